# SPDX-License-Identifier: Apache-2.0
"""The experts of every family of transformers, small and with random weights, by its own code and by ours.

`python -m tests.moe_families` prints the table of experts classes, `--write` puts it into docs/methods.md.
"""

from __future__ import annotations

import copy
import re
import sys
import warnings
from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
import transformers

from cupy_router.torch import _experts, _replace, replace_routers, restore_routers
from cupy_router.torch._swapped import InlineRouter, Router
from tests.moe_configs import build, families, has_experts, model_classes, seeded_on_one_thread, sources
from tests.moe_gradients import gradients
from tests.moe_models import DOCUMENT, run
from tests.moe_values import cast, fill, inputs_of

MARKERS = "<!-- experts -->", "<!-- /experts -->"
RUNS = "runs"
OF_TRANSFORMERS = ("grouped_mm", "batched_mm")

NO_IMPLEMENTATIONS = "transformers has no experts implementations for it"
# Experts for which transformers has no implementations -> how they run.
NOT_GOVERNED = {
    "DbrxExperts": "one matrix holds those of all experts",
    "JetMoeParallelExperts": "a module for each of the two products",
    "Llama4TextExperts": "every expert runs for every token",
    "LongcatFlashExperts": "some experts return what they are given",
    "NllbMoeExperts": "a module for each expert, with dropout",
    "Step3p7Experts": "a loop over experts, without the decorator",
    "SwitchTransformersExperts": "a module for each expert",
    "VitPoseNaiveMoe": "a module for each expert",
}
WITHOUT_A_MODULE = "experts are rows of embeddings"  # doge

Values = dict[str, Any]


# -- Models ------------------------------------------------------------------------------------------------------------


def registered(family: str) -> bool:
    """Return whether experts of a family take an implementation from the registry of transformers."""
    return any("use_experts_implementation" in text for text in sources(family).values())


def experts_of(model: Any) -> dict[str, Any]:
    """Return the modules of a model that hold experts, by path."""
    return {
        f"{path}.{name}": child
        for path, block, _ in _replace._sparse_blocks(model)
        for name, child in block.named_children()
        if _replace._are_experts(name, child)
    }


def models(family: str, dtype: Any = torch.float32, device: str = "cpu") -> Iterator[Any]:
    """Yield small models with random weights that have every experts class of a family among them."""
    seen: set[str] = set()
    for model_class in model_classes(family):
        try:
            model = build(model_class)
        except Exception:  # a part for images or sound
            continue
        names = {type(module).__name__ for module in experts_of(model).values()}
        if names <= seen:
            continue
        seen |= names
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # about routers that stay
            replace_routers(model)
        routers = [module for module in model.modules() if isinstance(module, Router | InlineRouter)]
        with torch.no_grad():
            fill(model, routers)
            cast(model, routers, device, dtype)
        restore_routers(model)
        yield model
    assert seen or not registered(family), f"no model of {family} can be built"


def swap(model: Any) -> dict[str, str]:
    """Swap routers and experts, and return why classes of experts stay as they are."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        replace_routers(model, experts=True)
    names = {type(module).__name__ for module in experts_of(model).values()}
    found = (re.match(r"replace_routers left (\w+).*? as it is: (.*)", str(warning.message)) for warning in caught)
    return {match[1]: match[2] for match in found if match is not None and match[1] in names}


# -- What is compared --------------------------------------------------------------------------------------------------


def values(model: Any) -> Values:
    """Return the output of a model and the gradients of its parameters; the same random numbers are drawn each time."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(3)
        output = run(model, inputs_of(model, "cpu", torch.float32))
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(3)
        found = gradients(model)
    return {"output": output, **{name: grad for name, grad in found.items() if grad is not None}}


def by_own_code(model: Any) -> dict[str, Values]:
    """Return the values by each implementation that is the model's or of transformers; "eager" is the model's."""
    found = {}
    for implementation in ("eager", *OF_TRANSFORMERS):
        model.set_experts_implementation(implementation)
        found[implementation] = values(model)
    model.set_experts_implementation("eager")
    return found


def errors(found: Values, exact: Values) -> dict[str, float]:
    """Return the largest error of each value, as a part of its largest entry."""
    assert found.keys() == exact.keys()
    return {
        name: float((found[name] - want).abs().max() / want.abs().max().clamp(min=1e-30))
        for name, want in exact.items()
    }


def assert_as_close(ours: Values, theirs: dict[str, Values]) -> None:
    """Assert that values are those of a model's code: within 1e-5, or three times what implementations differ by."""
    exact = theirs["eager"]
    usual = [errors(theirs[name], exact) for name in OF_TRANSFORMERS]
    for name, error in errors(ours, exact).items():
        allowed = max(1e-5, *(3 * each[name] for each in usual))
        assert error <= allowed, f"{name}: {error:.1e}, where transformers' own are within {allowed / 3:.1e}"


def calls_of_experts(model: Any) -> list[tuple[Any, Any]]:
    """Return the experts modules of a model and the arguments of their calls while it runs."""
    found: list[tuple[Any, Any]] = []
    hooks = [
        module.register_forward_pre_hook(
            lambda module, args, kwargs: found.append((module, (args, kwargs))), with_kwargs=True
        )
        for module in experts_of(model).values()
    ]
    parameter = next(model.parameters())
    run(model, inputs_of(model, parameter.device.type, parameter.dtype))
    for hook in hooks:
        hook.remove()
    return found


def rounding_errors(module: Any, args: Any, kwargs: Any) -> dict[str, float]:
    """Return the error of an experts module in 16 bits by each implementation, relative to its own code in float32."""
    _experts.register()
    wide = copy.deepcopy(module).float()
    wide.config._experts_implementation_internal = "eager"
    exact = wide(*(a.float() if a.is_floating_point() else a for a in args), **kwargs)
    found = {}
    for implementation in ("eager", *OF_TRANSFORMERS, "cupy_router"):
        module.config._experts_implementation_internal = implementation
        found[implementation] = float((module(*args, **kwargs).float() - exact).norm() / exact.norm())
    return found


# -- The table ---------------------------------------------------------------------------------------------------------


class Row(NamedTuple):
    """How experts of one class run by our implementation."""

    family: str
    experts: str
    form: str  # in which it is not like most
    left: str  # why it was left as it is; empty if it runs by ours


def form_of(experts: Any) -> str:
    """Return in which way an experts module that transformers knows differs from most."""
    forms = {"has_gate": ("", "no gate"), "has_bias": ("biases", ""), "is_transposed": ("transposed weights", "")}
    forms |= {"is_concatenated": ("", "gate and up interleaved"), "has_post_expert_norm": ("norm of each output", "")}
    named = (words[not getattr(experts, name)] for name, words in forms.items() if hasattr(experts, name))
    return ", ".join(filter(None, named))


def examine(family: str) -> list[Row]:
    """Return a row for each experts class of a family."""
    rows = {}
    for model in models(family):
        found = {type(module).__name__: module for module in experts_of(model).values()}
        left = swap(model)
        reasons = {name: NOT_GOVERNED.get(name, reason) for name, reason in left.items()}
        rows |= {name: Row(family, name, form_of(module), reasons.get(name, "")) for name, module in found.items()}
        for name, module in found.items():
            if name in left:
                assert left[name] == NO_IMPLEMENTATIONS
            else:
                assert module.config._experts_implementation == "cupy_router", f"{name} stays without a reason"
    if not rows and has_experts(family):
        return [Row(family, "", "", WITHOUT_A_MODULE)]
    return list(rows.values())


def lines(rows: list[Row]) -> list[str]:
    """Return the lines of the table."""
    results = [f"not governed: {row.left}" if row.left else RUNS for row in rows]
    names = [f"`{row.experts}`" if row.experts else "" for row in rows]
    return [
        f"| `{row.family}` | {name} | {row.form} | {result} |"
        for row, name, result in zip(rows, names, results, strict=True)
    ]


def summary(runs: int, number: int) -> str:
    """Return the line above the table."""
    return (
        f"{runs} of the {number} experts classes of transformers {transformers.__version__} run by our implementation:"
    )


def main(arguments: list[str]) -> None:
    with seeded_on_one_thread():
        rows = [row for family in families() for row in examine(family)]
    head = [summary(sum(not row.left for row in rows), len(rows)), "", "| model | experts | with | result |"]
    content = "\n".join([*head, "|---|---|---|---|", *lines(rows)])
    sys.stdout.write(f"{content}\n")
    if arguments == ["--write"]:
        text = DOCUMENT.read_text()
        start, end = (text.index(marker) for marker in MARKERS)
        DOCUMENT.write_text(f"{text[: start + len(MARKERS[0])]}\n{content}\n{text[end:]}")


if __name__ == "__main__":
    main(sys.argv[1:])
