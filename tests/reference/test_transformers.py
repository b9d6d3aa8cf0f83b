# SPDX-License-Identifier: Apache-2.0
"""The reference against DeepSeek-V4's routers in the transformers package, on the CPU, with random weights."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from cupy_router.method import RoutingMethod, presets
from cupy_router.reference.activation_topk import activation_topk
from cupy_router.reference.hash_router import hash_router
from tests import frameworks

torch = pytest.importorskip("torch", reason="PyTorch is not installed")
frameworks.transformers_with_models()
modeling = pytest.importorskip(
    "transformers.models.deepseek_v4.modeling_deepseek_v4", reason="transformers has no DeepSeek-V4 here"
)

NUM_TOKENS, HIDDEN, VOCAB = 512, 64, 300

METHODS = {
    "small": RoutingMethod(16, 4, renormalize_eps=1e-20, scale=1.5),
    "small, sigmoid": RoutingMethod(16, 4, "sigmoid", renormalize_eps=1e-20, scale=1.5),
    **{name: method for name, method in presets().items() if name.startswith("deepseek-v4")},
}


@pytest.fixture(autouse=True)
def seeded() -> Iterator[None]:
    with torch.random.fork_rng(), torch.no_grad():
        torch.manual_seed(20261122)
        yield


def build(router: type, method: RoutingMethod) -> Any:
    """A router with a gate whose logits spread from about -6 to 6."""
    from transformers import DeepseekV4Config

    config = DeepseekV4Config(
        vocab_size=VOCAB,
        hidden_size=HIDDEN,
        n_routed_experts=method.num_experts,
        num_experts_per_tok=method.top_k,
        scoring_func=method.score,
        routed_scaling_factor=method.scale,
    )
    module = router(config)
    module.weight.normal_(std=1.5 / HIDDEN**0.5)
    return module


def scatter(weights: np.ndarray, indices: np.ndarray, num_experts: int) -> np.ndarray:
    """[num_tokens, num_experts]: transformers leaves a token's experts in no particular order."""
    dense = np.zeros((len(weights), num_experts), weights.dtype)
    np.put_along_axis(dense, indices.astype(np.int64), weights, axis=-1)
    return dense


def assert_same(ours: tuple[np.ndarray, np.ndarray], theirs: tuple[Any, Any], num_experts: int) -> None:
    got = scatter(*ours, num_experts)
    expected = scatter(theirs[0].numpy(), theirs[1].numpy(), num_experts)
    np.testing.assert_array_equal(got != 0, expected != 0)
    np.testing.assert_allclose(got, expected, rtol=1e-6)


@pytest.mark.parametrize("name", METHODS)
@pytest.mark.parametrize("centre", [0.0, 8.08])
def test_topk_router(name: str, centre: float) -> None:
    method = METHODS[name]
    router = build(modeling.DeepseekV4TopKRouter, method)
    bias = router.e_score_correction_bias.normal_(mean=centre, std=0.25)
    logits, weights, indices = router(torch.randn(NUM_TOKENS, HIDDEN))

    # Where the last chosen and the first left out are closer than rounding, either is right: leave those tokens out.
    selection = router.score_fn(logits.double()) + bias.double()
    ranked = selection.sort(descending=True).values
    clear = ranked[:, method.top_k - 1] - ranked[:, method.top_k] > 4 * 2**-23 * (1 + centre)
    assert clear.float().mean() > 0.99
    ours = activation_topk(logits[clear].numpy(), method, bias.numpy())
    assert_same(ours, (weights[clear], indices[clear]), method.num_experts)

    unbiased = activation_topk(logits[clear].numpy(), method)[1]
    changed = (np.sort(unbiased) != np.sort(ours[1])).any(axis=-1)
    assert changed.mean() > 0.5, "the bias changes too few picks to show that it is used"


@pytest.mark.parametrize("name", METHODS)
@pytest.mark.parametrize("given", ["logits", "x"])
def test_hash_router(name: str, given: str) -> None:
    method = METHODS[name]
    router = build(modeling.DeepseekV4HashRouter, method)
    router.tid2eid.copy_(torch.rand(VOCAB, method.num_experts).argsort()[:, : method.top_k])
    x, token_ids = torch.randn(NUM_TOKENS, HIDDEN), torch.randint(VOCAB, (NUM_TOKENS,))
    if given == "x":  # in float64 there, so that the rounding of its dot products does not show
        logits, weights, indices = router.double()(x.double(), token_ids)
        inputs = {"x": x.numpy(), "weight": router.weight.float().numpy()}
    else:
        logits, weights, indices = router(x, token_ids)
        inputs = {"logits": logits.numpy()}

    ours = hash_router(token_ids.numpy(), router.tid2eid.numpy(), method, **inputs)
    np.testing.assert_array_equal(ours[1], indices.numpy())
    np.testing.assert_allclose(ours[0], weights.numpy(), rtol=1e-6)

    one_more = replace(method, scale=method.scale * (1 + 2**-18))
    other = hash_router(token_ids.numpy(), router.tid2eid.numpy(), one_more, **inputs)[0]
    assert (abs(other - weights.numpy()) > 1e-6 * other).all(), "the tolerance is too wide to tell scales apart"
