# SPDX-License-Identifier: Apache-2.0
"""State dicts of a Gate: saved under Hugging Face's names or DeepSeek's, loaded from either."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

from cupy_router import Router, RoutingMethod
from tests import frameworks
from tests.gates import (
    EXPERTS,
    HIDDEN,
    METHOD,
    K,
    arguments,
    assert_same,
    dense_gate,
    expected,
    hash_gate,
    others,
    randomized,
    seeded,  # noqa: F401
    table,
)

torch = pytest.importorskip("torch", reason="PyTorch is not installed")
from cupy_router.torch import Gate, deepseek_state_dict  # noqa: E402

SOFTMAX = RoutingMethod(EXPERTS, K, "softmax")
AFTER = RoutingMethod(EXPERTS, K, "softmax", score_after_topk=True, renormalize=False)
BEFORE = RoutingMethod(EXPERTS, K, "softmax", bias_on="logits")


def biased() -> Any:
    return randomized(Gate(HIDDEN, METHOD, bias=True))


def weight_and(name: str, value: Any) -> dict[str, Any]:
    return {"weight": torch.randn(EXPERTS, HIDDEN), name: value}


# -- Loading -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("assign", [False, True])
@pytest.mark.parametrize(
    "name",
    ["bias", "e_score_correction_bias", "moe_statics.e_score_correction_bias", "expert_bias", "router_bias"],
)
def test_the_bias_of_any_checkpoint(name: str, assign: bool) -> None:
    gate, x = biased(), torch.randn(5, HIDDEN)
    state = weight_and(name, torch.randn(EXPERTS))
    given = dict(state)
    assert not any(gate.load_state_dict(state, assign=assign))
    assert state.keys() == given.keys()
    assert_same(gate(x), expected({"weight": state["weight"], "e_score_correction_bias": state[name]}, x))
    layer = {f"layers.3.ffn.gate.{key}": value for key, value in state.items()}
    assert_same(gate(x), Router.from_state_dict(layer, "layers.3", METHOD)(x))


@pytest.mark.parametrize("linear", ["wg", "classifier", "layer", "proj", "gate"])
def test_the_weight_of_a_linear_layer_in_a_router(linear: str) -> None:
    gate, x = biased(), torch.randn(5, HIDDEN)
    state = {f"{linear}.weight": torch.randn(EXPERTS, HIDDEN), "e_score_correction_bias": torch.randn(EXPERTS)}
    gate.load_state_dict(state)
    assert_same(gate(x), expected({**state, "weight": state[f"{linear}.weight"]}, x))
    layer = {f"layers.3.mlp.router.{key}": value for key, value in state.items()}
    assert_same(gate(x), Router.from_state_dict(layer, "layers.3", METHOD)(x))


@pytest.mark.parametrize("assign", [False, True])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("shape", [(EXPERTS,), (1, EXPERTS)])
def test_biases_become_float32_of_one_axis(shape: tuple[int, ...], dtype: Any, assign: bool) -> None:
    gate = dense_gate()
    state = {name: tensor.to(dtype) for name, tensor in others(gate).items()}
    state |= {name: tensor.reshape(shape) for name, tensor in state.items() if name != "weight"}
    gate.load_state_dict(state, assign=assign)
    for name, tensor in gate.state_dict().items():
        assert tensor.dtype == (dtype if name == "weight" and assign else torch.float32)
        assert torch.equal(tensor, state[name].float().reshape(tensor.shape))


def test_assigned_parameters_stay_parameters() -> None:
    gate = dense_gate()
    gate.logit_bias.requires_grad_(False)
    tied = torch.nn.Parameter(torch.randn(EXPERTS))
    half = torch.randn(EXPERTS).half()
    gate.load_state_dict({**others(gate), "per_expert_scale": tied, "logit_bias": half}, assign=True)
    assert gate.per_expert_scale is tied
    assert [name for name, parameter in gate.named_parameters() if parameter.requires_grad] == [
        "weight",
        "per_expert_scale",
    ]
    gate(torch.randn(3, HIDDEN)).weights.sum().backward()
    assert gate.weight.grad is not None


@pytest.mark.parametrize("make", [biased, hash_gate])
def test_assigned_buffers_stay_buffers(make: Callable[[], Any]) -> None:
    """Though models have them as parameters."""
    gate = make()
    state = {name: torch.nn.Parameter(value, requires_grad=False) for name, value in others(gate).items()}
    buffers = [name for name, _ in gate.named_buffers()]
    gate.load_state_dict(state, assign=True)
    assert [name for name, _ in gate.named_buffers()] == buffers
    assert all(torch.equal(value, state[name]) for name, value in gate.state_dict().items())


def test_in_a_model_and_in_parts() -> None:
    """As files of a checkpoint are loaded one after the other, each with some keys."""
    model = torch.nn.ModuleDict({"layers": torch.nn.ModuleList([biased(), hash_gate()])})
    state = {"layers.0.weight": torch.randn(EXPERTS, HIDDEN), "layers.0.bias": torch.randn(EXPERTS)}
    state |= {f"layers.1.{name}": tensor for name, tensor in others(model["layers"][1]).items()}
    for key, value in state.items():
        missing, unexpected = model.load_state_dict({key: value}, strict=False)
        assert not unexpected
        assert len(missing) == 5
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, state[name.replace("e_score_correction_bias", "bias")])


@pytest.mark.parametrize(
    ("make", "state", "words"),
    [
        (biased, {"weight": (EXPERTS, HIDDEN)}, 'Missing key.*"e_score_correction_bias"'),
        (biased, {"bias": EXPERTS}, 'Missing key.*"weight"'),
        (biased, {"weight": (EXPERTS, HIDDEN), "bias": EXPERTS, "expert_bias": EXPERTS}, 'Unexpected key.*"bias"'),
        (biased, {"weight": (EXPERTS, HIDDEN), "bias": EXPERTS, "scale": HIDDEN}, 'Unexpected key.*"scale"'),
        (biased, {"weight": (EXPERTS, HIDDEN), "bias": (2, EXPERTS)}, "size mismatch for e_score_correction_bias"),
        (lambda: Gate(HIDDEN, METHOD), {"weight": (EXPERTS, HIDDEN), "bias": EXPERTS}, 'Unexpected key.*"bias"'),
        # Neither the name nor the method says which bias it is.
        (lambda: Gate(HIDDEN, SOFTMAX, bias=True), {"weight": (EXPERTS, HIDDEN), "bias": EXPERTS}, 'Unexpected.*"bia'),
        # Of a linear layer, whose bias this gate does not have.
        (biased, {"wg.weight": (EXPERTS, HIDDEN), "wg.bias": EXPERTS}, 'Unexpected key.*"wg.bias"'),
    ],
)  # fmt: skip
def test_strict_loading_reports_keys(make: Callable[[], Any], state: dict[str, Any], words: str) -> None:
    with pytest.raises(RuntimeError, match=f"(?s){words}"):
        make().load_state_dict({name: torch.randn(shape) for name, shape in state.items()})


def logit_biased(method: RoutingMethod, **options: Any) -> Any:
    return randomized(Gate(HIDDEN, method, logit_bias=True, **options))


@pytest.mark.parametrize("method", [AFTER, SOFTMAX], ids=str)
def test_a_bias_beside_the_gate_is_the_logit_bias_of_a_gate_that_has_no_other(method: RoutingMethod) -> None:
    gate = logit_biased(method)
    state = weight_and("bias", torch.randn(EXPERTS))
    gate.load_state_dict(state)
    x = torch.randn(5, HIDDEN)
    assert_same(gate(x), Router(method, weight=state["weight"], logit_bias=state["bias"])(x))


@pytest.mark.parametrize("method", [AFTER, SOFTMAX, METHOD, BEFORE], ids=str)
@pytest.mark.parametrize("linear", ["wg", "classifier", "layer", "proj", "gate"])
def test_a_linear_layer_in_a_router_is_loaded_with_its_bias(linear: str, method: RoutingMethod) -> None:
    gate = logit_biased(method)
    layer = randomized(torch.nn.Linear(HIDDEN, EXPERTS))
    state = {f"{linear}.{name}": tensor for name, tensor in layer.state_dict().items()}
    if linear == "gate" and method is METHOD:
        with pytest.raises(RuntimeError, match=r"gate\.bias may be the logit_bias or"):
            gate.load_state_dict(state)
        return
    gate.load_state_dict(state)
    x = torch.randn(5, HIDDEN)
    assert_same(gate(x), Router(method, weight=layer.weight, logit_bias=layer.bias)(x))


@pytest.mark.parametrize("strict", [False, True])
@pytest.mark.parametrize(
    "make",
    [
        lambda: logit_biased(METHOD),
        lambda: logit_biased(RoutingMethod(EXPERTS, K)),
        lambda: logit_biased(METHOD, bias=True),
        lambda: logit_biased(SOFTMAX, bias=True),
        hash_gate,
    ],
)
def test_a_bias_that_may_select_is_no_logit_bias(make: Callable[[], Any], strict: bool) -> None:
    model = torch.nn.ModuleDict({"gate": make()})
    state = {f"gate.{name}": tensor for name, tensor in weight_and("bias", torch.randn(EXPERTS)).items()}
    words = "gate.bias may be the logit_bias .* rename it to gate.logit_bias or gate.e_score_correction_bias"
    with pytest.raises(RuntimeError, match=f"(?s){words}"):
        model.load_state_dict(state, strict=strict)


def test_a_bias_beside_a_logit_bias_is_deepseeks() -> None:
    gate, twin, x = dense_gate(), dense_gate(), torch.randn(5, HIDDEN)
    state = deepseek_state_dict(gate)
    assert list(state) == ["weight", "logit_bias", "per_expert_scale", "bias"]
    assert torch.equal(state["bias"], gate.e_score_correction_bias)
    twin.load_state_dict(state)
    assert_same(twin(x), gate(x))
    assert_same(Router.from_state_dict(state, "", METHOD)(x), gate(x))


@pytest.mark.parametrize("layer", [0, 1], ids=["hash", "dense"])
def test_a_gate_takes_the_state_dict_of_a_model(layer: int) -> None:
    transformers = frameworks.transformers_with_models()
    from transformers.models.deepseek_v4.modeling_deepseek_v4 import DeepseekV4SparseMoeBlock

    config = transformers.DeepseekV4Config(
        vocab_size=60, hidden_size=HIDDEN, n_routed_experts=EXPERTS, num_experts_per_tok=K, moe_intermediate_size=8,
        num_hidden_layers=2, mlp_layer_types=["hash_moe", "moe"],
    )  # fmt: skip
    theirs = DeepseekV4SparseMoeBlock(config, layer).gate
    for parameter in theirs.parameters():
        torch.nn.init.normal_(parameter)
    arrays = {"table": torch.zeros_like(theirs.tid2eid)} if layer == 0 else {"bias": True}
    ours = Gate(HIDDEN, RoutingMethod.from_config(config), **arrays)
    ours.load_state_dict(theirs.state_dict())
    theirs.load_state_dict(ours.state_dict())
    x, ids = torch.randn(2, 9, HIDDEN), torch.randint(60, (2, 9))
    _, weights, indices = theirs(x, *([ids] if layer == 0 else []))
    got = ours(x, ids)
    want = torch.zeros(18, EXPERTS).scatter(1, indices, weights)  # they do not sort
    found = torch.zeros(2, 9, EXPERTS).scatter(2, got.indices.long(), got.weights)
    torch.testing.assert_close(found.flatten(0, 1), want)


# -- Saving ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "save", [lambda gate: gate.state_dict(), deepseek_state_dict], ids=["Hugging Face", "DeepSeek"]
)
@pytest.mark.parametrize(
    "make",
    [
        biased,
        lambda: randomized(Gate(HIDDEN, METHOD, bias=True, expert_scale=True)),
        lambda: Gate(HIDDEN, METHOD, table=table()),
        *(lambda method=method: logit_biased(method) for method in (AFTER, SOFTMAX, METHOD, BEFORE)),
        dense_gate,
        hash_gate,
    ],
    ids=["bias", "scale", "table", *(f"logit_bias {i}" for i in range(4)), "all", "hash"],
)
def test_what_is_saved_is_loaded_by_gates_and_routers(make: Callable[[], Any], save: Callable[[Any], Any]) -> None:
    gate, twin = make(), make()
    given = arguments(gate, (5,))
    state = save(gate)
    twin.load_state_dict(state)
    assert_same(twin(*given), gate(*given))
    assert_same(Router.from_state_dict(state, "", gate.method)(*given), gate(*given))


def test_names() -> None:
    assert list(dense_gate().state_dict()) == ["weight", "logit_bias", "per_expert_scale", "e_score_correction_bias"]
    assert list(hash_gate().state_dict()) == ["weight", "logit_bias", "per_expert_scale", "tid2eid"]
    assert list(logit_biased(AFTER).state_dict()) == ["weight", "bias"]
    model = torch.nn.ModuleDict({"a": torch.nn.Sequential(biased()), "b": torch.nn.Linear(2, 2)})
    assert list(deepseek_state_dict(model)) == ["a.0.weight", "a.0.bias", "b.weight", "b.bias"]
    assert list(model.state_dict()) == ["a.0.weight", "a.0.e_score_correction_bias", "b.weight", "b.bias"]


def test_names_of_deepseek_under_a_wrapper_that_hides_its_own_name() -> None:
    wrapper = pytest.importorskip("torch.distributed.algorithms._checkpoint.checkpoint_wrapper")
    model = torch.nn.ModuleDict({"gate": wrapper.checkpoint_wrapper(biased())})
    assert list(deepseek_state_dict(model)) == ["gate.weight", "gate.bias"]
    assert list(model.state_dict()) == ["gate.weight", "gate.e_score_correction_bias"]


def test_names_of_deepseek_where_a_gate_is_used_twice() -> None:
    gate = biased()
    model = torch.nn.ModuleDict({"a": gate, "b": gate})
    assert list(deepseek_state_dict(model)) == ["a.weight", "a.bias", "b.weight", "b.bias"]
    assert deepseek_state_dict(model)._metadata.keys() == {"", "a", "b"}  # type: ignore[attr-defined]  # of PyTorch


def test_no_bias_is_saved_that_would_be_taken_for_another_one() -> None:
    model = torch.nn.ModuleDict({"gate": Gate(HIDDEN, SOFTMAX, bias=True)})
    words = "deepseek_state_dict: gate.e_score_correction_bias cannot be saved as gate.bias, which"
    with pytest.raises(ValueError, match=f"^{words}"):
        deepseek_state_dict(model)
    with pytest.raises(TypeError, match=r"^deepseek_state_dict: model must be a PyTorch module, got OrderedDict"):
        deepseek_state_dict(model.state_dict())


def test_a_table_alone_is_no_router_of_a_state_dict() -> None:
    """A checkpoint may lack its weight; then the weights of a routing would be uniform without a word."""
    gate = Gate(None, METHOD, table=table())
    with pytest.raises(ValueError, match="no gate at prefix"):
        Router.from_state_dict(gate.state_dict(), "", METHOD)
    given = arguments(hash_gate(), (5,))
    assert_same(Router(METHOD, table=gate.tid2eid)(*given), gate(*given))
