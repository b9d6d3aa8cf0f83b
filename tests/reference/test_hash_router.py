# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from cupy_router.method import SCORES, RoutingMethod
from cupy_router.reference.hash_router import hash_router
from tests import oracle
from tests.reference.strategies import assert_agrees, dtypes, locked, matrices, methods, thorough

pytestmark = pytest.mark.filterwarnings("error")

small = st.integers(-8, 8).map(float)  # whose products and sums are exact


def ints(dtype: str, highest: int) -> st.SearchStrategy[int]:
    """Draw mostly valid integers; the others are just outside the range or at the limits of the dtype."""
    limit = np.iinfo(dtype)
    wrong = [-1, highest + 1, int(limit.min), int(limit.max)] + ([2**31, 2**32] if dtype == "int64" else [])
    valid = st.integers(0, max(0, highest))
    return st.one_of(valid, valid, valid, st.sampled_from(wrong))


@st.composite
def int_arrays(draw: st.DrawFn, shape: tuple[int, ...], highest: int) -> np.ndarray:
    dtype = draw(st.sampled_from(["int32", "int64"]))
    count = int(np.prod(shape))
    drawn = draw(st.lists(ints(dtype, highest), min_size=count, max_size=count))
    return locked(np.array(drawn, dtype).reshape(shape))


@thorough
@given(st.data(), st.sampled_from(["table", "method", "logits", "x"]), dtypes, st.booleans())
def test_agrees_with_the_oracle(data: st.DataObject, form: str, dtype: str, padded: bool) -> None:
    tokens, vocab, experts = (data.draw(st.integers(low, high)) for low, high in [(0, 4), (0, 3), (1, 9)])
    method = data.draw(methods(experts))
    table = data.draw(int_arrays((vocab, method.top_k), experts - 1))
    token_ids = data.draw(int_arrays((tokens,), vocab - 1))
    num_valid = data.draw(st.integers(0, tokens)) if padded else None
    call: dict[str, Any] = {}
    logits = None
    if form == "logits":
        logits = call["logits"] = data.draw(matrices((tokens, method.num_logits), dtype))
    elif form == "x":
        x = call["x"] = data.draw(matrices((tokens, 3), dtype, small))
        weight = call["weight"] = data.draw(matrices((method.num_logits, 3), dtype, small))
        logits = oracle.gate_logits(x, weight)
    given = None if form == "table" else method
    got = hash_router(token_ids, table, given, num_valid=num_valid, **call)
    assert_agrees(got, oracle.hash_route(token_ids, table, given, logits, num_valid))


@pytest.mark.parametrize("score", SCORES)
def test_many_tokens(score: str) -> None:
    """More rows than one pass takes; every expert once per token, so that weights are the scores, permuted."""
    rng = np.random.default_rng(0)
    table = rng.permuted(np.broadcast_to(np.arange(64), (50, 64)), axis=-1)
    token_ids = rng.integers(0, 50, 9000)
    logits = rng.standard_normal((9000, 64)).astype(np.float32)
    method = RoutingMethod(64, 64, score, renormalize=False)
    weights, indices = hash_router(token_ids, table, method, logits)
    np.testing.assert_array_equal(indices, table[token_ids])
    for r in range(0, 9000, 1499):
        expected = oracle.score(logits[r : r + 1], method)[0]
        np.testing.assert_allclose(weights[r], expected[indices[r]], rtol=1.2e-7)


def test_scale_does_not_change_uniform_weights() -> None:
    method = RoutingMethod(4, 2, scale=2.5)
    weights, _ = hash_router(np.array([0], np.int32), np.array([[3, 1]], np.int32), method)
    assert weights.tolist() == [[0.5, 0.5]]


@pytest.mark.parametrize("given", ["logits", "x"])
def test_invalid_rows_do_not_affect_valid_ones(given: str) -> None:
    table = np.array([[0, 1], [1, 4], [2, -1], [3, 2]], np.int64)
    token_ids = np.array([3, 1, 2, 4, -1, 2**63 - 1, 0], np.int64)
    logits = np.arange(28, dtype=np.float32).reshape(7, 4)
    gate: dict[str, Any] = (
        {"logits": logits} if given == "logits" else {"x": logits, "weight": np.eye(4, dtype=np.float32)}
    )
    weights, indices = hash_router(token_ids, table, RoutingMethod(4, 2, "identity"), **gate)
    assert indices.tolist() == [[3, 2], *[[-1, -1]] * 5, [0, 1]]
    np.testing.assert_allclose(weights[[0, 6]], [[3 / 5, 2 / 5], [24 / 49, 25 / 49]], rtol=1e-7)
    assert not weights[1:6].any()


def test_without_a_method_any_int32_is_an_expert() -> None:
    table = np.array([[0, 2**31 - 1], [0, 2**31], [2**32, 0]], np.int64)
    weights, indices = hash_router(np.arange(3, dtype=np.int32), table)
    assert indices.tolist() == [[0, 2**31 - 1], [-1, -1], [-1, -1]]
    assert weights.tolist() == [[0.5, 0.5], [0, 0], [0, 0]]
