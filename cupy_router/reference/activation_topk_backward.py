# SPDX-License-Identifier: Apache-2.0
"""Compute the gradient with respect to the logits from that of the weights: ``activation_topk`` backwards.

The selection is constant almost everywhere, so the indices and a bias that only selects have no gradient. The weights
of a token's selected experts depend on its logits by

    scaled = (logit + logit_bias) * logit_scale
    x      = cap * tanh(scaled / cap)                  dx / d scaled = 1 / cosh(scaled / cap)^2
    s      = score(x)                                  ds / dx: see SCORE_DERIVATIVES
    u      = s / D,  D = S + eps or max(S, min)        S: the sum of s over the selected experts
    weight = u * scale * expert_scale

Let g be the gradient of a loss L with respect to the weights. Then h = g * scale * expert_scale is the gradient with
respect to u. Let H be the sum of h u over the selected experts. Each s occurs in one numerator and in the D of all. The
derivative D' of D with respect to S is 1, or 0 where the sum is clamped. Without renormalisation D = 1 and D' = 0. So

    dL / ds_i = (h_i - D' H) / D
    dL / dx_i = dL / ds_i * s'(x_i)

For a softmax, every s_i depends on every x_j, ds_i / dx_j = s_i ((i == j) - s_j), and so

    dL / dx_j = s_j (dL / ds_j - A),  A = sum of s_i dL / ds_i = H (D - D' S) / D

where dL / ds_j is 0 unless j is selected. If D is the plain sum, A is 0: the weights are a softmax of the selected
logits alone.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ..method import RoutingMethod
from .order import row_slices
from .scoring import (
    SCORE_FUNCTIONS,
    Float32,
    Float64,
    cap_logits,
    custom_score,
    flush,
    log_sigmoid,
    normaliser,
    scale_logits,
    score_logits,
    sigmoid,
    softmax,
)


@np.errstate(all="ignore")
def activation_topk_backward(
    grad_weights: NDArray[Any],
    indices: NDArray[Any],
    logits: NDArray[Any],
    method: RoutingMethod,
    *,
    logit_bias: Float32 | None = None,
    expert_scale: Float32 | None = None,
    dtype: str | None = None,
) -> NDArray[Any]:
    """Return the gradient of a loss with respect to the logits, given that with respect to the weights.

    Rounding the weights to a 16-bit dtype has derivative 1. An expert with weight NaN gets gradient NaN and does not
    affect the others. Where the sum of scores is 0, weights and gradients are 0.

    Args:
        grad_weights: [num_tokens, top_k + shared experts], in the method's ``weight_dtype``. Columns of shared experts
            with a fixed weight are ignored.
        indices: Experts from the forward pass, of the same shape. A token with an expert that does not exist (-1 in
            padding) gets gradient 0.
        logits: [num_tokens, num_experts] float32, float16 or bfloat16. Further columns belong to shared experts.
        method: As in the forward pass.
        logit_bias, expert_scale: As in the forward pass.
        dtype: Dtype of the result, by default that of the logits.

    Returns:
        [num_tokens, columns of the logits], 0 where the weights do not depend on a logit. Summed over the tokens it is
        the gradient with respect to ``logit_bias``.

    >>> grad_weights = np.array([[1.0, 0.0]], np.float32)  # the loss is the first weight
    >>> logits, indices = np.array([[2.0, 1.0, 0.0]], np.float32), np.array([[0, 2]], np.int32)
    >>> activation_topk_backward(grad_weights, indices, logits, RoutingMethod(3, 2, "sigmoid", renormalize=False))
    array([[0.10499358, 0.        , 0.        ]], dtype=float32)
    """
    num_tokens, num_logits = logits.shape
    grad_logits = np.zeros((num_tokens, num_logits), np.dtype(dtype or logits.dtype))
    experts = indices[:, : method.top_k]
    routed = np.nonzero(((experts >= 0) & (experts < method.num_experts)).all(axis=-1))[0]
    for rows in row_slices(len(routed), num_logits):
        tokens = routed[rows]
        columns = _weight_columns(experts[tokens], method)
        scaled = scale_logits(logits[tokens], method, logit_bias)
        gradients = grad_weights[tokens, : columns.shape[-1]].astype(np.float64) * method.scale
        if expert_scale is not None:
            gradients[:, : method.top_k] *= flush(expert_scale)[experts[tokens]]
        gradients = _prepared_logits_gradient(gradients, columns, cap_logits(scaled, method), method)
        gradients *= _softcap_derivative(scaled, method) * method.logit_scale
        grad_logits[tokens] = flush(gradients.astype(np.float32))
    return grad_logits


def _weight_columns(experts: NDArray[Any], method: RoutingMethod) -> NDArray[np.int64]:
    """Return the logit column of each weight: selected experts, then shared experts with logits."""
    ids = np.arange(method.num_experts, method.num_logits)
    shared = np.broadcast_to(ids, (len(experts), len(ids)))
    return np.concatenate([experts.astype(np.int64), shared], axis=-1)


def _prepared_logits_gradient(
    h: Float64, columns: NDArray[np.int64], prepared: Float32, method: RoutingMethod
) -> Float64:
    """Return dL / dx of all columns of the logits, [num_tokens, num_logits], from dL / du of the given columns."""
    x = np.take_along_axis(prepared, columns, axis=-1)
    gradients = np.zeros(prepared.shape)
    if method.shared_in_normalizer:
        # u is a softmax of log(sigmoid(x)), whose derivative is sigmoid(-x).
        wide = x.astype(np.float64)
        u = softmax(log_sigmoid(wide))
        grad_x = u * (h - _dot(h, u)) * sigmoid(-wide)
    else:
        whole_row = method.score == "softmax" and not method.score_after_topk
        scores = score_logits(prepared[:, : method.num_experts] if whole_row else x, method).astype(np.float64)
        s = np.take_along_axis(scores, columns, axis=-1) if whole_row else scores
        total, divisor, divisor_derivative = _divisor(s, method)
        is_zero = (total == 0.0) | (divisor == 0.0)
        u = np.where(is_zero, s * 0.0, s / divisor)
        mean = _dot(h, u)
        # No product, which would turn an infinite mean into NaN.
        from_divisor = np.where(divisor_derivative == 0.0, 0.0, mean)
        if method.score == "softmax":
            softmax_term = np.where(is_zero, 0.0, mean * (divisor - divisor_derivative * total) / divisor)
            grad_x = u * (h - from_divisor)
            if whole_row:
                gradients = 0.0 - softmax_term * np.nan_to_num(scores, nan=0.0)  # the sum leaves NaN out
            else:
                grad_x -= s * softmax_term
        else:
            grad_s = np.where(is_zero, 0.0, (h - from_divisor) / divisor)
            grad_x = grad_s * _score_derivative(x.astype(np.float64), method)
    grad_x[np.isnan(u)] = np.nan
    np.add.at(gradients, (np.arange(len(columns))[:, None], columns), grad_x)  # a table may repeat an expert
    return gradients


def _dot(h: Float64, u: Float64) -> Float64:
    """Return the sum of h u over a token's experts, leaving out those with weight NaN, [num_tokens, 1]."""
    products: Float64 = np.where(np.isnan(u), 0.0, h * u).sum(axis=-1, keepdims=True)
    return products


def _divisor(s: Float64, method: RoutingMethod) -> tuple[Float64, Float64, Float64]:
    """Return S, D and D' of the module's docstring, each [num_tokens, 1]."""
    one = np.ones((len(s), 1))
    if not method.renormalize:
        return one, one, one * 0.0
    total, divisor = normaliser(s, method)
    clamped = np.zeros_like(total) if method.renormalize_min is None else total < method.renormalize_min
    return total, divisor, np.where(clamped, 0.0, 1.0)


def _softcap_derivative(scaled: Float32, method: RoutingMethod) -> Float64 | float:
    if method.logit_softcap is None:
        return 1.0
    derivative = np.cosh(scaled.astype(np.float64) / np.float32(method.logit_softcap)) ** -2.0
    return np.where(np.isnan(derivative), 1.0, derivative)  # so that a NaN that is not selected has gradient 0


def _score_derivative(x: Float64, method: RoutingMethod) -> Float64:
    if isinstance(method.score, str):
        return SCORE_DERIVATIVES[method.score](x)
    derivative = method.score.derivative
    assert derivative is not None, "checked by the op"
    return custom_score(derivative, x)


def _sqrtsoftplus_derivative(x: Float64) -> Float64:
    """Return sigmoid(x) / (2 * score(x)), or its limit exp(x / 2) / 2 far below 0, where the quotient is 0 / 0."""
    derivative = sigmoid(x) / (2.0 * SCORE_FUNCTIONS["sqrtsoftplus"](x))
    return np.where(x < -40.0, 0.5 * np.exp(0.5 * x), derivative)


def _sigmoid_derivative(x: Float64) -> Float64:
    return sigmoid(x) * sigmoid(-x)


SCORE_DERIVATIVES: dict[str, Callable[[Float64], Float64]] = {
    "sqrtsoftplus": _sqrtsoftplus_derivative,
    "sigmoid": _sigmoid_derivative,
    "identity": np.ones_like,
}
