# SPDX-License-Identifier: Apache-2.0
"""The order of every selection: descending value, of equal values the lower index first, NaN lowest.

The order is total. Each float32 becomes an unsigned integer of the same order, and the column index in the low half of
the 64-bit key makes all keys of a row different. So every sorting algorithm gives the same result.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
from numpy.typing import NDArray

ENTRIES_AT_ONCE = 2**18  # with their float64 temporaries these fit into a CPU's cache


def row_slices(num_rows: int, row_entries: int) -> Iterator[slice]:
    """Split ``num_rows`` rows of ``row_entries`` entries into slices that fit into the CPU's cache."""
    step = max(1, ENTRIES_AT_ONCE // max(1, row_entries))
    for begin in range(0, num_rows, step):
        yield slice(begin, min(begin + step, num_rows))


def order_key(values: NDArray[np.float32]) -> NDArray[np.uint32]:
    """Return unsigned integers in the order of ``values``: NaN is 0, -0.0 equals +0.0, subnormals are exact.

    A float32 has a sign and a magnitude, and the order of magnitudes is the order of their bits. So the key is the
    magnitude added to or subtracted from the middle of the range. It uses no float arithmetic, which flush-to-zero
    could change.

    >>> [f"{key:#010x}" for key in order_key(np.array([np.nan, -np.inf, -0.0, 0.0, 1e-45, 1.0], np.float32))]
    ['0x00000000', '0x00800000', '0x80000000', '0x80000000', '0x80000001', '0xbf800000']
    """
    bits = values.view(np.uint32)
    magnitude = bits & np.uint32(0x7FFFFFFF)
    middle = np.uint32(0x80000000)
    key = np.where(bits >= middle, middle - magnitude, middle + magnitude)
    return np.where(magnitude > np.uint32(0x7F800000), np.uint32(0), key)


def top_indices(
    values: NDArray[np.float32], count: int, eligible: NDArray[np.bool_] | None = None
) -> NDArray[np.int32]:
    """Return the columns of the ``count`` greatest values of each row, greatest first.

    Args:
        values: [num_rows, num_columns] float32.
        count: Number of columns to select, at most num_columns.
        eligible: [num_rows, num_columns] bool; False excludes a value.

    Returns:
        [num_rows, count] int32; -1 where a row has fewer than ``count`` eligible values.

    >>> top_indices(np.array([[1, 3, np.nan, 3]], np.float32), 4)
    array([[1, 3, 0, 2]], dtype=int32)
    """
    num_columns = values.shape[-1]
    # Best first is ascending in the inverted key, with the column in the low half to break ties.
    keys: NDArray[np.uint64] = (~order_key(values)).astype(np.uint64) << np.uint64(32)
    keys |= np.arange(num_columns, dtype=np.uint64)
    if eligible is not None:
        keys[~eligible] = 2**64 - 1  # above every real key, and its low half reads as -1
    if count < num_columns:
        keys = np.partition(keys, count - 1, axis=-1)[:, :count]
    best = np.sort(keys, axis=-1)[:, :count]
    return best.astype(np.uint32).view(np.int32)  # the cast keeps the low half
