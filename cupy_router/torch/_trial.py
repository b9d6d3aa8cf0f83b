# SPDX-License-Identifier: Apache-2.0
"""Copies of router modules, and arguments for them, to try out what they return."""

from __future__ import annotations

from operator import attrgetter
from typing import Any

import torch

from cupy_router.torch._router_spec import INLINE, RouterSpec, Unsupported, by_role

TOKENS = 16  # number of tokens in trial runs; any number works


def zeros_for(module: Any, spec: RouterSpec, x_dtype: Any, gate_dtype: Any, device: str, rank: int) -> list[Any]:
    """Return zeros for the arguments of a module's routing method, for hidden states of `rank` dimensions."""
    tokens = (TOKENS,) if rank == 2 else (2, TOKENS // 2)
    weight = attrgetter(spec.gate)(module)
    shapes = {
        "x": ((*tokens, weight.shape[-1]), x_dtype),
        "bias": ((spec.method.num_experts,), torch.float32),
        "token_ids": (tokens, torch.int64),
    }
    if spec.call == INLINE:  # what the block makes of hidden states depends on its code
        x = torch.zeros(shapes["x"][0], dtype=x_dtype, device="meta")
        passed = _passed_inline(stand_in(module, gate_dtype, "meta"), spec, x)
        shapes = {role: (value.shape, value.dtype) for role, value in passed.items()}
    wanted = [shapes[role.removeprefix("ignored ")] for role, _ in spec.arguments]
    return [torch.zeros(shape, dtype=dtype, device=device) for shape, dtype in wanted]


class _Passed(Exception):
    """Carries the arguments of a routing method out of the block's forward."""


def _passed_inline(block: Any, spec: RouterSpec, x: Any) -> dict[str, Any]:
    """Return the arguments, by role, that the forward of a block passes to its routing method."""

    def stop(*args: Any, **kwargs: Any) -> None:
        raise _Passed(by_role(spec, args, kwargs))

    setattr(block, INLINE, stop)
    try:
        block.forward(x)
    except _Passed as passed:
        return passed.args[0]  # type: ignore[no-any-return]
    raise Unsupported(f"{type(block).__name__}.forward does not call {INLINE}")


def trial_of(module: Any, spec: RouterSpec, dtype: Any, device: str) -> Any:
    """Return a copy of a module with zeros for what its routing method may read; experts take no memory."""
    return stand_in(module, dtype, device, spec.gate.partition(".")[0] if spec.call == INLINE else None)


def stand_in(module: Any, dtype: Any, device: str, only_child: str | None = None) -> Any:
    """Return a copy of a module for trial runs, with zeros for its values and without hooks."""
    copy = object.__new__(type(module))
    empty: dict[str, Any] = {"_parameters": {}, "_buffers": {}, "_modules": {}}
    hooks = {name: type(value)() for name, value in vars(module).items() if name.endswith("_hooks")}
    copy.__dict__.update({**vars(module), **empty, **hooks})
    copy.__dict__.pop("forward", None)  # a wrapper set on the instance
    for kind in ("_parameters", "_buffers"):
        for name, tensor in vars(module)[kind].items():
            like = dtype if tensor is not None and tensor.is_floating_point() else getattr(tensor, "dtype", None)
            vars(copy)[kind][name] = None if tensor is None else torch.zeros(tensor.shape, dtype=like, device=device)
    for name, child in module._modules.items():
        place = device if only_child in (None, name) else "meta"
        copy._modules[name] = None if child is None else stand_in(child, dtype, place)
    return copy
