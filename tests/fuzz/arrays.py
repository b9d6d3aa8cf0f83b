# SPDX-License-Identifier: Apache-2.0
"""Contents of drawn arrays: ties, close values, special values, exact products."""

from __future__ import annotations

from typing import Any

import numpy as np
from hypothesis import strategies as st

from tests.backends import DTYPES
from tests.inputs import WORD, from_bits
from tests.reference.strategies import INFINITY, values

_seeds = st.integers(0, 2**32 - 1)
biases = st.sampled_from([0.0, 1e4, -1e4, 0.5, 8.08, np.inf, -np.inf, np.nan, 1e-40]) | values


@st.composite
def floats(draw: st.DrawFn, shape: tuple[int, ...], dtype: str, elements: Any = values) -> np.ndarray:
    """Draw few values with many ties, values close to these, normal values, or normal values with some special ones."""
    few = np.array(draw(st.lists(elements, min_size=1, max_size=6)), np.float32)
    kind = draw(st.sampled_from(["few", "neighbours", "normal", "sprinkled"]))
    rng = np.random.default_rng(draw(_seeds))
    drawn = rng.choice(few, shape)
    if kind == "neighbours":
        spread = np.float32(draw(st.sampled_from([1e-7, 1e-6, 1e-5, 1e-3])))
        with np.errstate(all="ignore"):
            drawn = drawn * (1 + spread * rng.standard_normal(shape, np.float32))
    elif kind != "few":
        normal = rng.standard_normal(shape, np.float32) * np.float32(draw(st.sampled_from([0.01, 1.0, 20.0])))
        drawn = np.where(rng.random(shape) < (0.1 if kind == "sprinkled" else 0.0), drawn, normal)
    with np.errstate(over="ignore"):
        return np.asarray(drawn, DTYPES[dtype])


@st.composite
def bits(draw: st.DrawFn, shape: tuple[int, ...], dtype: str) -> np.ndarray:
    """Draw bit patterns: few, patterns that differ in their lowest bits, any, or those of normal values."""
    size = 8 * np.dtype(WORD[dtype]).itemsize
    infinity, sign = INFINITY[dtype], 1 << (size - 1)
    edges = [0, 1, infinity - 1, infinity, infinity + 1, infinity | infinity >> 1]
    few = draw(st.lists(st.sampled_from([s + e for e in edges for s in (0, sign)]) | st.integers(0, 2**size - 1),
                        min_size=1, max_size=6))  # fmt: skip
    kind = draw(st.sampled_from(["few", "neighbours", "all", "normal"]))
    rng = np.random.default_rng(draw(_seeds))
    bits = rng.choice(np.array(few, np.int64), shape)
    if kind == "neighbours":
        bits = (bits + rng.integers(0, 2 ** draw(st.integers(0, size - 1)), shape)) % 2**size
    elif kind == "all":
        bits = rng.integers(0, 2**size, shape)
    elif kind == "normal":
        return rng.standard_normal(shape, np.float32).astype(DTYPES[dtype])
    return from_bits(bits, dtype)


@st.composite
def small_integers(draw: st.DrawFn, shape: tuple[int, ...], dtype: str) -> np.ndarray:
    """Draw values whose dot products are exact in float32; some are infinite or NaN."""
    largest = draw(st.integers(0, 8))
    special = draw(st.sampled_from([0.0, 0.0, np.inf, -np.inf, np.nan]))
    rng = np.random.default_rng(draw(_seeds))
    drawn = rng.integers(-largest, largest + 1, shape).astype(np.float32)
    return np.where(rng.random(shape) < 0.001, np.float32(special), drawn).astype(DTYPES[dtype])


@st.composite
def integers(draw: st.DrawFn, count: int, dtype: str, good: Any, bad: Any = None) -> np.ndarray:
    """Draw from a few valid integers; about one in ten is invalid, if there are invalid ones."""
    few = np.array(draw(st.lists(good, min_size=1, max_size=20)), DTYPES[dtype])
    rng = np.random.default_rng(draw(_seeds))
    drawn = rng.choice(few, count)
    if bad is not None and draw(st.booleans()):
        drawn = np.where(rng.random(count) < 0.1, np.array(draw(bad), DTYPES[dtype]), drawn)
    return np.asarray(drawn, DTYPES[dtype])


@st.composite
def recorded(draw: st.DrawFn, shape: tuple[int, int], dtype: str, num_experts: int) -> np.ndarray:
    """Draw ids of experts, some of which are none; in a signed dtype also rows of -1."""
    limits = np.iinfo(DTYPES[dtype])
    bad = [i for i in (-1, num_experts, limits.min, limits.max) if limits.min <= i <= limits.max]
    good = st.integers(0, min(num_experts - 1, limits.max))
    ids: np.ndarray = draw(integers(shape[0] * shape[1], dtype, good, st.sampled_from(bad))).reshape(shape)
    if limits.min < 0:
        ids[draw(st.integers(0, 3)) :: draw(st.integers(1, 4))] = -1
    return ids
