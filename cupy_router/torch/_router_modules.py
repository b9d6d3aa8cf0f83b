# SPDX-License-Identifier: Apache-2.0
"""What a router module of a Hugging Face model holds, takes and returns, found out without running the model.

A router is known by its position, as the child of a sparse block that returns weights and indices, and not by its name.
So the children in question run once on tensors without values; the shapes and dtypes of what they return say what each
result is. Their tensors a table knows by name, and a router with a tensor that is not in it is left alone.
"""

from __future__ import annotations

import inspect
import itertools
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from operator import attrgetter
from typing import Any, NamedTuple

import torch

from cupy_router.huggingface import TENSORS
from cupy_router.method import RoutingMethod

# What routers call the argument that may follow the hidden states.
_ARGUMENTS = {"e_score_correction_bias": "bias", "expert_bias": "bias", "input_ids": "token_ids"}
_INLINE_ARGUMENTS = {"hidden_states": "x", "router_logits": "logits"}

INLINE = "route_tokens_to_experts"  # the method by which some sparse blocks route themselves
SORTED = ("order", "rows", "gates", "sizes", "logits")  # pairs of token and expert in the order of experts

FLOATS = (torch.float32, torch.float16, torch.bfloat16)
TOKENS = 16  # of trial runs; any number


class Unknown(Exception):
    """Why a router is left alone."""


class Results(NamedTuple):
    """What a router returns for one dtype of the hidden states and one of the gate."""

    method: RoutingMethod  # its results have the dtypes of the module's own
    dtypes: tuple[Any, ...]  # of each result


@dataclass(frozen=True)
class Plan:
    """How one module routes: plain data, so that copies and pickles of the module carry it along."""

    method: RoutingMethod
    gate: str  # path of the gate's weight
    call: str  # the method of the module that routes
    arguments: tuple[tuple[str, str], ...]  # of that method, in order: what each is, and its name
    outputs: tuple[str, ...] = ()  # what each result is
    results: Mapping[tuple[Any, Any], Results] = field(default_factory=dict, repr=False)  # by dtype of x and the gate
    tensors: Mapping[str, str] = field(default_factory=dict)  # what a tensor is -> its path
    noise: tuple[str, ...] = ()  # attributes that say how much noise the module adds in training


def plan_router(module: Any, method: RoutingMethod) -> Plan | None:
    """How a child of a sparse block routes; None if it is no router.

    Raises:
        Unknown: it is one, but cannot be swapped.
    """
    gate = _gate(module, method)
    names = list(inspect.signature(type(module).forward).parameters)[1:]
    if gate is None or not names:
        return None
    more = tuple((_ARGUMENTS[name], name) for name in names[1:] if name in _ARGUMENTS)
    plan = _with_results(module, Plan(method, gate, "forward", (("x", names[0]), *more)))
    if plan is None:
        return None
    if len(names) > 2 or len(names) != len(plan.arguments):
        raise Unknown(f"{type(module).__name__} takes {', '.join(names)}, which are not all known")
    tensors = _tensors(module, plan)
    if "input_scale" in tensors:  # the family that has it returns probabilities where others return logits
        outputs = tuple("probabilities" if output == "logits" else output for output in plan.outputs)
        plan = replace(plan, outputs=outputs)
    if "total_scale" in tensors:  # weights are rounded after it
        exact = {
            key: Results(replace(own, weight_dtype="float32"), dtypes) for key, (own, dtypes) in plan.results.items()
        }
        plan = replace(plan, results=exact)
    return replace(plan, tensors=tensors, noise=_noise(module))


def plan_inline(block: Any, method: RoutingMethod) -> tuple[Plan, Any] | None:
    """How a sparse block routes by a method of its own, and its child that makes the logits; None if it does not.

    Raises:
        Unknown: it does, but cannot be swapped.
    """
    gates = [(name, child, _gate(child, method)) for name, child in block.named_children()]
    found = [(name, child, gate) for name, child, gate in gates if gate is not None]
    names = list(inspect.signature(getattr(block, INLINE, lambda: None)).parameters)
    if len(found) != 1 or names not in (["router_logits"], ["hidden_states", "router_logits"]):
        return None
    name, child, gate = found[0]
    arguments = tuple((_INLINE_ARGUMENTS[argument], argument) for argument in names)
    plan = _with_results(block, Plan(method, f"{name}.{gate}", INLINE, arguments, noise=_noise(child)))
    if plan is None or set(plan.outputs) != {"weights", "indices"}:
        return None
    if _tensors(child, replace(plan, gate=gate)):
        raise Unknown(f"{type(child).__name__} has tensors besides the gate")
    return plan, child


# -- What it holds -----------------------------------------------------------------------------------------------------


def _gate(module: Any, method: RoutingMethod) -> str | None:
    """The path of the only weight with a row for each logit: the module's own, or that of a child."""
    found = {}
    for name, owner in (("", module), *module.named_children()):
        weight = getattr(owner, "weight", None)
        if isinstance(weight, torch.Tensor) and weight.ndim == 2 and weight.shape[0] == method.num_logits:
            found[f"{name}.weight".lstrip(".")] = weight
    return next((path for path, weight in found.items() if len(found) == 1 and weight.dtype in FLOATS), None)


def _tensors(module: Any, plan: Plan) -> dict[str, str]:
    """What each tensor besides the gate is to the method -> its path."""
    method = plan.method
    sizes = {"bias": method.num_experts, "logit_bias": method.num_logits, "total_scale": 1}
    found = {role: "" for role, _ in plan.arguments}
    for path, tensor in itertools.chain(module.named_parameters(), module.named_buffers()):
        role = TENSORS.get(path)
        if path == plan.gate:
            continue
        if role is None or (role == "input_scale" and not hasattr(module, "scalar_root_size")):
            raise Unknown(f"{type(module).__name__} has a tensor {path}, whose meaning is not known")
        if role in found or tensor.numel() != sizes.get(role, tensor.numel()):
            raise Unknown(
                f"{path} {list(tensor.shape)} of {type(module).__name__} is not what {method.num_experts} experts need"
            )
        found[role] = path
    if "bias" in found and method.score_after_topk and method.bias_on == "score":
        raise Unknown(f"{type(module).__name__} has a bias, but chooses by logits without one")
    return {role: path for role, path in found.items() if path}


def _noise(module: Any) -> tuple[str, ...]:
    return tuple(name for name in vars(module) if "jitter" in name)


# -- What it returns ---------------------------------------------------------------------------------------------------


def _with_results(module: Any, plan: Plan) -> Plan | None:
    """The plan with what each result is, for all dtypes with which the module's code runs; None if it is no router."""
    for device in ("meta", "cpu"):  # on the CPU for code that looks at values: they are zeros
        found: dict[tuple[str, ...], dict[tuple[Any, Any], Results]] = {}
        for x_dtype, gate_dtype in itertools.product(FLOATS, FLOATS):
            try:
                with torch.no_grad():
                    like = stand_in(module, gate_dtype, device)
                    returned = call(like, plan, zeros_for(module, plan, x_dtype, gate_dtype, device))
            except Exception:  # the code is not ours, and may not be made for such inputs
                continue
            outputs = _outputs(returned, plan.method)
            dtypes = tuple(getattr(result, "dtype", None) for result in (returned if outputs else ()))
            weights = next((dtype for output, dtype in zip(outputs, dtypes, strict=True) if output in _WEIGHTS), None)
            if weights in FLOATS:
                own = replace(plan.method, weight_dtype=str(weights).removeprefix("torch."), index_dtype="int64")
                found.setdefault(outputs, {})[x_dtype, gate_dtype] = Results(own, dtypes)
        if found:
            outputs, results = next(iter(found.items()))
            return replace(plan, outputs=outputs, results=results) if len(found) == 1 else None
    return None


_WEIGHTS = ("weights", "gates", "scores")


def zeros_for(module: Any, plan: Plan, x_dtype: Any, gate_dtype: Any, device: str) -> list[Any]:
    """Zeros for the arguments of a module."""
    made = {
        "x": ((TOKENS, attrgetter(plan.gate)(module).shape[-1]), x_dtype),
        "logits": ((TOKENS, plan.method.num_logits), gate_dtype),
        "bias": ((plan.method.num_experts,), torch.float32),
        "token_ids": ((TOKENS,), torch.int64),
    }
    return [torch.zeros(made[role][0], dtype=made[role][1], device=device) for role, _ in plan.arguments]


def call(module: Any, plan: Plan, arguments: list[Any]) -> Any:
    """What a module returns."""
    try:
        return getattr(module, plan.call)(*arguments)
    except ValueError:  # it unpacks the shape of [batch, sequence, hidden]
        return getattr(module, plan.call)(arguments[0][None], *arguments[1:])


def stand_in(module: Any, dtype: Any, device: str, device_of_children: str | None = None) -> Any:
    """A copy of a module with zeros for its values and without hooks, that may be run and thrown away."""
    copy = object.__new__(type(module))
    empty: dict[str, Any] = {"_parameters": {}, "_buffers": {}, "_modules": {}}
    hooks = {name: type(value)() for name, value in vars(module).items() if name.endswith("_hooks")}
    copy.__dict__.update({**vars(module), **empty, **hooks})
    copy.__dict__.pop("forward", None)  # what others have put around it
    for kind in ("_parameters", "_buffers"):
        for name, tensor in vars(module)[kind].items():
            like = dtype if tensor is not None and tensor.is_floating_point() else getattr(tensor, "dtype", None)
            vars(copy)[kind][name] = None if tensor is None else torch.zeros(tensor.shape, dtype=like, device=device)
    for name, child in module._modules.items():
        copy._modules[name] = None if child is None else stand_in(child, dtype, device_of_children or device)
    return copy


def _outputs(returned: Any, method: RoutingMethod) -> tuple[str, ...]:
    """What each result of a router is, or nothing if these are not the results of a router."""
    if not isinstance(returned, tuple):
        return ()
    num_experts, top_k = method.num_experts, method.top_k
    shapes = [_shape(result) for result in returned]
    if shapes == [("int", TOKENS * top_k)] * 2 + [
        ("float", TOKENS * top_k),
        ("list", num_experts),
        ("float", TOKENS, num_experts),
    ]:
        return SORTED
    if shapes == [("float", TOKENS, num_experts)] * 2:
        return "scores", "logits"
    widths = {"logits": num_experts, "weights": top_k, "shared": method.num_shared_experts, "indices": top_k}
    outputs: list[str] = []
    for kind, *shape in shapes:
        names = ("logits", "weights", "shared") if kind == "float" else ("indices",)
        fits = (name for name in names if name not in outputs and shape == [TOKENS, widths[name]])
        outputs.append(next(fits, ""))
    # Where all experts are chosen, only the usual order tells logits and weights apart.
    usual = top_k < num_experts or outputs[:3] == ["logits", "weights", "indices"]
    return tuple(outputs) if usual and "" not in outputs and {"weights", "indices"} <= set(outputs) else ()


def _shape(result: Any) -> tuple[Any, ...]:
    """What kind of thing a result is, and its shape."""
    if isinstance(result, torch.Tensor):
        return ("float" if result.is_floating_point() else "int", *result.shape)
    return ("list", len(result)) if isinstance(result, list) else ("other",)
