# SPDX-License-Identifier: Apache-2.0
"""Convert Hugging Face and DeepSeek configurations to the fields of a RoutingMethod.

A configuration holds numbers, but not what the model's code does with them. The table ``RULES`` adds this by
``model_type``. A model that is not in the table is supported if its configuration states every step.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

Config = Mapping[str, Any]

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
    "score": ("scoring_func", "score_func", "scoring_function", "router_score_function", "moe_router_activation_func"),
    "logit_scale": ("output_multiplier",),
    "logit_softcap": ("moe_router_logit_softcapping", "router_logit_softcapping"),
    "num_groups": ("n_group", "num_expert_group", "n_expert_groups"),
    "top_groups": ("topk_group", "n_limited_groups"),
    "renormalize": ("norm_topk_prob", "moe_renormalize", "route_norm"),
    "renormalize_min": ("moe_norm_min",),
    "scale": (
        "routed_scaling_factor",
        "route_scale",
        "router_scaling_factor",
        "moe_router_scaling_factor",
        "moe_routed_scaling_factor",
    ),
    "num_shared_experts": ("n_shared_experts",),
}
SCORES = ("softmax", "sigmoid", "sqrtsoftplus")
UNSTATED, TOP2_OR_0 = "unstated", "top2 or 0"  # group scores that are refused where groups have an effect


# A rule describes the code of some models: each field of the method is a constant or one of these classes. The numbers
# of experts are always read.
class Read(NamedTuple):
    """Take the value of the configuration under one of the field's names."""

    default: Any = ...  # used if the value is absent or None; ... makes it required


class Total(NamedTuple):
    """Add up the values of the configuration under these names; None counts as 0."""

    names: tuple[str, ...]


class Inverse(NamedTuple):
    """Take 1 / the value of another field of the method."""

    field: str


class Choice(NamedTuple):
    """Take the rule for the value under this name. Values without a rule are refused."""

    name: str
    rules: Mapping[Any, Mapping[str, Any]]
    default: Any = None  # used if the value is absent


Rule = Mapping[str, Any] | Choice | str  # a string names the feature that cannot be expressed

_PLAIN = {"renormalize": False}
_SOFTMAX: dict[str, Any] = {"score": "softmax"}
_SOFTMAX_AFTER_TOPK = {"score": "softmax", "score_after_topk": True, **_PLAIN}
_SIGMOID: dict[str, Any] = {"score": "sigmoid"}
_SIGMOID_AFTER_TOPK = {"score": "sigmoid", "score_after_topk": True}
_GROUPS = {"num_groups": Read(), "top_groups": Read()}
_MAYBE_GROUPS = {"num_groups": Read(1), "top_groups": Read(1)}
_EPS = {"renormalize_eps": 1e-20}
_DEEPSEEK_V3 = {**_SIGMOID, **_GROUPS, "group_score": "top2", "renormalize": Read(), **_EPS, "scale": Read()}

_CAPACITY = "experts drop tokens beyond their capacity, so that a token's experts depend on the other tokens"

# A model_type that is not in the table has to state these fields, and must have none of the unsupported features.
_STATED: dict[str, Any] = {"score": Read(), "renormalize": Read(), **_EPS, "scale": Read(1.0), "logit_softcap": Read(0)}
_UNSUPPORTED = {
    "expert_capacity": _CAPACITY,
    "capacity_factor": _CAPACITY,
    "expert_capacity_factor": _CAPACITY,
    "moe_capacity_factor": _CAPACITY,
    "zero_expert_num": "experts without weights are among those that can be chosen",
    "use_expert_choice": "experts choose their tokens",
}
_UNKNOWN = Choice(
    "topk_method",
    {
        None: {**_STATED, **_MAYBE_GROUPS, "group_score": UNSTATED},
        "greedy": _STATED,
        "group_limited_greedy": {**_STATED, **_GROUPS},
        "noaux_tc": {**_STATED, **_MAYBE_GROUPS, "group_score": "top2"},
    },
)
_DEEPSEEK_V2 = Choice(
    "topk_method",
    {
        "greedy": {**_SOFTMAX, **_PLAIN, "scale": Read()},
        "group_limited_greedy": {**_SOFTMAX, **_GROUPS, **_PLAIN, "scale": Read()},
        "noaux_tc": _UNKNOWN.rules["noaux_tc"],  # used by checkpoints that bring their own code
    },
)

# Configurations of DeepSeek's inference code have no model_type, but one of the names in _INFERENCE.
_INFERENCE_SOFTMAX = {**_SOFTMAX, **_MAYBE_GROUPS, **_PLAIN, "scale": Read(1.0)}
_INFERENCE_SIGMOID = {**_SIGMOID, **_MAYBE_GROUPS, "group_score": "top2", **_EPS, "scale": Read(1.0)}
_INFERENCE_V4 = {"score": "sqrtsoftplus", **_EPS, "scale": Read(1.0)}
_INFERENCE_RULES = {"softmax": _INFERENCE_SOFTMAX, "sigmoid": _INFERENCE_SIGMOID, "sqrtsoftplus": _INFERENCE_V4}
_INFERENCE = {
    "n_hash_layers": Choice("score_func", {None: _INFERENCE_V4, **_INFERENCE_RULES}),
    "n_activated_experts": Choice("score_func", {None: _INFERENCE_SOFTMAX, **_INFERENCE_RULES}),
}

# The rule of each model_type. It overrides whatever else the configuration contains.
_FAMILIES: tuple[tuple[str, Rule], ...] = (
    (
        "flex_olmo mellum olmoe qwen2_moe qwen3_moe qwen3_next qwen3_omni_moe_talker_text qwen3_omni_moe_text "
        "qwen4_exp_text",
        {**_SOFTMAX, "renormalize": Read()},
    ),
    ("diffusion_gemma_text hunyuan_v1_moe minimax mixtral qwen3_5_moe_text qwen3_vl_moe_text", _SOFTMAX),
    ("gemma4_text", Choice("enable_moe_block", {True: _SOFTMAX})),
    ("jamba", {**_SOFTMAX, **_PLAIN}),
    ("dbrx", Choice("moe_normalize_expert_weights", {None: {**_SOFTMAX, **_PLAIN}, 1: _SOFTMAX}, default=1)),
    ("ernie4_5_moe ernie4_5_vl_moe_text", {**_SOFTMAX, "renormalize_min": Read(1e-12)}),
    (
        "longcat_flash",
        {**_SOFTMAX, **_PLAIN, "num_experts": Total(("n_routed_experts", "zero_expert_num")), "scale": Read()},
    ),
    ("deepseek_ocr2_text deepseek_v2 unlimited_ocr_text", _DEEPSEEK_V2),
    ("mistral4", {**_DEEPSEEK_V3, **_SOFTMAX}),
    ("mistral_large4_text", {**_DEEPSEEK_V3, **_SOFTMAX, "renormalize": True}),
    ("aria_text gpt_oss granitemoe granitemoe_swa granitemoehybrid granitemoeshared jetmoe", _SOFTMAX_AFTER_TOPK),
    ("openai_privacy_filter", {**_SOFTMAX_AFTER_TOPK, "scale": Inverse("top_k")}),
    (
        "cohere2_moe",
        Choice(
            "expert_selection_fn",
            {"softmax": _SOFTMAX_AFTER_TOPK, "sigmoid": {**_SIGMOID_AFTER_TOPK, "renormalize": Read()}},
        ),
    ),
    ("llama4_text", {**_SIGMOID_AFTER_TOPK, **_PLAIN}),
    ("kolibri1", {**_SIGMOID_AFTER_TOPK, "bias_on": "logits", "renormalize": Read()}),
    ("flint", {**_SIGMOID, "renormalize": Read()}),
    ("minimax_m2 minimax_m3_vl_text step3p5", _SIGMOID),
    ("laguna", {**_SIGMOID, "logit_softcap": Read(0)}),
    ("lfm2_moe", {**_SIGMOID, "renormalize": Read(), "renormalize_eps": 1e-6, "scale": Read()}),
    ("afmoe dots3_note_vision_encoder hy_v3", {**_SIGMOID, **_EPS, "scale": Read()}),
    ("muse_spark_text", {**_SIGMOID, "logit_scale": Read(), "renormalize_eps": 1e-15, "scale": Read()}),
    (
        "axk1 bailing_hybrid deepseek_v3 deepseek_v32 dots1 dots3_note_text exaone_moe glm4_moe glm4_moe_lite "
        "glm4v_moe_text glm5_next_text glm_moe_dsa hy_v4 kimi_linear nemotron_h solar_open",
        _DEEPSEEK_V3,
    ),
    ("mimo_v2_flash", {**_DEEPSEEK_V3, "scale": Read(1.0)}),
    ("beam", {**_DEEPSEEK_V3, "scale": 1.0}),
    ("axk2", {**_DEEPSEEK_V3, **_MAYBE_GROUPS, "group_score": TOP2_OR_0}),
    ("deepseek_v4 inkling2_text", {"score": Read(), **_EPS, "scale": Read()}),
    ("inkling_text", {**_SIGMOID, "scale": Read(), "num_shared_experts": Read(), "shared_in_normalizer": True}),
    ("doge", "experts are the pairs of two top-k selections over product keys, not rows of a gate"),
    ("nllb-moe switch_transformers", _CAPACITY),
    ("phimoe", "SparseMixer weighs each expert by a softmax over the near logits"),
    ("vitpose_backbone", "the data set of an image decides on its expert, without a router"),
    ("zaya", "a token can skip all experts, and its logits come from an MLP that sees the router of the layer before"),
)
RULES: dict[str, Rule] = {model_type: rule for names, rule in _FAMILIES for model_type in names.split()}

# Parts of a configuration that describe the language model; they take precedence over other parts.
_LANGUAGE = ("text_config", "language_config", "llm_config", "thinker_config")


def routing_fields(config: Any) -> dict[str, Any]:
    """Return the fields of the RoutingMethod of a configuration: an object, its dict, or the dict of a config.json.

    Raises:
        TypeError: ``config`` is neither a configuration object nor a dict.
        ValueError: It has no experts, lacks a field, or describes a step that no method can express.

    >>> routing_fields({"model_type": "mixtral", "num_local_experts": 8, "num_experts_per_tok": 2})
    {'num_experts': 8, 'top_k': 2, 'score': 'softmax'}
    >>> routing_fields({"model_type": "phimoe", "num_local_experts": 16, "num_experts_per_tok": 2})
    Traceback (most recent call last):
    ...
    ValueError: phimoe: no RoutingMethod expresses that SparseMixer weighs each expert by a softmax over the near logits
    """
    top = _as_dict(config)
    if top is None:
        raise TypeError(f"config is a {type(config).__name__}, but must be a configuration object or its dict")
    found = _find(top, _model_type(top))
    if found is None:
        raise ValueError(
            f"{_model_type(top) or 'config'}: has no experts, neither it nor its parts have one of "
            f"{', '.join(NAMES['num_experts'])}"
        )
    part, model_type = found
    rule = RULES.get(model_type)
    if rule is None and not model_type:
        rule = next((rule for name, rule in _INFERENCE.items() if name in part), None)
    if rule is None:
        rule = next((why for name, why in _UNSUPPORTED.items() if part.get(name)), _UNKNOWN)
    try:
        return _finish(_apply(rule, part))
    except ValueError as error:
        raise ValueError(f"{model_type or 'config'}: {error}") from None


def _as_dict(config: Any) -> Config | None:
    """Return the configuration as a dict, or None if the object is not a configuration."""
    if isinstance(config, Mapping):
        return config
    if callable(config) or not hasattr(config, "__dict__"):  # a callable is a class or a model
        return None
    values = config.to_dict() if callable(getattr(config, "to_dict", None)) else vars(config)
    return values if isinstance(values, Mapping) else None


def _model_type(config: Config) -> str:
    return str(config.get("model_type") or "")


def _find(config: Config, model_type: str) -> tuple[Config, str] | None:
    """Return the part of a configuration that has experts, and its model_type, inherited if the part has none."""
    if any(config.get(name) for name in NAMES["num_experts"]):
        return config, model_type
    inherited = next((known for known in (f"{model_type}_text", model_type) if known in RULES), "")
    others = []
    for name in sorted(config, key=lambda name: _LANGUAGE.index(name) if name in _LANGUAGE else len(_LANGUAGE)):
        is_part = isinstance(config[name], Mapping) or hasattr(config[name], "to_dict")
        part = _as_dict(config[name]) if is_part else None
        found = None if part is None else _find(part, _model_type(part) or inherited)
        if found is not None and name in _LANGUAGE:
            return found
        if found is not None:
            others.append((name, found))
    if len(others) > 1:
        names = " and ".join(str(name) for name, _ in others)
        raise ValueError(f"{model_type or 'config'}: has experts in {names}, so pass one of them")
    return others[0][1] if others else None


def _apply(rule: Rule, config: Config) -> dict[str, Any]:
    """Apply a rule to a configuration and return the fields."""
    if isinstance(rule, Choice):
        value = config.get(rule.name, rule.default)
        chosen = next((fields for key, fields in rule.rules.items() if key == value), None)
        if chosen is None:
            allowed = " or ".join(repr(key) for key in rule.rules)
            raise ValueError(f"{rule.name} is {value!r}, but a RoutingMethod expresses only {allowed}")
        rule = chosen
    if isinstance(rule, str):
        raise ValueError(f"no RoutingMethod expresses that {rule}")
    fields: dict[str, Any] = {}
    for field, value in {"num_experts": Read(), "top_k": Read(), **rule}.items():
        if isinstance(value, Read):
            value = _read(config, field, value.default)
        elif isinstance(value, Total):
            value = sum(config.get(name) or 0 for name in value.names)
        elif isinstance(value, Inverse):
            value = 1.0 / (fields[value.field] or 1)  # RoutingMethod refuses a field of 0
        fields[field] = value
    return fields


def _read(config: Config, field: str, default: Any) -> Any:
    """Return the value of a field. If the configuration has it under several names, the values must be equal."""
    layers = config.get("per_layer_config")
    overrides = (
        [layer for layer in layers.values() if isinstance(layer, Mapping)] if isinstance(layers, Mapping) else []
    )
    given: dict[str, Any] = {}
    for name in NAMES[field]:
        values = config.get(name)
        values = list(values) if isinstance(values, list | tuple) and values else [values]
        values += [layer[name] for layer in overrides if name in layer]
        if any(value != values[0] for value in values):
            raise ValueError(f"{name} differs between layers, so pass the configuration of one layer")
        if values[0] is not None:
            given[name] = values[0]
    first = next(iter(given.values()), default)
    if any(value != first for value in given.values()):
        raise ValueError(
            f"{' and '.join(f'{name} = {value!r}' for name, value in given.items())} contradict each other"
        )
    if first is ...:
        raise ValueError(f"does not say {field}, for which it would have one of {', '.join(NAMES[field])}")
    return first


def _finish(fields: dict[str, Any]) -> dict[str, Any]:
    """Drop the fields that have no effect, so that equivalent configurations give equal methods."""
    if fields["score"] not in SCORES:
        raise ValueError(f"its score is {fields['score']!r}, but must be one of {', '.join(map(repr, SCORES))}")
    if not fields.get("logit_softcap"):
        fields.pop("logit_softcap", None)
    if not fields.get("renormalize", True):
        fields.pop("renormalize_eps", None)
        fields.pop("renormalize_min", None)
    group_score = fields.get("group_score", "max")
    if fields.get("num_groups", 1) == 1 or fields["num_groups"] == fields["top_groups"]:
        for field in ("num_groups", "top_groups", "group_score"):
            fields.pop(field, None)
    elif group_score == UNSTATED:
        raise ValueError("has groups of experts, but no topk_method, which would say how a group is scored")
    elif group_score == TOP2_OR_0:
        raise ValueError(
            "no RoutingMethod expresses that experts outside the best groups count 0, which can be more than experts "
            "inside them have when their bias is negative"
        )
    return fields
