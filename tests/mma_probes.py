# SPDX-License-Identifier: Apache-2.0
"""Inputs that tell models of tensor cores apart: tiles a [tiles, 16, k], b [tiles, 8, k] and c [tiles, 16, 8]."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import numpy as np

from tests.backends import DTYPES

ROWS, COLUMNS, STEP = 16, 8, 16
CHAINS = (16, 32, 64, 512)
RECORDED = Path(__file__).with_name("mma_h200.npz")  # by tests/gpu/mma_chains.py


class Tiles(NamedTuple):
    """Operands of products, in the dtypes of the instruction."""

    a: np.ndarray
    b: np.ndarray
    c: np.ndarray


class Maker:
    """Random tiles of one dtype."""

    def __init__(self, dtype: str, tiles: int) -> None:
        self.dtype, self.tiles = DTYPES[dtype], tiles
        self.rng = np.random.default_rng(5)
        self.is_half = dtype == "float16"
        self.bits = 11 if self.is_half else 8  # of a significand

    def shapes(self, k: int) -> tuple[tuple[int, int, int], ...]:
        return (self.tiles, ROWS, k), (self.tiles, COLUMNS, k), (self.tiles, ROWS, COLUMNS)

    def floats(self, shape: tuple[int, ...], low: int, high: int, bits: int = 0) -> np.ndarray:
        """Return floats with uniform significands, signs, and exponents low..high - 1."""
        bits = bits or self.bits
        significands = self.rng.integers(1 << bits - 1, 1 << bits, shape) * self.rng.choice([-1, 1], shape)
        return np.ldexp(significands.astype(np.float64), self.rng.integers(low, high, shape) - bits + 1)

    def tiles_of(self, a: np.ndarray, b: np.ndarray, c: np.ndarray) -> Tiles:
        return Tiles(a.astype(self.dtype), b.astype(self.dtype), c.astype(np.float32))

    def ranged(self, k: int, spread: int, c_low: int = 0, c_high: int = 0) -> Tiles:
        """Operands of `spread` exponents each, and accumulators of the given ones, or 0."""
        a, b, c = self.shapes(k)
        high = min(spread // 2 + 1, 14)
        accumulators = self.floats(c, c_low, c_high, 24) if c_high > c_low else np.zeros(c)
        return self.tiles_of(self.floats(a, high - spread, high), self.floats(b, high - spread, high), accumulators)

    def cancelling(self, k: int) -> Tiles:
        """Products that cancel in pairs, but for a few small ones, in random places."""
        a, b, c = (self.rng.normal(size=shape) for shape in self.shapes(k))
        half = k // 2
        b[..., half:] = b[..., :half]
        a[..., half:] = -a[..., :half] * self.rng.choice([1, 1, 1 + 2.0**-7], a[..., :half].shape)
        order = self.rng.permutation(k)
        return self.tiles_of(a[..., order], b[..., order], c * 2.0**-20)

    def one_large(self, sign: int) -> Tiles:
        """One product of 1 or 2.25, in each place, and tiny ones of each magnitude beside it."""
        a, b, c = (np.zeros(shape) for shape in self.shapes(STEP))
        tiny = self.floats(a.shape, 0, 1)
        tiny = np.abs(tiny) * np.ldexp(1.0, -self.rng.integers(4, 14, (self.tiles, ROWS, 1)))
        b[:] = np.abs(self.floats(b.shape, 0, 1)) * np.ldexp(1.0, -self.rng.integers(4, 14, (self.tiles, COLUMNS, 1)))
        places = np.arange(self.tiles) % STEP
        a[:] = sign * tiny
        large = self.rng.choice([1.0, 1.5], (self.tiles, 1))
        a[np.arange(self.tiles), :, places], b[np.arange(self.tiles), :, places] = large, large
        return self.tiles_of(a, b, c)

    def large_accumulator(self, sign: int) -> Tiles:
        """An accumulator near 1, and tiny products."""
        a, b, c = self.shapes(STEP)
        scales = [np.ldexp(1.0, -self.rng.integers(4, 14, (self.tiles, rows, 1))) for rows in (ROWS, COLUMNS)]
        positive = [np.abs(self.floats(shape, 0, 1)) * scale for shape, scale in zip((a, b), scales, strict=True)]
        return self.tiles_of(sign * positive[0], positive[1], np.abs(self.floats(c, 0, 1, 24)))

    def carries(self) -> Tiles:
        """The largest significands, whose sum needs all carry bits."""
        a, b, c = self.shapes(STEP)
        most = 2 - 2.0 ** (1 - self.bits)
        signs = np.where(self.rng.random((self.tiles, ROWS, 1)) < 0.5, -1.0, 1.0)
        accumulators = self.floats(c, -6, 9, 24)
        return self.tiles_of(np.full(a, most) * signs, np.full(b, most) * (1 - 2.0**-6), accumulators)

    def sparse(self, spread: int) -> Tiles:
        """Many factors are 0, the others may be large."""
        tiles = self.ranged(STEP, spread)
        a, b = (np.where(self.rng.random(array.shape) < 0.6, 0, array) for array in tiles[:2])
        c = np.where(self.rng.random(tiles.c.shape) < 0.5, 0, self.floats(tiles.c.shape, -30, -8, 24))
        return self.tiles_of(a, b, c)

    @np.errstate(invalid="ignore")  # signaling NaN
    def bit_patterns(self, k: int, finite: bool) -> Tiles:
        """Any bits: subnormal numbers, infinities and NaN among them."""
        arrays = []
        for shape, dtype in zip(self.shapes(k), (self.dtype, self.dtype, np.float32), strict=True):
            size = np.dtype(dtype).itemsize
            array = self.rng.integers(0, 1 << 8 * size, shape, np.uint32).astype(f"u{size}").view(dtype)
            if finite:
                array = np.where(np.isfinite(array.astype(np.float64)), array, np.asarray(0, dtype))
            arrays.append(array)
        return Tiles(*arrays)

    def subnormal(self) -> Tiles:
        """Subnormal factors with normal ones; in bfloat16 their products may be subnormal or 0."""
        a, b, c = self.shapes(STEP)
        lowest = -14 if self.is_half else -126
        factors = np.ldexp(self.rng.integers(-127, 128, a).astype(np.float64), lowest - self.bits + 1)
        accumulators = np.where(self.rng.random(c) < 0.5, 0, self.floats(c, lowest - 12, lowest - 1, 24))
        return self.tiles_of(factors, self.floats(b, -3, 8), accumulators)

    def tiny_results(self, zeros: float) -> Tiles:
        """Sums of bfloat16 about as small as the smallest float32. `zeros`: share of factors and accumulators."""
        a, b, c = self.shapes(STEP)
        arrays = self.floats(a, -78, -60), self.floats(b, -80, -62), self.floats(c, -149, -120, 24)
        return self.tiles_of(*(np.where(self.rng.random(array.shape) < zeros, 0, array) for array in arrays))

    def huge(self) -> Tiles:
        """Products and sums of bfloat16 up to infinity."""
        a, b, c = self.shapes(STEP)
        return self.tiles_of(self.floats(a, 60, 67), self.floats(b, 58, 63), self.floats(c, 118, 128, 24))

    def zeros(self) -> Tiles:
        """Sums that are exactly 0, with zeros of both signs."""
        shares = [0.1, 0.4, 0.4, 0.1]
        a, b, c = (self.rng.choice([-1.0, -0.0, 0.0, 1.0], shape, p=shares) for shape in self.shapes(STEP))
        return self.tiles_of(a, b, np.where(self.rng.random(c.shape) < 0.7, np.copysign(0.0, c), c))


def probes(dtype: str, tiles: int) -> Iterator[tuple[str, Tiles]]:
    """Yield names and tiles."""
    make = Maker(dtype, tiles)
    for k in CHAINS:
        yield f"normal, chain of {k}", make.tiles_of(*(make.rng.normal(size=shape) for shape in make.shapes(k)))
    for spread in (3, 6, 10, 16, 26):
        yield f"{spread} exponents", make.ranged(STEP, spread)
        yield f"{spread} exponents, accumulators", make.ranged(STEP, spread, -spread - 8, spread + 4)
        yield f"{spread} exponents, chain of 64", make.ranged(64, spread)
    for k in (16, 64):
        yield f"cancelling, chain of {k}", make.cancelling(k)
    for sign in (1, -1):
        yield f"one large product, others {'plus' if sign > 0 else 'minus'}", make.one_large(sign)
        yield f"large accumulator, products {'plus' if sign > 0 else 'minus'}", make.large_accumulator(sign)
    yield "carries", make.carries()
    for spread in (8, 26):
        yield f"zeros among {spread} exponents", make.sparse(spread)
    yield "subnormal factors", make.subnormal()
    yield "signed zeros", make.zeros()
    if dtype == "bfloat16":
        for zeros in (0.0, 0.5, 0.9):
            yield f"tiny results, {zeros:.0%} zeros", make.tiny_results(zeros)
        yield "huge", make.huge()
    yield "finite bits", make.bit_patterns(STEP, finite=True)
    yield "all bits", make.bit_patterns(STEP, finite=False)


def recorded(dtype: str, k: int) -> tuple[Tiles, np.ndarray]:
    """Return tiles a [tiles, 8, k], b [tiles, 8, k], c [tiles, 8, 8], and their products as an H200 gave them."""
    with np.load(RECORDED) as file:
        a, b, c, d = (file[f"{dtype}, chain of {k}: {part}"] for part in "abcd")
    return Tiles(a.view(DTYPES[dtype]), b.view(DTYPES[dtype]), c.view(np.float32)), d.view(np.float32)
