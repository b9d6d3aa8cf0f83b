# SPDX-License-Identifier: Apache-2.0
"""What the ops return: named tuples of arrays in the caller's framework."""

from __future__ import annotations

from typing import Any, NamedTuple


class Routing(NamedTuple):
    """Which experts process each token, and with what weights.

    weights: [num_tokens, top_k (+ shared experts)] float32, or the method's weight_dtype.
    indices: the same shape, int32, or the method's index_dtype: expert ids; -1 marks a row without a result (padding,
        bad token id).
    """

    weights: Any
    indices: Any


class TopK(NamedTuple):
    """The k largest scores of each row, best first.

    values: [num_rows, k], dtype of the scores, bit copies of the inputs; -inf where a row holds fewer than k. None if
        they were not asked for.
    indices: [num_rows, k] int32, columns counted from the row's start; -1 where a row holds fewer than k.
    """

    values: Any
    indices: Any
