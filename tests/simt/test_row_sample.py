# SPDX-License-Identifier: Apache-2.0
"""How long the list is that a sampled threshold makes of a row: results do not depend on it, but time does."""

from __future__ import annotations

import numpy as np
import pytest

from cupy_router.simt.device import SimtBackend
from tests import inputs
from tests.simt.sources import run

LENGTH, K, SAMPLE = 32768, 2048, 256 * 2 * 4


def _in_steps() -> np.ndarray:
    """A permutation of neighbouring floats in which neighbours differ by a constant."""
    return (np.arange(LENGTH) * 2654435761 % LENGTH + 0x3F800000).astype(np.int32).view(np.float32)


def _one_bin() -> np.ndarray:
    row = inputs.normal((LENGTH,), seed=310)
    row[::2] = 1 + np.arange(LENGTH // 2, dtype=np.float32) * np.float32(2.0**-23)
    return row


ROWS = {
    "normal": lambda: inputs.normal((LENGTH,), seed=311),
    "ascending": lambda: np.arange(LENGTH, dtype=np.float32),
    "sawtooth": lambda: (np.arange(LENGTH) % 64 * 512 + np.arange(LENGTH) // 64).astype(np.float32),
    "in steps": _in_steps,
    "one bin": _one_bin,
    "same fours": lambda: np.repeat(inputs.normal((LENGTH // 4,), seed=312), 4),
}


def threshold(row: np.ndarray, target: int, room: int = LENGTH // 4) -> tuple[int, bool]:
    result = np.zeros(2, np.uint32)
    run(SimtBackend(), "threshold", 1, 256, row, result, np.int32(LENGTH), np.int32(target), np.int32(room))
    return int(result[0]), bool(result[1])


def keys_of(row: np.ndarray) -> np.ndarray:
    bits = row.view(np.uint32).astype(np.int64)
    return np.where(bits < 2**31, 2**31 + bits, 2**31 - (bits - 2**31))


@pytest.mark.parametrize("factor", [1, 2])
@pytest.mark.parametrize("name", ROWS)
def test_lists_are_long_enough_and_not_much_longer(name: str, factor: int) -> None:
    row = np.ascontiguousarray(ROWS[name]())
    hits = SAMPLE * K / LENGTH
    target = int(factor * (hits + 5 * hits**0.5 + 3))
    key, tied = threshold(row, target)
    most = target * 1.25  # of the sample, as far as it goes without another look
    assert factor * K <= (keys_of(row) >= key).sum() <= (most + 4 * most**0.5) * LENGTH / SAMPLE
    assert not tied


@pytest.mark.parametrize(("room", "tied"), [(LENGTH // 10, True), (LENGTH // 4, False)])
def test_ties_are_listed_where_there_is_room_for_them(room: int, tied: bool) -> None:
    """A sixth of the row are equal scores, among which the threshold is."""
    row = inputs.normal((LENGTH,), seed=313)
    row[inputs.rng(314).permutation(LENGTH)[: LENGTH // 6]] = 9
    key, found = threshold(row, 340, room)
    assert (key, found) == (int(keys_of(np.float32([9]))[0]), tied)
