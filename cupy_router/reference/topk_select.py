# SPDX-License-Identifier: Apache-2.0
"""Select the k largest entries of each row."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from .order import row_slices, top_indices


@np.errstate(all="ignore")
def topk_select(
    scores: NDArray[Any],
    k: int,
    lengths: NDArray[np.int32] | None = None,
    starts: NDArray[np.int32] | None = None,
    *,
    order: str = "value",
    index_map: NDArray[np.int32] | None = None,
    page_size: int = 1,
) -> tuple[NDArray[Any], NDArray[np.int32]]:
    """Return the k largest entries of each row, or of a window of each row, in the order of ``order.py``.

    Args:
        scores: [num_rows, num_columns] float32, float16 or bfloat16.
        k: Number of entries per row, at least 1.
        lengths: [num_rows] int32 number of columns in a row's window (default: to the end), clamped to the row.
        starts: [num_rows] int32 first column of a row's window (default: 0). A start outside the row makes the window
            empty.
        order: "column" for the same entries by ascending column; "any" is the order of "value" here.
        index_map: [num_rows or 1, num_pages] int32 page table: index i becomes
            index_map[row, i // page_size] * page_size + i % page_size.
        page_size: Number of indices per page.

    Returns:
        values [num_rows, k] in the dtype of ``scores``, bit copies; indices [num_rows, k] int32, counted from the row's
        start. Where a window has fewer than k entries, the rest is -inf and -1.

    >>> topk_select(np.array([[3, 9, 4, 9]], np.float32), 3)
    (array([[9., 9., 4.]], dtype=float32), array([[1, 3, 2]], dtype=int32))
    >>> topk_select(np.array([[3, 9, 4, 9]], np.float32), 3, starts=np.array([2], np.int32))
    (array([[  9.,   4., -inf]], dtype=float32), array([[ 1,  0, -1]], dtype=int32))
    """
    num_rows, num_columns = scores.shape
    begin, end = _windows(num_rows, num_columns, lengths, starts)
    whole_rows = lengths is None and starts is None
    column = np.arange(num_columns)
    width = min(k, num_columns)

    values = np.full((num_rows, k), -np.inf, scores.dtype)
    indices = np.full((num_rows, k), -1, np.int32)
    for rows in row_slices(num_rows, num_columns):
        eligible = None if whole_rows else (column >= begin[rows]) & (column < end[rows])
        comparable = scores[rows].astype(np.float32, copy=False)  # exact for float16 and bfloat16
        chosen = top_indices(comparable, width, eligible)
        if order == "column":
            chosen = np.sort(chosen.astype(np.uint32)).astype(np.int32)  # -1 last
        found = chosen >= 0
        entries = np.take_along_axis(scores[rows], np.maximum(chosen, 0), axis=-1)
        values[rows, :width][found] = entries[found]
        indices[rows, :width][found] = (chosen - begin[rows])[found]
    return values, indices if index_map is None else _mapped(indices, index_map, page_size)


def _mapped(indices: NDArray[np.int32], index_map: NDArray[np.int32], page_size: int) -> NDArray[np.int32]:
    """Translate the indices by the page table; -1 stays."""
    pages = np.broadcast_to(index_map, (len(indices), index_map.shape[1]))
    found = np.maximum(indices, 0)
    page = np.take_along_axis(pages, found // page_size, axis=1) if index_map.size else found
    return np.where(indices < 0, indices, page * np.int32(page_size) + found % page_size).astype(np.int32)


def _windows(
    num_rows: int, num_columns: int, lengths: NDArray[np.int32] | None, starts: NDArray[np.int32] | None
) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Return the first column and the end of each row's window, [num_rows, 1], in int64 to avoid overflow."""
    begin = np.zeros(num_rows, np.int64) if starts is None else starts.astype(np.int64)
    length = np.full(num_rows, num_columns, np.int64) if lengths is None else lengths.astype(np.int64)
    outside = (begin < 0) | (begin >= num_columns)
    end = np.where(outside, begin, np.minimum(begin + length, num_columns))
    return begin[:, None], end[:, None]
