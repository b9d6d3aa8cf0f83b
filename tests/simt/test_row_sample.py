# SPDX-License-Identifier: Apache-2.0
"""How long the list is that a sampled threshold makes of a row: results do not depend on it, but time does."""

from __future__ import annotations

import numpy as np
import pytest

from tests import inputs
from tests.simt.device import SimtBackend
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


def threshold(row: np.ndarray, number: int) -> tuple[int, bool]:
    result = np.zeros(2, np.uint32)
    run(SimtBackend(), "threshold", 1, 256, row, result, np.int32(LENGTH), np.int32(K), np.int32(number))
    return int(result[0]), bool(result[1])


@pytest.mark.parametrize("number", [0, 1])
@pytest.mark.parametrize("name", ROWS)
def test_lists_are_long_enough_and_not_much_longer(name: str, number: int) -> None:
    row = np.ascontiguousarray(ROWS[name]())
    key, tied = threshold(row, number)
    bits = row.view(np.uint32).astype(np.int64)
    keys = np.where(bits < 2**31, 2**31 + bits, 2**31 - (bits - 2**31))
    hits = SAMPLE * K / LENGTH
    most = (hits + 5 * hits**0.5 + 3) * 1.25  # of the sample, as far as it goes without another look
    assert K <= (keys >= key).sum() <= (most + 4 * most**0.5) * LENGTH / SAMPLE
    assert not tied


def test_a_second_sample_looks_elsewhere() -> None:
    row = ROWS["normal"]()
    assert threshold(row, 0) == threshold(row, 0) != threshold(row, 1)
