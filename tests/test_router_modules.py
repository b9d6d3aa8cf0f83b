# SPDX-License-Identifier: Apache-2.0
"""How routers are recognised by replace_routers, on modules made for it, and which are left alone."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest

from tests import frameworks

torch = pytest.importorskip("torch", reason="PyTorch is not installed")
transformers = frameworks.transformers_with_models()

from cupy_router.torch import replace_routers, restore_routers  # noqa: E402
from tests import moe_configs  # noqa: E402
from tests.moe_configs import NUM_EXPERTS, TOP_K  # noqa: E402


@pytest.fixture(autouse=True)
def _quiet() -> Iterator[None]:
    with moe_configs.seeded_on_one_thread():
        yield


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    return moe_configs.counted_calls(monkeypatch)


class Gate(torch.nn.Module):
    """A router as some model might have it: what it returns is up to the test."""

    def __init__(self, *outputs: str) -> None:
        super().__init__()
        self.weight = torch.nn.Parameter(torch.randn(NUM_EXPERTS, 64) / 8)
        self.outputs = outputs

    def forward(self, hidden_states: Any) -> Any:
        logits = torch.nn.functional.linear(hidden_states, self.weight)
        weights, indices = logits.float().softmax(-1).topk(TOP_K)
        weights = (weights / weights.sum(-1, keepdim=True)).to(logits.dtype)
        return tuple({"logits": logits, "weights": weights, "indices": indices}[output] for output in self.outputs)


class Block(torch.nn.Module):
    def __init__(self, router: Any, experts: Any = None) -> None:
        super().__init__()
        self.anything = router
        self.experts = torch.nn.Linear(64, 64) if experts is None else experts
        self.shared_expert_gate = torch.nn.Linear(64, 1)
        self.unrelated = torch.nn.Linear(64, NUM_EXPERTS)
        self.config = {"model_type": "mixtral", "num_local_experts": NUM_EXPERTS, "num_experts_per_tok": TOP_K}


@pytest.mark.parametrize(
    ("outputs", "op"),
    [
        (("logits", "weights", "indices"), "activation_topk"),
        (("indices", "weights", "logits"), "activation_topk"),
        (("weights", "indices"), "dense_router"),
        (("indices", "weights"), "dense_router"),
    ],
)
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_results_are_recognised_by_their_shapes(
    outputs: tuple[str, ...], op: str, dtype: str, calls: list[str]
) -> None:
    block = Block(Gate(*outputs)).to(getattr(torch, dtype))
    x = torch.randn(50, 64).to(getattr(torch, dtype))
    with torch.no_grad():
        theirs = dict(zip(outputs, block.anything(x), strict=True))
        assert replace_routers(block) == 1
        ours = dict(zip(outputs, block.anything(x), strict=True))
    assert calls == [op]
    for output in outputs:
        assert (ours[output].dtype, ours[output].shape) == (theirs[output].dtype, theirs[output].shape)
    if dtype == "float32":
        assert torch.equal(ours["indices"], theirs["indices"])
        torch.testing.assert_close(ours["weights"], theirs["weights"])


class OtherName(Gate):
    def forward(self, tokens: Any) -> Any:
        return super().forward(tokens)


def test_the_first_argument_may_have_any_name(calls: list[str]) -> None:
    block = Block(OtherName("logits", "weights", "indices"))
    x = torch.randn(50, 64)
    with torch.no_grad():
        theirs = block.anything(tokens=x)
        assert replace_routers(block) == 1
        assert torch.equal(block.anything(tokens=x)[2], theirs[2])
    assert calls == ["activation_topk"]


class Inline(Block):
    """A block that routes by a method of its own, with a linear layer for a gate."""

    def __init__(self) -> None:
        super().__init__(torch.nn.Linear(64, NUM_EXPERTS, bias=False))
        del self.unrelated

    def route_tokens_to_experts(self, hidden_states: Any, router_logits: Any) -> Any:
        weights, indices = router_logits.float().softmax(-1).topk(TOP_K)
        return indices, (weights / weights.sum(-1, keepdim=True)).to(hidden_states.dtype)

    def forward(self, x: Any) -> Any:
        return self.route_tokens_to_experts(x, self.anything(x))


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_blocks_that_route_inline(dtype: str, calls: list[str]) -> None:
    block = Inline().to(getattr(torch, dtype))
    x = torch.randn(50, 64).to(getattr(torch, dtype))
    theirs = block(x)
    (gradient,) = torch.autograd.grad(theirs[1].float().square().sum(), block.anything.weight)
    assert replace_routers(block) == 1
    ours = block(x)
    assert calls == ["activation_topk"]
    assert block.anything(x).dtype == torch.float32
    (own,) = torch.autograd.grad(ours[1].float().square().sum(), block.anything.weight)
    assert [result.dtype for result in ours] == [result.dtype for result in theirs]
    if dtype == "float32":
        assert torch.equal(ours[0], theirs[0])
        torch.testing.assert_close(ours[1], theirs[1])
        torch.testing.assert_close(own, gradient, rtol=1e-4, atol=1e-5)
    assert restore_routers(block) == 1
    assert type(block.anything) is torch.nn.Linear
    assert type(block) is Inline


def with_tensor(name: str) -> Any:
    gate = Gate("logits", "weights", "indices")
    gate.register_buffer(name, torch.ones(NUM_EXPERTS))
    return gate


class WithArgument(Gate):
    def forward(self, hidden_states: Any, temperature: float = 1.0) -> Any:
        return super().forward(hidden_states / temperature)


class OtherWidth(Gate):
    def forward(self, hidden_states: Any) -> Any:
        logits, weights, indices = super().forward(hidden_states)
        return logits, weights[:, :-1], indices[:, :-1]


@pytest.mark.parametrize(
    ("router", "reason"),
    [
        (lambda: with_tensor("temperature"), "Gate has a tensor temperature, whose meaning is not known"),
        (lambda: with_tensor("global_scale"), r"global_scale \[24\] of Gate is not what 24 experts need"),
        (
            lambda: WithArgument("logits", "weights", "indices"),
            "WithArgument takes hidden_states, temperature, which are not all known",
        ),
        (lambda: OtherWidth("logits", "weights", "indices"), "none of its children .*returns weights and indices of 4"),
        (lambda: Gate("logits", "weights"), "none of its children anything, shared_expert_gate, unrelated multiplies"),
        (lambda: torch.nn.Linear(64, NUM_EXPERTS), "none of its children"),
    ],
)
def test_unknown_blocks_are_left_unchanged(router: Any, reason: str) -> None:
    blocks = torch.nn.Sequential(Block(router()), Block(router()))
    with pytest.warns(
        UserWarning, match=rf"replace_routers left Block \(0 and 1 more\) as it is: .*{reason}"
    ) as caught:
        assert replace_routers(blocks) == 0
    assert len(caught) == 1
    assert restore_routers(blocks) == 0


def test_a_method_for_another_number_of_experts_leaves_the_router() -> None:
    block = Block(Gate("logits", "weights", "indices"))
    block.config["num_local_experts"] = NUM_EXPERTS - 1
    with pytest.warns(UserWarning, match="with a gate of 23 rows"):
        assert replace_routers(block) == 0


def test_two_routers_in_one_block_leave_both() -> None:
    block = Block(Gate("logits", "weights", "indices"))
    block.other = Gate("logits", "weights", "indices")
    with pytest.warns(UserWarning, match="2 of its children"):
        assert replace_routers(block) == 0


def test_a_forward_on_the_instance_leaves_the_router() -> None:
    model = moe_configs.build(transformers.MixtralForCausalLM)
    gate = model.model.layers[1].mlp.gate
    gate.forward = gate.forward
    with pytest.warns(UserWarning, match=r"\(model.layers.1.mlp\) .*MixtralTopKRouter has been replaced on the inst"):
        assert replace_routers(model) == 1


def test_models_without_experts() -> None:
    model = moe_configs.build(transformers.LlamaForCausalLM)
    with pytest.warns(UserWarning, match="replace_routers left LlamaForCausalLM as it is: llama: has no experts"):
        assert replace_routers(model) == 0
    with pytest.warns(UserWarning, match="left Linear as it is: it has no config"):
        assert replace_routers(torch.nn.Linear(2, 2)) == 0


@pytest.mark.parametrize("function", [replace_routers, restore_routers])
@pytest.mark.parametrize("wrong", [None, {}, torch.nn.Linear, torch.zeros(2)])
def test_not_a_module(function: Any, wrong: Any) -> None:
    with pytest.raises(TypeError, match=f"{function.__name__}: model must be a torch.nn.Module, got "):
        function(wrong)
