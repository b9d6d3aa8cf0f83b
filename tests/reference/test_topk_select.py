# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from cupy_router.reference.order import order_key
from cupy_router.reference.topk_select import topk_select
from tests import oracle
from tests.compare import assert_same_bits
from tests.reference.strategies import DTYPES, INFINITY, dtypes, locked, thorough, words

pytestmark = pytest.mark.filterwarnings("error")

int32s = st.one_of(st.integers(-2, 14), st.sampled_from([-(2**31), 2**31 - 1]))


def bits(array: np.ndarray) -> np.ndarray:
    return array.view(f"u{array.itemsize}")


def check(scores: np.ndarray, k: int, lengths: np.ndarray | None = None, starts: np.ndarray | None = None) -> None:
    got, want = topk_select(scores, k, lengths, starts), oracle.topk(scores, k, lengths, starts)
    assert got[1].dtype == np.int32
    np.testing.assert_array_equal(got[1], want[1])
    assert_same_bits(got[0], want[0])


@thorough
@given(st.data(), dtypes, st.integers(0, 4), st.integers(0, 12), st.integers(1, 15), st.booleans(), st.booleans())
def test_agrees_with_the_oracle(
    data: st.DataObject, dtype: str, rows: int, columns: int, k: int, with_lengths: bool, with_starts: bool
) -> None:
    scores = data.draw(words((rows, columns), dtype))
    int_rows = st.lists(int32s, min_size=rows, max_size=rows).map(lambda drawn: locked(np.array(drawn, np.int32)))
    lengths = data.draw(int_rows) if with_lengths else None
    starts = data.draw(int_rows) if with_starts else None
    check(scores, k, lengths, starts)


@thorough
@given(words((1, 20), "float32"))
def test_order_key_orders_like_the_floats(row: np.ndarray) -> None:
    values, keys = row[0].tolist(), order_key(row[0]).tolist()
    for a, key_a in zip(values, keys, strict=True):
        for b, key_b in zip(values, keys, strict=True):
            assert (key_a < key_b) == (a < b or (math.isnan(a) and not math.isnan(b)))


@pytest.mark.parametrize("dtype", sorted(DTYPES))
def test_all_bit_patterns_of_a_16_bit_dtype_at_once(dtype: str) -> None:
    patterns = np.random.default_rng(0).permutation(2**16).astype(np.uint16)
    check((patterns.astype(np.uint32) << 16 if dtype == "float32" else patterns).view(DTYPES[dtype])[None], 2**16)


@pytest.mark.parametrize("dtype", sorted(DTYPES))
def test_nan_payloads_come_back(dtype: str) -> None:
    word = np.dtype(f"u{np.dtype(DTYPES[dtype]).itemsize}")
    payloads = np.array([[INFINITY[dtype] + 5, INFINITY[dtype] + 1]], word)
    values, indices = topk_select(payloads.view(DTYPES[dtype]), 2)
    np.testing.assert_array_equal(bits(values), payloads)
    assert indices.tolist() == [[0, 1]]


def test_a_million_columns() -> None:
    scores = np.random.default_rng(1).integers(0, 5000, (2, 2**20)).astype(np.float32)
    values, indices = topk_select(scores, 2048)
    expected = np.argsort(-scores, axis=-1, kind="stable")[:, :2048]
    np.testing.assert_array_equal(indices, expected)
    np.testing.assert_array_equal(values, np.take_along_axis(scores, expected, axis=-1))


def test_many_strided_rows() -> None:
    scores = np.random.default_rng(2).integers(-9, 9, (5000, 130)).astype(np.float32)[:, 1:101]
    lengths = np.arange(5000, dtype=np.int32) % 103 - 1
    starts = np.arange(5000, dtype=np.int32)[::-1] % 7
    _, indices = topk_select(scores, 9, lengths, starts)
    for r in range(0, 5000, 83):
        window = scores[r, starts[r] : starts[r] + max(0, lengths[r])]
        chosen = np.argsort(-window, kind="stable")[:9]
        assert indices[r].tolist() == chosen.tolist() + [-1] * (9 - chosen.size)
