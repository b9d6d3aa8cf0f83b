# SPDX-License-Identifier: Apache-2.0
"""Chains of products by wgmma and by mma.sync have the same bits: the promise of batch invariance rests on it."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from typing import Any

import ml_dtypes
import numpy as np
import pytest

from cupy_router import compiler
from tests.simt.sources import source

DTYPES: dict[str, Any] = {"bfloat16": ml_dtypes.bfloat16, "float16": np.float16}
SIZES = (32, 64, 72, 128)
COLUMNS = (16, 64, 256, 448, 7168)


@cache
def probe() -> tuple[Any, Any]:
    import cupy

    if cupy.cuda.Device().compute_capability != "90":
        pytest.skip("only GPUs of compute capability 9.0 have wgmma")
    text = source("wgmma_chain")
    return cupy, cupy.RawKernel(text, "wgmma_chain", compiler.options(text))


def chains(a: np.ndarray, b: np.ndarray, place: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return a times b by wgmma, whose products have each column in its place, and by mma.sync."""
    cupy, kernel = probe()
    words = [cupy.asarray(factor.view(np.uint16)) for factor in (a, b)]
    results = [cupy.full((64, len(b)), np.nan, cupy.float32) for _ in range(2)]
    numbers = (np.int32(a.shape[1]), np.int32(len(b)), np.int32(a.dtype == ml_dtypes.bfloat16))
    kernel((1,), (128,), (*words, cupy.asarray(place, np.int32), *results, *numbers))
    return cupy.asnumpy(results[0]), cupy.asnumpy(results[1])


def normal(rng: np.random.Generator, shape: tuple[int, int]) -> np.ndarray:
    return rng.standard_normal(shape)


def wide(rng: np.random.Generator, shape: tuple[int, int]) -> np.ndarray:
    """Of exponents far apart."""
    return rng.standard_normal(shape) * 2.0 ** rng.integers(-12, 12, shape)


def cancelling(rng: np.random.Generator, shape: tuple[int, int]) -> np.ndarray:
    values = wide(rng, shape)
    values[:, 1::2] = -values[:, ::2] * (1 + 2.0**-9 * rng.integers(-1, 2, (shape[0], shape[1] // 2)))
    return values


def subnormal(rng: np.random.Generator, shape: tuple[int, int]) -> np.ndarray:
    """With products that float32 holds as subnormal numbers, or 16 bits do."""
    return rng.standard_normal(shape) * 2.0 ** rng.choice([-70, -20, -5], shape)


def equal(rng: np.random.Generator, shape: tuple[int, int]) -> np.ndarray:
    return np.full(shape, 1.0 + 2.0**-7)


def falling(rng: np.random.Generator, shape: tuple[int, int]) -> np.ndarray:
    """Large, then ever smaller."""
    return rng.standard_normal(shape) * np.exp2(np.linspace(6, -12, shape[1]))


KINDS: tuple[Callable[..., np.ndarray], ...] = (normal, wide, cancelling, subnormal, equal, falling)


@pytest.mark.parametrize("make", KINDS, ids=lambda make: make.__name__)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("order", ["in place", "reversed", "of words of four", "shuffled"])
def test_wgmma_has_the_bits_of_mma(make: Callable[..., np.ndarray], dtype: str, order: str) -> None:
    """Also if its products have their columns in another order, as words of four columns in shared memory have."""
    rng = np.random.default_rng(9)
    for columns in COLUMNS:
        for size in SIZES if columns < 7168 else (128,):
            a, b = (make(rng, (rows, columns)).astype(DTYPES[dtype]) for rows in (64, size))
            place = {
                "in place": np.arange(16),
                "reversed": np.arange(16)[::-1],
                "of words of four": np.arange(16).reshape(2, 4, 2).transpose(1, 0, 2).ravel(),
                "shuffled": rng.permutation(16),
            }[order]
            found, expected = chains(a, b, place)
            different = found.view(np.uint32) != expected.view(np.uint32)
            assert not different.any(), f"{different.mean():.1%} of {columns} columns, {size} rows of b"
