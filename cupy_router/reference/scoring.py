# SPDX-License-Identifier: Apache-2.0
"""Compute logits from a gate, scores from logits, and weights from the scores of the selected experts.

Subnormal float32 results become 0, as in the kernels, which are compiled with flush-to-zero.
"""

from __future__ import annotations

from collections.abc import Callable
from itertools import pairwise
from typing import Any

import ml_dtypes  # noqa: F401  # gives NumPy the dtype "bfloat16"
import numpy as np
from numpy.typing import NDArray

from ..method import RoutingMethod
from ..method_fields import FLOAT32_TINY
from ..score_function import ScoreFunction
from .order import row_slices

_PARTS, _STEP = 16, 32  # of hidden, where the order of sums is fixed

Float64 = NDArray[np.float64]
Float32 = NDArray[np.float32]


def flush(values: Float32) -> Float32:
    """Return the values with subnormals replaced by 0."""
    return np.where(np.abs(values) < np.float32(FLOAT32_TINY), np.float32(0), values)


def gate_logits(x: NDArray[Any], weight: NDArray[Any]) -> Float32:
    """Return the float32 logits [num_tokens, num_experts] of x [num_tokens, hidden] and a gate [num_experts, hidden].

    The products are accumulated in float64 and rounded once.

    >>> gate_logits(np.array([[1.0, 2.0]], np.float32), np.array([[3.0, 0.5], [0.0, 1.0]], np.float32))
    array([[4., 2.]], dtype=float32)
    """
    gate = weight.astype(np.float64).T
    logits = np.empty((len(x), len(weight)), np.float32)
    for rows in row_slices(*x.shape):
        logits[rows] = x[rows].astype(np.float64) @ gate
    return logits


def gate_logits_by_parts(x: NDArray[Any], weight: NDArray[Any]) -> Float32:
    """Return the logits of :func:`gate_logits`, each the same to the bit in any batch.

    Hidden is divided into 16 parts of whole steps of 32 columns. A part is summed in float64 and rounded. Pairs of
    neighbours are added in float32, and then their sums in order. NumPy's matrix product is of no use here: it sums in
    another order for another number of rows.

    >>> gate_logits_by_parts(np.array([[1.0, 2.0]], np.float32), np.array([[3.0, 0.5], [0.0, 1.0]], np.float32))
    array([[4., 2.]], dtype=float32)
    """
    hidden = x.shape[1]
    steps = -(-hidden // _STEP)
    bounds = [min(part * steps // _PARTS * _STEP, hidden) for part in range(_PARTS + 1)]
    logits = np.empty((len(x), len(weight)), np.float32)
    for rows in row_slices(len(x), len(weight) * max(1, *np.diff(bounds))):
        sums = np.zeros((_PARTS, len(x[rows]), len(weight)), np.float32)
        for part, (begin, end) in enumerate(pairwise(bounds)):
            gate = weight[:, begin:end].astype(np.float64)
            sums[part] = (x[rows, None, begin:end].astype(np.float64) * gate).sum(-1)
        total, *others = sums[0::2] + sums[1::2]
        for more in others:
            total = total + more
        logits[rows] = total
    return logits


def prepare_logits(logits: NDArray[Any], method: RoutingMethod, logit_bias: Float32 | None = None) -> Float32:
    """Add the bias to the logits, scale and cap them, each step in float32.

    >>> prepare_logits(np.array([[1.0, 50.0]]), RoutingMethod(2, 1, logit_scale=2.0, logit_softcap=30.0))
    array([[ 1.9970423, 29.923738 ]], dtype=float32)
    """
    return cap_logits(scale_logits(logits, method, logit_bias), method)


def bias_logits(logits: NDArray[Any], logit_bias: Float32 | None = None) -> Float32:
    """Add the bias to the logits, if there is one."""
    biased = flush(logits.astype(np.float32))
    if logit_bias is not None:
        num_shared = biased.shape[-1] - len(logit_bias)  # shared experts have no bias
        biased = flush(biased + np.pad(flush(logit_bias), (0, num_shared)))
    return biased


def scale_logits(logits: NDArray[Any], method: RoutingMethod, logit_bias: Float32 | None = None) -> Float32:
    """Add the bias to the logits, then scale them."""
    scaled = bias_logits(logits, logit_bias)
    if method.logit_scale != 1.0:
        scaled = flush(scaled * np.float32(method.logit_scale))
    return scaled


def cap_logits(scaled: Float32, method: RoutingMethod) -> Float32:
    """Apply the soft cap to the scaled logits, if there is one."""
    if method.logit_softcap is None:
        return scaled
    cap = float(np.float32(method.logit_softcap))
    return flush((cap * np.tanh(scaled.astype(np.float64) / cap)).astype(np.float32))


def score_logits(logits: Float32, method: RoutingMethod) -> Float32:
    """Return the score of each logit, [num_tokens, any number of columns]. Softmax is over these columns.

    >>> score_logits(np.array([[0.0, np.log(3.0)]]), RoutingMethod(2, 1, "softmax"))
    array([[0.25, 0.75]], dtype=float32)
    """
    wide = logits.astype(np.float64)
    scores = SCORE_FUNCTIONS[method.score](wide) if isinstance(method.score, str) else custom_score(method.score, wide)
    return flush(scores.astype(np.float32))


def custom_score(score: ScoreFunction, x: Float64) -> Float64:
    """Apply the caller's function to x; ValueError if it returns another shape, TypeError if complex numbers."""
    scores = np.asarray(score.numpy(x))
    if np.iscomplexobj(scores):
        raise TypeError(f"{score!r} made complex numbers, but must make real ones")
    if scores.shape != x.shape:
        raise ValueError(f"{score!r} made shape {scores.shape} of an array of shape {x.shape}")
    return scores


def route_weights(
    logits: Float32, experts: NDArray[Any], method: RoutingMethod, expert_scale: Float32 | None = None
) -> NDArray[Any]:
    """Return the weights [num_tokens, top_k + shared] of experts [num_tokens, top_k], from prepared logits.

    Weights are float32 and rounded to the method's dtype at the end.

    >>> route_weights(np.array([[0.0, 9.0, 0.0]], np.float32), np.array([[0, 2]]), RoutingMethod(3, 2, scale=4.0))
    array([[2., 2.]], dtype=float32)
    """
    routed = logits[:, : method.num_experts]
    if method.shared_in_normalizer:
        chosen = np.concatenate(
            [np.take_along_axis(routed, experts, axis=-1), logits[:, method.num_experts :]], axis=-1
        )
        weights = flush((softmax(log_sigmoid(chosen.astype(np.float64))) * method.scale).astype(np.float32))
        weights = _scale_experts(weights, experts, expert_scale)
    else:
        if method.score_after_topk:
            scores = score_logits(np.take_along_axis(routed, experts, axis=-1), method)
        else:
            scores = np.take_along_axis(score_logits(routed, method), experts, axis=-1)
        weights = append_shared(_scale_experts(renormalize_and_scale(scores, method), experts, expert_scale), method)
    return weights.astype(method.weight_dtype)


def empty_results(num_tokens: int, num_columns: int, method: RoutingMethod | None) -> tuple[NDArray[Any], NDArray[Any]]:
    """Return weights 0 and indices -1, or the highest value of unsigned ones, in the method's dtypes."""
    weight_dtype, index_dtype = (method.weight_dtype, method.index_dtype) if method else ("float32", "int32")
    shape = (num_tokens, num_columns)
    return np.zeros(shape, np.dtype(weight_dtype)), np.full(shape, -1).astype(index_dtype)


def append_shared(weights: Float32, method: RoutingMethod) -> Float32:
    """Append the weights of shared experts that have no logits."""
    shape = (len(weights), method.num_columns - weights.shape[-1])
    return np.concatenate([weights, np.full(shape, method.shared_weight, np.float32)], axis=-1)


def append_shared_indices(experts: NDArray[Any], method: RoutingMethod) -> NDArray[Any]:
    """Append the indices of the shared experts, in the method's dtype."""
    ids = np.arange(method.num_experts, method.num_experts + method.num_shared_experts)
    shared = np.broadcast_to(ids, (len(experts), len(ids)))
    return np.concatenate([experts, shared], axis=-1).astype(method.index_dtype)


def renormalize_and_scale(scores: Float32, method: RoutingMethod) -> Float32:
    """Renormalise and scale the scores [num_tokens, top_k] of each token's experts.

    Renormalising divides by the sum, with three rules. The sum leaves NaN out, so that one NaN does not spoil the other
    weights. A divisor of 0 gives weights 0, or NaN for infinite scores. Where a score is +inf, infinite scores get
    weight NaN and finite ones 0.

    >>> renormalize_and_scale(np.array([[1.0, 3.0]], np.float32), RoutingMethod(8, 2, scale=2.0))
    array([[0.5, 1.5]], dtype=float32)
    """
    weights = scores.astype(np.float64)
    if method.renormalize:
        total, divisor = normaliser(weights, method)
        is_zero = (total == 0.0) | (divisor == 0.0)
        weights = np.where(is_zero, weights * 0.0, weights / divisor)  # NaN * 0 stays NaN
    return flush((weights * method.scale).astype(np.float32))


def normaliser(scores: Float64, method: RoutingMethod) -> tuple[Float64, Float64]:
    """Return the sum of each token's scores that are not NaN, and the divisor, both [num_tokens, 1]."""
    total = np.nansum(scores, axis=-1, keepdims=True)
    total[np.isnan(total)] = np.inf  # the sum of +inf and -inf
    if method.renormalize_min is not None:
        return total, np.maximum(total, method.renormalize_min)
    return total, total + method.renormalize_eps


def _scale_experts(weights: Float32, experts: NDArray[Any], expert_scale: Float32 | None) -> Float32:
    """Multiply the weights of the selected experts by the factor of each expert."""
    if expert_scale is not None:
        weights[:, : experts.shape[-1]] *= flush(expert_scale)[experts]
    return flush(weights)


def log_sigmoid(x: Float64) -> Float64:
    logs: Float64 = np.minimum(x, 0.0) - np.log1p(np.exp(-np.abs(x)))
    return logs


def _sqrtsoftplus(x: Float64) -> Float64:
    """Return sqrt(log(1 + exp(x))), without overflow for large x or rounding 1 + exp(x) to 1 for small x."""
    scores: Float64 = np.sqrt(np.maximum(x, 0.0) + np.log1p(np.exp(-np.abs(x))))
    return scores


def sigmoid(x: Float64) -> Float64:
    return 1.0 / (1.0 + np.exp(-x))


def softmax(x: Float64) -> Float64:
    """Return exp(x) divided by its sum, shifted by the maximum so that exp cannot overflow.

    The maximum gets exp(0) = 1 even where it is infinite. Maximum and sum leave NaN out.
    """
    highest = np.fmax.reduce(x, axis=-1, keepdims=True)
    share: Float64 = np.where(x == highest, 1.0, np.exp(x - highest))
    shares: Float64 = share / np.nansum(share, axis=-1, keepdims=True)
    return shares


def _identity(x: Float64) -> Float64:
    return x


SCORE_FUNCTIONS: dict[str, Callable[[Float64], Float64]] = {
    "sqrtsoftplus": _sqrtsoftplus,
    "sigmoid": sigmoid,
    "softmax": softmax,
    "identity": _identity,
}
