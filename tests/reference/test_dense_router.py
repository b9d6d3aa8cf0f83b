# SPDX-License-Identifier: Apache-2.0
"""The reference of dense_router against exact arithmetic and against transformers."""

from __future__ import annotations

from fractions import Fraction

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays

from cupy_router.method import RoutingMethod
from cupy_router.reference.activation_topk import activation_topk
from cupy_router.reference.dense_router import dense_router
from cupy_router.reference.scoring import SCORE_FUNCTIONS
from tests import frameworks
from tests.backends import DTYPES

FINITE = st.floats(-1e4, 1e4, width=16)


@given(st.data())
def test_logits_are_rounded_once(data: st.DataObject) -> None:
    """Against sums of fractions: without cancellation the float64 product is exact to far below half a float32 step."""
    n, experts, hidden = (data.draw(st.integers(low, 6)) for low in (0, 1, 1))
    dtypes = st.sampled_from([DTYPES[name] for name in ("float32", "float16", "bfloat16")])
    x = data.draw(arrays.arrays(np.float32, (n, hidden), elements=FINITE)).astype(data.draw(dtypes))
    weight = data.draw(arrays.arrays(np.float32, (experts, hidden), elements=FINITE)).astype(data.draw(dtypes))
    method = RoutingMethod(experts, experts, "identity", renormalize=False)
    weights, indices = dense_router(x, weight, method)
    for row, values, chosen in zip(x.astype(float), weights, indices, strict=True):
        for value, expert in zip(values, chosen, strict=True):
            terms = [
                Fraction(a) * Fraction(b)
                for a, b in zip(row.tolist(), weight[expert].astype(float).tolist(), strict=True)
            ]
            exact, size = float(sum(terms)), float(sum(map(abs, terms)))
            assert abs(float(value) - exact) <= 2**-24 * abs(exact) + 2**-48 * size + 2**-126


@pytest.mark.parametrize("score", SCORE_FUNCTIONS)
@pytest.mark.parametrize("num_valid", [None, 0, 3, 7])
def test_equals_activation_topk_of_the_product(score: str, num_valid: int | None) -> None:
    draw = np.random.default_rng(20261122)
    x, weight, bias = (draw.standard_normal(shape).astype(np.float32) for shape in ((7, 12), (9, 12), (9,)))
    method = RoutingMethod(9, 3, score, scale=2.0)
    logits = (x.astype(np.float64) @ weight.T.astype(np.float64)).astype(np.float32)
    for got, want in zip(
        dense_router(x, weight, method, bias, num_valid=num_valid),
        activation_topk(logits, method, bias, num_valid=num_valid),
        strict=True,
    ):
        np.testing.assert_array_equal(got, want)
        assert got.dtype == want.dtype


def test_padding_is_not_computed() -> None:
    """Values in padded rows, NaN and infinity among them, raise no warning and reach no result."""
    x = np.full((4, 3), np.inf, np.float32)
    x[0] = 1.0
    weights, indices = dense_router(x, np.eye(3, dtype=np.float32), RoutingMethod(3, 2), num_valid=1)
    np.testing.assert_array_equal(indices, [[0, 1], [-1, -1], [-1, -1], [-1, -1]])
    assert (weights[1:] == 0).all()
    np.testing.assert_allclose(weights[0], [0.5, 0.5])


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_the_router_of_transformers(dtype: str) -> None:
    """x of either dtype with a float32 gate; products in float32."""
    torch = pytest.importorskip("torch")
    frameworks.transformers_with_models()
    modeling = pytest.importorskip("transformers.models.deepseek_v4.modeling_deepseek_v4")
    from transformers import DeepseekV4Config

    config = DeepseekV4Config(hidden_size=64, n_routed_experts=16, num_experts_per_tok=4, routed_scaling_factor=1.5)
    with torch.random.fork_rng(), torch.no_grad():
        torch.manual_seed(20261122)
        router = modeling.DeepseekV4TopKRouter(config)
        router.weight.normal_(std=0.2)
        bias = router.e_score_correction_bias.normal_(std=0.25)
        x = torch.randn(200, 64).to(getattr(torch, dtype)).float()
        logits, weights, indices = router(x)
    ranked = (router.score_fn(logits.double()) + bias.double()).sort(descending=True).values
    clear = (ranked[:, 3] - ranked[:, 4] > 1e-5).numpy()
    assert clear.mean() > 0.95
    method = RoutingMethod(16, 4, renormalize_eps=1e-20, scale=1.5)
    got = dense_router(x.numpy().astype(DTYPES[dtype]), router.weight.detach().numpy(), method, bias.numpy())
    dense = np.zeros((2, 200, 16), np.float32)
    np.put_along_axis(dense[0], got[1].astype(np.int64), got[0], -1)
    np.put_along_axis(dense[1], indices.numpy(), weights.numpy(), -1)
    np.testing.assert_allclose(dense[0][clear], dense[1][clear], rtol=1e-5)
