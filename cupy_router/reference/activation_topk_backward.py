# SPDX-License-Identifier: Apache-2.0
"""From the gradient of the weights to that of the logits: the steps of ``activation_topk`` backwards.

Which experts are chosen is constant almost everywhere, so indices have no gradient, and a bias, which only selects, has
none either. Of a token, the weights of the chosen experts depend on its logits by

    scaled = (logit + logit_bias) * logit_scale
    x      = cap * tanh(scaled / cap)                  dx / d scaled = 1 / cosh(scaled / cap)^2
    s      = score(x)                                  ds / dx: see SLOPES
    u      = s / D,  D = S + eps or max(S, min)        S: the sum of s over the chosen
    weight = u * scale * expert_scale

Let g be the gradient of a loss L by the weights, h = g * scale * expert_scale that by the u, and H the sum of h u over
the chosen. Each s stands in its own numerator and in the D of all, whose derivative by S is D' = 1, or 0 where the
sum is clamped; without renormalisation D = 1 and D' = 0. So

    dL / ds_i = (h_i - D' H) / D
    dL / dx_i = dL / ds_i * s'(x_i)

but for a softmax, in which every x_j takes part in every s_i, ds_i / dx_j = s_i ((i == j) - s_j):

    dL / dx_j = s_j (dL / ds_j - A),  A = sum of s_i dL / ds_i = H (D - D' S) / D

where dL / ds_j is 0 unless j is chosen. With a plain sum for D, A is 0: such weights are a softmax of the chosen alone.
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
    flush,
    log_sigmoid,
    normaliser,
    own_score,
    scale_logits,
    score_logits,
    sigmoid,
    softmax,
)


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
    """The gradient of a loss by the logits, given that by the weights of the experts that were chosen.

    The rounding of weights to a 16-bit dtype counts as no step: its gradient is 1. An expert whose weight is NaN has
    gradient NaN and leaves that of the others alone. Where the sum of scores is 0, weights are 0 and so are gradients.

    Args:
        grad_weights: [num_tokens, top_k + shared experts], in the method's ``weight_dtype``; what it has for shared
            experts of fixed weight does not matter.
        indices: of the same shape, int32 or int64, as the forward pass gave them, by choice or by a table. A token
            whose experts do not all exist (-1 in padding) gets gradient 0.
        logits: [num_tokens, num_experts] float32, float16 or bfloat16; further columns are shared experts' own.
        method: as in the forward pass.
        logit_bias, expert_scale: as in the forward pass.
        dtype: of the result, that of the logits by default.

    Returns:
        [num_tokens, columns of the logits], 0 where a logit has no part in the weights. Summed over the tokens it is
        the gradient by ``logit_bias``.

    >>> weights_up = np.array([[1.0, 0.0]], np.float32)  # the loss is the first weight
    >>> logits, chosen = np.array([[2.0, 1.0, 0.0]], np.float32), np.array([[0, 2]], np.int32)
    >>> activation_topk_backward(weights_up, chosen, logits, RoutingMethod(3, 2, "sigmoid", renormalize=False))
    array([[0.10499358, 0.        , 0.        ]], dtype=float32)
    """
    num_tokens, num_logits = logits.shape
    grad_logits = np.zeros((num_tokens, num_logits), np.dtype(dtype or logits.dtype))
    experts = indices[:, : method.top_k]
    routed = np.nonzero(((experts >= 0) & (experts < method.num_experts)).all(axis=-1))[0]
    for rows in row_slices(len(routed), num_logits):
        tokens = routed[rows]
        columns = _weighed_columns(experts[tokens], method)
        scaled = scale_logits(logits[tokens], method, logit_bias)
        with np.errstate(all="ignore"):
            gradients = grad_weights[tokens, : columns.shape[-1]].astype(np.float64) * method.scale
            if expert_scale is not None:
                gradients[:, : method.top_k] *= flush(expert_scale)[experts[tokens]]
            gradients = _by_prepared_logits(gradients, columns, cap_logits(scaled, method), method)
            gradients *= _cap_slope(scaled, method) * method.logit_scale
            grad_logits[tokens] = flush(gradients.astype(np.float32))
    return grad_logits


def _weighed_columns(experts: NDArray[Any], method: RoutingMethod) -> NDArray[np.int64]:
    """The columns of the logits that the weights are made of: of chosen experts, then of shared ones with logits."""
    shared = np.arange(method.num_experts, method.num_logits)
    behind = np.broadcast_to(shared, (len(experts), len(shared)))
    return np.concatenate([experts.astype(np.int64), behind], axis=-1)


def _by_prepared_logits(h: Float64, columns: NDArray[np.int64], prepared: Float32, method: RoutingMethod) -> Float64:
    """dL / dx for all columns of the logits, [num_tokens, num_logits], from dL / du of the weighed ones."""
    x = np.take_along_axis(prepared, columns, axis=-1)
    gradients = np.zeros(prepared.shape)
    if method.shared_in_normalizer:
        # u is a softmax of log(sigmoid(x)), whose derivative is sigmoid(-x).
        wide = x.astype(np.float64)
        u = softmax(log_sigmoid(wide))
        by_x = u * (h - _dot(h, u)) * sigmoid(-wide)
    else:
        whole_row = method.score == "softmax" and not method.score_after_topk
        scores = score_logits(prepared[:, : method.num_experts] if whole_row else x, method).astype(np.float64)
        s = np.take_along_axis(scores, columns, axis=-1) if whole_row else scores
        total, divisor, slope = _divisor(s, method)
        nothing = (total == 0.0) | (divisor == 0.0)
        u = np.where(nothing, s * 0.0, s / divisor)
        mean = _dot(h, u)
        shared = np.where(slope == 0.0, 0.0, mean)  # not a product, in which an infinite mean would become NaN
        if method.score == "softmax":
            drain = np.where(nothing, 0.0, mean * (divisor - slope * total) / divisor)
            by_x = u * (h - shared)
            if whole_row:
                gradients = 0.0 - drain * np.nan_to_num(scores, nan=0.0)  # the sum left NaN out
            else:
                by_x -= s * drain
        else:
            by_s = np.where(nothing, 0.0, (h - shared) / divisor)
            by_x = by_s * _slope(x.astype(np.float64), method)
    by_x[np.isnan(u)] = np.nan
    np.add.at(gradients, (np.arange(len(columns))[:, None], columns), by_x)  # a table may repeat an expert
    return gradients


def _dot(h: Float64, u: Float64) -> Float64:
    """The sum of h u over a token's experts, without those whose weight is NaN: [num_tokens, 1]."""
    products: Float64 = np.where(np.isnan(u), 0.0, h * u).sum(axis=-1, keepdims=True)
    return products


def _divisor(s: Float64, method: RoutingMethod) -> tuple[Float64, Float64, Float64]:
    """S, D and D' of the text above, each [num_tokens, 1]."""
    one = np.ones((len(s), 1))
    if not method.renormalize:
        return one, one, one * 0.0
    total, divisor = normaliser(s, method)
    clamped = np.zeros_like(total) if method.renormalize_min is None else total < method.renormalize_min
    return total, divisor, np.where(clamped, 0.0, 1.0)


def _cap_slope(scaled: Float32, method: RoutingMethod) -> Float64 | float:
    if method.logit_softcap is None:
        return 1.0
    slope = np.cosh(scaled.astype(np.float64) / np.float32(method.logit_softcap)) ** -2.0
    return np.where(np.isnan(slope), 1.0, slope)  # a NaN that is not chosen has gradient 0


def _slope(x: Float64, method: RoutingMethod) -> Float64:
    if isinstance(method.score, str):
        return SLOPES[method.score](x)
    derivative = method.score.derivative
    assert derivative is not None, "the op asks for it"
    return own_score(derivative, x)


def _sqrtsoftplus_slope(x: Float64) -> Float64:
    """sigmoid(x) / (2 y). Far below 0 that tends to exp(x / 2) / 2, long after both parts of the quotient are 0."""
    slope = sigmoid(x) / (2.0 * SCORE_FUNCTIONS["sqrtsoftplus"](x))
    return np.where(x < -40.0, 0.5 * np.exp(0.5 * x), slope)


def _sigmoid_slope(x: Float64) -> Float64:
    return sigmoid(x) * sigmoid(-x)


SLOPES: dict[str, Callable[[Float64], Float64]] = {
    "sqrtsoftplus": _sqrtsoftplus_slope,
    "sigmoid": _sigmoid_slope,
    "identity": np.ones_like,
}
