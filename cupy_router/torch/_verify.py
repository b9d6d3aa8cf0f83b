# SPDX-License-Identifier: Apache-2.0
"""Whether a router, before it is swapped, and ours do the same for a few random tokens on the CPU.

A configuration may mean something else to the code of a model than to us: that is to be a warning, not another result.
"""

from __future__ import annotations

import inspect
import itertools
from typing import Any

import torch

from cupy_router.torch._router_modules import INLINE, SORTED, TOKENS, Plan, Unknown, call, stand_in, zeros_for
from cupy_router.torch._swapped import subclass

_COLUMNS = 8  # of hidden states and gate that are not 0, so that a large router takes no longer than a small one


def verify(module: Any, kind: type, plan: Plan) -> None:
    """Compare a module with what it is to become, in float32.

    Raises:
        Unknown: results differ.
    """
    random = torch.Generator("cpu").manual_seed(0)
    with torch.no_grad():
        trial = stand_in(module, torch.float32, "cpu", "meta" if plan.call == INLINE else None).eval()
        given = zeros_for(module, plan, torch.float32, torch.float32, "cpu")
        for tensor in itertools.chain(trial.parameters(), trial.buffers(), given):
            if tensor.device.type == "cpu":
                _fill(tensor, plan, random)
        different = _different(trial, kind, plan, given)
        parameters = inspect.signature(getattr(trial, plan.call)).parameters
        if different and parameters[plan.arguments[-1][1]].default is None:
            without = _different(trial, kind, plan, given[:-1])  # it may be one that ignores what it is given
            different = different if without is None else without
    if different:
        raise Unknown(
            f"for random tokens the {different} of its {type(module).__name__} are not those of {plan.method}"
        )


def _different(trial: Any, kind: type, plan: Plan, given: list[Any]) -> str | None:
    """Which result differs, "" if none does, or None if its own code does not run."""
    try:
        theirs = _comparable(plan, call(trial, plan, given))
    except Exception:  # it may be made for other dtypes, or for a GPU alone
        return None
    original = trial.__class__
    trial.__class__, trial._cupy_router = subclass(kind, original), plan
    try:
        ours = _comparable(plan, call(trial, plan, given))
    except (TypeError, ValueError) as error:
        raise Unknown(str(error)) from error
    trial.__class__ = original
    pairs = ((name, ours[name].float(), their.float()) for name, their in theirs.items())
    return next((name for name, our, their in pairs if not torch.allclose(our, their, rtol=1e-5, atol=1e-6)), "")


def _fill(tensor: Any, plan: Plan, random: Any) -> None:
    """Random values; token ids and tables of experts are for the first few tokens."""
    if tensor.is_floating_point() and tensor.ndim > 1:
        width = plan.method.num_logits if tensor.shape[-1] == plan.method.num_logits else _COLUMNS
        tensor[..., :width].normal_(std=0.7, generator=random)
    elif tensor.is_floating_point():
        tensor.uniform_(0.5, 1.5, generator=random)
    elif tensor.ndim == 2:
        experts = torch.rand(TOKENS, plan.method.num_experts, generator=random, device="cpu").argsort(dim=-1)
        tensor[:TOKENS] = experts[: len(tensor), : tensor.shape[1]]
    else:
        tensor.copy_(torch.arange(len(tensor), device="cpu") % TOKENS)


def _comparable(plan: Plan, results: Any) -> dict[str, Any]:
    """The results by name, in an order that does not depend on the order of a token's experts."""
    named = dict(zip(plan.outputs, results, strict=True))
    if plan.outputs == SORTED:
        sizes = torch.tensor(named["sizes"], device="cpu")
        experts = torch.arange(len(sizes), device="cpu").repeat_interleave(sizes)
        weights = torch.zeros_like(named["logits"]).index_put((named["rows"], experts), named["gates"])
        return {"weights": weights, "logits": named["logits"]}
    if "indices" in named:
        order = named["indices"].argsort(dim=-1)
        named |= {name: named[name].gather(1, order) for name in ("indices", "weights")}
    return named
