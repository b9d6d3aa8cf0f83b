# SPDX-License-Identifier: Apache-2.0
"""Routers of vLLM: a custom routing function, physical experts with their load, and a plugin that swaps all routers.

Written for vLLM 0.33.0, from its sources. With CUPY_ROUTER_VLLM=1 in the environment, vLLM's plugin system calls
:func:`cupy_router.integrations.register_vllm` in every process, which swaps all routers that a method describes.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import wraps
from importlib import import_module
from typing import Any

from cupy_router.integrations._engine import SCORES, as_float32, method_of, require
from cupy_router.method import RoutingMethod, resolve
from cupy_router.ops._layout import LayoutSpec
from cupy_router.ops.activation_topk import activation_topk
from cupy_router.ops.hash_router import hash_router

TRIED = "vLLM 0.33.0"

_ROUTERS = "vllm.model_executor.layers.fused_moe.router"
_CLASSES = (
    ("fused_topk_router", "FusedTopKRouter"),
    ("fused_topk_bias_router", "FusedTopKBiasRouter"),
    ("grouped_topk_router", "GroupedTopKRouter"),
)
_COMPUTE = "_compute_routing"
_INDEX_DTYPES = {"None": "int32", "torch.int32": "int32", "torch.int64": "int64"}  # by what vLLM asks for

Routed = tuple[Any, Any]  # weights and ids

require("vLLM", "vllm", TRIED)


# -- Functions that engines and models call ----------------------------------------------------------------------------


def routing_function(
    method: RoutingMethod | str, *, bias: Any = None, logit_bias: Any = None, expert_scale: Any = None
) -> Callable[[Any, Any, int, bool], Routed]:
    """Return a `custom_routing_function` for vLLM's `FusedMoE`, which routes by a method.

    Args:
        method: A :class:`cupy_router.RoutingMethod`, or the name of a preset.
        bias, logit_bias, expert_scale: As for :func:`cupy_router.activation_topk`.

    Returns:
        A function of hidden_states [num_tokens, hidden], gating_output [num_tokens, num_experts], topk and renormalize,
        which returns weights [num_tokens, topk] float32 and ids int32. It raises a ValueError if vLLM asks for another
        topk or renormalize than the method has.
    """
    routed = replace(resolve(method), weight_dtype="float32", index_dtype="int32")
    layer = {"bias": bias, "logit_bias": logit_bias, "expert_scale": expert_scale}

    def custom_routing_function(hidden_states: Any, gating_output: Any, topk: int, renormalize: bool) -> Routed:
        if topk != routed.num_columns or renormalize != routed.renormalize:
            raise ValueError(
                f"routing_function: topk and renormalize must be {routed.num_columns} and {routed.renormalize} as in "
                f"the method, got {topk} and {renormalize}"
            )
        weights, ids = activation_topk(gating_output, routed, **layer)
        return weights, ids

    return custom_routing_function


def route_physical(
    method: RoutingMethod | str,
    gating_output: Any,
    eplb_state: Any,
    *,
    bias: Any = None,
    logit_bias: Any = None,
    expert_scale: Any = None,
    replica_offset: int = 0,
    num_valid: Any = None,
) -> Routed:
    """Return weights and physical experts, and add the pairs of each to the load of vLLM's EPLB.

    Args:
        method: A :class:`cupy_router.RoutingMethod`, or the name of a preset.
        gating_output: [num_tokens, num_experts] logits.
        eplb_state: vLLM's `EplbLayerState`: `logical_to_physical_map` and `logical_replica_count` choose replicas,
            `expert_load_view` [num_physical] gets the load, if `should_record_tensor` is None or true.
        bias, logit_bias, expert_scale, replica_offset, num_valid: As for :func:`cupy_router.activation_topk`. Padding
            is in no load.
    """
    load = eplb_state.expert_load_view
    weights, ids, layout = activation_topk(
        gating_output, method, bias=bias, logit_bias=logit_bias, expert_scale=expert_scale,
        replicas=eplb_state.logical_to_physical_map, replica_counts=eplb_state.logical_replica_count,
        replica_offset=replica_offset, num_physical=load.shape[0], layout=LayoutSpec(want=("counts",)),
        num_valid=num_valid,
    )  # fmt: skip
    recorded = eplb_state.should_record_tensor
    counts = layout.counts[: load.shape[0]]  # without shared experts
    load.add_(counts if recorded is None else counts * recorded)
    return weights, ids


def recorder(buffer: Any) -> Callable[[Any], None]:
    """Return a function for `set_capture_fn` of vLLM's routers, which keeps the experts of a step for replay.

    Args:
        buffer: [max_tokens, top_k] tensor of integers. Its first rows become the experts, all others -1, which replay
            routes as usual: pass it as `indices` of :func:`cupy_router.activation_topk`, `dense_router` or `Router`.
    """

    def capture(topk_ids: Any) -> None:
        buffer[: len(topk_ids)].copy_(topk_ids)
        buffer[len(topk_ids) :].fill_(-1)

    return capture


# -- The plugin --------------------------------------------------------------------------------------------------------


def swap_routers() -> int:
    """Let vLLM's routers compute by cupy_router, those with unknown steps as before; return how many classes changed.

    vLLM captures the experts, maps them to physical ones and counts the load as before.
    """
    found = [_class(*where) for where in _CLASSES]
    plain = [router for router in found if not hasattr(getattr(router, _COMPUTE), "original")]
    for router in plain:
        setattr(router, _COMPUTE, _swapped(getattr(router, _COMPUTE)))
    return len(plain)


def restore_routers() -> int:
    """Undo :func:`swap_routers`; return how many classes changed."""
    swapped = [
        router for router in (_class(*where) for where in _CLASSES) if hasattr(getattr(router, _COMPUTE), "original")
    ]
    for router in swapped:
        setattr(router, _COMPUTE, getattr(router, _COMPUTE).original)
    return len(swapped)


def _class(module: str, name: str) -> Any:
    return getattr(import_module(f"{_ROUTERS}.{module}"), name)


def _swapped(original: Any) -> Any:
    @wraps(original)
    def compute_routing(
        self: Any, hidden_states: Any, router_logits: Any, indices_type: Any, *, input_ids: Any = None
    ) -> Routed:
        method = _method(self, router_logits.shape[-1], indices_type)
        table = getattr(self, "_hash_indices_table", None)
        if method is None or (table is not None and input_ids is None):
            return original(self, hidden_states, router_logits, indices_type, input_ids=input_ids)  # type: ignore[no-any-return]
        if table is not None:
            weights, ids = hash_router(input_ids, table, method, logits=router_logits)
        else:
            bias = as_float32(getattr(self, "e_score_correction_bias", None))
            weights, ids = activation_topk(router_logits, method, bias=bias)
        return weights, ids

    compute_routing.original = original  # type: ignore[attr-defined]
    return compute_routing


def _method(router: Any, num_experts: int, indices_type: Any) -> RoutingMethod | None:
    """Return the method of a router of vLLM, None if it has another step."""
    groups = None if not hasattr(router, "num_expert_group") else (router.num_expert_group, router.topk_group)
    shared = getattr(router, "num_fused_shared_experts", 0)
    others = getattr(router, "bias_vl", None) is not None or getattr(router, "skip_padding", False)
    ungrouped = groups is not None and (num_experts <= groups[0] or num_experts % groups[0] != 0 or shared > 0)
    moved = shared > 0 and router.global_num_experts != num_experts
    if others or ungrouped or moved or router.scoring_func not in SCORES or str(indices_type) not in _INDEX_DTYPES:
        return None
    return method_of(
        num_experts, router.top_k, router.scoring_func, renormalize=bool(router.renormalize),
        scale=float(getattr(router, "routed_scaling_factor", 1.0)), index_dtype=_INDEX_DTYPES[str(indices_type)],
        groups=groups, sum_of_two=groups is not None and router.e_score_correction_bias is not None,
        shared=(shared, float(getattr(router, "shared_expert_weight", 1.0))),
    )  # fmt: skip
