# SPDX-License-Identifier: Apache-2.0
"""Tensors near a gate that no Router takes: refused if they are named like a part of the router, and only then."""

from __future__ import annotations

import re

import pytest

from cupy_router import Router
from tests.test_router import BIAS, METHOD, gate


@pytest.mark.parametrize(
    ("router", "gate_name", "other"),
    [
        ("mlp.gate", "weight", "global_scale"),  # of Inkling, a factor of all weights
        ("router", "proj.weight", "scale"),  # of Gemma, a factor of the input
        ("mlp.router", "layer.weight", "norm.weight"),
        ("mlp.gate", "weight", "weight_scale_inv"),
        ("mlp.router", "gate.weight", "bias"),
    ],
)
@pytest.mark.parametrize("of_layer", [False, True])
def test_tensors_that_a_router_cannot_take_are_refused(router: str, gate_name: str, other: str, of_layer: bool) -> None:
    weight, other, prefix = f"a.{router}.{gate_name}", f"a.{router}.{other}", "a" if of_layer else f"a.{router}"
    state = {weight: gate(), other: BIAS, "a.other": BIAS, "a.mlp.gate_up": BIAS, "a.routers": BIAS}
    words = f"^Router.from_state_dict: {other} is part of the router of {weight}, but nothing that a Router can take$"
    with pytest.raises(ValueError, match=words):
        Router.from_state_dict(state, prefix, METHOD)
    del state[other]
    assert Router.from_state_dict(state, prefix, METHOD).weight is state[weight]


@pytest.mark.parametrize(
    ("weight", "other"),
    [
        ("mlp.gate.weight", "moe.router.bias"),
        ("mlp.gate.weight", "moe.router.gain"),
        ("mlp.gate.weight", "mlp.router_bias_2"),
        ("mlp.gate.weight", "mlp.experts.expert_bias"),
        ("mlp.gate.weight", "mlp.correction_bias"),
        ("mlp.gate.weight", "mlp.expert_scales"),
        ("mlp.gate.weight", "hash.tid2eid"),
        ("mlp.router.gate.weight", "moe.router.expert_bias"),
        ("mlp.text_moe.gate.weight", "mlp.router_bias_2"),
    ],
)
@pytest.mark.parametrize("of_layer", [False, True])
def test_tensors_elsewhere_with_the_names_of_a_router_s_are_refused(weight: str, other: str, of_layer: bool) -> None:
    layer, router = "layers.3", f"layers.3.{weight.removesuffix('.weight')}"
    if of_layer and "text" in weight:
        router = layer = f"{layer}.mlp.text_moe"
    state = {f"layers.3.{weight}": gate(), f"layers.3.{other}": BIAS}
    state |= {f"layers.3.{name}": BIAS for name in NOT_OF_ROUTERS} | {f"layers.{n}.{other}": BIAS for n in (2, 30)}
    below = of_layer or weight.count(".") < 3  # that far above the router its biases are looked for
    if below:
        words = f"layers.3.{other} is part of the router of layers.3.{weight}, but nothing that a Router can take$"
        with pytest.raises(ValueError, match=words):
            Router.from_state_dict(state, layer if of_layer else router, METHOD)
    del state[f"layers.3.{other}"]
    assert Router.from_state_dict(state, router, METHOD).bias is None


@pytest.mark.parametrize("folder", ["mlp", "block_sparse_moe", "moe"])
@pytest.mark.parametrize(
    "name",
    [
        *("bias", "scale", "global_scale", "gate_bias", "gate_scale", "routing_bias", "route_scale", "routing_scale"),
        *("score_bias", "e_score_bias", "moe_bias", "balance_bias", "load_balancing_bias", "topk_bias", "logit_bias"),
        *("selection_bias", "router_table", "hash_table", "router_multiplier", "temperature", "token_to_expert"),
        *("E_SCORE_CORRECTION_BIAS", "moe_statics.bias", "gate_correction.bias", "router.bias", "moe.router.bias"),
        *("router.norm.gain", "experts.router_bias", "text_gate.e_score_correction_bias"),
    ],
)
def test_no_tensor_of_the_router_s_block_is_left_out(folder: str, name: str) -> None:
    state = {f"a.layers.3.{folder}.gate.weight": gate(), f"a.layers.3.{folder}.{name}": BIAS}
    words = (
        rf"a\.layers\.3\.{folder}\.{re.escape(name)} is part of the router of a\.layers\.3\.{folder}\.gate\.weight, but"
    )
    for prefix in ("a.layers.3", f"a.layers.3.{folder}"):
        with pytest.raises(ValueError, match=words):
            Router.from_state_dict(state, prefix, METHOD)


@pytest.mark.parametrize("name", ["gate.bias", "moe.gate.bias", "router.bias", "moe_bias", "topk_bias", "gate_scale"])
def test_tensors_of_the_layer_and_of_other_blocks_with_a_router_s_name(name: str) -> None:
    state = {"layers.3.mlp.gate.weight": gate(), f"layers.3.{name}": BIAS}
    with pytest.raises(ValueError, match=rf"layers\.3\.{re.escape(name)} is part of the router of"):
        Router.from_state_dict(state, "layers.3", METHOD)


# Keys of the same layer that have nothing to do with its router.
NOT_OF_ROUTERS = (
    "mlp.experts.down_proj_bias",
    "mlp.experts.gate_up_proj_bias",
    "mlp.experts.w1_expert_scale",
    "mlp.experts.expert_0_scale",
    "mlp.experts.per_expert_input_scale",
    "mlp.experts.3.gate.scales",
    "mlp.experts.bias",
    "mlp.shared_experts_scale",
    "mlp.routed_experts_scale",
    "mlp.shared_expert_gate.bias",
    "mlp.mlp1_weight.scales",
    "mlp.mlp1_bias",
    "mlp.w1_scale",
    "mlp.gate_up_proj_scale",
    "mlp.norm.scale",
    "mlp.norm.bias",
    "mlp.experts.3.up_proj.weight_scale_inv",
    "mlp.shared_expert_gate.weight",
    "mlp.shared_experts.gate_proj.bias",
    "mlp.vision_moe.gate.weight",
    "mlp.vision_moe.gate.e_score_correction_bias",
    "self_attn.gate.bias",
    "self_attn.router.bias",
    "self_attn.q_proj.k_scale",
    "layer_scalar",
    "hc_ffn_scale",
)
