# SPDX-License-Identifier: Apache-2.0
"""Find out which tensors, arguments and results a router module of a Hugging Face model has.

A router is recognised by its position, as the child of a sparse block that returns weights and indices, not by its
name. So each candidate runs once on meta tensors, and the shapes and dtypes of its results tell their roles. The role
of a tensor comes from a table of names. A router with a tensor that is not in the table is not swapped.
"""

from __future__ import annotations

import inspect
import itertools
import re
from dataclasses import replace
from operator import attrgetter
from typing import Any

import torch

from cupy_router.huggingface import TENSORS
from cupy_router.method import RoutingMethod
from cupy_router.torch._router_spec import INLINE, SORTED, ResultTypes, RouterSpec, Unsupported
from cupy_router.torch._trial import TOKENS, trial_of, zeros_for

# Role of each argument that may follow the hidden states, by its name.
_ARGUMENTS = {"e_score_correction_bias": "bias", "expert_bias": "bias", "input_ids": "token_ids"}
_INLINE_ARGUMENTS = {"hidden_states": "x", "router_logits": "logits"}

FLOATS = (torch.float32, torch.float16, torch.bfloat16)


def describe_router(module: Any, method: RoutingMethod, failures: list[str]) -> RouterSpec | None:
    """Describe a child of a sparse block, or return None if it is not a router, or does not run: see `failures`.

    Raises:
        Unsupported: It is a router, but cannot be swapped.
    """
    gate = _gate(module, method)
    names = list(inspect.signature(type(module).forward).parameters)[1:]
    if gate is None or not names:
        return None
    more = tuple((_ARGUMENTS[name], name) for name in names[1:] if name in _ARGUMENTS)
    spec = _with_results(module, RouterSpec(method, gate, "forward", (("x", names[0]), *more)), failures)
    if spec is None:
        return None
    if len(names) > 2 or len(names) != len(spec.arguments):
        raise Unsupported(f"{type(module).__name__} takes {', '.join(names)}, which are not all known")
    tensors = _tensors(module, spec)
    if "total_scale" in tensors:  # it is applied before the weights are rounded
        exact = {
            key: ResultTypes(replace(method, weight_dtype="float32"), dtypes)
            for key, (method, dtypes) in spec.results.items()
        }
        spec = replace(spec, results=exact)
    return replace(spec, tensors=tensors, noise=_noise(module))


def describe_inline_router(
    block: Any, method: RoutingMethod, failures: list[str]
) -> tuple[RouterSpec, Any, RouterSpec] | None:
    """Describe a sparse block that routes itself, and its child that computes the logits; or return None.

    Raises:
        Unsupported: The block routes itself, but cannot be swapped.
    """
    gates = [(name, child, _gate(child, method)) for name, child in block.named_children()]
    found = [(name, child, gate) for name, child, gate in gates if gate is not None]
    names = list(inspect.signature(getattr(block, INLINE, lambda: None)).parameters)
    if len(found) != 1 or names not in (["router_logits"], ["hidden_states", "router_logits"]):
        return None
    name, child, gate = found[0]
    arguments = tuple((_INLINE_ARGUMENTS[argument], argument) for argument in names)
    described = RouterSpec(method, f"{name}.{gate}", INLINE, arguments, noise=_noise(block))
    spec = _with_results(block, described, failures)
    if spec is None or set(spec.outputs) != {"weights", "indices"}:
        return None
    of_x = next(iter(inspect.signature(child.forward).parameters), "")
    of_gate = replace(spec, gate=gate, call="forward", arguments=(("x", of_x),), noise=_noise(child))
    tensors = {role: f"{name}.{path}" for role, path in _tensors(child, of_gate).items()}
    tensors |= _tensors(block, spec, recurse=False)
    if not tensors.keys() <= {"bias"}:
        raise Unsupported(f"{type(child).__name__} has tensors besides the gate and a bias")
    return replace(spec, tensors=tensors), child, of_gate


# -- Tensors of a router -----------------------------------------------------------------------------------------------


def _gate(module: Any, method: RoutingMethod) -> str | None:
    """Return the path of the only weight with one row per logit, of the module or of a child."""
    found = {}
    for name, owner in (("", module), *module.named_children()):
        weight = getattr(owner, "weight", None)
        if isinstance(weight, torch.Tensor) and weight.ndim == 2 and weight.shape[0] == method.num_logits:
            found[f"{name}.weight".lstrip(".")] = weight
    return next((path for path, weight in found.items() if len(found) == 1 and weight.dtype in FLOATS), None)


def _tensors(module: Any, spec: RouterSpec, recurse: bool = True) -> dict[str, str]:
    """Return the path of each tensor besides the gate, by its role."""
    method = spec.method
    sizes = {"bias": method.num_experts, "logit_bias": method.num_logits, "total_scale": 1}
    found = {role: "" for role, _ in spec.arguments}
    stored = itertools.chain(module.named_parameters("", recurse), module.named_buffers("", recurse))
    paths = dict.fromkeys(re.sub(r"parametrizations\.(\w+)\..*", r"\1", path) for path, _ in stored)
    for path in paths:
        tensor = attrgetter(path)(module)
        role = TENSORS.get(path)
        if path == spec.gate:
            continue
        if role in (None, "image_bias") or (role == "input_scale" and not hasattr(module, "scalar_root_size")):
            raise Unsupported(f"{type(module).__name__} has a tensor {path}, whose meaning is not known")
        if role in found or tensor.numel() != sizes.get(role, tensor.numel()):
            raise Unsupported(
                f"{path} {list(tensor.shape)} of {type(module).__name__} is not what {method.num_experts} experts need"
            )
        found[role] = path
    if "bias" in found and method.score_after_topk and method.bias_on == "score":
        raise Unsupported(f"{type(module).__name__} has a bias, but chooses by logits without one")
    return {role: path for role, path in found.items() if path}


def _noise(module: Any) -> tuple[str, ...]:
    return tuple(name for name in vars(module) if "jitter" in name)


# -- Results of a router -----------------------------------------------------------------------------------------------


def _with_results(module: Any, spec: RouterSpec, failures: list[str]) -> RouterSpec | None:
    """Add the roles and dtypes of the results for all input dtypes that the module accepts; None if not a router."""
    failure: Exception | None = None
    ran = False
    for device, rank in itertools.product(("meta", "cpu"), (2, 3)):  # the CPU, with zeros, for code that reads values
        found: dict[tuple[str, ...], dict[tuple[Any, Any], ResultTypes]] = {}
        for x_dtype, gate_dtype in itertools.product(FLOATS, FLOATS):
            try:
                with torch.no_grad():
                    given = zeros_for(module, spec, x_dtype, gate_dtype, device, rank)
                    returned = getattr(trial_of(module, spec, gate_dtype, device), spec.call)(*given)
            except Exception as error:  # for dtypes that it does not support, its own code will raise the error
                failure = error
                continue
            ran = True
            outputs = roles(returned, spec.method)
            dtypes = tuple(getattr(result, "dtype", None) for result in (returned if outputs else ()))
            weights = next((dtype for output, dtype in zip(outputs, dtypes, strict=True) if output in _WEIGHTS), None)
            if weights in FLOATS:
                weight_dtype: Any = str(weights).removeprefix("torch.")
                method = replace(spec.method, weight_dtype=weight_dtype, index_dtype="int64")
                found.setdefault(outputs, {})[x_dtype, gate_dtype] = ResultTypes(method, dtypes)
        if found:
            outputs, results = next(iter(found.items()))
            return replace(spec, outputs=outputs, results=results) if len(found) == 1 else None
    if not ran:
        failures.append(f"; {type(module).__name__} raises {type(failure).__name__}: {failure}")
    return None


_WEIGHTS = ("weights", "gates", "scores")


def roles(returned: Any, method: RoutingMethod) -> tuple[str, ...]:
    """Return the role of each result, or () if these are not the results of a router."""
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
    # If all experts are selected, only the usual order distinguishes logits and weights.
    usual = top_k < num_experts or outputs[:3] == ["logits", "weights", "indices"]
    return tuple(outputs) if usual and "" not in outputs and {"weights", "indices"} <= set(outputs) else ()


def _shape(result: Any) -> tuple[Any, ...]:
    """Return the kind of a result and its shape."""
    if isinstance(result, torch.Tensor):
        return ("float" if result.is_floating_point() else "int", *result.shape)
    return ("list", len(result)) if isinstance(result, list) else ("other",)
