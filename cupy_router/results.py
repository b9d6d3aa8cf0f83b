# SPDX-License-Identifier: Apache-2.0
"""Results of the ops: named tuples of arrays of the caller's framework."""

from __future__ import annotations

from typing import Any, NamedTuple


class Routing(NamedTuple):
    """Experts of each token and their weights.

    weights: [num_tokens, top_k (+ shared experts)] float32, or the method's weight_dtype.
    indices: Expert ids, of the same shape, int32 or the method's index_dtype. A row without a result (padding, bad
        token id) has -1 here and weights 0.
    """

    weights: Any
    indices: Any


class TopK(NamedTuple):
    """The k largest scores of each row, best first.

    values: [num_rows, k] in the dtype of the scores, bit copies of the inputs; -inf where a row has fewer than k. None
        with ``return_values=False``.
    indices: [num_rows, k] int32, columns counted from the row's start; -1 where a row has fewer than k.
    """

    values: Any
    indices: Any
