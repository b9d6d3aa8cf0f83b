# SPDX-License-Identifier: Apache-2.0
"""Routing of each known model: ``RULES`` has one line for each model_type. Data only.

A configuration holds numbers, but not what the model's code does with them. A rule says this: it has a value or one of
the classes below for each field of a RoutingMethod that is not at its default. The numbers of experts are always read.
A new model whose steps are known is a line in ``RULES``. Read its code for it, not the code of a similar model.
"""

from __future__ import annotations

from typing import Any, NamedTuple

# Names of each field of a RoutingMethod in configurations.
NAMES = {
    "num_experts": ("num_experts", "n_routed_experts", "num_local_experts", "moe_num_experts"),
    "top_k": (
        "num_experts_per_tok",
        "num_experts_per_token",
        "n_activated_experts",
        "experts_per_token",
        "top_k_experts",
        "moe_topk",
        "moe_top_k",
        "moe_k",
    ),
    "score": (
        "scoring_func",
        "score_func",
        "score_function",
        "scoring_function",
        "router_score_function",
        "moe_router_activation_func",
        "moe_router_activation",
        "moe_router_score_function",
        "router_score_func",
        "moe_gate_act",
    ),
    "logit_scale": ("output_multiplier",),
    "logit_softcap": ("moe_router_logit_softcapping", "router_logit_softcapping"),
    "num_groups": ("n_group", "num_expert_group", "n_expert_groups", "num_expert_groups"),
    "top_groups": ("topk_group", "n_limited_groups", "num_expert_groups_per_tok"),
    "renormalize": ("norm_topk_prob", "moe_renormalize", "route_norm", "norm_expert_weight"),
    "renormalize_min": ("moe_norm_min",),
    "scale": (
        "routed_scaling_factor",
        "route_scale",
        "router_scaling_factor",
        "moe_router_scaling_factor",
        "moe_routed_scaling_factor",
        "moe_router_topk_scaling_factor",
        "routed_scale",
    ),
    "num_shared_experts": ("n_shared_experts",),
}


class Read(NamedTuple):
    """The value of the configuration under one of the field's names."""

    default: Any = ...  # that of the model's code, used if the value is absent or None; ... makes the value required
    names: tuple[str, ...] = ()  # in place of those in NAMES


class Plus(NamedTuple):
    """The value of the field, plus the value under this name, which has to be there; None counts as 0."""

    name: str


class Inverse(NamedTuple):
    """1 / the value of another field of the method."""

    field: str


class IfSeveral(NamedTuple):
    """A value or Read for a top_k of 2 or more. With one expert per token it is False."""

    value: Any


class Choice(NamedTuple):
    """The rule for the value under this name. Values without a rule are refused."""

    name: str
    rules: dict[Any, Any]
    default: Any = None  # used if the value is absent
    why: str = "what its routers do is known only for {allowed}"  # other values are refused


Steps = dict[str, Any]
Rule = Steps | Choice | str  # a string names the feature that no method expresses

UNSTATED, TOP2_OR_0 = "unstated", "top2 or 0"  # group scores that are refused where groups have an effect

# Steps that rules consist of.
_SOFTMAX: Steps = {"score": "softmax"}
_SIGMOID: Steps = {"score": "sigmoid"}
_OF_CHOSEN: Steps = {"score_after_topk": True}
_GROUPS: Steps = {"num_groups": Read(), "top_groups": Read()}
_TOP2: Steps = {"group_score": "top2"}
_MAYBE_GROUPS: Steps = {"num_groups": Read(1), "top_groups": Read(None)}  # None is refused if there are groups
_UNSTATED_GROUPS: Steps = _MAYBE_GROUPS | {"group_score": UNSTATED}
_PLAIN: Steps = {"renormalize": False}
_NORM: Steps = {"renormalize": Read()}
_EPS: Steps = {"renormalize_eps": 1e-20}
_SCALE: Steps = {"scale": Read()}
_SCALE_OR_1: Steps = {"scale": Read(1.0)}

# The steps of several models.
_SOFTMAX_OF_CHOSEN = _SOFTMAX | _OF_CHOSEN | _PLAIN
_DEEPSEEK_V3 = _SIGMOID | _GROUPS | _TOP2 | _NORM | _EPS | _SCALE
_ERNIE = _SOFTMAX | {"renormalize_min": Read(1e-12)}
_LONGCAT = _SOFTMAX | _PLAIN | _SCALE | {"num_experts": Plus("zero_expert_num")}
_ARIA = _SOFTMAX_OF_CHOSEN | {"top_k": Read(names=("moe_topk",))}  # the code ignores num_experts_per_tok

# A model_type that is not in the table has to state these fields, and must have none of the unsupported features.
_STATED: Steps = {"score": Read()} | _NORM | _EPS | _SCALE_OR_1 | {"logit_softcap": Read(0)}
UNKNOWN = Choice(
    "topk_method",
    {
        None: _STATED | _UNSTATED_GROUPS,
        "greedy": _STATED,
        "group_limited_greedy": _STATED | _GROUPS,
        "noaux_tc": _STATED | _MAYBE_GROUPS | _TOP2,
    },
)
_CAPACITY = "experts drop tokens beyond their capacity, so that a token's experts depend on the other tokens"
UNSUPPORTED = {
    "expert_capacity": _CAPACITY,
    "capacity_factor": _CAPACITY,
    "expert_capacity_factor": _CAPACITY,
    "moe_capacity_factor": _CAPACITY,
    "zero_expert_num": "experts without weights are among those that can be chosen",
    "use_expert_choice": "experts choose their tokens",
}

_DEEPSEEK_V2 = Choice(
    "topk_method",
    {
        "greedy": _SOFTMAX | _PLAIN | _SCALE_OR_1,
        "group_limited_greedy": _SOFTMAX | _GROUPS | _PLAIN | _SCALE_OR_1,
        "noaux_tc": UNKNOWN.rules["noaux_tc"],  # used by checkpoints that bring their own code
    },
)
# The code that DeepSeek-VL2 and DeepSeek-OCR bring reads all fields.
_VL2: Steps = {"score": Read("softmax"), "renormalize": IfSeveral(Read(False))} | _EPS | _SCALE_OR_1
_DEEPSEEK_VL2 = Choice(
    "topk_method",
    {
        "greedy": _VL2,
        "group_limited_greedy": _VL2 | _GROUPS,
        "noaux_tc": _VL2 | _GROUPS | {"group_score": TOP2_OR_0},
    },
)
# Ling and Ring 2.0, LLaDA2.
_LING_2 = _DEEPSEEK_V3 | {"renormalize": IfSeveral(True)}
_LING_1_STEPS = _SOFTMAX | {"renormalize": IfSeveral(Read())} | _UNSTATED_GROUPS
_LING_1 = Choice(
    "moe_router_enable_expert_bias",
    {None: _LING_1_STEPS, False: _LING_1_STEPS},
    why="it has no score_function, which models with such a bias have",
)
_STEP3_STEPS = Choice("use_moe_router_bias", {None: _SOFTMAX | _PLAIN, False: _SOFTMAX | _PLAIN})
_STEP3 = Choice(
    "norm_expert_weight",
    {None: _STEP3_STEPS, False: _STEP3_STEPS},
    why="of its two published implementations only one renormalises then",
)

# Configurations without a model_type: the rule of those that have this name. The first three are of inference code.
_V4 = {"score": "sqrtsoftplus"} | _EPS | _SCALE_OR_1
_INFERENCE_SOFTMAX = _SOFTMAX | _MAYBE_GROUPS | _PLAIN | _SCALE_OR_1
_INFERENCE_SIGMOID = _SIGMOID | _MAYBE_GROUPS | _TOP2 | _EPS | _SCALE_OR_1
_INFERENCE = {"softmax": _INFERENCE_SOFTMAX, "sigmoid": _INFERENCE_SIGMOID, "sqrtsoftplus": _V4}
WITHOUT_TYPE: dict[str, Rule] = {
    "n_hash_layers": Choice("score_func", {None: _V4, **_INFERENCE}),  # DeepSeek-V4
    "n_activated_experts": Choice("score_func", {None: _INFERENCE_SOFTMAX, **_INFERENCE}),  # DeepSeek-V2 and V3
    "routed_scale": _SOFTMAX | _UNSTATED_GROUPS | _SCALE,  # params.json of Mistral Large 3
}

# The rule of each model_type. A configuration that states another step than the rule is refused. So a scale of 1.0 is
# written where the model's code applies the configuration's after the router.
RULES: dict[str, Rule] = {
    "afmoe": _SIGMOID | _EPS | _SCALE,
    "aria_moe_lm": _ARIA,
    "aria_text": _ARIA,
    "axk1": _DEEPSEEK_V3,
    "axk2": _SIGMOID | _MAYBE_GROUPS | {"group_score": TOP2_OR_0} | _NORM | _EPS | _SCALE,
    "bailing_hybrid": _DEEPSEEK_V3,
    "bailing_moe": Choice("score_function", {None: _LING_1, "sigmoid": _LING_2}),
    "bailing_moe_linear": Choice("score_function", {"sigmoid": _LING_2}),
    "bailing_moe_v2": Choice("score_function", {None: _LING_2, "sigmoid": _LING_2}),
    "beam": _DEEPSEEK_V3 | {"scale": 1.0},
    "cohere2_moe": Choice(
        "expert_selection_fn", {"softmax": _SOFTMAX_OF_CHOSEN, "sigmoid": _SIGMOID | _OF_CHOSEN | _NORM}
    ),
    "dbrx": Choice("moe_normalize_expert_weights", {None: _SOFTMAX | _PLAIN, 1: _SOFTMAX}, default=1),
    "deepseek_ocr2_text": _DEEPSEEK_V2,
    "deepseek_v2": _DEEPSEEK_V2,
    "deepseek_v3": _DEEPSEEK_V3,
    "deepseek_v32": _DEEPSEEK_V3,
    "deepseek_v4": {"score": Read()} | _EPS | _SCALE,
    "deepseek_vl_v2": _DEEPSEEK_VL2,
    "diffusion_gemma_text": _SOFTMAX,
    "doge": "experts are the pairs of two top-k selections over product keys, not rows of a gate",
    "dots1": _DEEPSEEK_V3,
    "dots3_note_text": _DEEPSEEK_V3,
    "dots3_note_vision_encoder": _SIGMOID | _EPS | _SCALE,
    "ernie4_5_moe": _ERNIE,
    "ernie4_5_moe_vl": Choice("moe_group_experts", {None: _ERNIE, False: _ERNIE}),
    "ernie4_5_vl_moe_text": _ERNIE,
    "exaone_moe": _DEEPSEEK_V3,
    "flex_olmo": _SOFTMAX | _NORM,
    "flint": _SIGMOID | _NORM,
    "gemma4_text": Choice("enable_moe_block", {True: _SOFTMAX}),
    "glm4_moe": _DEEPSEEK_V3,
    "glm4_moe_lite": _DEEPSEEK_V3,
    "glm4v_moe_text": _DEEPSEEK_V3,
    "glm5_next_text": _DEEPSEEK_V3,
    "glm_moe_dsa": _DEEPSEEK_V3,
    "gpt_oss": _SOFTMAX_OF_CHOSEN,
    "granitemoe": _SOFTMAX_OF_CHOSEN,
    "granitemoe_swa": _SOFTMAX_OF_CHOSEN,
    "granitemoehybrid": _SOFTMAX_OF_CHOSEN,
    "granitemoeshared": _SOFTMAX_OF_CHOSEN,
    "hunyuan_v1_moe": _SOFTMAX,
    "hy_v3": _SIGMOID | _EPS | _SCALE,
    "hy_v4": _DEEPSEEK_V3,
    "hy_v4_vl_text": _DEEPSEEK_V3,
    "inkling2_loop_text": {"score": Read()} | _EPS | _SCALE,
    "inkling2_text": {"score": Read()} | _EPS | _SCALE,
    "inkling_text": _SIGMOID | _SCALE | {"num_shared_experts": Read(), "shared_in_normalizer": True},
    "jamba": _SOFTMAX | _PLAIN,
    "jetmoe": _SOFTMAX_OF_CHOSEN,
    "kimi_linear": _DEEPSEEK_V3,
    "kolibri1": _SIGMOID | _OF_CHOSEN | {"bias_on": "logits"} | _NORM,
    "laguna": _SIGMOID | {"logit_softcap": Read(0), "scale": 1.0},
    "lara_mini": _SOFTMAX | _NORM,
    "lfm2_moe": _SIGMOID | _NORM | {"renormalize_eps": 1e-6} | _SCALE,
    "llada2_moe": Choice("score_function", {None: _LING_2, "sigmoid": _LING_2}),
    "llama4_text": _SIGMOID | _OF_CHOSEN | _PLAIN,
    "longcat_flash": _LONGCAT,
    "longcat_flash_ngram": _LONGCAT,
    "mellum": _SOFTMAX | _NORM,
    "mimo_v2_flash": _DEEPSEEK_V3 | _SCALE_OR_1,
    "minimax": _SOFTMAX,
    "minimax_m1": _SOFTMAX,
    "minimax_m2": _SIGMOID,
    "minimax_m3_vl_text": _SIGMOID | {"scale": 1.0},
    "minimax_text_01": _SOFTMAX,
    "mistral4": _DEEPSEEK_V3 | _SOFTMAX,
    "mistral_large4_text": _DEEPSEEK_V3 | _SOFTMAX | {"renormalize": True},
    "mixtral": _SOFTMAX,
    "muse_spark_text": _SIGMOID | {"logit_scale": Read(), "renormalize_eps": 1e-15} | _SCALE,
    "nemotron_h": _DEEPSEEK_V3,
    "nllb-moe": _CAPACITY,
    "olmoe": _SOFTMAX | _NORM,
    "openai_privacy_filter": _SOFTMAX_OF_CHOSEN | {"scale": Inverse("top_k")},
    "phimoe": "SparseMixer weighs each expert by a softmax over the near logits",
    "qwen2_moe": _SOFTMAX | _NORM,
    "qwen3_5_moe_text": _SOFTMAX,
    "qwen3_moe": _SOFTMAX | _NORM,
    "qwen3_next": _SOFTMAX | _NORM,
    "qwen3_omni_moe_talker_text": _SOFTMAX | _NORM,
    "qwen3_omni_moe_text": _SOFTMAX | _NORM,
    "qwen3_vl_moe_text": _SOFTMAX,
    "qwen4_exp_text": _SOFTMAX | _NORM,
    "sarvam_mla": _DEEPSEEK_V3,
    "sarvam_moe": _DEEPSEEK_V3,
    "solar_open": _DEEPSEEK_V3,
    "step3_text": _STEP3,
    "step3_vl": _STEP3,
    "step3p5": _SIGMOID | {"scale": 1.0},
    "switch_transformers": _CAPACITY,
    "unlimited_ocr_text": _DEEPSEEK_V2,
    "vitpose_backbone": "the data set of an image decides on its expert, without a router",
    "zaya": "a token can skip all experts, and its logits come from an MLP that sees the router of the layer before",
}
