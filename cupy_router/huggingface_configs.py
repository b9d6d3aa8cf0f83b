# SPDX-License-Identifier: Apache-2.0
"""Convert Hugging Face and DeepSeek configurations to the fields of a RoutingMethod.

``huggingface_families.RULES`` says how each model's code uses its configuration. A model that is not
in that table is supported if its configuration states every step.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from typing import Any, NoReturn

from cupy_router.huggingface_families import (
    NAMES,
    RULES,
    TOP2_OR_0,
    UNKNOWN,
    UNSTATED,
    UNSUPPORTED,
    WITHOUT_TYPE,
    Choice,
    IfSeveral,
    Inverse,
    Plus,
    Read,
    Rule,
    Steps,
)

Config = Mapping[str, Any]

SCORES = ("softmax", "sigmoid", "sqrtsoftplus")

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
    try:
        found = _find(top, _model_type(top))
    except RecursionError:
        raise ValueError("config: a part of it contains itself") from None
    if found is None:
        raise ValueError(
            f"{_model_type(top) or 'config'}: has no experts, neither it nor its parts have one of "
            f"{', '.join(NAMES['num_experts'])}"
        )
    part, model_type = found
    try:
        return _finish(_apply(_rule(part, model_type), part))
    except ValueError as error:
        raise ValueError(f"{model_type or 'config'}: {error}") from None


def _rule(config: Config, model_type: str) -> Rule:
    """Return the rule of a model_type, or that of configurations which state their steps."""
    rule = RULES.get(model_type)
    if rule is None and not model_type:
        rule = next((rule for name, rule in WITHOUT_TYPE.items() if name in config), None)
    if rule is None:
        rule = next((why for name, why in UNSUPPORTED.items() if config.get(name)), None)
    if rule is None:
        _refuse_unknown_steps(config)
        rule = UNKNOWN
    return rule


def _refuse_unknown_steps(config: Config) -> None:
    """Raise ValueError if an unknown model has a number for its routing under a name that is not known.

    A step that is absent counts as left out. So a name that nobody reads would give a wrong method.
    """
    for name, value in _numbers(config, ""):
        if not _is_neutral(name, value):
            raise ValueError(f"has {name} = {value!r}, whose meaning is not known")


# Words in the names of numbers that belong to a step of routing, of steps, and of what else has such names.
_OF_ROUTING = re.compile("rout|expert|moe|gate|gating|topk|top_k")
_STEP = re.compile("scal|factor|multiplier|temperature|cap$|capping|group|zero|null|copy")
_NO_STEP = re.compile("loss|aux|attn|attention|rope|parallel")
_NAMED = {name for names in NAMES.values() for name in names}


def _numbers(config: Config, start: str) -> Iterator[tuple[str, Any]]:
    """Yield name and value of the numbers that belong to a step of routing, those in parts about routing, too."""
    for name, value in config.items():
        path = f"{start}{name}"
        if isinstance(value, Mapping) and _OF_ROUTING.search(path):
            yield from _numbers(value, f"{path}.")
        elif path not in _NAMED and _OF_ROUTING.search(path) and _STEP.search(path) and not _NO_STEP.search(path):
            yield path, value


def _is_neutral(name: str, value: Any) -> bool:
    """Return True if a step with this value changes nothing, or the value is no number."""
    value = _plain(value)
    if isinstance(value, list | tuple):
        return all(_is_neutral(name, one) for one in value)
    try:
        number = float(value)
    except (TypeError, ValueError):
        return True
    is_one_neutral = isinstance(value, bool) or not re.search("cap|zero|null|copy", name)
    return number == 0 or (number == 1 and is_one_neutral)


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
    if any(_plain(config.get(name)) for name in NAMES["num_experts"]):
        return config, model_type
    inherited = next((known for known in (f"{model_type}_text", model_type) if known in RULES), "")
    own_code = model_type if model_type in RULES else ""  # reads the parts, whatever types they say
    others = []
    for name in sorted(config, key=lambda name: _LANGUAGE.index(name) if name in _LANGUAGE else len(_LANGUAGE)):
        is_part = isinstance(config[name], Mapping) or hasattr(config[name], "to_dict")
        part = _as_dict(config[name]) if is_part else None
        found = None if part is None else _find(part, own_code or _model_type(part) or inherited)
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
    while isinstance(rule, Choice):
        value = config.get(rule.name, rule.default)
        chosen = next((fields for key, fields in rule.rules.items() if key == value), None)
        if chosen is None:
            allowed = " or ".join(repr(key) for key in rule.rules)
            raise ValueError(f"{rule.name} is {value!r}, but {rule.why.format(allowed=allowed)}")
        rule = chosen
    if isinstance(rule, str):
        raise ValueError(f"no RoutingMethod expresses that {rule}")
    fields: dict[str, Any] = {}
    for field, value in ({"num_experts": Read(), "top_k": Read()} | rule).items():
        fields[field] = _value(field, value, config, fields)
    _refuse_contradictions(rule, fields, config)
    return fields


def _refuse_contradictions(rule: Steps, fields: Config, config: Config) -> None:
    """Raise ValueError if a configuration states a step that its rule has otherwise.

    Another implementation of the model may read what this one ignores.
    """
    for field, default in _STATED.items():
        own = rule.get(field, default)
        own = own.value if isinstance(own, IfSeveral) else own
        if isinstance(own, Read) or (field == "scale" and field in rule):  # applied after the router
            continue
        stated = _read(config, field, Read(None))
        if stated is None or _same(stated, own) or _has_no_effect(field, stated, fields, config):
            continue
        name = next(name for name in NAMES[field] if config.get(name) is not None)
        raise ValueError(f"has {name} = {stated!r}, but its routers have {field} = {own!r}, so pass a RoutingMethod")
    method, num_groups = config.get("topk_method"), fields.get("num_groups", 1)
    own = {"max": "group_limited_greedy", "top2": "noaux_tc"}.get(fields.get("group_score", "max"), method)
    if method not in (None, own) and num_groups not in (1, fields.get("top_groups")):
        raise ValueError(f"has topk_method = {method!r}, but its routers have that of {own!r}, so pass a RoutingMethod")


# Fields that a configuration may state, with the value of a rule that does not have them.
_STATED = {"score": None, "renormalize": True, "scale": 1.0, "logit_softcap": None, "num_groups": 1}


def _has_no_effect(field: str, stated: Any, fields: Config, config: Config) -> bool:
    """Return True if the value that a configuration states for a field gives the same weights as that of its rule."""
    if field == "renormalize":  # a softmax over the selected experts has the sum 1 anyway
        return fields["score"] == "softmax" and bool(fields.get("score_after_topk"))
    if field == "num_groups":
        return config.get("topk_method") == "greedy" or stated == _read(config, "top_groups", Read(1))
    return field == "logit_softcap" and not stated


def _same(one: Any, other: Any) -> bool:
    return bool(one == other or (one != one and other != other))  # NaN is refused later, by its name


def _value(field: str, value: Any, config: Config, fields: Config) -> Any:
    """Return the value of a field by its entry in a rule; `fields` has those before it."""
    if isinstance(value, IfSeveral):
        value = value.value if fields["top_k"] != 1 else False
    if isinstance(value, Read):
        return _read(config, field, value)
    if isinstance(value, Plus):
        if value.name not in config:
            raise ValueError(f"does not say {value.name}, which is part of {field}")
        more = _read(config, field, Read(0, (value.name,)))
        return _count(field, _read(config, field, Read())) + _count(value.name, more)
    if isinstance(value, Inverse):
        return 1.0 / (fields[value.field] or 1)  # RoutingMethod refuses a field of 0
    return value


def _count(name: str, value: Any) -> int:
    if isinstance(value, bool) or not isinstance(value, int):
        raise TypeError(f"RoutingMethod: {name} is {value!r}, but must be an int")
    if value < 0:
        raise ValueError(f"{name} is {value}, but must be 0 or more")
    return value


def _plain(value: Any) -> Any:
    """Return a NumPy array or scalar as Python's list or number, and anything else as it is."""
    return value.tolist() if type(value).__module__ == "numpy" else value


def _read(config: Config, field: str, how: Read) -> Any:
    """Return the value of a field. If the configuration has it under several names, the values must be equal."""
    layers = config.get("per_layer_config")
    overrides = (
        [layer for layer in layers.values() if isinstance(layer, Mapping)] if isinstance(layers, Mapping) else []
    )
    given: dict[str, Any] = {}
    names = how.names or NAMES[field]
    for name in names:
        values = _plain(config.get(name))
        values = list(values) if isinstance(values, list | tuple) and values else [values]
        values += [layer[name] for layer in overrides if name in layer]
        if not all(_same(value, values[0]) for value in values):
            raise ValueError(f"{name} differs between layers, so pass the configuration of one layer")
        if values[0] is not None:
            given[name] = values[0]
    first = next(iter(given.values()), how.default)
    if not all(_same(value, first) for value in given.values()):
        raise ValueError(
            f"{' and '.join(f'{name} = {value!r}' for name, value in given.items())} contradict each other"
        )
    return _required(field, names) if first is ... else first


def _finish(fields: dict[str, Any]) -> dict[str, Any]:
    """Drop the fields that have no effect, so that equivalent configurations give equal methods."""
    if fields["score"] not in SCORES:
        raise ValueError(f"its score is {fields['score']!r}, but must be one of {', '.join(map(repr, SCORES))}")
    if not fields.get("logit_softcap"):
        fields.pop("logit_softcap", None)
    if not fields.get("renormalize", True):
        fields.pop("renormalize_eps", None)
        fields.pop("renormalize_min", None)
    if "num_groups" in fields:
        _finish_groups(fields)
    return fields


def _finish_groups(fields: dict[str, Any]) -> None:
    """Check the fields about groups, and drop them if groups have no effect."""
    num_groups, top_groups = fields["num_groups"], fields["top_groups"]
    if num_groups != 1 and top_groups is None:
        _required("top_groups", NAMES["top_groups"])
    if num_groups == (1 if top_groups is None else top_groups):
        for field in ("num_groups", "top_groups", "group_score"):
            fields.pop(field, None)
    elif fields.get("group_score") == UNSTATED:
        raise ValueError("has groups of experts, but no topk_method, which would say how a group is scored")
    elif fields.get("group_score") == TOP2_OR_0:
        raise ValueError(
            "no RoutingMethod expresses that experts outside the best groups count 0, which can be more than experts "
            "inside them have when their bias is negative"
        )


def _required(field: str, names: tuple[str, ...]) -> NoReturn:
    raise ValueError(f"does not say {field}, for which it would have one of {', '.join(names)}")
