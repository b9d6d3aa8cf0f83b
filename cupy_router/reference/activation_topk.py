# SPDX-License-Identifier: Apache-2.0
"""Select experts from logits and compute their weights."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from ..method import RoutingMethod
from .given import given_ids, known_rows, unset_rows
from .groups import eligible_experts
from .order import row_slices, top_indices
from .scoring import append_shared_indices, empty_results, flush, prepare_logits, route_weights, score_logits


@np.errstate(all="ignore")
def activation_topk(
    logits: NDArray[Any],
    method: RoutingMethod,
    bias: NDArray[np.float32] | None = None,
    *,
    bias_index: NDArray[np.int32] | None = None,
    logit_bias: NDArray[np.float32] | None = None,
    expert_scale: NDArray[np.float32] | None = None,
    given_experts: NDArray[Any] | None = None,
    unset: str = "route",
    num_valid: int | None = None,
) -> tuple[NDArray[Any], NDArray[Any]]:
    """Score the logits, select the experts with the highest score plus bias, weight them by their score.

    The bias takes part in the selection only. Weights are gathered from the scores, because (score + bias) - bias would
    lose the low bits.

    Args:
        logits: [num_tokens, num_experts] float32, float16 or bfloat16. Further columns belong to shared experts.
        method: How to score, select and weight.
        bias: [num_experts] float32, or None. With `bias_index`, [num_biases, num_experts].
        bias_index: [num_tokens] int32, the bias of each token.
        logit_bias: [num_experts] float32 to add to the logits, or None.
        expert_scale: [num_experts] float32 factor of each expert's weight, or None.
        given_experts: [num_tokens, top_k], or with the columns of shared experts: the experts of each token, in place
            of a selection. A row with an id that is no expert has weights 0 and indices -1.
        unset: "route": experts are selected for a row of -1; "empty": it has weights 0 and indices -1.
        num_valid: Number of rows before the padding; None if there is no padding.

    Returns:
        weights and indices [num_tokens, top_k + shared experts], in the method's dtypes, ordered by selection value as
        in ``order.py``, or as given. Padding has weights 0 and indices -1, and so has a token whose bias does not exist
        where experts are selected by it.

    >>> logits = np.array([[2.0, 1.0, 1.0, 0.0]], np.float32)
    >>> activation_topk(logits, RoutingMethod(4, 2, "identity"), bias=np.array([0, 0, 0, 9], np.float32))
    (array([[0., 1.]], dtype=float32), array([[3, 0]], dtype=int32))
    >>> activation_topk(logits, RoutingMethod(4, 2, "identity"), given_experts=np.array([[2, 1]]))
    (array([[0.5, 0.5]], dtype=float32), array([[2, 1]], dtype=int32))
    """
    num_tokens, num_logits = logits.shape
    weights, indices = empty_results(num_tokens, method.num_columns, method)
    for rows in row_slices(num_tokens if num_valid is None else num_valid, num_logits):
        prepared = prepare_logits(logits[rows], method, logit_bias)
        biases, exist = biases_of_rows(bias, None if bias_index is None else bias_index[rows])
        selects = np.ones(len(prepared), bool)
        chosen = np.zeros((len(prepared), method.top_k), np.int64)
        if given_experts is not None:
            chosen = given_ids(given_experts[rows], method)
            selects = unset_rows(chosen) & (unset == "route")
        selection = selection_values(prepared[:, : method.num_experts], method, biases)[selects]
        chosen[selects] = top_indices(selection, method.top_k, eligible_experts(selection, method))
        known = known_rows(chosen, method) & (exist[:, 0] | ~selects)
        indices[rows][known] = append_shared_indices(chosen[known], method)
        weights[rows][known] = route_weights(prepared[known], chosen[known], method, expert_scale)
    return weights, indices


def biases_of_rows(
    bias: NDArray[np.float32] | None, bias_index: NDArray[np.int32] | None
) -> tuple[NDArray[np.float32] | None, NDArray[np.bool_]]:
    """Return the bias of all rows or of each row, and whether it exists, [num_rows or 1, 1].

    >>> biases_of_rows(np.array([[1.0], [2.0]], np.float32), np.array([1, 2]))[0]
    array([[2.],
           [1.]], dtype=float32)
    """
    if bias is None or bias_index is None:
        return bias, np.ones((1, 1), np.bool_)
    exist = (bias_index >= 0) & (bias_index < len(bias))
    return bias[np.where(exist, bias_index, 0)], exist[:, None]


def selection_values(
    logits: NDArray[np.float32], method: RoutingMethod, bias: NDArray[np.float32] | None
) -> NDArray[np.float32]:
    """Return the values that rank the experts: scores or logits, plus the bias, in float32."""
    values = logits if method.selects_on_logits else score_logits(logits, method)
    return values if bias is None else flush(values + flush(bias))
