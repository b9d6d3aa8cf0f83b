# SPDX-License-Identifier: Apache-2.0
"""How routers are recognised by replace_routers, on modules made for it, and which are left alone."""

from __future__ import annotations

import functools
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
    "outputs",
    [
        ("logits", "weights", "indices"),
        ("indices", "weights", "logits"),
        ("weights", "indices"),
        ("indices", "weights"),
    ],
)
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_results_are_recognised_by_their_shapes(outputs: tuple[str, ...], dtype: str, calls: list[str]) -> None:
    block = Block(Gate(*outputs)).to(getattr(torch, dtype))
    x = torch.randn(50, 64).to(getattr(torch, dtype))
    with torch.no_grad():
        theirs = dict(zip(outputs, block.anything(x), strict=True))
        assert replace_routers(block) == 1
        ours = dict(zip(outputs, block.anything(x), strict=True))
    assert calls == ["dense_router"]
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
    assert calls == ["dense_router"]


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


class InlineWithBias(Inline):
    """Its gate takes [batch, sequence, hidden] and computes in float32; its method returns a list of all tokens."""

    def __init__(self) -> None:
        super().__init__()
        self.expert_bias = torch.nn.Parameter(torch.randn(NUM_EXPERTS))
        self.config = dict(self.config, model_type="lfm2_moe", norm_topk_prob=True, routed_scaling_factor=1.0)

    def route_tokens_to_experts(self, router_logits: Any) -> Any:
        batch, sequence, num_experts = router_logits.shape  # an error for other numbers of dimensions
        scores = router_logits.view(batch * sequence, num_experts).sigmoid()
        indices = (scores + self.expert_bias).topk(TOP_K).indices
        weights = scores.gather(1, indices)
        return indices, weights / (weights.sum(-1, keepdim=True) + 1e-6)

    def forward(self, x: Any) -> Any:
        return self.route_tokens_to_experts(torch.nn.functional.linear(x.float(), self.anything.weight.float()))


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_blocks_that_route_sequences_inline(dtype: str, calls: list[str]) -> None:
    block, x = InlineWithBias().to(getattr(torch, dtype)), torch.randn(2, 25, 64).to(getattr(torch, dtype))
    theirs = block(x)
    assert replace_routers(block) == 1
    ours = block(x)
    assert calls == ["activation_topk"]
    assert [(result.dtype, result.shape) for result in ours] == [(result.dtype, result.shape) for result in theirs]
    order = [results[0].argsort(dim=1) for results in (ours, theirs)]
    assert torch.equal(ours[0].gather(1, order[0]), theirs[0].gather(1, order[1]))
    torch.testing.assert_close(ours[1].gather(1, order[0]), theirs[1].gather(1, order[1]))
    with pytest.raises(ValueError, match="not enough values to unpack"):  # the model's own
        block(x[0])
    assert block.anything(x).shape == (2, 25, NUM_EXPERTS)
    assert restore_routers(block) == 1


class Flattening(torch.nn.Linear):
    def forward(self, x: Any) -> Any:
        return super().forward(x.reshape(-1, x.shape[-1]))


@pytest.mark.parametrize("kind", [torch.nn.Linear, Flattening])
def test_gates_of_blocks_keep_the_shape_of_their_logits(kind: type) -> None:
    block, x = Inline(), torch.randn(2, 5, 64)
    block.anything = kind(64, NUM_EXPERTS, bias=False)
    theirs = block.anything(x)
    assert replace_routers(block) == 1
    torch.testing.assert_close(block.anything(x), theirs)


# -- What is proved before a swap --------------------------------------------------------------------------------------


def test_other_numbers_of_dimensions_run_the_code_of_the_model(calls: list[str]) -> None:
    """This router returns [batch, sequence, top_k] for [batch, sequence, hidden]; models flatten it before."""
    block, x = Block(Gate("logits", "weights", "indices")), torch.randn(2, 5, 64)
    theirs = block.anything(x)
    assert replace_routers(block) == 1
    assert all(torch.equal(our, their) for our, their in zip(block.anything(x), theirs, strict=True))
    assert calls == []
    block.anything(x[0])
    assert calls == ["dense_router"]


class InTraining(Gate):
    """A router that does something of its own in training."""

    def forward(self, hidden_states: Any) -> Any:
        return super().forward(hidden_states * 2 if self.training else hidden_states)


def test_a_router_that_differs_in_training_runs_the_code_of_the_model_there(calls: list[str]) -> None:
    block, x = Block(InTraining("logits", "weights", "indices")), torch.randn(5, 64)
    theirs = block.anything(x)
    state = torch.get_rng_state()
    assert replace_routers(block) == 1
    assert torch.equal(torch.get_rng_state(), state)
    assert all(torch.equal(our, their) for our, their in zip(block.anything(x), theirs, strict=True))
    assert calls == []
    torch.testing.assert_close(block.eval().anything(x / 0.5)[1], theirs[1])
    assert calls == ["dense_router"]


class Ignoring(Gate):
    """A router that takes a bias and makes nothing of it."""

    def forward(self, hidden_states: Any, e_score_correction_bias: Any = None) -> Any:
        return super().forward(hidden_states)


def test_an_argument_that_the_router_ignores(calls: list[str]) -> None:
    block, x, bias = Block(Ignoring("logits", "weights", "indices")), torch.randn(50, 64), torch.randn(NUM_EXPERTS)
    theirs = block.anything(x, bias)
    assert replace_routers(block) == 1
    for ours in (block.anything(x, bias), block.anything(x), block.anything(x, e_score_correction_bias=bias)):
        assert torch.equal(ours[2], theirs[2])
    assert calls == ["dense_router"] * 3


class Probabilities(Gate):
    """A router that calls its probabilities logits, as those of transformers 5.0 do."""

    def forward(self, hidden_states: Any) -> Any:
        logits, weights, indices = super().forward(hidden_states)
        return logits.softmax(-1), weights, indices


def test_probabilities_in_place_of_logits(calls: list[str]) -> None:
    block, x = Block(Probabilities("logits", "weights", "indices")), torch.randn(50, 64)
    theirs = block.anything(x)
    assert replace_routers(block) == 1
    torch.testing.assert_close(block.anything(x), theirs)
    assert calls == ["dense_router"]


class OnGpuOnly(Gate):
    """A router whose code runs on meta tensors, but not on the CPU in float32."""

    def forward(self, hidden_states: Any) -> Any:
        if hidden_states.device.type == "cpu":
            raise NotImplementedError("a kernel for GPUs")
        return super().forward(hidden_states)


class Nowhere(Gate):
    def forward(self, hidden_states: Any) -> Any:
        raise RuntimeError("it needs another package")


class InlineNowhere(Inline):
    def forward(self, x: Any) -> Any:
        raise RuntimeError("it needs another package")


@pytest.mark.parametrize(
    ("block", "reason"),
    [
        (
            lambda: Block(OnGpuOnly("logits", "weights", "indices")),
            "its OnGpuOnly raises NotImplementedError: a kernel",
        ),
        (lambda: Block(Nowhere()), "none of .* experts a token; Nowhere raises RuntimeError: it needs another package"),
        (InlineNowhere, "none of .* experts a token; InlineNowhere raises RuntimeError: it needs another package"),
    ],
)
def test_code_that_cannot_be_tried_leaves_the_router(block: Any, reason: str) -> None:
    made = block()
    with pytest.warns(UserWarning, match=f"replace_routers left {type(made).__name__} as it is: .*{reason}"):
        assert replace_routers(made) == 0


def test_models_of_transformers_4(monkeypatch: pytest.MonkeyPatch) -> None:
    """Their blocks choose experts in their forward, which nothing can be put in place of."""

    class OldBlock(torch.nn.Module):
        __module__ = "transformers.models.mixtral.modeling_mixtral"

        def __init__(self) -> None:
            super().__init__()
            self.gate = torch.nn.Linear(64, NUM_EXPERTS, bias=False)
            self.experts = torch.nn.ModuleList(torch.nn.Linear(64, 64) for _ in range(NUM_EXPERTS))
            self.config = transformers.MixtralConfig(num_local_experts=NUM_EXPERTS, num_experts_per_tok=TOP_K)

    monkeypatch.setattr("transformers.__version__", "4.57.6")
    with pytest.warns(
        UserWarning, match=r"token; this is transformers 4\.57\.6, and replace_routers knows .* of 5\.0 and"
    ):
        assert replace_routers(OldBlock()) == 0
    for version, model in (("4.57.6", torch.nn.Linear(2, 2)), ("10.1.0", OldBlock())):
        monkeypatch.setattr("transformers.__version__", version)
        with pytest.warns(UserWarning, match=r"replace_routers left (?!.*transformers)"):
            assert replace_routers(model) == 0


# -- What is left alone ------------------------------------------------------------------------------------------------


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
    gate.forward = functools.partial(gate.forward)
    with pytest.warns(UserWarning, match=r"\(model.layers.1.mlp\) .*MixtralTopKRouter has been replaced on the inst"):
        assert replace_routers(model) == 1


def test_models_without_experts() -> None:
    model = moe_configs.build(transformers.LlamaForCausalLM)
    with pytest.warns(UserWarning, match="replace_routers left LlamaForCausalLM as it is: llama: has no experts"):
        assert replace_routers(model) == 0
    with pytest.warns(UserWarning, match="left Linear as it is: it has no config"):
        assert replace_routers(torch.nn.Linear(2, 2)) == 0


@pytest.mark.parametrize("wrong", ["eager", 1, None])
def test_experts_is_a_bool(wrong: Any) -> None:
    """It is not the name of an implementation."""
    with pytest.raises(TypeError, match=f"^replace_routers: experts must be a bool, got {wrong!r}$"):
        replace_routers(torch.nn.Linear(2, 2), experts=wrong)


@pytest.mark.parametrize("function", [replace_routers, restore_routers])
@pytest.mark.parametrize("wrong", [None, {}, torch.nn.Linear, torch.zeros(2)])
def test_not_a_module(function: Any, wrong: Any) -> None:
    with pytest.raises(TypeError, match=f"{function.__name__}: model must be a torch.nn.Module, got "):
        function(wrong)
