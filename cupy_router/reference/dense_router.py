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
    num_valid: int | None = None,
) -> tuple[NDArray[np.float32], NDArray[np.int32]]:
    """Logits are the products of each token with each row of the gate, in float64, rounded once to float32.

    Args:
        x: [num_tokens, hidden] float32, float16 or bfloat16.
        weight: [num_experts, hidden] of those dtypes, the gate.
        method: how to score and weigh.
        bias: [num_experts] float32, or None.
        num_valid: rows from this one on are padding; None means that there is none.

    Returns:
        weights [num_tokens, top_k] float32 and indices [num_tokens, top_k] int32, as :func:`activation_topk`.

    >>> x, gate = np.array([[1.0, 2.0]], np.float32), np.array([[3, 0], [0, 1], [0, 2]], np.float32)
    >>> dense_router(x, gate, RoutingMethod(3, 2, "identity", renormalize=False))
    (array([[4., 3.]], dtype=float32), array([[2, 0]], dtype=int32))
    """
    num_tokens = len(x)
    valid = num_tokens if num_valid is None else num_valid
    weights = np.zeros((num_tokens, method.top_k), np.float32)
    indices = np.full((num_tokens, method.top_k), -1, np.int32)
    weights[:valid], indices[:valid] = activation_topk(gate_logits(x[:valid], weight), method, bias)
    return weights, indices
