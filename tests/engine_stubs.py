# SPDX-License-Identifier: Apache-2.0
"""Stubs of vLLM 0.33.0 and SGLang 0.5.23: the modules, names and signatures that cupy_router.integrations uses.

Their routers are a few lines of PyTorch, so that what replaces them can be compared.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from types import ModuleType
from typing import Any, NamedTuple

import torch


def route(
    logits: Any,
    top_k: int,
    scoring_func: str,
    renormalize: bool,
    scale: float = 1.0,
    bias: Any = None,
    groups: tuple[int, int] | None = None,
) -> tuple[Any, Any]:
    """Return weights float32 and ids int32, as both engines compute them."""
    logits = logits.float()
    softplus = torch.nn.functional.softplus
    scores = {
        "softmax": lambda x: x.softmax(-1),
        "sigmoid": torch.sigmoid,
        "sqrtsoftplus": lambda x: softplus(x).sqrt(),
    }[scoring_func](logits)
    ranked = scores if bias is None else scores + bias
    if groups is not None:
        split = ranked.view(len(ranked), groups[0], -1)
        worth = split.max(-1).values if bias is None else split.topk(2, -1).values.sum(-1)
        kept = torch.zeros_like(worth).scatter(1, worth.topk(groups[1], -1).indices, 1.0)
        ranked = split.masked_fill(kept[..., None] == 0, -torch.inf).flatten(1)
    ids = ranked.topk(top_k, -1).indices
    weights = scores.gather(1, ids)
    if renormalize:
        weights = weights / weights.sum(-1, keepdim=True)
    return weights * scale, ids.int()


@dataclass
class EplbLayerState:
    expert_load_view: Any = None
    logical_to_physical_map: Any = None
    logical_replica_count: Any = None
    should_record_tensor: Any = None
    num_unpadded_tokens_tensors: Any = None


class BaseRouter:
    """What is the same in all routers of vLLM."""

    def __init__(self, top_k: int, global_num_experts: int, eplb_state: Any = None) -> None:
        self.top_k, self.global_num_experts, self.eplb_state = top_k, global_num_experts, eplb_state
        self.capture_fn: Callable[[Any], None] | None = None
        self.own_calls = 0

    def set_capture_fn(self, capture_fn: Callable[[Any], None] | None) -> None:
        self.capture_fn = capture_fn

    def _select_experts(
        self, hidden_states: Any, router_logits: Any, topk_indices_dtype: Any = None, *, input_ids: Any = None
    ) -> tuple[Any, Any]:
        weights, ids = self._compute_routing(hidden_states, router_logits, topk_indices_dtype, input_ids=input_ids)
        if self.capture_fn is not None:
            self.capture_fn(ids)
        assert topk_indices_dtype in (None, ids.dtype)
        return weights, ids


def _own(scoring: str | None = None) -> Any:
    def _compute_routing(
        self: Any, hidden_states: Any, router_logits: Any, indices_type: Any, *, input_ids: Any = None
    ) -> tuple[Any, Any]:
        self.own_calls += 1
        weights, ids = route(
            router_logits, self.top_k, self.scoring_func, self.renormalize, getattr(self, "routed_scaling_factor", 1.0),
            getattr(self, "e_score_correction_bias", None),
            (self.num_expert_group, self.topk_group) if hasattr(self, "num_expert_group") else None,
        )  # fmt: skip
        if getattr(self, "_hash_indices_table", None) is not None:
            ids = self._hash_indices_table[input_ids].int()
            scores = torch.nn.functional.softplus(router_logits.float()).sqrt().gather(1, ids.long())
            weights = scores / scores.sum(-1, keepdim=True) * self.routed_scaling_factor
        shared = getattr(self, "num_fused_shared_experts", 0)
        if shared:
            more = torch.arange(self.global_num_experts, self.global_num_experts + shared, dtype=torch.int32)
            ids = torch.cat([ids, more.expand(len(ids), shared)], 1)
            weights = torch.cat([weights, torch.full((len(ids), shared), self.shared_expert_weight)], 1)
        return weights, ids.to(indices_type or torch.int32)

    return _compute_routing


class FusedTopKRouter(BaseRouter):
    def __init__(
        self, top_k: int, global_num_experts: int, scoring_func: str = "softmax", renormalize: bool = True,
        eplb_state: Any = None,
    ) -> None:  # fmt: skip
        super().__init__(top_k, global_num_experts, eplb_state)
        self.scoring_func, self.renormalize = scoring_func, renormalize

    _compute_routing = _own()


class FusedTopKBiasRouter(BaseRouter):
    def __init__(
        self, top_k: int, global_num_experts: int, e_score_correction_bias: Any = None, renormalize: bool = True,
        routed_scaling_factor: float = 1.0, eplb_state: Any = None, *, scoring_func: str = "sigmoid",
        hash_indices_table: Any = None, num_fused_shared_experts: int = 0, shared_expert_weight: float = 1.0,
        bias_vl: Any = None, image_sentinel_lo: int = 0,
    ) -> None:  # fmt: skip
        super().__init__(top_k, global_num_experts, eplb_state)
        self.e_score_correction_bias, self.renormalize = e_score_correction_bias, renormalize
        self.routed_scaling_factor, self.scoring_func = routed_scaling_factor, scoring_func
        self._hash_indices_table, self.bias_vl = hash_indices_table, bias_vl
        self.num_fused_shared_experts, self.shared_expert_weight = num_fused_shared_experts, shared_expert_weight

    _compute_routing = _own()


class GroupedTopKRouter(BaseRouter):
    def __init__(
        self, top_k: int, global_num_experts: int, num_expert_group: int, topk_group: int, renormalize: bool = True,
        scoring_func: str = "softmax", routed_scaling_factor: float = 1.0, e_score_correction_bias: Any = None,
        num_fused_shared_experts: int = 0, eplb_state: Any = None, skip_padding: bool = False,
    ) -> None:  # fmt: skip
        super().__init__(top_k, global_num_experts, eplb_state)
        self.num_expert_group, self.topk_group, self.renormalize = num_expert_group, topk_group, renormalize
        self.scoring_func, self.routed_scaling_factor = scoring_func, routed_scaling_factor
        self.e_score_correction_bias, self.skip_padding = e_score_correction_bias, skip_padding
        self.num_fused_shared_experts = num_fused_shared_experts

    _compute_routing = _own()


class StandardTopKOutput(NamedTuple):
    topk_weights: Any
    topk_ids: Any
    router_logits: Any


@dataclass
class TopKConfig:
    top_k: int
    use_grouped_topk: bool = False
    topk_group: int | None = None
    num_expert_group: int | None = None
    renormalize: bool = True
    custom_routing_function: Any = None
    correction_bias: Any = None
    routed_scaling_factor: float | None = None
    apply_routed_scaling_factor_on_output: bool = False
    scoring_func: str = "softmax"
    sqrtsoftplus_log1p: bool = False
    fused_gate_packed_ids: bool = False
    allow_routed_experts_capture: bool = True
    num_shared_topk_slots: int = 0


@dataclass
class ExpertLocationDispatchInfo:
    ep_dispatch_algorithm: str
    partial_logical_to_rank_dispatch_physical_map: Any
    partial_logical_to_all_physical_map: Any
    partial_logical_to_all_physical_map_num_valid: Any
    num_physical_experts: int
    rank_invariant: bool = False


@dataclass
class SGLang:
    """SGLang's module of top-k, with what it was told."""

    own_calls: int = 0
    captured: list[Any] = field(default_factory=list)
    recorded: list[Any] = field(default_factory=list)
    capturer: Any = None
    simulated: bool = False

    def select_experts(
        self, hidden_states: Any, router_logits: Any, topk_config: TopKConfig, *, layer_id: int | None = None,
        num_token_non_padded: Any = None, expert_location_dispatch_info: Any = None, dynamic_expert_bias: Any = None,
        router_logits_partials: Any = None,
    ) -> StandardTopKOutput:  # fmt: skip
        self.own_calls += 1
        config, info = topk_config, expert_location_dispatch_info
        scaled = config.apply_routed_scaling_factor_on_output and config.routed_scaling_factor
        scoring = "sigmoid" if config.use_grouped_topk and config.correction_bias is not None else config.scoring_func
        weights, ids = route(
            router_logits, config.top_k, scoring, config.renormalize, scaled or 1.0, config.correction_bias,
            (config.num_expert_group or 1, config.topk_group or 1) if config.use_grouped_topk else None,
        )  # fmt: skip
        if info is not None:
            counts = info.partial_logical_to_all_physical_map_num_valid[ids.long()]
            turns = torch.arange(len(ids))[:, None] % counts
            ids = info.partial_logical_to_all_physical_map[ids.long(), turns].int()
        if num_token_non_padded is not None:
            ids[int(num_token_non_padded) :], weights[int(num_token_non_padded) :] = -1, 0.0
        return StandardTopKOutput(weights, ids, router_logits)

    def module(self) -> dict[str, Any]:
        recorder = ModuleType("recorder")
        recorder.on_select_experts = lambda topk_ids: self.recorded.append(topk_ids)  # type: ignore[attr-defined]
        return {
            "select_experts": self.select_experts,
            "StandardTopKOutput": StandardTopKOutput,
            "TopKConfig": TopKConfig,
            "get_global_experts_capturer": lambda: self.capturer,
            "capture_routed_experts_if_allowed": lambda config, layer_id, ids: self.captured.append((layer_id, ids)),
            "get_global_expert_distribution_recorder": lambda: recorder,
            "routing_simulation_enabled": lambda: self.simulated,
        }


@contextmanager
def installed(engine: str, modules: dict[str, dict[str, Any]]) -> Iterator[None]:
    """Stand in for an engine by modules of these names in its package, and forget all that is imported of both."""
    ours = f"cupy_router.integrations.{engine}"
    before = {name: module for name, module in sys.modules.items() if name.split(".")[0] == engine or name == ours}
    for name in before:
        del sys.modules[name]
    try:
        for path, names in {engine: {}, **modules}.items():
            parts = path.split(".")
            for end in range(1, len(parts) + 1):
                name = ".".join(parts[:end])
                module = sys.modules.setdefault(name, ModuleType(name))
                module.__path__ = []
            vars(sys.modules[path]).update(names)
        yield
    finally:
        for name in [name for name in sys.modules if name.split(".")[0] == engine or name == ours]:
            del sys.modules[name]
        sys.modules.update(before)


ROUTERS = "vllm.model_executor.layers.fused_moe.router"


def vllm() -> Any:
    """Stand in for vLLM, whose classes are new in each call."""
    kinds = {"fused_topk_router": FusedTopKRouter, "fused_topk_bias_router": FusedTopKBiasRouter}
    kinds["grouped_topk_router"] = GroupedTopKRouter
    made = {module: type(kind.__name__, (kind,), {"_compute_routing": _own()}) for module, kind in kinds.items()}
    return installed("vllm", {f"{ROUTERS}.{module}": {kind.__name__: kind} for module, kind in made.items()})


def sglang(state: SGLang) -> Any:
    return installed("sglang", {"sglang.srt.layers.moe.topk": state.module()})
