# SPDX-License-Identifier: Apache-2.0
"""Results do not depend on the default dtype and the default device of PyTorch."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest

torch = pytest.importorskip("torch")

from cupy_router import RoutingMethod, activation_topk  # noqa: E402
from cupy_router.torch import load_balance, replace_routers  # noqa: E402
from tests import frameworks  # noqa: E402
from tests.gradient_cases import KINDS  # noqa: E402
from tests.torch_gradients import Case  # noqa: E402

METHOD = RoutingMethod(16, 4, "softmax")


@pytest.fixture(params=["bfloat16", "float16", "float64", "a default device"])
def default(request: pytest.FixtureRequest) -> Iterator[None]:
    if request.param == "a default device":
        torch.set_default_device("meta")
    else:
        torch.set_default_dtype(getattr(torch, request.param))
    yield
    torch.set_default_device(None)
    torch.set_default_dtype(torch.float32)


def _gradients(case: Case) -> list[Any]:
    routing = case.call()
    loss = (routing.weights.float() * case.upstream).sum()
    return [*routing, *torch.autograd.grad(loss, list(case.smooth.values()))]


@pytest.fixture(scope="module")
def plain() -> dict[str, list[Any]]:
    return {kind: _gradients(Case(kind, "everything")) for kind in KINDS}


@pytest.mark.parametrize("kind", KINDS)
def test_gradients(kind: str, plain: dict[str, list[Any]], default: None) -> None:
    with torch.device("cpu"):
        case = Case(kind, "everything")
    assert_same(_gradients(case), plain[kind])


@pytest.mark.slow("seconds")
def test_compiled_gradients_and_load_balance(default: None) -> None:
    with torch.device("cpu"):
        logits = torch.randn(6, 16, dtype=torch.float32, requires_grad=True)
        scale = torch.rand(16, dtype=torch.float32, requires_grad=True)
    routing = activation_topk(logits, METHOD, expert_scale=scale)
    eager = [*torch.autograd.grad(routing.weights.sum(), [logits, scale])]
    balance = load_balance(logits, routing.indices, METHOD)
    assert balance.mean_scores.dtype == torch.float32
    assert balance.mean_scores.device.type == "cpu"
    torch.testing.assert_close(balance.mean_scores, logits.softmax(dim=1).mean(dim=0))

    route = torch.compile(
        lambda *a: activation_topk(a[0], METHOD, expert_scale=a[1]), fullgraph=True, backend="aot_eager"
    )
    assert_same(list(torch.autograd.grad(route(logits, scale).weights.sum(), [logits, scale])), eager)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_swapped_routers(dtype: Any) -> None:
    """The proof before the swap and the swapped forward, in a model that was built under another default dtype."""
    transformers = frameworks.transformers_with_models()
    torch.set_default_dtype(dtype)
    try:
        config = transformers.Qwen3MoeConfig(
            vocab_size=64, hidden_size=32, intermediate_size=32, moe_intermediate_size=16, num_hidden_layers=2,
            num_attention_heads=2, num_key_value_heads=1, head_dim=16, num_experts=8, num_experts_per_tok=2,
        )  # fmt: skip
        model = transformers.Qwen3MoeForCausalLM(config).eval()
        ids = torch.arange(10)[None]
        want = model(ids, output_router_logits=True)
        assert replace_routers(model) == 2
        got = model(ids, output_router_logits=True)
        assert got.logits.dtype == want.logits.dtype == dtype
        torch.testing.assert_close(got.logits, want.logits, rtol=0.05, atol=0.05)
    finally:
        torch.set_default_dtype(torch.float32)


def assert_same(got: list[Any], want: list[Any]) -> None:
    for ours, theirs in zip(got, want, strict=True):
        assert (ours.dtype, ours.device) == (theirs.dtype, theirs.device)
        assert ours.equal(theirs)
