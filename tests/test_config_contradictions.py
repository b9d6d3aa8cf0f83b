# SPDX-License-Identifier: Apache-2.0
"""Configurations that state a step which the routers of their model do not have, or numbers that mean nothing."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from cupy_router import RoutingMethod
from tests.test_from_config import COUNTS, GROUPS, MIXTRAL, STANDARD

Config = dict[str, Any]
SCALED = {"routed_scaling_factor": 2.5}
V3: Config = {"model_type": "deepseek_v3", **COUNTS, "n_group": 1, "topk_group": 1, "norm_topk_prob": True, **SCALED}
LING: Config = {"model_type": "bailing_moe", **COUNTS, "norm_topk_prob": True}
LING_2: Config = {**LING, **GROUPS, **SCALED, "score_function": "sigmoid"}
STEP: Config = {"moe_num_experts": 48, "moe_top_k": 3}
LONGCAT: Config = {"n_routed_experts": 256, "moe_topk": 12, "routed_scaling_factor": 6.0, "zero_expert_num": 128}
ERNIE: Config = {"model_type": "ernie4_5_moe_vl", "moe_num_experts": [64, 64], "moe_k": 6}
VL2: Config = {"n_routed_experts": 64, "num_experts_per_tok": 6, "n_group": 1, "topk_group": 1, "topk_method": "greedy"}

CONTRADICTIONS: list[tuple[Config, str]] = [
    ({**V3, "scoring_func": "softmax", "topk_method": None}, "scoring_func = 'softmax', .* score = 'sigmoid'"),
    ({**V3, **GROUPS, "topk_method": "group_limited_greedy"}, "topk_method = 'group_limited_greedy', .* 'noaux_tc'"),
    ({**V3, **GROUPS, "topk_method": "greedy"}, "topk_method = 'greedy', .* 'noaux_tc'"),
    ({**ERNIE, "moe_gate_act": "sigmoid"}, "moe_gate_act = 'sigmoid', .* score = 'softmax'"),
    ({**STEP, "model_type": "step3_text", "moe_router_activation": "sigmoid"}, "activation = 'sigmoid', .* 'softmax'"),
    ({**STEP, "model_type": "step3_text", "moe_router_scaling_factor": 3.0}, "scaling_factor = 3.0, .* scale = 1.0"),
    ({**STEP, "model_type": "step3_text", "use_moe_router_bias": True}, "use_moe_router_bias is True, but"),
    ({**STEP, "model_type": "step3p5", "moe_router_activation": "softmax"}, "activation = 'softmax', .* 'sigmoid'"),
    ({**STEP, "model_type": "step3p5", "norm_expert_weight": False}, "norm_expert_weight = False, .* = True"),
    ({**LING, **SCALED}, "routed_scaling_factor = 2.5, .* scale = 1.0"),
    ({**LING, "moe_router_enable_expert_bias": True}, "expert_bias is True, but it has no score_function"),
    ({**LING, "scoring_func": "sigmoid"}, "scoring_func = 'sigmoid', .* score = 'softmax'"),
    ({**LING_2, "norm_topk_prob": False}, "norm_topk_prob = False, .* renormalize = True"),
    ({**LING_2, "model_type": "llada2_moe", "norm_topk_prob": False}, "norm_topk_prob = False, .* = True"),
    ({**LONGCAT, "model_type": "longcat_flash", "norm_topk_prob": True}, "norm_topk_prob = True, .* = False"),
    ({**LONGCAT, "model_type": "longcat_flash_ngram", "norm_topk_prob": True}, "norm_topk_prob = True, .* = False"),
    ({"model_type": "deepseek_v2", **COUNTS, "topk_method": "greedy", "norm_topk_prob": True}, "norm_topk_prob = True"),
    ({"model_type": "qwen3_vl_moe_text", **COUNTS, "norm_topk_prob": False}, "norm_topk_prob = False, .* = True"),
    ({**MIXTRAL, "n_group": 4, "topk_group": 2}, "n_group = 4, .* num_groups = 1"),
    ({**MIXTRAL, "scoring_func": "sigmoid"}, "scoring_func = 'sigmoid', .* score = 'softmax'"),
    ({**MIXTRAL, "moe_router_score_function": "sigmoid"}, "function = 'sigmoid', .* score = 'softmax'"),
    ({**MIXTRAL, "router_logit_softcapping": 30.0}, "router_logit_softcapping = 30.0, .* logit_softcap = None"),
    ({**MIXTRAL, "routed_scaling_factor": 2.5}, "routed_scaling_factor = 2.5, .* scale = 1.0"),
]


@pytest.mark.parametrize(("config", "words"), CONTRADICTIONS, ids=lambda value: str(value)[:70])
def test_a_step_that_is_stated_otherwise_is_refused(config: Config, words: str) -> None:
    with pytest.raises(ValueError, match=f"^{config['model_type']}: .*{words}") as caught:
        RoutingMethod.from_config(config)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("config", "stated"),
    [
        (MIXTRAL, {"scoring_func": "softmax", "norm_topk_prob": True, "routed_scaling_factor": 1.0, "n_group": 1}),
        (MIXTRAL, {"n_group": 4, "topk_group": 4, "router_logit_softcapping": 0, "moe_router_score_function": None}),
        (V3, {"scoring_func": "sigmoid", "topk_method": "noaux_tc"}),
        (V3, {"topk_method": "greedy"}),
        ({"model_type": "gpt_oss", **COUNTS}, {"norm_topk_prob": True}),
        ({"model_type": "deepseek_v2", **COUNTS, "topk_method": "greedy"}, {**GROUPS, "norm_topk_prob": False}),
        (LING_2, {"norm_topk_prob": True, "moe_router_enable_expert_bias": True}),
        ({**STEP, "model_type": "step3p5"}, {"moe_router_activation": "sigmoid", "moe_router_scaling_factor": 3.0}),
        ({"model_type": "laguna", **COUNTS}, {"moe_routed_scaling_factor": 2.5}),
    ],
    ids=lambda value: str(value)[:70],
)
def test_a_step_that_is_stated_as_it_is(config: Config, stated: Config) -> None:
    assert RoutingMethod.from_config(config | stated) == RoutingMethod.from_config(config)


def test_one_expert_is_not_renormalised_whatever_is_stated() -> None:
    method = RoutingMethod.from_config({**LING_2, "num_experts_per_tok": 1})
    assert not method.renormalize


@pytest.mark.parametrize("typed", [False, True])
@pytest.mark.parametrize("top", ["deepseek_v2", "deepseek_v3"])
def test_the_code_of_a_model_reads_its_parts_whatever_type_they_have(top: str, typed: bool) -> None:
    part = {**VL2, "norm_topk_prob": True, "scoring_func": "sigmoid", **({"model_type": top} if typed else {})}
    method = RoutingMethod.from_config({"model_type": "deepseek_vl_v2", "language_config": part})
    assert method == RoutingMethod(64, 6, "sigmoid", renormalize_eps=1e-20)
    grouped = {**part, "topk_method": "noaux_tc", "n_group": 8, "topk_group": 4}
    with pytest.raises(ValueError, match=r"deepseek_vl_v2: .* outside the best groups count 0"):
        RoutingMethod.from_config({"model_type": "deepseek_vl_v2", "language_config": grouped})


@pytest.mark.parametrize(
    ("name", "value"),
    [
        *(("moe_softcap", 1.0), ("gate_scale", 2.0), ("topk_scaling_factor", 2.0), ("routed_scaling", "2.5")),
        *(("router_scaling_factors", [2.5]), ("router_scaling_factors", np.array([1.0, 2.5])), ("num_zero_experts", 4)),
        *(("router.scaling_factor", 2.5), ("moe.gating.temperature", 0.5), ("num_zero_experts", 1)),
        *(("num_null_experts", 2), ("top_k_scale", 2), ("gate_multiplier", np.float32(2)), ("expert_groups", 4)),
    ],
)
def test_a_number_whose_name_is_not_known_is_refused(name: str, value: Any) -> None:
    *parts, last = name.split(".")
    config: Config = {last: value}
    for part in reversed(parts):
        config = {part: config}
    with pytest.raises(ValueError, match=f"^brand_new: has {name} = .*, whose meaning is not known$"):
        RoutingMethod.from_config({**STANDARD, **config})


@pytest.mark.parametrize(
    "others",
    [
        {"moe_softcap": 0, "gate_scale": 1.0, "topk_scaling_factor": None, "router_scaling_factors": [1.0, 1]},
        {"num_zero_experts": 0, "router": {"scaling_factor": 1.0}, "moe_router_enable_routed_scaling": True},
        {"rope_parameters": {"factor": 40}, "attn_gate_scale": 2.0, "router_aux_loss_factor": 0.1, "vocab_scale": 2.0},
        {"expert_model_parallel_group": 8, "moe_group": "world", "expert_layer_frequency": 2, "gate_up_factor": "auto"},
    ],
)
def test_numbers_that_belong_to_no_step_or_change_nothing(others: Config) -> None:
    assert RoutingMethod.from_config({**STANDARD, **others}) == RoutingMethod.from_config(STANDARD)


def test_the_score_of_an_unknown_model_is_not_ignored() -> None:
    with pytest.raises(ValueError, match="scoring_func = 'sigmoid' and moe_router_score_function = 'softmax'"):
        RoutingMethod.from_config({**STANDARD, "moe_router_score_function": "softmax"})


@pytest.mark.parametrize(
    ("changed", "error", "words"),
    [
        ({"zero_expert_num": "128"}, TypeError, "zero_expert_num is '128', but must be an int"),
        ({"zero_expert_num": True}, TypeError, "zero_expert_num is True, but must be an int"),
        ({"zero_expert_num": 1.5}, TypeError, "zero_expert_num is 1.5, but must be an int"),
        ({"zero_expert_num": -6}, ValueError, "longcat_flash: zero_expert_num is -6, but must be 0 or more"),
        ({"n_routed_experts": "256"}, TypeError, "num_experts is '256', but must be an int"),
        ({"n_routed_experts": True}, TypeError, "num_experts is True, but must be an int"),
        ({"routed_scaling_factor": float("nan")}, ValueError, "scale is nan, but must be"),
        ({"routed_scaling_factor": [1.0, 2.0]}, ValueError, "routed_scaling_factor differs between layers"),
    ],
    ids=str,
)
def test_numbers_of_another_kind(changed: Config, error: type, words: str) -> None:
    with pytest.raises(error, match=words):
        RoutingMethod.from_config({**LONGCAT, "model_type": "longcat_flash", **changed})


def test_numbers_of_numpy() -> None:
    config = {**MIXTRAL, "num_local_experts": np.array([8, 8]), "num_experts_per_tok": np.int64(2)}
    assert RoutingMethod.from_config(config) == RoutingMethod.from_config(MIXTRAL)
    with pytest.raises(ValueError, match="num_local_experts differs between layers"):
        RoutingMethod.from_config({**MIXTRAL, "num_local_experts": np.array([8, 4])})


def test_a_part_that_contains_itself() -> None:
    config: Config = {}
    config["text_config"] = config
    with pytest.raises(ValueError, match=r"^config: a part of it contains itself$"):
        RoutingMethod.from_config(config)
