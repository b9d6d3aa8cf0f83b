# SPDX-License-Identifier: Apache-2.0
"""One order for every selection: descending value; equal values, lower index first; NaN below everything.

The order is total: each float32 becomes an unsigned integer that orders alike, and the index below it in the same
64-bit key makes all keys of a row different. Whatever sorts them, the answer is the same.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
from numpy.typing import NDArray

ENTRIES_AT_ONCE = 2**18  # as float64 and their temporaries these stay in a CPU's cache


def row_slices(num_rows: int, row_entries: int) -> Iterator[slice]:
    """Cut ``num_rows`` rows of ``row_entries`` entries into slices that are worth one pass each."""
    step = max(1, ENTRIES_AT_ONCE // max(1, row_entries))
    for begin in range(0, num_rows, step):
        yield slice(begin, min(begin + step, num_rows))


def order_key(values: NDArray[np.float32]) -> NDArray[np.uint32]:
    """Unsigned integers in the order of ``values``: NaN is 0, -0.0 and +0.0 are equal, subnormals are exact.

    A float32 is a sign and a magnitude, and magnitudes order like their bits; so the key is the magnitude, counted up
    or down from the middle. No arithmetic is done on the floats, which flush-to-zero could spoil.

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
    """The columns of the ``count`` best values of each row, best first.

    Args:
        values: [num_rows, num_columns] float32.
        count: columns to choose, at most num_columns.
        eligible: [num_rows, num_columns] bool; where it is False the value does not take part.

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
        keys[~eligible] = 2**64 - 1  # behind every real key, and its low half reads as -1
    if count < num_columns:
        keys = np.partition(keys, count - 1, axis=-1)[:, :count]
    best = np.sort(keys, axis=-1)[:, :count]
    return best.astype(np.uint32).view(np.int32)  # the cast keeps the low half
