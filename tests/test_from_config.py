# SPDX-License-Identifier: Apache-2.0
"""RoutingMethod.from_config: published configurations, their dicts, DeepSeek's own, parts, and what is refused."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from cupy_router import RoutingMethod, presets

V2 = {"num_experts_per_tok": 6, "scoring_func": "softmax", "norm_topk_prob": False}
V3 = {"num_experts_per_tok": 8, "scoring_func": "sigmoid", "topk_method": "noaux_tc", "norm_topk_prob": True}
V4 = {**V3, "num_experts_per_tok": 6, "scoring_func": "sqrtsoftplus", "num_hash_layers": 3}
NO_GROUPS = {"n_group": 1, "topk_group": 1}

# Preset -> the configuration class, and what the published config.json of the model says about its routers.
PUBLISHED: dict[str, tuple[str, dict[str, Any]]] = {
    "deepseek-v4-flash": ("DeepseekV4Config", {**V4, "n_routed_experts": 256, "routed_scaling_factor": 1.5}),
    "deepseek-v4-pro": ("DeepseekV4Config", {**V4, "n_routed_experts": 384, "routed_scaling_factor": 2.5}),
    "deepseek-v3": (
        "DeepseekV3Config",
        {**V3, "n_routed_experts": 256, "n_group": 8, "topk_group": 4, "routed_scaling_factor": 2.5},
    ),
    "deepseek-v2": (
        "DeepseekV2Config",
        {
            **V2,
            "n_routed_experts": 160,
            "topk_method": "group_limited_greedy",
            "n_group": 8,
            "topk_group": 3,
            "routed_scaling_factor": 16.0,
        },
    ),
    "deepseek-v2-lite": (
        "DeepseekV2Config",
        {**V2, **NO_GROUPS, "n_routed_experts": 64, "topk_method": "greedy", "routed_scaling_factor": 1.0},
    ),
    "kimi-k2": ("DeepseekV3Config", {**V3, **NO_GROUPS, "n_routed_experts": 384, "routed_scaling_factor": 2.827}),
    "glm-4.5": (
        "Glm4MoeConfig",
        {
            **NO_GROUPS,
            "n_routed_experts": 160,
            "num_experts_per_tok": 8,
            "norm_topk_prob": True,
            "routed_scaling_factor": 2.5,
        },
    ),
    "qwen3-moe": ("Qwen3MoeConfig", {"num_experts": 128, "num_experts_per_tok": 8, "norm_topk_prob": True}),
    "qwen2-moe": ("Qwen2MoeConfig", {"num_experts": 60, "num_experts_per_tok": 4, "norm_topk_prob": False}),
    "mixtral": ("MixtralConfig", {"num_local_experts": 8, "num_experts_per_tok": 2}),
    "gpt-oss": ("GptOssConfig", {"num_local_experts": 32, "num_experts_per_tok": 4, "experts_per_token": 4}),
    "gpt-oss-120b": ("GptOssConfig", {"num_local_experts": 128, "num_experts_per_tok": 4, "experts_per_token": 4}),
    "llama4": ("Llama4TextConfig", {"num_local_experts": 16, "num_experts_per_tok": 1}),
    "llama4-maverick": ("Llama4TextConfig", {"num_local_experts": 128, "num_experts_per_tok": 1}),
    "granite-moe": ("GraniteMoeConfig", {"num_local_experts": 32, "num_experts_per_tok": 8}),
    "granite-moe-3b": ("GraniteMoeConfig", {"num_local_experts": 40, "num_experts_per_tok": 8}),
    "minimax-m2": (
        "MiniMaxM2Config",
        {"num_local_experts": 256, "num_experts_per_tok": 8, "scoring_func": "sigmoid", "use_routing_bias": True},
    ),
    "ernie-4.5": ("Ernie4_5_MoeConfig", {"moe_num_experts": 64, "moe_k": 6}),
    "ernie-4.5-300b": ("Ernie4_5_MoeConfig", {"moe_num_experts": 64, "moe_k": 8}),
    "olmoe": ("OlmoeConfig", {"num_experts": 64, "num_experts_per_tok": 8, "norm_topk_prob": False}),
}

# Configurations of DeepSeek's inference code, which has names of its own.
INFERENCE: dict[str, dict[str, Any]] = {
    "deepseek-v4-flash": {
        "n_routed_experts": 256,
        "n_shared_experts": 1,
        "n_activated_experts": 6,
        "score_func": "sqrtsoftplus",
        "route_scale": 1.5,
        "n_hash_layers": 3,
    },
    "deepseek-v4-pro": {"n_routed_experts": 384, "n_activated_experts": 6, "route_scale": 2.5, "n_hash_layers": 3},
    "deepseek-v3": {
        "n_routed_experts": 256,
        "n_shared_experts": 1,
        "n_activated_experts": 8,
        "n_expert_groups": 8,
        "n_limited_groups": 4,
        "route_scale": 2.5,
        "score_func": "sigmoid",
    },
    "deepseek-v2": {
        "n_routed_experts": 160,
        "n_shared_experts": 2,
        "n_activated_experts": 6,
        "n_expert_groups": 8,
        "n_limited_groups": 3,
        "route_scale": 16.0,
    },
    "deepseek-v2-lite": {"n_routed_experts": 64, "n_shared_experts": 2, "n_activated_experts": 6, "route_scale": 1.0},
}


def test_every_preset_has_its_published_values_here() -> None:
    assert PUBLISHED.keys() == presets().keys()


def test_the_documentation_has_a_row_for_every_preset() -> None:
    page = (Path(__file__).parents[1] / "docs/methods.md").read_text()
    rows = re.findall(r"^\| `([\w.-]+)`[^|]* \| (\d+) \| (\d+) \| ", page, re.M)
    assert [(name, int(e), int(k)) for name, e, k in rows] == [
        (n, m.num_experts, m.top_k) for n, m in presets().items()
    ]


@pytest.mark.parametrize("name", PUBLISHED)
def test_published_values_give_the_preset(name: str) -> None:
    transformers = pytest.importorskip("transformers", reason="transformers is not installed")
    class_name, published = PUBLISHED[name]
    config = getattr(transformers, class_name)(**published)
    assert RoutingMethod.from_config(config) == presets()[name]
    assert RoutingMethod.from_config(config.to_dict()) == presets()[name]
    assert RoutingMethod.from_config(json.loads(config.to_json_string())) == presets()[name]
    assert RoutingMethod.from_config({"model_type": config.model_type, **published}) == presets()[name]


@pytest.mark.parametrize("name", INFERENCE)
def test_configurations_of_deepseek_s_inference_code(name: str) -> None:
    assert RoutingMethod.from_config(INFERENCE[name]) == presets()[name]
    assert RoutingMethod.from_config(SimpleNamespace(**INFERENCE[name])) == presets()[name]


def test_a_dataclass_is_a_configuration() -> None:
    @dataclass
    class ModelArgs:
        n_routed_experts: int = 64
        n_activated_experts: int = 6
        score_func: str = "softmax"

    assert RoutingMethod.from_config(ModelArgs()) == presets()["deepseek-v2-lite"]


MIXTRAL = {"model_type": "mixtral", "num_local_experts": 8, "num_experts_per_tok": 2}
OLMOE = {"model_type": "olmoe", "num_experts": 64, "num_experts_per_tok": 8, "norm_topk_prob": False}
KIMI = {"model_type": "kimi_k2", **PUBLISHED["kimi-k2"][1]}
DENSE = {"model_type": "llama", "hidden_size": 64}


@pytest.mark.parametrize(
    ("config", "preset"),
    [
        ({"model_type": "some_vlm", "vision_config": DENSE, "text_config": OLMOE}, "olmoe"),
        ({"model_type": "some_vlm", "vision_config": MIXTRAL, "text_config": OLMOE}, "olmoe"),
        ({"vision_config": MIXTRAL, "text_config": DENSE}, "mixtral"),
        ({"model_type": "kimi_vl", "text_config": KIMI}, "kimi-k2"),
        ({"talker_config": {"text_config": MIXTRAL}, "thinker_config": {"text_config": OLMOE}}, "olmoe"),
        ({"model_type": "llama4", "text_config": {"num_local_experts": 16, "num_experts_per_tok": 1}}, "llama4"),
        ({"model_type": "some_vlm", "text_config": SimpleNamespace(to_dict=lambda: OLMOE)}, "olmoe"),
    ],
    ids=lambda value: str(value)[:60],
)
def test_configurations_with_parts(config: dict[str, Any], preset: str) -> None:
    assert RoutingMethod.from_config(config) == presets()[preset]


def test_configuration_objects_with_parts() -> None:
    transformers = pytest.importorskip("transformers", reason="transformers is not installed")
    llama = transformers.Llama4Config(text_config={"num_local_experts": 128, "num_experts_per_tok": 1})
    assert RoutingMethod.from_config(llama) == presets()["llama4-maverick"]
    ffn = {"moe_num_experts": 16, "moe_top_k": 4, "moe_normalize_expert_weights": 1.0}
    assert RoutingMethod.from_config(transformers.DbrxConfig(ffn_config=ffn)) == RoutingMethod(16, 4, "softmax")


def test_the_configuration_of_one_layer() -> None:
    transformers = pytest.importorskip("transformers", reason="transformers is not installed")
    if not hasattr(transformers, "Dots3NoteVisionConfig"):
        pytest.skip("another version of transformers has this model")
    layers = {25: {"num_local_experts": 4}, 26: {"num_local_experts": 8}}
    config = transformers.Dots3NoteVisionConfig(num_hidden_layers=27, num_experts_per_tok=2, per_layer_config=layers)
    with pytest.raises(ValueError, match="num_local_experts differs between layers"):
        RoutingMethod.from_config(config)
    method = RoutingMethod.from_config(config.per_layer_config[26])
    assert method == RoutingMethod(8, 2, "sigmoid", renormalize_eps=1e-20)


COUNTS = {"num_experts": 16, "num_experts_per_tok": 4}
STANDARD = {"model_type": "brand_new", **COUNTS, "scoring_func": "sigmoid", "norm_topk_prob": True}
GROUPS = {"n_group": 4, "topk_group": 2}

# What the code of a model does although its configuration says something else, or nothing.
SERVED: dict[str, tuple[dict[str, Any], RoutingMethod]] = {
    "the scale comes after the router": (
        {"model_type": "minimax_m3_vl_text", **COUNTS, "routed_scaling_factor": 2.0},
        RoutingMethod(16, 4, "sigmoid"),
    ),
    "the scale is null": (
        {"model_type": "mimo_v2_flash", **COUNTS, **GROUPS, "norm_topk_prob": True, "routed_scaling_factor": None},
        RoutingMethod(16, 4, "sigmoid", num_groups=4, top_groups=2, group_score="top2", renormalize_eps=1e-20),
    ),
    "softmax with bias and groups by top 2": (
        {"model_type": "mistral4", **COUNTS, **GROUPS, "norm_topk_prob": False, "routed_scaling_factor": 1.0},
        RoutingMethod(16, 4, "softmax", num_groups=4, top_groups=2, group_score="top2", renormalize=False),
    ),
    "zero experts are experts": (
        {"model_type": "longcat_flash", "n_routed_experts": 16, "zero_expert_num": 8, "moe_topk": 4, "route_scale": 6},
        RoutingMethod(24, 4, "softmax", renormalize=False, scale=6.0),
    ),
    "experts under another name": (
        {"model_type": "longcat_flash", "num_local_experts": 16, "zero_expert_num": 8, "moe_topk": 4, "route_scale": 6},
        RoutingMethod(24, 4, "softmax", renormalize=False, scale=6.0),
    ),
    "divided by top_k": (
        {"model_type": "openai_privacy_filter", **COUNTS},
        RoutingMethod(16, 4, "softmax", score_after_topk=True, renormalize=False, scale=0.25),
    ),
    "bias on the logits": (
        {"model_type": "kolibri1", **COUNTS, "norm_topk_prob": True},
        RoutingMethod(16, 4, "sigmoid", score_after_topk=True, bias_on="logits"),
    ),
    "softmax of the chosen is not renormalised": (
        {"model_type": "cohere2_moe", **COUNTS, "expert_selection_fn": "softmax", "norm_topk_prob": True},
        RoutingMethod(16, 4, "softmax", score_after_topk=True, renormalize=False),
    ),
    "scaled logits": (
        {"model_type": "muse_spark_text", **COUNTS, "output_multiplier": 0.25, "routed_scaling_factor": 2.0},
        RoutingMethod(16, 4, "sigmoid", logit_scale=0.25, renormalize_eps=1e-15, scale=2.0),
    ),
    "soft cap": (
        {"model_type": "laguna", **COUNTS, "moe_router_logit_softcapping": 30.0},
        RoutingMethod(16, 4, "sigmoid", logit_softcap=30.0),
    ),
    "no soft cap": (
        {"model_type": "laguna", **COUNTS, "moe_router_logit_softcapping": 0},
        RoutingMethod(16, 4, "sigmoid"),
    ),
    "shared experts in the normaliser": (
        {"model_type": "inkling_text", **COUNTS, "n_shared_experts": 2, "route_scale": 8.0},
        RoutingMethod(16, 4, "sigmoid", scale=8.0, num_shared_experts=2, shared_in_normalizer=True),
    ),
    "a list with the same number for every layer": (
        {"model_type": "hunyuan_v1_moe", "num_experts": 16, "moe_topk": [4, 4, 4]},
        RoutingMethod(16, 4, "softmax"),
    ),
    "no norm": (
        {"model_type": "dbrx", "ffn_config": {**COUNTS, "moe_normalize_expert_weights": None}},
        RoutingMethod(16, 4, "softmax", renormalize=False),
    ),
    "the norm of its class": ({"model_type": "dbrx", "ffn_config": COUNTS}, RoutingMethod(16, 4, "softmax")),
    "groups of which all count": (
        {"model_type": "axk2", **COUNTS, "n_group": 4, "topk_group": 4, "norm_topk_prob": False, "route_scale": 1},
        RoutingMethod(16, 4, "sigmoid", renormalize=False),
    ),
    "unknown, with factors of losses": (
        {**STANDARD, "router_aux_loss_factor": 0.01, "moe_group": "world", "rope_scaling_factor": 8.0},
        RoutingMethod(16, 4, "sigmoid", renormalize_eps=1e-20),
    ),
    "unknown, one group": ({**STANDARD, **NO_GROUPS}, RoutingMethod(16, 4, "sigmoid", renormalize_eps=1e-20)),
    "unknown, softmax": (
        {**STANDARD, "scoring_func": "softmax", "norm_topk_prob": False, "routed_scaling_factor": 3.0},
        RoutingMethod(16, 4, "softmax", renormalize=False, scale=3.0),
    ),
    "unknown, groups by top 2": (
        {**STANDARD, **GROUPS, "topk_method": "noaux_tc"},
        RoutingMethod(16, 4, "sigmoid", num_groups=4, top_groups=2, group_score="top2", renormalize_eps=1e-20),
    ),
    "unknown, groups by maximum": (
        {**STANDARD, **GROUPS, "topk_method": "group_limited_greedy"},
        RoutingMethod(16, 4, "sigmoid", num_groups=4, top_groups=2, renormalize_eps=1e-20),
    ),
}


@pytest.mark.parametrize("case", SERVED)
def test_the_method_is_what_the_code_does(case: str) -> None:
    config, method = SERVED[case]
    assert RoutingMethod.from_config(config) == method


REFUSED: list[tuple[dict[str, Any], str]] = [
    ({"model_type": "switch_transformers", "num_experts": 8}, "switch_transformers: .* beyond their capacity"),
    ({"model_type": "nllb-moe", "num_experts": 8}, "nllb-moe: .* beyond their capacity"),
    ({"model_type": "phimoe", **COUNTS}, "phimoe: .* SparseMixer"),
    ({"model_type": "doge", **COUNTS}, "doge: .* product keys"),
    ({"model_type": "zaya", **COUNTS}, "zaya: .* skip all experts"),
    ({"backbone_config": {"model_type": "vitpose_backbone", "num_experts": 6}}, "vitpose_backbone: .* data set"),
    (
        {"model_type": "axk2", **COUNTS, **GROUPS, "norm_topk_prob": True, "route_scale": 1.0},
        "axk2: .* outside the best groups count 0",
    ),
    ({"model_type": "dbrx", **COUNTS, "moe_normalize_expert_weights": 2}, "moe_normalize_expert_weights is 2, but"),
    ({"model_type": "gemma4_text", **COUNTS, "enable_moe_block": False}, "enable_moe_block is False, but"),
    ({"model_type": "cohere2_moe", **COUNTS, "expert_selection_fn": "relu"}, "expert_selection_fn is 'relu', but"),
    ({"model_type": "deepseek_v2", **COUNTS, "topk_method": "random"}, "topk_method is 'random', but"),
    ({"model_type": "deepseek_v4", **COUNTS, "scoring_func": "gelu", "route_scale": 1.0}, "its score is 'gelu', but"),
    ({"n_routed_experts": 16, "n_activated_experts": 4, "score_func": "tanh"}, "config: score_func is 'tanh', but"),
    ({"model_type": "hunyuan_v1_moe", "num_experts": 16, "moe_topk": [4, 2]}, "moe_topk differs between layers"),
    (
        {"model_type": "hy_v3", **COUNTS, "route_scale": 1.0, "per_layer_config": {"3": {"num_experts": 8}}},
        "num_experts differs between layers, so pass the configuration of one layer",
    ),
    ({**MIXTRAL, "num_experts": 9}, "num_experts = 9 and num_local_experts = 8 contradict each other"),
    ({"model_type": "mixtral", "num_local_experts": 8}, "mixtral: does not say top_k, .* num_experts_per_tok"),
    ({"model_type": "olmoe", **COUNTS}, "olmoe: does not say renormalize, .* norm_topk_prob"),
    ({**MIXTRAL, "num_experts_per_tok": 9}, "top_k is 9, but must be from 1 to num_experts = 8"),
    ({"model_type": "openai_privacy_filter", "num_experts": 8, "moe_k": 0}, "top_k is 0, but"),
    # Unknown model_types
    ({"model_type": "brand_new", **COUNTS}, "brand_new: does not say score, .* scoring_func"),
    ({"model_type": "brand_new", **COUNTS, "scoring_func": "sigmoid"}, "does not say renormalize"),
    ({**STANDARD, **GROUPS}, "brand_new: has groups of experts, but no topk_method"),
    ({**STANDARD, "topk_method": "expert_choice"}, "topk_method is 'expert_choice', but"),
    ({**STANDARD, "scoring_func": "entmax"}, "its score is 'entmax', but"),
    ({**STANDARD, "moe_capacity_factor": 1.25}, "brand_new: .* beyond their capacity"),
    ({**STANDARD, "zero_expert_num": 4}, "brand_new: .* without weights"),
    ({**STANDARD, "use_expert_choice": True}, "brand_new: .* experts choose their tokens"),
    ({**STANDARD, "num_experts_per_tok": None}, "does not say top_k"),
    ({**STANDARD, "topk_method": "noaux_tc", "n_group": 4}, "brand_new: does not say top_groups, .* topk_group"),
    ({**STANDARD, "topk_group": 2}, "brand_new: has groups of experts, but no topk_method"),
    ({**STANDARD, "moe_topk_scaling": 2.5}, "brand_new: has moe_topk_scaling = 2.5, whose meaning is not known"),
    ({**STANDARD, "expert_group_count": 4}, "brand_new: has expert_group_count = 4, whose meaning is not known"),
    # Names that are missing
    ({"model_type": "longcat_flash", **COUNTS, "route_scale": 6.0}, "does not say zero_expert_num, which is part of"),
    ({"model_type": "longcat_flash", "zero_expert_num": 8, "moe_topk": 4}, "longcat_flash: has no experts"),
    # No experts, or experts in several places
    ({}, "config: has no experts"),
    (DENSE, "llama: has no experts, .* num_experts, n_routed_experts"),
    ({"model_type": "granitemoehybrid", "num_local_experts": 0, "num_experts_per_tok": 0}, "has no experts"),
    ({"model_type": "gemma4", "text_config": {"model_type": "gemma4_text", "num_experts": None}}, "has no experts"),
    ({"encoder_config": MIXTRAL, "decoder_config": OLMOE}, "has experts in encoder_config and decoder_config, so pass"),
]


@pytest.mark.parametrize(("config", "message"), REFUSED, ids=[message for _, message in REFUSED])
def test_inexpressible_features_are_refused_by_name(config: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message) as caught:
        RoutingMethod.from_config(config)
    assert "\n" not in str(caught.value)


class Model:
    """Callable, like a model passed instead of its configuration."""

    def __init__(self) -> None:
        self.config = MIXTRAL

    def __call__(self) -> None: ...


@pytest.mark.parametrize(
    "config", [None, 8, "mixtral", [MIXTRAL], b"{}", Model(), Model, object()], ids=lambda c: type(c).__name__
)
def test_not_a_configuration(config: Any) -> None:
    with pytest.raises(TypeError, match=f"config is a {type(config).__name__}, but must be a configuration object or"):
        RoutingMethod.from_config(config)


@pytest.mark.parametrize("fields", [{"num_experts_per_tok": "2"}, {"num_local_experts": 8.0}])
def test_fields_of_the_wrong_type(fields: dict[str, Any]) -> None:
    with pytest.raises(TypeError, match="but must be an int"):
        RoutingMethod.from_config({**MIXTRAL, **fields})


def test_configurations_are_not_changed() -> None:
    config = {"model_type": "some_vlm", "text_config": dict(OLMOE)}
    RoutingMethod.from_config(config)
    assert config == {"model_type": "some_vlm", "text_config": OLMOE}


@pytest.mark.slow("process")
def test_neither_torch_nor_transformers_is_imported() -> None:
    code = (
        f"import sys, cupy_router; cupy_router.RoutingMethod.from_config({MIXTRAL}); "
        'print(*sorted({"numpy", "torch", "transformers"} & set(sys.modules)))'
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "\n"
