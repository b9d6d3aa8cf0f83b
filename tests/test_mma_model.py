# SPDX-License-Identifier: Apache-2.0
"""The model of tensor cores gives the bits that an H200 gave."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from tests import compare, inputs, mma_model
from tests.backends import DTYPES


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
@pytest.mark.parametrize("k", [16, 32, 64])
def test_recorded_products(dtype: str, k: int) -> None:
    """Subnormal numbers, overflow, infinities, NaN and zeros of both signs are among the recorded ones."""
    with np.load(Path(__file__).parent / "gpu" / "mma_h200.npz") as file:
        words = {part: file[f"{dtype}, chain of {k}: {part}"] for part in "abcd"}
    a, b = (words[part].view(DTYPES[dtype]) for part in "ab")
    c, d = (words[part].view(np.float32) for part in "cd")
    compare.assert_same_bits(mma_model.multiply(a, b, c), d)


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_logits_are_near_the_exact_ones(dtype: str) -> None:
    """Each column counts once, also where hidden is no multiple of a step."""
    for hidden in (1, 33, 1031):
        x, weight = (inputs.normal((rows, hidden), dtype, seed=rows) for rows in (5, 9))
        exact, bound = (f(x.astype(np.float64)) @ f(weight.astype(np.float64)).T for f in (lambda array: array, np.abs))
        assert (np.abs(mma_model.gate_logits(x, weight) - exact) <= 2.0**-22 * bound).all()
