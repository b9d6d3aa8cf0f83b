# SPDX-License-Identifier: Apache-2.0
"""Top-k of SGLang: `select_experts` with SGLang's signature, and its place in SGLang.

Written for SGLang 0.5.23, from its sources.
"""

from __future__ import annotations

from importlib import import_module
from typing import Any

from cupy_router.integrations._engine import SCORES, as_float32, method_of, require
from cupy_router.method import RoutingMethod
from cupy_router.ops.activation_topk import activation_topk

TRIED = "SGLang 0.5.23"

_EPS = 1e-20  # SGLang's, in the divisor of renormalised weights
_originals: list[Any] = []  # SGLang's own function, once ours has its place

require("SGLang", "sglang", TRIED)


def select_experts(
    hidden_states: Any,
    router_logits: Any,
    topk_config: Any,
    *,
    layer_id: int | None = None,
    num_token_non_padded: Any = None,
    expert_location_dispatch_info: Any = None,
    dynamic_expert_bias: Any = None,
    router_logits_partials: Any = None,
) -> Any:
    """Select the experts of each token as SGLang's function of this name does, in one launch.

    Args:
        hidden_states: [num_tokens, hidden].
        router_logits: [num_tokens, num_experts].
        topk_config: SGLang's `TopKConfig`.
        layer_id: Number of the layer, for SGLang's capture of routed experts.
        num_token_non_padded: One-element tensor: rows from it on get ids -1 and weights 0, as by `num_valid`.
        expert_location_dispatch_info: SGLang's maps to physical experts. A token at row t takes replica t % count, also
            where SGLang would draw one at random.
        dynamic_expert_bias, router_logits_partials: None, or SGLang's own function is called.

    Returns:
        SGLang's `StandardTopKOutput` of weights float32, ids int32 and the logits. SGLang's own function is called for
        what no method has: custom routing functions, shared experts among the selected ones, simulated routing, other
        algorithms of dispatch than "dynamic", and physical experts while logical ones are captured.
    """
    topk, info = _topk(), expert_location_dispatch_info
    others = dynamic_expert_bias is not None or router_logits_partials is not None
    method = None if others else _method(topk_config, router_logits.shape[-1])
    captured = topk.get_global_experts_capturer() is not None
    if (
        method is None
        or topk.routing_simulation_enabled()
        or not _maps_in_turn(info)
        or (captured and info is not None)
    ):
        own = _originals[0] if _originals else topk.select_experts
        more = {"dynamic_expert_bias": dynamic_expert_bias, "router_logits_partials": router_logits_partials}
        return own(
            hidden_states, router_logits, topk_config, layer_id=layer_id, num_token_non_padded=num_token_non_padded,
            expert_location_dispatch_info=info, **{name: value for name, value in more.items() if value is not None},
        )  # fmt: skip
    bias = as_float32(topk_config.correction_bias)
    count = None if num_token_non_padded is None else num_token_non_padded.int()
    weights, ids = activation_topk(router_logits, method, bias=bias, num_valid=count, **_maps(info))
    topk.capture_routed_experts_if_allowed(topk_config, layer_id, ids)
    topk.get_global_expert_distribution_recorder().on_select_experts(topk_ids=ids)
    return topk.StandardTopKOutput(weights, ids, router_logits)


def swap_select_experts() -> None:
    """Let SGLang's layers call :func:`select_experts`; nothing changes if they do already."""
    topk = _topk()
    if not _originals:
        _originals.append(topk.select_experts)
        topk.select_experts = select_experts


def restore_select_experts() -> None:
    """Undo :func:`swap_select_experts`."""
    if _originals:
        _topk().select_experts = _originals.pop()


def _topk() -> Any:
    return import_module("sglang.srt.layers.moe.topk")


def _maps_in_turn(info: Any) -> bool:
    return info is None or info.ep_dispatch_algorithm == "dynamic"


def _maps(info: Any) -> dict[str, Any]:
    """Return the arguments of physical experts."""
    if info is None:
        return {}
    return {
        "replicas": info.partial_logical_to_all_physical_map,
        "replica_counts": info.partial_logical_to_all_physical_map_num_valid,
        "num_physical": info.num_physical_experts,
    }


def _method(config: Any, num_experts: int) -> RoutingMethod | None:
    """Return the method of a configuration of SGLang, None if it has another step."""
    has_bias, grouped = config.correction_bias is not None, config.use_grouped_topk
    others = config.custom_routing_function is not None or config.num_shared_topk_slots > 0
    others |= config.sqrtsoftplus_log1p or config.fused_gate_packed_ids
    score = "sigmoid" if grouped and has_bias else config.scoring_func
    if others or score not in SCORES:
        return None
    scaled = config.apply_routed_scaling_factor_on_output and config.routed_scaling_factor is not None
    return method_of(
        num_experts, config.top_k, score, renormalize=bool(config.renormalize), eps=_EPS,
        scale=float(config.routed_scaling_factor) if scaled else 1.0,
        groups=(config.num_expert_group, config.topk_group) if grouped else None, sum_of_two=grouped and has_bias,
    )  # fmt: skip
