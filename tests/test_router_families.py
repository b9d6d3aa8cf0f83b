# SPDX-License-Identifier: Apache-2.0
"""Routers out of the checkpoints of every model of transformers: each tensor of a router is taken, or refused."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests import frameworks

torch = pytest.importorskip("torch", reason="PyTorch is not installed")
frameworks.transformers_with_models()
pytest.importorskip("safetensors", reason="safetensors is not installed")
from safetensors.torch import load_file  # noqa: E402

from cupy_router import Router  # noqa: E402
from cupy_router.torch import _swapped, replace_routers, restore_routers  # noqa: E402
from tests import moe_configs, moe_values  # noqa: E402

# Routers with a tensor that a Router cannot take -> its name.
REFUSED = {
    "DiffusionGemmaTextRouter": r"router\.scale is part of the router",
    "Gemma4TextRouter": r"router\.scale is part of the router",
    "InklingTopkRouter": r"gate\.global_scale is part of the router",
}
# A layer with two routers or without a gate of a usual name, and the key of such a gate.
NOT_FOUND = {
    "blocks.0.mlp.gate_weight": "no key begins with it",
    "Dots3NoteVisionTopKRouter": r"the keys there are .*blocks\.0\.",
    "Ernie4_5_VLMoeMoeTopKRouter": r"there are routers at layers\.1\.mlp\.text_moe\.gate, layers\.1\.mlp\.vision_moe",
}


@pytest.fixture(autouse=True)
def _quiet() -> Iterator[None]:
    with moe_configs.seeded_on_one_thread():
        yield


def models(family: str) -> Iterator[tuple[Any, list[Any]]]:
    """Models of a family with random weights, and of each router its class, method, gate and other tensors."""
    for model_class in moe_configs.model_classes(family):
        try:
            model = moe_configs.build(model_class)
        except Exception:  # a part for images or sound
            continue
        if replace_routers(model):
            routers = {p: m for p, m in model.named_modules() if isinstance(m, _swapped.Router | _swapped.InlineRouter)}
            with torch.no_grad():
                moe_values.fill(model, list(routers.values()))
            specs = {path: router._cupy_router for path, router in routers.items()}
            tensors = {path: dict(moe_values.tensors_of(model, router)) for path, router in routers.items()}
            gates = {path: moe_values.tensor_at(router, specs[path].gate) for path, router in routers.items()}
            restore_routers(model)
            yield model, [(type(routers[p]).__name__, specs[p].method, gates[p], tensors[p]) for p in routers]


def key_of(state: dict[str, Any], tensor: Any) -> str | None:
    same = (key for key, value in state.items() if value.shape == tensor.shape and torch.equal(value, tensor))
    return next(same, None)


def read(state: dict[str, Any], prefix: str, method: Any) -> Router | str:
    try:
        return Router.from_state_dict(state, prefix, method)
    except ValueError as error:
        return str(error)


def check(state: dict[str, Any], name: str, method: Any, gate: Any, tensors: dict[str, Any]) -> None:
    key = key_of(state, gate)
    assert key is not None, f"{name}: the gate is not in the checkpoint"
    layer = re.match(r"(.*?\d+)\.(?!.*\.\d+\.)", key)
    assert layer is not None
    for prefix in (layer[1], key.removesuffix(".weight")):
        router = read(state, prefix, method)
        if isinstance(router, str):
            words = REFUSED.get(name) or NOT_FOUND.get(name if prefix == layer[1] else key)
            assert re.search(words or "no reason is known", router), f"{name} at {prefix}: {router}"
            continue
        assert name not in REFUSED
        assert router.weight is state[key]
        got = {role: array for role, array in router.arrays().items() if array is not None and role != "weight"}
        assert got.keys() == tensors.keys(), f"{name} at {prefix}"
        for role, array in got.items():
            assert torch.equal(array.reshape(-1), tensors[role].reshape(-1)), f"{role} of {name} at {prefix}"


@pytest.mark.filterwarnings("ignore:replace_routers left")  # parts that are no language model
@pytest.mark.slow("seconds", every=13)
@pytest.mark.parametrize("family", moe_configs.families())
def test_every_tensor_of_every_router_is_taken_or_refused(family: str, tmp_path: Path) -> None:
    """By the names of the modules, and by those of the files that transformers writes."""
    seen: set[str] = set()
    for number, (model, routers) in enumerate(models(family)):
        if {name for name, *_ in routers} <= seen:
            continue
        folder = tmp_path / str(number)
        model.save_pretrained(folder)
        written = {key: value for file in folder.glob("*.safetensors") for key, value in load_file(file).items()}
        for name, *router in routers:
            if name not in seen:
                seen.add(name)
                check(model.state_dict(), name, *router)
                check(written, name, *router)
