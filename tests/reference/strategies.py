# SPDX-License-Identifier: Apache-2.0
"""Strategies of hypothesis: hard floats for selections, in read-only arrays."""

from __future__ import annotations

from typing import Any

import ml_dtypes
import numpy as np
from hypothesis import settings
from hypothesis import strategies as st

from cupy_router.method import SCORES, RoutingMethod
from cupy_router.method_fields import INDEX_DTYPES

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
    """Draw an array of any bit patterns, few of them distinct, so that ties are common."""
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
    """Draw an array of ordinary and special values."""
    count = shape[0] * shape[1]
    drawn = draw(st.lists(elements, min_size=count, max_size=count))
    with np.errstate(over="ignore"):
        return locked(np.array(drawn, np.float32).reshape(shape).astype(DTYPES[dtype]))


@st.composite
def methods(draw: st.DrawFn, num_experts: int, max_top_k: int = 7) -> RoutingMethod:
    """Draw methods with any steps; NumPy adds fewer than 8 terms from left to right, as the oracle does."""
    fields: dict[str, Any] = {
        "score": draw(st.sampled_from(SCORES)),
        "renormalize": draw(st.booleans()),
        "scale": draw(st.sampled_from([1.0, 1.5, 2.5])),
        **draw(st.sampled_from(DIVISORS)),
    }
    groups = top_groups = 1
    if draw(st.booleans()):
        groups = draw(st.sampled_from([g for g in range(1, num_experts + 1) if num_experts % g == 0]))
        top_groups = draw(st.integers(1, groups))
        fields |= {
            "logit_scale": draw(st.sampled_from([1.0, 0.5, -2.0])),
            "logit_softcap": draw(st.sampled_from([None, 3.0])),
            "num_groups": groups,
            "top_groups": top_groups,
            "group_score": draw(st.sampled_from(["max", "top2"])),
            "num_shared_experts": draw(st.integers(0, 2)),
            "shared_weight": 0.5,
            "weight_dtype": draw(st.sampled_from(sorted(DTYPES))),
            "index_dtype": draw(st.sampled_from([d for d, most in INDEX_DTYPES.items() if num_experts + 2 <= most])),
            **draw(st.sampled_from(CHOICES)),
        }
        if fields["num_shared_experts"] and draw(st.booleans()):
            fields |= {"shared_in_normalizer": True, "score": "sigmoid", "renormalize": True, **DIVISORS[0]}
    most = min(num_experts // groups * top_groups, max_top_k)
    return RoutingMethod(num_experts, draw(st.integers(1, most) | st.just(most)), **fields)  # all: NaN among them


DIVISORS: list[dict[str, Any]] = [
    {"renormalize_eps": 0.0, "renormalize_min": None},
    *({"renormalize_eps": eps} for eps in (1e-20, 0.25)),
    *({"renormalize_min": least} for least in (0.0, 1e-12, 0.5)),
]
CHOICES = [{}, {"bias_on": "logits"}, {"bias_on": "logits", "score_after_topk": True}]


@st.composite
def layers(draw: st.DrawFn, num_experts: int) -> dict[str, np.ndarray]:
    """Draw arrays of a layer besides its gate, each present or not."""
    names = draw(st.sets(st.sampled_from(["bias", "logit_bias", "expert_scale"])))
    return {name: draw(matrices((1, num_experts), "float32"))[0] for name in sorted(names)}


def assert_agrees(got: tuple[np.ndarray, np.ndarray], want: tuple[np.ndarray, np.ndarray]) -> None:
    """Assert the same experts, and weights within one rounding: from float64 to float32, or to the dtype."""
    assert [(array.dtype, array.shape) for array in got] == [(array.dtype, array.shape) for array in want]
    np.testing.assert_array_equal(got[1], want[1])
    rtol = {"float32": 3e-7, "float16": 2.0**-10, "bfloat16": 2.0**-7}[str(want[0].dtype)]
    weights, right = (array[0].astype(np.float32) for array in (got, want))
    np.testing.assert_allclose(weights, right, rtol=rtol, atol=2.0**-24 if want[0].dtype == np.float16 else 0)


def locked(array: np.ndarray) -> np.ndarray:
    array.setflags(write=False)
    return array
