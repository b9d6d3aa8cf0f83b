# SPDX-License-Identifier: Apache-2.0
"""Every MoE model of the installed transformers package, small and with random weights, before and after the swap.

`python -m tests.moe_models` prints the table of router classes, `--write` puts it into docs/methods.md.
"""

from __future__ import annotations

import dataclasses
import re
import sys
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import torch
import transformers

from cupy_router import RoutingMethod, activation_topk
from cupy_router.torch import replace_routers, restore_routers
from cupy_router.torch._router_spec import INLINE, SORTED
from cupy_router.torch._swapped import InlineRouter, Router, Swapped
from tests.moe_configs import SIZES, build, families, model_classes, routing_classes
from tests.moe_values import cast, fill, inputs_of, tensor_at, tensors_of

DOCUMENT = Path(__file__).parents[1] / "docs" / "methods.md"
MARKERS = "<!-- families -->", "<!-- /families -->"

# In bfloat16, of the picks and of the weights of a router that rounds its logits, or what it makes of them.
MOST_FLIPPED, LARGEST_ERROR = 0.03, 0.03


class Row(NamedTuple):
    """What was found of one router class."""

    family: str
    router: str
    method: RoutingMethod | None
    tensors: tuple[str, ...]  # that take part besides the gate
    left: str  # why it was left as it is; empty if it was swapped
    # Of all routers of the class, for the hidden states that they had before the swap:
    picks: int = 0
    flipped: int = 0  # picks of ours that the model's own code does not make
    error: float = 0.0  # of the weights of tokens without flips, and of logits, in units of the largest
    difference: float = 0.0  # of the output of the whole model, in units of its standard deviation
    effects: tuple[tuple[str, float], ...] = ()  # a step of the method -> the share of picks that it changes


# -- Before and after --------------------------------------------------------------------------------------------------


def run(model: Any, inputs: dict[str, Any]) -> Any:
    """The logits of a model, or its last hidden states."""
    with torch.no_grad():
        output = model(**inputs)
    return output["logits"] if "logits" in output else output["last_hidden_state"]


class Calls:
    """Arguments and results of a model's routers while it ran; called before the swap."""

    def __init__(self, routers: list[Any], inline: set[Any]) -> None:
        self.found: list[tuple[Any, Any, Any, Any]] = []
        self._inline = inline
        self._hooks = [m.register_forward_hook(self._note, with_kwargs=True) for m in routers if m not in inline]
        for block in inline:
            setattr(block, INLINE, self._noting(block, getattr(block, INLINE)))

    def _noting(self, block: Any, route: Any) -> Any:
        def noting(*args: Any, **kwargs: Any) -> Any:
            output = route(*args, **kwargs)
            self._note(block, args, kwargs, output)
            return output

        return noting

    def _note(self, module: Any, args: Any, kwargs: Any, output: Any) -> None:
        self.found.append((module, args, kwargs, output))

    def close(self) -> None:
        for hook in self._hooks:
            hook.remove()
        for block in self._inline:
            delattr(block, INLINE)


def examine(family: str, device: str = "cpu", dtype: Any = torch.float32, variant: str | None = None) -> list[Row]:
    """All router classes of a family."""
    rows: dict[str, Row] = {}
    wanted, failures = routing_classes(family), []
    for model_class in model_classes(family):
        if rows and wanted <= set(rows):
            break
        try:
            model = build(model_class, variant)
        except Exception as error:  # parts for images and sound, mostly, which have other sizes and no experts
            failures.append(f"{model_class.__name__} cannot be built: {error}")
            continue
        for row in examine_model(family, model, device, dtype):
            rows.setdefault(row.router, row)
    missing = sorted(wanted - set(rows))
    return [*rows.values(), *(Row(family, name, None, (), "; ".join(failures) or "not reached") for name in missing)]


def examine_model(family: str, model: Any, device: str, dtype: Any) -> list[Row]:
    """Return a row per router class of a model: results, or why it was left unchanged."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        number = replace_routers(model)
    messages = [str(warning.message) for warning in caught if "replace_routers left" in str(warning.message)]
    reason = "; ".join(message.split(" as it is: ", 1)[1] for message in messages)
    routers = [module for module in model.modules() if isinstance(module, Router | InlineRouter)]
    assert number == len(routers)
    if not routers:
        present = {type(module).__name__ for module in model.modules()} & routing_classes(family)
        blocks = {name for message in messages for name in re.findall(r"left (\w+) \(", message)}
        return [Row(family, name, None, (), reason) for name in sorted(present or blocks)]
    assert not reason, f"only some routers of {type(model).__name__} were swapped: {reason}"
    with torch.no_grad():
        fill(model, routers)
        cast(model, routers, device, dtype)
    inline = {module for module in routers if isinstance(module, InlineRouter)}
    assert restore_routers(model) == number

    inputs = inputs_of(model, device, dtype)
    calls = Calls(routers, inline)
    before = run(model, inputs)
    calls.close()
    assert replace_routers(model) == number
    assert replace_routers(model) == 0, "what is swapped already was swapped again"
    difference = float((run(model, inputs).float() - before.float()).abs().max() / before.float().std())
    with torch.no_grad():
        rows = [_row(family, model, name, calls.found) for name in dict.fromkeys(type(m).__name__ for m in routers)]
    assert restore_routers(model) == number
    assert not any(isinstance(module, Swapped) for module in model.modules())
    if device == "cpu":  # CUDA adds up experts in no particular order
        assert torch.equal(run(model, inputs), before), "restored routers give other results"
    return [row._replace(difference=difference) for row in rows]


def _row(family: str, model: Any, name: str, calls: list[Any]) -> Row:
    """Return the row of one router class, from the arguments and results of its routers before the swap."""
    picks = flipped = 0
    error = 0.0
    effects: dict[str, list[float]] = {}
    for module, args, kwargs, theirs in calls:
        if type(module).__name__ != name:
            continue
        plan = module._cupy_router
        ours = getattr(module, INLINE if isinstance(module, InlineRouter) else "forward")(*args, **kwargs)
        _assert_alike(ours, theirs)
        got, want = (_dense(plan, results) for results in (ours, theirs))
        picks += int((got != 0).sum())
        flips = (got != 0) & (want == 0)
        flipped += int(flips.sum())
        same = ~flips.any(dim=1, keepdim=True)  # where one pick differs, the others may weigh differently
        error = max(error, float(((got - want).abs() * same).max() / want.abs().max()))
        for output, our, their in zip(plan.outputs, ours, theirs, strict=True):
            if output in ("logits", "probabilities", "shared"):
                apart = (our.float() - their.float()).abs() * (same if output == "shared" else 1)
                error = max(error, float(apart.max() / their.float().abs().max()))
        given = dict(tensors_of(model, module))
        for step, share in _effects(module, args, {role: given.get(role) for role in ("bias", "logit_bias")}):
            effects.setdefault(step, []).append(share)
    means = tuple((step, sum(shares) / len(shares)) for step, shares in effects.items())
    return Row(family, name, plan.method, tuple(sorted(given)), "", picks, flipped, error, effects=means)


def _assert_alike(ours: Any, theirs: Any) -> None:
    """Assert the same number of results, with equal types, shapes and dtypes."""
    assert type(ours) is type(theirs) is tuple
    assert len(ours) == len(theirs)
    for our, their in zip(ours, theirs, strict=True):
        if isinstance(their, torch.Tensor):
            assert (our.shape, our.dtype, our.device) == (their.shape, their.dtype, their.device)
        else:
            assert type(our) is type(their)
            assert len(our) == len(their)


def _dense(plan: Any, results: Any) -> Any:
    """[num_tokens, num_experts] the weight of each expert that was chosen, 0 for the others."""
    named = dict(zip(plan.outputs, results, strict=True))
    if "scores" in named:
        return named["scores"].float()
    if plan.outputs == SORTED:
        experts = torch.arange(len(named["sizes"])).repeat_interleave(torch.tensor(named["sizes"]))
        rows, columns, weights = named["rows"], experts.to(named["rows"].device), named["gates"]
    else:
        columns, weights = named["indices"], named["weights"]
        rows = torch.arange(len(columns), device=columns.device)[:, None].expand_as(columns)
    assert bool((weights != 0).all()), "a weight of 0 would look like no pick"
    dense = torch.zeros(int(rows.max()) + 1, plan.method.num_experts, device=weights.device)
    return dense.index_put((rows, columns), weights.float(), accumulate=True)


def _effects(module: Any, args: Any, biases: dict[str, Any]) -> Iterator[tuple[str, float]]:
    """Return the share of picks that change when a step of the method is left out, computed on the CPU."""
    plan = module._cupy_router
    if "table" in plan.tensors:
        return
    x = args[0].reshape(-1, args[0].shape[-1])
    if "input_scale" in plan.tensors:
        x = module.norm(x) * module.scale * module.scalar_root_size
    logits = args[-1] if isinstance(module, InlineRouter) else x.float() @ tensor_at(module, plan.gate).float().T
    logits = logits.float().reshape(-1, logits.shape[-1]).cpu()
    flat = {role: None if bias is None else bias.reshape(-1).float().cpu() for role, bias in biases.items()}

    def chosen(method: RoutingMethod, **without: Any) -> Any:
        indices = activation_topk(logits, method, **{**flat, **without}).indices[:, : method.top_k]
        return torch.zeros_like(logits, dtype=torch.bool).scatter_(1, indices.long(), True)

    every = chosen(plan.method)
    for role, bias in flat.items():
        if bias is not None:
            yield role, float((every & ~chosen(plan.method, **{role: None})).sum() / every.sum())
    if plan.method.num_groups > 1:
        ungrouped = dataclasses.replace(plan.method, num_groups=1, top_groups=1, group_score="max")
        yield "groups", float((every & ~chosen(ungrouped)).sum() / every.sum())


def generated(model: Any, device: str, number: int = 32) -> list[int]:
    """Return this many tokens generated after a few random ones, without sampling."""
    start = torch.randint(5, SIZES["vocab_size"] - 1, (1, 7), generator=torch.Generator().manual_seed(7)).to(device)
    with torch.inference_mode():
        tokens = model.generate(start, do_sample=False, min_new_tokens=number, max_new_tokens=number)
    return [int(token) for token in tokens[0, start.shape[1] :]]


def generate_twice(model_class: Any, device: str) -> tuple[list[int], list[int]]:
    """Return what a model in float32 generates before and after the swap."""
    model = build(model_class)
    number = replace_routers(model)
    with torch.no_grad():
        fill(model, [module for module in model.modules() if isinstance(module, Router | InlineRouter)])
    model.to(device)
    assert restore_routers(model) == number
    before = generated(model, device)
    assert replace_routers(model) == number > 0
    return before, generated(model, device)


def report(rows: list[Row]) -> list[dict[str, Any]]:
    """The figures of rows as plain data."""
    names = ("family", "router", "left", "picks", "flipped", "error", "difference")
    return [{"steps": steps(row), **{name: getattr(row, name) for name in names}} for row in rows]


# -- The table ---------------------------------------------------------------------------------------------------------


def steps(row: Row) -> str:
    """Return the steps of a router, in order."""
    method = row.method
    if method is None:
        return ""
    said = []
    if "input_scale" in row.tensors:
        said.append("norm")
    if "logit_bias" in row.tensors:
        said.append("logit bias")
    if method.logit_scale != 1.0:
        said.append("logit scale")
    if method.logit_softcap is not None:
        said.append("soft cap")
    score = f"{method.score} of the chosen" if method.score_after_topk else str(method.score)
    said.append(score)
    if "table" in row.tensors:
        said.append("table")
    if "bias" in row.tensors:
        said.append("bias on logits" if method.selects_on_logits else "bias")
    if method.num_groups > 1:
        said.append(f"groups by {method.group_score}")
    if method.shared_in_normalizer:
        said.append("shared experts in the sum")
    elif method.renormalize and method.renormalize_min is not None:
        said.append(f"sum, at least {method.renormalize_min:g}")
    elif method.renormalize and not (method.score_after_topk and method.score == "softmax"):
        said.append("sum" + (f" + {method.renormalize_eps:g}" if method.renormalize_eps else ""))
    if method.scale != 1.0 or "total_scale" in row.tensors:
        said.append("scale")
    if "expert_scale" in row.tensors:
        said.append("scale of each expert")
    return ", ".join(said)


def lines(rows: list[Row]) -> list[str]:
    """The lines of the table."""
    results = [f"left: {row.left}" if row.left else "equal" for row in rows]
    return [
        f"| `{row.family}` | `{row.router}` | {steps(row)} | {result} |"
        for row, result in zip(rows, results, strict=True)
    ]


def summary(swapped: int, number: int) -> str:
    """The line above the table."""
    return f"{swapped} of the {number} router classes of transformers {transformers.__version__} are swapped:"


def table(rows: list[Row]) -> str:
    """Markdown, one line for each router class."""
    head = [
        summary(sum(not row.left for row in rows), len(rows)),
        "",
        "| model | router | steps | result |",
        "|---|---|---|---|",
    ]
    return "\n".join([*head, *lines(rows)])


def document_with(text: str, content: str) -> str:
    """A document with `content` between its markers."""
    start, end = (text.index(marker) for marker in MARKERS)
    return f"{text[: start + len(MARKERS[0])]}\n{content}\n{text[end:]}"


def main(arguments: list[str]) -> None:
    torch.set_num_threads(1)
    content = table([row for family in families() for row in examine(family)])
    sys.stdout.write(f"{content}\n")
    if arguments == ["--write"]:
        DOCUMENT.write_text(document_with(DOCUMENT.read_text(), content))


if __name__ == "__main__":
    main(sys.argv[1:])
