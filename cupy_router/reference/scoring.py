# SPDX-License-Identifier: Apache-2.0
"""Logits of a gate, scores of logits, and weights from the scores of the chosen experts.

The float32 results never hold a subnormal: it becomes 0, as in the kernels, which are compiled with flush-to-zero.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ..method import FLOAT32_TINY, RoutingMethod
from .order import row_slices

Float64 = NDArray[np.float64]
Float32 = NDArray[np.float32]


def flush(values: Float32) -> Float32:
    """The values, subnormals as 0."""
    return np.where(np.abs(values) < np.float32(FLOAT32_TINY), np.float32(0), values)


def gate_logits(x: NDArray[Any], weight: NDArray[Any]) -> Float32:
    """The logits [num_tokens, num_experts] of x [num_tokens, hidden] under a gate [num_experts, hidden], in float32.

    >>> gate_logits(np.array([[1.0, 2.0]], np.float32), np.array([[3.0, 0.5], [0.0, 1.0]], np.float32))
    array([[4., 2.]], dtype=float32)
    """
    gate = weight.astype(np.float64).T
    logits = np.empty((len(x), len(weight)), np.float32)
    with np.errstate(all="ignore"):  # infinities and NaN are ordinary inputs, here and below
        for rows in row_slices(*x.shape):
            logits[rows] = x[rows].astype(np.float64) @ gate
    return logits


def score_logits(logits: NDArray[Any], method: RoutingMethod) -> Float32:
    """The score of each logit: [num_tokens, num_experts] of any float dtype in, float32 out.

    >>> score_logits(np.array([[0.0, np.log(3.0)]]), RoutingMethod(2, 1, "softmax"))
    array([[0.25, 0.75]], dtype=float32)
    """
    with np.errstate(all="ignore"):
        return flush(SCORE_FUNCTIONS[method.score](logits.astype(np.float64)).astype(np.float32))


def weigh(scores: Float32, method: RoutingMethod) -> Float32:
    """Weights from the scores [num_tokens, top_k] of each token's experts: renormalised, then scaled.

    Renormalising divides by the sum, under three rules: it leaves out NaN, so that one NaN does not spoil its
    neighbours; a sum of 0 gives weights 0; where a score is +inf, infinite scores weigh NaN and finite ones 0.

    >>> weigh(np.array([[1.0, 3.0]], np.float32), RoutingMethod(8, 2, scale=2.0))
    array([[0.5, 1.5]], dtype=float32)
    """
    weights = scores.astype(np.float64)
    with np.errstate(all="ignore"):
        if method.renormalize:
            total = np.nansum(weights, axis=-1, keepdims=True)
            total[np.isnan(total)] = np.inf  # +inf met -inf
            divisor = total + method.renormalize_eps
            if method.renormalize_min is not None:
                divisor = np.maximum(total, method.renormalize_min)
            nothing = (total == 0.0) | (divisor == 0.0)
            weights = np.where(nothing, weights * 0.0, weights / divisor)  # NaN * 0 stays NaN
        return flush((weights * method.scale).astype(np.float32))


def _sqrtsoftplus(x: Float64) -> Float64:
    """sqrt(log(1 + exp(x))), without overflow for large x and without rounding 1 + exp(x) to 1 for small x."""
    scores: Float64 = np.sqrt(np.maximum(x, 0.0) + np.log1p(np.exp(-np.abs(x))))
    return scores


def _sigmoid(x: Float64) -> Float64:
    return 1.0 / (1.0 + np.exp(-x))


def _softmax(x: Float64) -> Float64:
    """exp(x) over its sum. Shifting by the maximum changes nothing but keeps exp from overflowing.

    The maximum itself gets exp(0) = 1 even where it is infinite, and NaN takes part in neither maximum nor sum.
    """
    highest = np.fmax.reduce(x, axis=-1, keepdims=True)
    share: Float64 = np.where(x == highest, 1.0, np.exp(x - highest))
    shares: Float64 = share / np.nansum(share, axis=-1, keepdims=True)
    return shares


def _identity(x: Float64) -> Float64:
    return x


SCORE_FUNCTIONS: dict[str, Callable[[Float64], Float64]] = {
    "sqrtsoftplus": _sqrtsoftplus,
    "sigmoid": _sigmoid,
    "softmax": _softmax,
    "identity": _identity,
}
