# SPDX-License-Identifier: Apache-2.0
"""Names that a configuration leaves out, or has in another spelling: the method is that of transformers, or refused."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from functools import cache
from typing import Any

import pytest

from tests import frameworks

pytest.importorskip("torch", reason="PyTorch is not installed")
transformers = frameworks.transformers_with_models()
from transformers.models.auto.configuration_auto import CONFIG_MAPPING  # noqa: E402

from cupy_router import RoutingMethod  # noqa: E402
from cupy_router.huggingface_families import NAMES, RULES, Choice, Plus  # noqa: E402
from tests import moe_configs  # noqa: E402

TYPES = [model_type for model_type in RULES if model_type in CONFIG_MAPPING]
READ = {name for names in NAMES.values() for name in names}
READ |= {rule.name for rule in RULES.values() if isinstance(rule, Choice)}
STEPS = [value for rule in RULES.values() if isinstance(rule, dict) for value in rule.values()]
READ |= {value.name for value in STEPS if isinstance(value, Plus)}


@pytest.fixture(autouse=True)
def _quiet() -> Iterator[None]:
    logger = logging.getLogger("transformers")
    level = logger.level
    logger.setLevel(logging.CRITICAL)
    yield
    logger.setLevel(level)


def method(config: Any) -> RoutingMethod | None:
    try:
        return RoutingMethod.from_config(config)
    except (TypeError, ValueError):
        return None


@cache
def served() -> list[tuple[str, Any, dict[str, Any]]]:
    """Model_type, class and dict of configurations with other values than the defaults of their class."""
    found = [(model_type, CONFIG_MAPPING[model_type]) for model_type in TYPES]
    configs = [(model_type, kind, moe_configs.small(kind).to_dict()) for model_type, kind in found]
    return [entry for entry in configs if method(entry[2]) is not None]


@pytest.mark.slow("seconds")
def test_a_missing_name_is_refused_or_counts_as_the_default_of_the_class() -> None:
    counted = 0
    for model_type, kind, config in served():
        for name in READ & config.keys():
            without = {key: value for key, value in config.items() if key != name}
            got = method(without)
            if got is not None:
                counted += 1
                assert got == method(kind.from_dict(dict(without))), f"{model_type} without {name}"
    assert counted >= 25


@pytest.mark.slow("seconds")
def test_the_spellings_of_transformers_are_read() -> None:
    counted = 0
    for model_type, kind, config in served():
        for spelling, name in kind.attribute_map.items():
            if name in READ & config.keys():
                counted += 1
                respelled = {key: value for key, value in config.items() if key != name} | {spelling: config[name]}
                assert method(respelled) == method(config), f"{model_type} with {spelling} in place of {name}"
    assert counted >= 25


@pytest.mark.slow("seconds")
def test_every_kind_of_configuration_is_seen() -> None:
    refused = {model_type for model_type in TYPES if isinstance(RULES[model_type], str)}
    assert len(served()) >= len(set(TYPES) - refused) - 3


@pytest.mark.slow("seconds")
def test_every_configuration_class_with_experts_is_known() -> None:
    """For a new one, read the code of its router."""
    served, refused, unknown = set(), {}, []
    for model_type in CONFIG_MAPPING:
        try:
            config = CONFIG_MAPPING[model_type]()
        except Exception:  # its class has no valid defaults
            continue
        try:
            method = RoutingMethod.from_config(config)
        except ValueError as error:
            if str(error).partition(":")[0] in RULES:
                refused[model_type] = str(error)
            elif "has no experts" not in str(error):
                unknown.append(str(error))
        else:
            assert RoutingMethod.from_config(config.to_dict()) == method
            served.add(model_type)
    assert unknown == []
    assert len(served) >= 60
    beyond = {model_type for model_type, error in refused.items() if "no RoutingMethod expresses" in error}
    assert beyond <= {"doge", "nllb-moe", "phimoe", "switch_transformers", "vitpose", "vitpose_backbone", "zaya"}


@pytest.mark.skipif(not hasattr(transformers, "SarvamMoEConfig"), reason="transformers 5.24 brought it")
@pytest.mark.parametrize(("config", "model"), [("SarvamMoEConfig", "Glm4Moe"), ("SarvamMLAConfig", "DeepseekV3")])
def test_configurations_of_another_family_s_model(config: str, model: str) -> None:
    config = moe_configs.small(getattr(transformers, config))
    assert type(transformers.AutoModelForCausalLM.from_config(config)).__name__ == f"{model}ForCausalLM"
    other = moe_configs.small(getattr(transformers, f"{model}Config"))
    assert RoutingMethod.from_config(config) == RoutingMethod.from_config(other)
