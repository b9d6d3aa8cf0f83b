# SPDX-License-Identifier: Apache-2.0
"""Routers for engines, on stubs of these: results beside the engine's own, and what is left to it."""

from __future__ import annotations

import importlib
import inspect
import sys
from collections.abc import Iterator
from contextlib import suppress
from importlib.metadata import entry_points
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from cupy_router import RoutingMethod, activation_topk, integrations
from tests import inputs

torch = pytest.importorskip("torch", reason="PyTorch is not installed")

from tests import engine_stubs as stubs  # noqa: E402  # it needs PyTorch

pytestmark = pytest.mark.backends("reference")
N, EXPERTS, K, PHYSICAL = 13, 16, 4, 24
HIDDEN = torch.zeros(N, 8)


def tensor(*shape: int, seed: int = 0) -> Any:
    return torch.from_numpy(inputs.normal(shape, seed=760 + seed))


LOGITS, BIAS = tensor(N, EXPERTS), tensor(EXPERTS, seed=1)


def maps(dtype: Any = torch.int64) -> tuple[Any, Any]:
    """Return the replicas of each expert and how many there are: experts below 8 have two."""
    replicas = torch.full((EXPERTS, 3), -1, dtype=dtype)
    replicas[:, 0] = torch.arange(EXPERTS)
    replicas[:8, 1] = torch.arange(EXPERTS, PHYSICAL)
    return replicas, (replicas >= 0).sum(1).to(dtype)


def by_expert(weights: Any, ids: Any) -> Any:
    """Return weights [num_tokens, 32] by id, since engines return experts in any order."""
    return torch.zeros(len(ids), 32).scatter_add(1, ids.long().clamp(min=0), weights)


def same(got: Any, want: Any) -> None:
    assert got[0].dtype == torch.float32
    assert got[1].dtype == want[1].dtype
    torch.testing.assert_close(by_expert(*got), by_expert(*want), rtol=1e-5, atol=1e-6)


@pytest.fixture
def vllm() -> Iterator[Any]:
    with stubs.vllm():
        yield importlib.import_module("cupy_router.integrations.vllm")


@pytest.fixture
def engine() -> Iterator[stubs.SGLang]:
    state = stubs.SGLang()
    with stubs.sglang(state):
        yield state


# -- vLLM --------------------------------------------------------------------------------------------------------------


def test_a_custom_routing_function_of_vllm(vllm: Any) -> None:
    route = vllm.routing_function(RoutingMethod(EXPERTS, K, "sigmoid", scale=2.5, weight_dtype="bfloat16"), bias=BIAS)
    assert list(inspect.signature(route).parameters) == ["hidden_states", "gating_output", "topk", "renormalize"]
    got = route(hidden_states=HIDDEN, gating_output=LOGITS, topk=K, renormalize=True)
    same(got, stubs.route(LOGITS, K, "sigmoid", True, 2.5, BIAS))
    assert got[1].dtype == torch.int32
    for topk, renormalize in ((K + 1, True), (K, False)):
        with pytest.raises(ValueError, match="topk and renormalize must be 4 and True as in the method, got"):
            route(HIDDEN, LOGITS, topk, renormalize)


def routers(**more: Any) -> dict[str, Any]:
    """Return routers of every class of vLLM, each with a step of its own."""
    found = {name: getattr(importlib.import_module(f"{stubs.ROUTERS}.{name}"), kind) for name, kind in (
        ("fused_topk_router", "FusedTopKRouter"), ("fused_topk_bias_router", "FusedTopKBiasRouter"),
        ("grouped_topk_router", "GroupedTopKRouter"),
    )}  # fmt: skip
    plain, biased, grouped = found.values()
    table = torch.arange(40, dtype=torch.int32).view(10, 4) % EXPERTS
    return {
        "softmax": plain(K, EXPERTS),
        "sigmoid": plain(K, EXPERTS, "sigmoid", renormalize=False),
        "bias": biased(K, EXPERTS, BIAS, routed_scaling_factor=2.5),
        "bias in bfloat16": biased(K, EXPERTS, BIAS.bfloat16(), scoring_func="softmax"),
        "shared": biased(
            K, EXPERTS, BIAS, scoring_func="sqrtsoftplus", num_fused_shared_experts=2, shared_expert_weight=0.5
        ),
        "table": biased(K, EXPERTS, scoring_func="sqrtsoftplus", hash_indices_table=table, routed_scaling_factor=1.5),
        "groups": grouped(K, EXPERTS, 4, 2),
        "groups, bias": grouped(K, EXPERTS, 4, 2, True, "sigmoid", 2.5, BIAS),
    }  # fmt: skip


@pytest.mark.parametrize("dtype", [None, torch.int32, torch.int64])
def test_swapped_routers_of_vllm(vllm: Any, dtype: Any) -> None:
    ids = torch.arange(N) % 10
    wanted = {name: r._select_experts(HIDDEN, LOGITS, dtype, input_ids=ids) for name, r in routers().items()}
    assert vllm.swap_routers() == 3
    assert vllm.swap_routers() == 0
    for name, router in routers().items():
        same(router._select_experts(HIDDEN, LOGITS, dtype, input_ids=ids), wanted[name])
        assert router.own_calls == 0, name
    assert vllm.restore_routers() == 3
    restored = routers()["softmax"]
    restored._select_experts(HIDDEN, LOGITS)
    assert restored.own_calls == 1


OTHERS: dict[str, dict[str, Any]] = {
    "bias": {"bias_vl": BIAS},
    "table": {},  # called without token ids
    "softmax": {"scoring_func": "tanh"},
    "shared": {"global_num_experts": 20},
    "groups": {"skip_padding": True},
    "groups, bias": {"num_expert_group": 3},
}


@pytest.mark.parametrize("name", OTHERS)
def test_routers_of_vllm_with_other_steps_compute_as_before(vllm: Any, name: str) -> None:
    vllm.swap_routers()
    router = routers()[name]
    vars(router).update(OTHERS[name])
    with suppress(Exception):  # the stub cannot do all of it
        router._select_experts(HIDDEN, LOGITS)
    assert router.own_calls == 1


def test_the_environment_decides(vllm: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    (plugin,) = entry_points(group="vllm.general_plugins", name="cupy_router") or [None]
    if plugin is not None:  # of an installation that is older than the entry point
        assert plugin.load() is integrations.register_vllm
    for value, swapped in ((None, False), ("0", False), ("", False), ("1", True), ("1", True)):
        monkeypatch.delenv(integrations.VLLM_SWITCH, raising=False)
        if value is not None:
            monkeypatch.setenv(integrations.VLLM_SWITCH, value)
        integrations.register_vllm()
        router = routers()["softmax"]
        router._select_experts(HIDDEN, LOGITS)
        assert (router.own_calls == 0) == swapped


def test_routing_that_vllm_captures_is_replayed(vllm: Any) -> None:
    vllm.swap_routers()
    router, buffer = routers()["bias"], torch.zeros(N + 3, K, dtype=torch.int16)
    router.set_capture_fn(vllm.recorder(buffer))
    weights, ids = router._select_experts(HIDDEN, LOGITS)
    assert torch.equal(buffer[:N].int(), ids)
    assert (buffer[N:] == -1).all()
    method = RoutingMethod(EXPERTS, K, "sigmoid", scale=2.5)
    replayed = activation_topk(LOGITS, method, indices=buffer[:N])
    assert torch.equal(replayed.weights, weights)


@pytest.mark.parametrize("recorded", [None, True, False])
def test_physical_experts_and_load_of_vllm(vllm: Any, recorded: bool | None) -> None:
    replicas, counts = maps()
    load = torch.full((PHYSICAL,), 100, dtype=torch.int32)
    state = stubs.EplbLayerState(load, replicas, counts, None if recorded is None else torch.tensor(recorded))
    method = RoutingMethod(EXPERTS, K, "softmax", num_shared_experts=1)
    weights, ids = vllm.route_physical(method, LOGITS, state, bias=BIAS, replica_offset=1, num_valid=N - 2)
    plain = activation_topk(LOGITS, method, bias=BIAS, num_valid=N - 2)
    assert torch.equal(weights, plain.weights)
    for token, experts in enumerate(plain.indices[: N - 2].tolist()):
        turns = [(token + 1) % int(counts[expert]) for expert in experts[:K]]
        assert ids[token].tolist() == [int(replicas[e, turn]) for e, turn in zip(experts, turns, strict=False)] + [
            PHYSICAL
        ]
    assert (ids[N - 2 :] == -1).all()
    pairs = np.bincount(ids[: N - 2, :K].flatten().numpy(), minlength=PHYSICAL)
    assert (load.numpy() == 100 + pairs * (recorded is not False)).all()


# -- SGLang ------------------------------------------------------------------------------------------------------------


def config(**fields: Any) -> Any:
    return stubs.TopKConfig(K, **fields)


CONFIGS: dict[str, Any] = {
    "softmax": config(),
    "not renormalised": config(renormalize=False, scoring_func="sigmoid"),
    "scaled": config(scoring_func="sqrtsoftplus", correction_bias=BIAS, routed_scaling_factor=2.5,
                     apply_routed_scaling_factor_on_output=True),
    "scaled elsewhere": config(scoring_func="sigmoid", correction_bias=BIAS, routed_scaling_factor=2.5),
    "groups": config(use_grouped_topk=True, num_expert_group=4, topk_group=2),
    "groups, bias": config(use_grouped_topk=True, num_expert_group=4, topk_group=2, correction_bias=BIAS.bfloat16()),
}  # fmt: skip


@pytest.mark.parametrize("physical", [False, True])
@pytest.mark.parametrize("name", CONFIGS)
def test_select_experts_of_sglang(engine: stubs.SGLang, name: str, physical: bool) -> None:
    ours = importlib.import_module("cupy_router.integrations.sglang")
    info = stubs.ExpertLocationDispatchInfo("dynamic", None, *maps(), PHYSICAL, True) if physical else None
    more = {"layer_id": 3, "num_token_non_padded": torch.tensor([N - 2]), "expert_location_dispatch_info": info}
    want = engine.select_experts(HIDDEN, LOGITS, CONFIGS[name], **more)
    ours.swap_select_experts()
    ours.swap_select_experts()
    topk = importlib.import_module("sglang.srt.layers.moe.topk")
    got = topk.select_experts(HIDDEN, LOGITS, CONFIGS[name], **more)
    assert engine.own_calls == 1
    assert type(got) is stubs.StandardTopKOutput
    assert got.router_logits is LOGITS
    same(got[:2], want[:2])
    assert (got.topk_ids[N - 2 :] == -1).all()
    assert [layer for layer, _ in engine.captured] == [3]
    assert engine.recorded[-1] is got.topk_ids
    assert (
        inspect.signature(ours.select_experts).parameters.keys()
        == inspect.signature(stubs.SGLang().select_experts).parameters.keys()
    )
    ours.restore_select_experts()
    assert topk.select_experts == engine.select_experts


@pytest.mark.parametrize(
    "change",
    [
        {"config": config(custom_routing_function=print)},
        {"config": config(num_shared_topk_slots=1)},
        {"config": config(sqrtsoftplus_log1p=True)},
        {"config": config(fused_gate_packed_ids=True)},
        {"simulated": True},
        {"capturer": SimpleNamespace(), "info": stubs.ExpertLocationDispatchInfo("dynamic", None, *maps(), PHYSICAL)},
        {"info": stubs.ExpertLocationDispatchInfo("static", None, *maps(), PHYSICAL)},
        {"more": {"dynamic_expert_bias": BIAS}},
        {"more": {"router_logits_partials": LOGITS}},
    ],
)
@pytest.mark.parametrize("swapped", [False, True])
def test_other_steps_of_sglang_are_left_to_it(engine: stubs.SGLang, change: dict[str, Any], swapped: bool) -> None:
    ours = importlib.import_module("cupy_router.integrations.sglang")
    if swapped:
        ours.swap_select_experts()
    engine.simulated, engine.capturer = change.get("simulated", False), change.get("capturer")
    its_config, more = change.get("config", config()), change.get("more", {})
    ours.select_experts(HIDDEN, LOGITS, its_config, expert_location_dispatch_info=change.get("info"), **more)
    assert engine.own_calls == 1
    assert not engine.captured


# -- Without the engines -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("name", "engine"), [("vllm", "vLLM"), ("sglang", "SGLang")])
def test_without_the_engine_one_sentence_says_so(name: str, engine: str, monkeypatch: pytest.MonkeyPatch) -> None:
    if importlib.util.find_spec(name) is not None:
        pytest.skip(f"{engine} is installed")
    monkeypatch.setitem(sys.modules, "torch", None)  # which comes with the engine
    with pytest.raises(ImportError) as caught:
        importlib.import_module(f"cupy_router.integrations.{name}")
    tried = {"vllm": "vLLM 0.33.0", "sglang": "SGLang 0.5.23"}[name]
    wanted = f"cupy_router.integrations.{name} needs {engine} (tried with the sources of {tried}): pip install {name}"
    assert str(caught.value) == wanted
