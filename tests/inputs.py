# SPDX-License-Identifier: Apache-2.0
"""Hard inputs for selections: ties, infinities, NaN, subnormals, overfull histogram bins."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

from tests.backends import DTYPES

# The acceptance lists of routing and of top-k selection.
TOKENS = (0, 1, 7, 33, 64, 65, 1025, 8192, 70_000)
EXPERTS = (1, 2, 8, 36, 60, 64, 72, 96, 108, 128, 144, 160, 192, 256, 320, 384, 512, 576, 896, 1000)
TOKEN_CASES = [pytest.param(n, id=str(n), marks=pytest.mark.acceptance(f"n = {n}")) for n in TOKENS[:-1]] + [
    pytest.param(n, id=str(n), marks=[pytest.mark.acceptance(f"n = {n}"), pytest.mark.slow("seconds")])
    for n in TOKENS[-1:]
]
SCORES = ("sqrtsoftplus", "sigmoid", "softmax", "identity")
FLOATS = ("float32", "float16", "bfloat16")
WIDTHS = (1, 8, 31, 32, 33, 255, 257, 1024, 1025, 8191, 8193, 16385, 131_072, 1_048_576)
TOP_K = (6, 7, 31, 33, 511, 513, 1000, 2047, 2049, 2051, 4096)


def rng(*seed: int) -> np.random.Generator:
    return np.random.default_rng([20261122, *seed])


def normal(shape: tuple[int, ...], dtype: str = "float32", seed: int = 0, scale: float = 1.0) -> np.ndarray:
    drawn: np.ndarray = (rng(seed, *shape).standard_normal(shape, np.float32) * np.float32(scale)).astype(DTYPES[dtype])
    return drawn


def distinct(rows: int, columns: int, dtype: str = "float32", seed: int = 0) -> np.ndarray:
    """Return rows that permute equally spaced values in [-4, 4]: gaps far above rounding for up to 1000 columns."""
    grid = np.linspace(-4, 4, columns).astype(DTYPES[dtype])
    return rng(seed, columns).permuted(np.broadcast_to(grid, (rows, columns)), axis=1)


def row_views(xp: Any, array: Any) -> list[Any]:
    """Return valid views of a NumPy or CuPy matrix: reversed rows, every second row, a repeated row, one column."""
    return [array[::-1], array[::2], xp.broadcast_to(array[1:2], (3, array.shape[1])), array.T[:, :1], array[:, :1]]


# -- Logits of routers -------------------------------------------------------------------------------------------------


def _quantised(n: int, experts: int) -> np.ndarray:
    return np.round(normal((n, experts), seed=1) * 2).astype(np.float32) / 2


def _sprinkled(*values: float) -> Callable[[int, int], np.ndarray]:
    """Return normal logits in which each of these values replaces about one entry in eight."""

    def make(n: int, experts: int) -> np.ndarray:
        logits, draw = distinct(n, experts, seed=2), rng(3, n, experts).integers(0, 8, (n, experts))
        for i, value in enumerate(values):
            logits[draw == i] = value
        return logits

    return make


def _one_nan(n: int, experts: int) -> np.ndarray:
    logits = distinct(n, experts, seed=4)
    logits[np.arange(n), np.arange(n) % experts] = np.nan
    return logits


def _nan_rows(n: int, experts: int) -> np.ndarray:
    logits = distinct(n, experts, seed=5)
    logits[::3] = np.nan
    return logits


def _filled(value: float) -> Callable[[int, int], np.ndarray]:
    return lambda n, experts: np.full((n, experts), value, np.float32)


# In each of these the values are equal or far apart, so that order and sets have one right answer on every path.
LOGITS: dict[str, Callable[[int, int], np.ndarray]] = {
    "all logits equal": _filled(0.25),
    "quantised logits": _quantised,
    "logits at +-100": _sprinkled(100.0, -100.0),
    "logits all -100": _filled(-100.0),
    "logits at +-inf": _sprinkled(np.inf, -np.inf),
    "logits all +inf": _filled(np.inf),
    "logits all -inf": _filled(-np.inf),
    "one NaN": _one_nan,
    "a row of NaN": _nan_rows,
    "NaN and +-inf": _sprinkled(np.nan, np.inf, -np.inf),
    "logits of zero of both signs": _sprinkled(0.0, -0.0, 0.0, -0.0, 0.0, -0.0),
}


def _bias_large(experts: int) -> np.ndarray:
    return np.where(rng(6, experts).random(experts) < 0.5, -1e4, 1e4).astype(np.float32)


def _bias_deepseek(experts: int) -> np.ndarray:
    """Near 8.08 with a spread of a few float32 steps there: many selection values tie or nearly tie."""
    return (np.float32(8.08) + rng(7, experts).integers(0, 8, experts) * np.float32(2**-20)).astype(np.float32)


BIAS: dict[str, Callable[[int], np.ndarray]] = {
    "bias of +-1e4": _bias_large,
    "bias near 8.08": _bias_deepseek,
    "bias all -1e4": lambda experts: np.full(experts, -1e4, np.float32),
    "bias with +-inf": lambda experts: np.resize(np.array([0, np.inf, 0, -np.inf, 0.5], np.float32), experts),
    "bias with NaN": lambda experts: np.resize(np.array([0, 0.25, np.nan], np.float32), experts),
}


# -- Rows of top-k selection -------------------------------------------------------------------------------------------

WORD = {"float32": np.uint32, "float16": np.uint16, "bfloat16": np.uint16}


def from_bits(bits: np.ndarray, dtype: str) -> np.ndarray:
    return np.ascontiguousarray(bits.astype(WORD[dtype])).view(DTYPES[dtype])


def cast(values: np.ndarray, dtype: str) -> np.ndarray:
    with np.errstate(over="ignore"):
        return np.asarray(values, DTYPES[dtype])


def _shared_bits(base: int) -> Callable[..., np.ndarray]:
    """base + a permutation: adjacent float32 that share their high bits."""

    def make(rows: int, columns: int, k: int, dtype: str) -> np.ndarray:
        keys = rng(8, columns).permuted(np.broadcast_to(np.arange(columns), (rows, columns)), axis=1)
        return from_bits(base + keys, dtype)

    return make


def _low_bits(bits: int) -> Callable[..., np.ndarray]:
    def make(rows: int, columns: int, k: int, dtype: str) -> np.ndarray:
        one = 0x3F800000 if dtype == "float32" else 0x3C00
        return from_bits(one + rng(9, bits, columns).integers(0, 2**bits, (rows, columns)), dtype)

    return make


def pivots(extra: int, place: str) -> Callable[..., np.ndarray]:
    """k + extra copies of a pivot, first, last or alternating; in odd rows k // 2 entries above it."""

    def make(rows: int, columns: int, k: int, dtype: str) -> np.ndarray:
        copies = min(k + extra, columns)
        x = np.full((rows, columns), -1.0, np.float32)
        if place == "first":
            x[:, :copies] = 1.0
        elif place == "last":
            x[:, columns - copies :] = 1.0
        else:
            step = max(1, columns // max(copies, 1))
            x[:, : copies * step : step] = 1.0
        below = np.flatnonzero(x[0] < 0)
        x[1::2, below[::-1][: k // 2]] = 2.0
        return x.astype(DTYPES[dtype])

    return make


def _extremes(rows: int, columns: int, k: int, dtype: str) -> np.ndarray:
    """Magnitudes above 65504 and below 2**-24, which a half-precision histogram cannot tell apart."""
    draw = rng(10, columns)
    large, small = draw.uniform(16, 100, (rows, columns)), draw.uniform(-100, -25, (rows, columns))
    exponent = np.where(draw.random((rows, columns)) < 0.5, large, small)
    return cast(draw.choice([-1, 1], (rows, columns)) * np.exp2(exponent), dtype)


def _subnormals(rows: int, columns: int, k: int, dtype: str) -> np.ndarray:
    fraction = {"float32": 23, "float16": 10, "bfloat16": 7}[dtype]
    sign = 1 << (8 * np.dtype(WORD[dtype]).itemsize - 1)
    draw = rng(11, columns)
    signs = sign * draw.integers(0, 2, (rows, columns))
    return from_bits(signs + draw.integers(0, 2**fraction, (rows, columns)), dtype)


def _choice(*values: float) -> Callable[..., np.ndarray]:
    def make(rows: int, columns: int, k: int, dtype: str) -> np.ndarray:
        return rng(12, columns).choice(np.array(values, np.float32), (rows, columns)).astype(DTYPES[dtype])

    return make


def _mostly(value: float) -> Callable[..., np.ndarray]:
    def make(rows: int, columns: int, k: int, dtype: str) -> np.ndarray:
        x = normal((rows, columns), dtype, seed=13)
        x[rng(14, columns).random((rows, columns)) < 0.9] = value
        return x

    return make


def nan_bits(rows: int, columns: int, dtype: str) -> np.ndarray:
    """NaN of both signs, quiet and signalling, with different payloads."""
    size = 8 * np.dtype(WORD[dtype]).itemsize
    infinity = {"float32": 0x7F800000, "float16": 0x7C00, "bfloat16": 0x7F80}[dtype]
    fraction = {"float32": 23, "float16": 10, "bfloat16": 7}[dtype]
    draw = rng(15, columns)
    signs = draw.integers(0, 2, (rows, columns)) << (size - 1)
    return signs + infinity + draw.integers(1, 2**fraction, (rows, columns))


def _some_nan(share: float) -> Callable[..., np.ndarray]:
    def make(rows: int, columns: int, k: int, dtype: str) -> np.ndarray:
        bits = normal((rows, columns), dtype, seed=16).view(WORD[dtype]).astype(np.int64)
        chosen = rng(17, columns).random((rows, columns)) < share
        return from_bits(np.where(chosen, nan_bits(rows, columns, dtype), bits), dtype)

    return make


def _monotone(step: int, period: int | None = None) -> Callable[..., np.ndarray]:
    def make(rows: int, columns: int, k: int, dtype: str) -> np.ndarray:
        ramp = np.arange(columns, dtype=np.float32)[::step] % (period or columns)
        return cast(np.broadcast_to(ramp - columns // 3, (rows, columns)), dtype)

    return make


def one_bin(candidates: int) -> Callable[..., np.ndarray]:
    """This many values between 1 and 1 + 2**-9, in one bin of a coarse histogram, the rest spread below."""

    def make(rows: int, columns: int, k: int, dtype: str) -> np.ndarray:
        draw = rng(18, columns, candidates)
        x = -np.abs(normal((rows, columns), seed=19)) - 0.5
        for row in x:
            at = draw.permutation(columns)[: min(candidates, columns)]
            row[at] = 1 + draw.integers(0, 2**14, at.size) * np.float32(2**-23)
        return cast(x, dtype)

    return make


ROWS: dict[str, Callable[..., np.ndarray]] = {
    "normal": lambda rows, columns, k, dtype: normal((rows, columns), dtype, seed=20),
    "all equal": lambda rows, columns, k, dtype: np.full((rows, columns), 0.5, DTYPES[dtype]),
    **{f"{name} copies of the pivot, {place}": pivots(copies, place)
       for name, copies in (("k-1", -1), ("k", 0), ("k+1", 1)) for place in ("first", "last", "alternating")},
    "shared high bits 0x3F800000 + i": _shared_bits(0x3F800000),
    "shared high bits 0x3805ED27 + i": _shared_bits(0x3805ED27),
    "differ in the lowest bit": _low_bits(1),
    "differ in the lowest 8 bits": _low_bits(8),
    "differ in the lowest 10 bits": _low_bits(10),
    "above 65504 and below 2**-24": _extremes,
    "all subnormals": _subnormals,
    "+0.0 and -0.0 mixed": _choice(0.0, -0.0),
    "mostly +inf": _mostly(np.inf),
    "mostly -inf": _mostly(-np.inf),
    "NaN of both signs": _some_nan(0.5),
    "mostly NaN": _some_nan(0.98),
    "only NaN": _some_nan(1.1),
    "ascending": _monotone(1),
    "descending": _monotone(-1),
    "sawtooth": _monotone(1, 97),
    "more than half exact zeros": lambda rows, columns, k, dtype: np.maximum(normal((rows, columns), dtype, 21), 0),
}  # fmt: skip
BITS_OF_FLOAT32 = ("shared high bits 0x3F800000 + i", "shared high bits 0x3805ED27 + i")
