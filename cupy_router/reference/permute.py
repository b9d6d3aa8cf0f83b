# SPDX-License-Identifier: Apache-2.0
"""Copy the row of each token to the rows of its pairs, in order of experts."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from ..method_fields import FLOAT32_TINY


@np.errstate(all="ignore")
def permute(x: NDArray[Any], order: NDArray[np.int32], top_k: int, weights: NDArray[Any] | None = None) -> NDArray[Any]:
    """Return [capacity, hidden] in the dtype of x: the token of each row, times the weight of its pair.

    Args:
        x: [num_tokens, hidden].
        order: [capacity], the pair of each row, token * top_k + slot. Rows of any other number are 0.
        top_k: Number of pairs of a token.
        weights: [num_tokens, top_k] floats, or None. The product is float32, rounded once.

    >>> permute(np.array([[1.0], [2.0]], np.float32), np.array([3, -1, 0], np.int32), 2)
    array([[2.],
           [0.],
           [1.]], dtype=float32)
    """
    rows = np.zeros((len(order), x.shape[1]), x.dtype)
    used = np.flatnonzero((order >= 0) & (order < len(x) * top_k))
    pairs = order[used]
    found = x[pairs // top_k]
    if weights is not None:
        factors = weights.reshape(-1)[pairs, None].astype(np.float32)
        found = _flush(_flush(found.astype(np.float32)) * _flush(factors)).astype(x.dtype)
    rows[used] = found
    return rows


@np.errstate(all="ignore")
def row_dots(a: NDArray[Any], b: NDArray[Any], positions: NDArray[np.int32]) -> NDArray[np.float32]:
    """Return [num_tokens, top_k] float32: the dot product of each row of a with the rows of b at its positions.

    A position outside of b gives 0.
    """
    dots = np.zeros(positions.shape, np.float32)
    tokens, slots = np.nonzero((positions >= 0) & (positions < len(b)))
    for i, slot in zip(tokens, slots, strict=True):
        dots[i, slot] = np.dot(a[i].astype(np.float64), b[positions[i, slot]].astype(np.float64))
    return dots


def _flush(values: NDArray[np.float32]) -> NDArray[np.float32]:
    """Return the values with subnormals replaced by 0 of their sign, as it is kept in rows."""
    return np.where(np.abs(values) < np.float32(FLOAT32_TINY), np.copysign(np.float32(0), values), values)
