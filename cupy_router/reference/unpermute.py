# SPDX-License-Identifier: Apache-2.0
"""Sum the rows of each token's pairs, weighted."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from .scoring import flush


@np.errstate(all="ignore")
def unpermute(
    y: NDArray[Any],
    positions: NDArray[np.int32],
    weights: NDArray[Any] | None = None,
    residual: NDArray[Any] | None = None,
    residual_scale: NDArray[np.float32] | None = None,
) -> NDArray[Any]:
    """Return [num_tokens, hidden] in the dtype of y: float32 sums in the order of slots, rounded once.

    Args:
        y: [capacity, hidden] floats.
        positions: [num_tokens, top_k], the row of each pair. Pairs at any other number are left out.
        weights: [num_tokens, top_k] floats, or None: 1.
        residual: [num_tokens, hidden] floats, added last, or None.
        residual_scale: [num_tokens], a factor of the residual, or None: 1.

    >>> unpermute(np.array([[1.0], [2.0]], np.float32), np.array([[1, 0], [-1, 1]], np.int32))
    array([[3.],
           [2.]], dtype=float32)
    """
    num_tokens, top_k = positions.shape
    total = np.zeros((num_tokens, y.shape[1]), np.float32)
    for slot in range(top_k):
        used = np.flatnonzero((positions[:, slot] >= 0) & (positions[:, slot] < len(y)))
        rows = flush(y[positions[used, slot]].astype(np.float32))
        if weights is not None:
            rows = flush(rows * flush(weights[used, slot, None].astype(np.float32)))
        total[used] = flush(total[used] + rows)
    if residual is not None:
        rows = flush(residual.astype(np.float32))
        total = flush(total + (rows if residual_scale is None else flush(rows * flush(residual_scale[:, None]))))
    return total.astype(y.dtype)
