# SPDX-License-Identifier: Apache-2.0
"""What hypothesis draws: floats on which selections go wrong, in arrays that cannot be written."""

from __future__ import annotations

from typing import Any

import ml_dtypes
import numpy as np
from hypothesis import settings
from hypothesis import strategies as st

from cupy_router.method import SCORES, RoutingMethod

DTYPES: dict[str, Any] = {"float32": np.float32, "float16": np.float16, "bfloat16": ml_dtypes.bfloat16}
INFINITY = {"float32": 0x7F800000, "float16": 0x7C00, "bfloat16": 0x7F80}

thorough = settings(max_examples=200, deadline=None)

dtypes = st.sampled_from(sorted(DTYPES))
ordinary = st.integers(-200 * 2**16, 200 * 2**16).map(lambda i: i / 2**16)
special = st.sampled_from([0.0, -0.0, 1.0, 1e-30, -87.0, -100.0, -174.0, -175.0, 100.0, 1e4, -1e4, 3e38, -3e38])
unruly = st.sampled_from([np.inf, -np.inf, np.nan, 1e-40, -1e-40])
values = st.one_of(ordinary, special, unruly)


@st.composite
def words(draw: st.DrawFn, shape: tuple[int, int], dtype: str) -> np.ndarray:
    """An array of any bit patterns, from few distinct ones, so that ties are common."""
    infinity = INFINITY[dtype]
    size = 8 * np.dtype(DTYPES[dtype]).itemsize
    sign = 1 << (size - 1)
    edges = [0, 1, infinity - 1, infinity, infinity + 1]
    some = st.one_of(st.sampled_from(edges + [sign + edge for edge in edges]), st.integers(0, 2**size - 1))
    pool = draw(st.lists(some, min_size=1, max_size=8))
    count = shape[0] * shape[1]
    bits = draw(st.lists(st.sampled_from(pool), min_size=count, max_size=count))
    return locked(np.array(bits, f"u{size // 8}").reshape(shape).view(DTYPES[dtype]))


@st.composite
def matrices(draw: st.DrawFn, shape: tuple[int, int], dtype: str, elements: Any = values) -> np.ndarray:
    """An array of values worth routing."""
    count = shape[0] * shape[1]
    drawn = draw(st.lists(elements, min_size=count, max_size=count))
    with np.errstate(over="ignore"):
        return locked(np.array(drawn, np.float32).reshape(shape).astype(DTYPES[dtype]))


@st.composite
def methods(draw: st.DrawFn, num_experts: int, max_top_k: int = 7) -> RoutingMethod:
    """Below 8 terms NumPy sums one by one, as brute_force.py does."""
    renormalize_min = draw(st.sampled_from([None, None, 0.0, 1e-12, 0.5]))
    return RoutingMethod(
        num_experts,
        draw(st.integers(1, min(num_experts, max_top_k))),
        draw(st.sampled_from(SCORES)),
        renormalize=draw(st.booleans()),
        renormalize_eps=0.0 if renormalize_min is not None else draw(st.sampled_from([0.0, 1e-20, 0.25])),
        renormalize_min=renormalize_min,
        scale=draw(st.sampled_from([1.0, 1.5, 2.5])),
    )


def locked(array: np.ndarray) -> np.ndarray:
    array.setflags(write=False)
    return array
