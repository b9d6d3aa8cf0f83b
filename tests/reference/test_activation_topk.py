# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from cupy_router.method import SCORES, RoutingMethod
from cupy_router.reference.activation_topk import activation_topk
from tests import oracle
from tests.reference.strategies import assert_agrees, dtypes, layers, matrices, methods, thorough

pytestmark = pytest.mark.filterwarnings("error")


@thorough
@given(st.data(), dtypes, st.integers(0, 3), st.integers(1, 12), st.booleans())
def test_agrees_with_the_oracle(data: st.DataObject, dtype: str, tokens: int, experts: int, padded: bool) -> None:
    method = data.draw(methods(experts))
    logits = data.draw(matrices((tokens, method.num_logits), dtype))
    layer = data.draw(layers(experts))
    num_valid = data.draw(st.integers(0, tokens)) if padded else None
    got = activation_topk(logits, method, num_valid=num_valid, **layer)
    assert_agrees(got, oracle.route(logits, method, num_valid=num_valid, **layer))


@pytest.mark.parametrize("shared", [{}, {"num_shared_experts": 1, "shared_in_normalizer": True}])
def test_a_subnormal_weight_is_0_before_the_factor_of_its_expert(shared: dict[str, Any]) -> None:
    method = RoutingMethod(2, 2, "sigmoid", **shared)
    logits = np.zeros((1, method.num_logits), np.float32)
    logits[0, 1] = -88.0
    factors = np.array([1, 1e9], np.float32)
    for route in (activation_topk, oracle.route):
        weights, _ = route(logits, method, expert_scale=factors)
        assert weights[0, 1] == 0


@pytest.mark.parametrize("score", SCORES)
@pytest.mark.parametrize("experts", [1, 36, 256, 1000])
def test_many_rows_and_each_row_alone(score: str, experts: int) -> None:
    """More rows than one pass takes, in a strided array: each row equals that row routed alone."""
    rng = np.random.default_rng(experts)
    logits = rng.standard_normal((700_000 // experts, experts + 3)).astype(np.float32)[:, 1:-2]
    bias = rng.standard_normal(experts).astype(np.float32)
    method = RoutingMethod(experts, min(experts, 8), score)
    weights, indices = activation_topk(logits, method, bias)
    for r in [*range(0, len(logits), len(logits) // 7), len(logits) - 1]:
        alone = activation_topk(logits[r : r + 1].copy(), method, bias)
        np.testing.assert_array_equal(weights[r], alone[0][0])
        np.testing.assert_array_equal(indices[r], alone[1][0])


@pytest.mark.parametrize("score", SCORES)
def test_all_experts_can_be_chosen(score: str) -> None:
    logits = np.random.default_rng(3).standard_normal((5, 300)).astype(np.float32)
    method = RoutingMethod(300, 300, score, renormalize=False)
    weights, indices = activation_topk(logits, method)
    np.testing.assert_array_equal(np.sort(indices), np.broadcast_to(np.arange(300), (5, 300)))
    assert (np.diff(weights) <= 0).all()


def test_a_row_of_nan_gives_the_first_experts() -> None:
    weights, indices = activation_topk(np.full((1, 9), np.nan, np.float32), RoutingMethod(9, 4))
    assert indices.tolist() == [[0, 1, 2, 3]]
    assert np.isnan(weights).all()


def test_an_infinite_score_over_a_divisor_of_0_weighs_nan() -> None:
    method = RoutingMethod(3, 3, "identity", renormalize_min=0.0)
    weights, _ = activation_topk(np.array([[1.0, 0.0, -np.inf]], np.float32), method)
    np.testing.assert_array_equal(weights, np.array([[0.0, 0.0, np.nan]], np.float32))


def test_selection_is_in_float32() -> None:
    """At 8 a float32 step is 2**-20: scores that differ by less tie, and the lower index wins."""
    logits = np.array([[0.5, 0.5 + 2**-23, 0.25]], np.float32)
    method = RoutingMethod(3, 2, "identity", renormalize=False)
    assert activation_topk(logits, method)[1].tolist() == [[1, 0]]
    assert activation_topk(logits, method, np.full(3, 8.08, np.float32))[1].tolist() == [[0, 1]]


def test_bias_does_not_weigh() -> None:
    logits = np.array([[1.0, 2.0, 3.0]], np.float32)
    weights, indices = activation_topk(logits, RoutingMethod(3, 2, "identity"), np.array([1e4, -1e4, 0], np.float32))
    assert indices.tolist() == [[0, 2]]
    np.testing.assert_array_equal(weights, np.array([[0.25, 0.75]], np.float32))


def test_subnormal_selection_values_tie() -> None:
    logits = np.array([[0.0, 1e-39, 1.5e-38, 2e-38]], np.float32)
    method = RoutingMethod(4, 4, "identity", renormalize=False)
    assert activation_topk(logits, method)[1].tolist() == [[3, 2, 0, 1]]
    # Minus 1.5e-38: the sum of the last is 5e-39, which flushes to 0 like that of the one before it.
    bias = np.array([0, 0, -1.5e-38, -1.5e-38], np.float32)
    assert activation_topk(logits, method, bias)[1].tolist() == [[0, 1, 2, 3]]


def test_a_subnormal_bias_is_zero() -> None:
    logits = np.full((1, 2), 2e-38, np.float32)
    bias = np.array([0, 1e-39], np.float32)
    assert activation_topk(logits, RoutingMethod(2, 2, "identity"), bias)[1].tolist() == [[0, 1]]
