# SPDX-License-Identifier: Apache-2.0
"""Gradients of small MoE models, and of their routers, by the models' own code and by ours."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from typing import Any, NamedTuple

import torch

from cupy_router.torch import replace_routers, restore_routers
from cupy_router.torch._swapped import InlineRouter, Router
from tests.moe_configs import build, model_classes
from tests.moe_models import Calls, run
from tests.moe_values import cast, fill, inputs_of, tensor_at


def gradients_twice(family: str, device: str = "cpu", dtype: Any = torch.float32) -> tuple[dict[str, Any], ...]:
    """The gradients of all parameters of a small model by its own routers and by ours, for random upstream values."""
    model = next(filter(None, map(with_our_routers, model_classes(family))))
    routers = [module for module in model.modules() if isinstance(module, Router | InlineRouter)]
    with torch.no_grad():
        fill(model, routers)
        cast(model, routers, device, dtype)
    ours = gradients(model, device, dtype)
    restore_routers(model)
    return gradients(model, device, dtype), ours


def gradients(model: Any, device: str = "cpu", dtype: Any = torch.float32) -> dict[str, Any]:
    """Return the gradients of all parameters of a small model, for random inputs and upstream values."""
    model.zero_grad(set_to_none=True)
    output = model(**inputs_of(model, device, dtype))
    output = output["logits"] if "logits" in output else output["last_hidden_state"]
    upstream = torch.randn(output.shape, generator=torch.Generator().manual_seed(5)).to(device)
    (output.float() * upstream).sum().backward()
    return {name: parameter.grad for name, parameter in model.named_parameters()}


def assert_same_gradients(ours: dict[str, Any], theirs: dict[str, Any], tolerance: float) -> None:
    """Assert equality up to this fraction of the largest entry of each parameter."""
    assert {name for name, grad in ours.items() if grad is None} == {n for n, grad in theirs.items() if grad is None}
    for name, want in theirs.items():
        if want is not None:
            error = (ours[name].float() - want.float()).abs().max()
            assert error <= tolerance * want.float().abs().max(), f"{name}: {float(error)}"


class RouterErrors(NamedTuple):
    """Errors of one router, relative to float32: of the gradients by the gate and by the hidden states."""

    path: str
    theirs: tuple[float, ...]
    ours: tuple[float, ...]
    tokens: float  # fraction of the tokens that count


def router_errors(family: str, device: str, dtype: Any) -> Iterator[RouterErrors]:
    """Compare the gradients of each router module of a small model, for the hidden states that it has in the model.

    Tokens for which a router in float32, the model's own and ours choose different experts do not count: rounding
    decides between nearly equal logits, and one other expert changes a gradient by more than its rounding does.
    """
    model = next(filter(None, map(with_our_routers, model_classes(family))))
    routers = {module: path for path, module in model.named_modules() if isinstance(module, Router)}
    with torch.no_grad():
        fill(model, list(routers))
        cast(model, list(routers), device, dtype)
    own = copy.deepcopy(model)
    restore_routers(own)
    calls = Calls(list(routers), set())
    run(model, inputs_of(model, device, dtype))
    calls.close()
    for ours, (x, *args), kwargs, _ in calls.found:
        theirs, spec = own.get_submodule(routers[ours]), ours._cupy_router
        given = spec, x.reshape(-1, x.shape[-1]), args, kwargs
        upstream = torch.randn(len(given[1]), spec.method.num_experts, generator=torch.Generator().manual_seed(5))
        three = copy.deepcopy(theirs).float(), theirs, ours
        picks = [_picks_and_gradients(module, *given, upstream.to(device))[0] for module in three]
        same = ((picks[0] == picks[1]) & (picks[0] == picks[2])).all(dim=1)
        upstream = upstream.to(device) * same[:, None]
        exact, *found = (_picks_and_gradients(module, *given, upstream)[1] for module in three)
        errors = (tuple(_error(*pair) for pair in zip(gradients, exact, strict=True)) for gradients in found)
        yield RouterErrors(routers[ours], *errors, float(same.float().mean()))


def _picks_and_gradients(module: Any, spec: Any, x: Any, args: Any, kwargs: Any, upstream: Any) -> tuple[Any, Any]:
    """Return which experts are chosen, [num_tokens, num_experts], and the gradients by the gate and by x."""
    gate = tensor_at(module, spec.gate)
    x = x.detach().to(gate.dtype).requires_grad_()
    named = dict(zip(spec.outputs, module(x, *args, **kwargs), strict=True))
    picks = torch.zeros_like(upstream, dtype=torch.bool).scatter_(1, named["indices"], True)
    loss = (named["weights"].float() * upstream.gather(1, named["indices"])).sum()
    return picks, torch.autograd.grad(loss, (gate, x))


def _error(found: Any, exact: Any) -> float:
    return float((found.float() - exact).norm() / exact.norm())


def with_our_routers(model_class: type) -> Any:
    """Return a small model with swapped routers, or None if there is none."""
    try:
        model = build(model_class)
    except Exception:  # as in moe_models.examine
        return None
    return model if replace_routers(model) else None
