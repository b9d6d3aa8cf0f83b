# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from cupy_router.method import SCORES, RoutingMethod
from cupy_router.reference.scoring import SCORE_FUNCTIONS, flush, gate_logits, renormalize_and_scale, score_logits
from tests import oracle
from tests.reference import exact_scores
from tests.reference.strategies import dtypes, matrices, thorough

pytestmark = pytest.mark.filterwarnings("error")


@pytest.fixture(autouse=True)
def _as_the_ops_call_it() -> Iterator[None]:
    with np.errstate(all="ignore"):
        yield


inf, nan = np.inf, np.nan


def test_every_score_has_its_function() -> None:
    assert tuple(SCORE_FUNCTIONS) == SCORES


@pytest.mark.parametrize("score", SCORES)
@thorough
@given(data=st.data(), dtype=dtypes, columns=st.integers(1, 9))
def test_scores_are_the_real_numbers_rounded(score: str, data: st.DataObject, dtype: str, columns: int) -> None:
    """1 unit in the last place: float64 arithmetic may be on the other side of a tie between two float32."""
    logits, method = data.draw(matrices((1, columns), dtype)), RoutingMethod(columns, 1, score)
    want = exact_scores.scores(logits[0].astype(float).tolist(), score)
    for scores in (score_logits(logits, method), oracle.score(logits, method)):
        assert scores.dtype == np.float32
        np.testing.assert_allclose(scores[0], want, rtol=1.2e-7)


@pytest.mark.parametrize(
    ("score", "logit", "expected"),
    [
        ("sqrtsoftplus", -20.0, np.exp(-10.0)),
        ("sqrtsoftplus", -174.0, np.exp(-87.0)),  # float32 would flush exp(-174), not its square root
        ("sqrtsoftplus", -175.0, 0.0),
        ("sqrtsoftplus", -inf, 0.0),
        ("sqrtsoftplus", 400.0, 20.0),
        ("sqrtsoftplus", inf, inf),
        ("sigmoid", -87.0, np.exp(-87.0)),
        ("sigmoid", -88.0, 0.0),
        ("sigmoid", -inf, 0.0),
        ("sigmoid", inf, 1.0),
        ("identity", 1e-40, 0.0),
        ("identity", -1e-40, 0.0),
        ("identity", -inf, -inf),
    ],
)
def test_scores_at_their_limits(score: str, logit: float, expected: float) -> None:
    got = score_logits(np.array([[logit]], np.float32), RoutingMethod(1, 1, score))
    np.testing.assert_allclose(got, [[expected]], rtol=1e-7)


@pytest.mark.parametrize(
    ("logits", "expected"),
    [
        ([0, nan, 0], [0.5, nan, 0.5]),
        ([inf, 1, inf, -inf], [0.5, 0, 0.5, 0]),
        ([-inf, -inf], [0.5, 0.5]),
        ([-inf, nan], [1, nan]),
        ([inf, nan], [1, nan]),
        ([nan, nan], [nan, nan]),
        ([3e38, -3e38], [1, 0]),
    ],
)
def test_softmax_with_nan_and_infinity(logits: list[float], expected: list[float]) -> None:
    got = score_logits(np.array([logits], np.float32), RoutingMethod(len(logits), 1, "softmax"))
    np.testing.assert_array_equal(got, np.array([expected], np.float32))


@pytest.mark.parametrize(
    ("scores", "fields", "expected"),
    [
        ([1, 3], {}, [0.25, 0.75]),
        ([1, 3], {"scale": 2}, [0.5, 1.5]),
        ([1, 3], {"renormalize": False, "scale": 2}, [2, 6]),
        ([1, 3], {"renormalize_eps": 4}, [0.125, 0.375]),
        ([1, 3], {"renormalize_min": 8}, [0.125, 0.375]),
        ([1, 3], {"renormalize_min": 2}, [0.25, 0.75]),
        ([1, nan, 3], {}, [0.25, nan, 0.75]),
        ([inf, 3, nan], {}, [nan, 0, nan]),
        ([inf, inf, 3], {}, [nan, nan, 0]),
        ([inf, 3, -inf], {}, [nan, 0, nan]),
        ([3, -inf], {}, [0, nan]),
        ([3, -inf], {"renormalize_min": 2}, [1.5, -inf]),
        ([inf, 3], {"renormalize": False}, [inf, 3]),
        ([0, 0], {}, [0, 0]),
        ([0, 0], {"renormalize_eps": 1e-20}, [0, 0]),
        ([0, 0], {"renormalize_min": 1e-12}, [0, 0]),
        ([1, -1], {}, [0, 0]),
        ([1, -1], {"renormalize_eps": 1e-20}, [0, 0]),
        ([-1, -1], {"renormalize_eps": 2}, [0, 0]),
        ([nan, nan], {}, [nan, nan]),
        ([nan, 0], {}, [nan, 0]),
        ([1e-37, 1], {}, [1e-37, 1]),
        ([1e-38, 1], {}, [0, 1]),
    ],
)
def test_weights(scores: list[float], fields: dict[str, float], expected: list[float]) -> None:
    method = RoutingMethod(8, len(scores), "identity", **fields)  # type: ignore[arg-type]
    got = renormalize_and_scale(np.array([scores], np.float32), method)
    assert got.dtype == np.float32
    np.testing.assert_array_equal(got, np.array([expected], np.float32))


def test_flush_keeps_normal_numbers() -> None:
    tiny = np.float32(2.0**-126)
    below = np.nextafter(tiny, np.float32(0))
    values = np.array([tiny, -tiny, below, -below, 0, inf, -inf], np.float32)
    np.testing.assert_array_equal(flush(values), np.array([tiny, -tiny, 0, 0, 0, inf, -inf], np.float32))
    assert np.isnan(flush(np.array([nan], np.float32)))


def test_gate_logits_are_summed_in_float64() -> None:
    x = np.array([[2.0**30, 1.0, -(2.0**30)]] * 200_000, np.float32)  # more than one slice of rows
    np.testing.assert_array_equal(gate_logits(x, np.ones((2, 3), np.float16)), np.ones((200_000, 2), np.float32))
