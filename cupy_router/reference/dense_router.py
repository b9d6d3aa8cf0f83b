# SPDX-License-Identifier: Apache-2.0
"""From hidden states to experts and weights: the gate product, then what ``activation_topk`` does."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from ..method import RoutingMethod
from .activation_topk import activation_topk
from .scoring import gate_logits


def dense_router(
    x: NDArray[Any],
    weight: NDArray[Any],
    method: RoutingMethod,
    bias: NDArray[np.float32] | None = None,
    *,
    logit_bias: NDArray[np.float32] | None = None,
    expert_scale: NDArray[np.float32] | None = None,
    num_valid: int | None = None,
) -> tuple[NDArray[Any], NDArray[Any]]:
    """Logits are the products of each token with each row of the gate, in float64, rounded once to float32.

    Args:
        x: [num_tokens, hidden] float32, float16 or bfloat16.
        weight: [num_experts, hidden] of those dtypes, the gate; further rows are shared experts' own.
        method: how to score, choose and weigh.
        bias, logit_bias, expert_scale: as for :func:`activation_topk`.
        num_valid: rows from this one on are padding; None means that there is none.

    Returns:
        weights and indices as :func:`activation_topk`.

    >>> x, gate = np.array([[1.0, 2.0]], np.float32), np.array([[3, 0], [0, 1], [0, 2]], np.float32)
    >>> dense_router(x, gate, RoutingMethod(3, 2, "identity", renormalize=False))
    (array([[4., 3.]], dtype=float32), array([[2, 0]], dtype=int32))
    """
    num_tokens = len(x)
    logits = np.zeros((num_tokens, len(weight)), np.float32)
    valid = num_tokens if num_valid is None else num_valid
    logits[:valid] = gate_logits(x[:valid], weight)
    return activation_topk(logits, method, bias, logit_bias=logit_bias, expert_scale=expert_scale, num_valid=valid)
