# SPDX-License-Identifier: Apache-2.0
"""From logits to experts and weights."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from ..method import RoutingMethod
from .order import row_slices, top_indices
from .scoring import flush, score_logits, weigh


def activation_topk(
    logits: NDArray[Any],
    method: RoutingMethod,
    bias: NDArray[np.float32] | None = None,
    num_valid: int | None = None,
) -> tuple[NDArray[np.float32], NDArray[np.int32]]:
    """Score the logits, choose the experts with the best score plus bias, weigh them by their score.

    The bias only selects, it never weighs: the weights come from the scores themselves, gathered, because biased minus
    bias would have lost their low bits.

    Args:
        logits: [num_tokens, num_experts] float32, float16 or bfloat16.
        method: how to score and weigh.
        bias: [num_experts] float32, or None.
        num_valid: rows from this one on are padding; None means that there is none.

    Returns:
        weights [num_tokens, top_k] float32 and indices [num_tokens, top_k] int32, in the order of ``order.py`` of the
        selection values; 0 and -1 in padding.

    >>> logits = np.array([[2.0, 1.0, 1.0, 0.0]], np.float32)
    >>> activation_topk(logits, RoutingMethod(4, 2, "identity"), bias=np.array([0, 0, 0, 9], np.float32))
    (array([[0., 1.]], dtype=float32), array([[3, 0]], dtype=int32))
    """
    num_tokens, num_experts = logits.shape
    weights = np.zeros((num_tokens, method.top_k), np.float32)
    indices = np.full((num_tokens, method.top_k), -1, np.int32)
    for rows in row_slices(num_tokens if num_valid is None else num_valid, num_experts):
        scores = score_logits(logits[rows], method)
        selection = scores
        if bias is not None:
            with np.errstate(all="ignore"):
                selection = flush(scores + flush(bias))  # in float32, as the order is defined on it
        chosen = top_indices(selection, method.top_k)
        indices[rows] = chosen
        weights[rows] = weigh(np.take_along_axis(scores, chosen, axis=-1), method)
    return weights, indices
