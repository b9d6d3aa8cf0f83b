# SPDX-License-Identifier: Apache-2.0
"""Compare a router with ours on a few random tokens on the CPU, before it is swapped.

The code of a model may interpret its configuration differently. Then the user gets a warning, not a wrong result.
"""

from __future__ import annotations

import inspect
import itertools
from typing import Any

import torch

from cupy_router.torch._router_modules import INLINE, SORTED, TOKENS, RouterSpec, Unsupported, call, stand_in, zeros_for
from cupy_router.torch._swapped import subclass

_COLUMNS = 8  # nonzero columns of hidden states and gate, so that large routers take no longer than small ones


def verify(module: Any, kind: type, spec: RouterSpec) -> None:
    """Compare a module with its replacement, in float32.

    Raises:
        Unsupported: The results differ.
    """
    random = torch.Generator("cpu").manual_seed(0)
    with torch.no_grad():
        trial = stand_in(module, torch.float32, "cpu", "meta" if spec.call == INLINE else None).eval()
        given = zeros_for(module, spec, torch.float32, torch.float32, "cpu")
        for tensor in itertools.chain(trial.parameters(), trial.buffers(), given):
            if tensor.device.type == "cpu":
                _fill(tensor, spec, random)
        different = _different(trial, kind, spec, given)
        parameters = inspect.signature(getattr(trial, spec.call)).parameters
        if different and parameters[spec.arguments[-1][1]].default is None:
            without = _different(trial, kind, spec, given[:-1])  # the module may ignore this argument
            different = different if without is None else without
    if different:
        raise Unsupported(
            f"for random tokens the {different} of its {type(module).__name__} are not those of {spec.method}"
        )


def _different(trial: Any, kind: type, spec: RouterSpec, given: list[Any]) -> str | None:
    """Return the name of a result that differs, "" if none does, or None if the original does not run."""
    try:
        theirs = _comparable(spec, call(trial, spec, given))
    except Exception:  # the module may need other dtypes or a GPU
        return None
    original = trial.__class__
    trial.__class__, trial._cupy_router = subclass(kind, original), spec
    try:
        ours = _comparable(spec, call(trial, spec, given))
    except (TypeError, ValueError) as error:
        raise Unsupported(str(error)) from error
    trial.__class__ = original
    pairs = ((name, ours[name].float(), their.float()) for name, their in theirs.items())
    return next((name for name, our, their in pairs if not torch.allclose(our, their, rtol=1e-5, atol=1e-6)), "")


def _fill(tensor: Any, spec: RouterSpec, random: Any) -> None:
    """Fill a tensor with random values. Token ids and tables cover the first few tokens."""
    if tensor.is_floating_point() and tensor.ndim > 1:
        width = spec.method.num_logits if tensor.shape[-1] == spec.method.num_logits else _COLUMNS
        tensor[..., :width].normal_(std=0.7, generator=random)
    elif tensor.is_floating_point():
        tensor.uniform_(0.5, 1.5, generator=random)
    elif tensor.ndim == 2:
        experts = torch.rand(
            TOKENS, spec.method.num_experts, generator=random, device="cpu", dtype=torch.float32
        ).argsort(dim=-1)
        tensor[:TOKENS] = experts[: len(tensor), : tensor.shape[1]]
    else:
        tensor.copy_(torch.arange(len(tensor), device="cpu") % TOKENS)


def _comparable(spec: RouterSpec, results: Any) -> dict[str, Any]:
    """Return the results by name, with each token's experts sorted by index."""
    named = dict(zip(spec.outputs, results, strict=True))
    if spec.outputs == SORTED:
        sizes = torch.tensor(named["sizes"], device="cpu")
        experts = torch.arange(len(sizes), device="cpu").repeat_interleave(sizes)
        weights = torch.zeros_like(named["logits"]).index_put((named["rows"], experts), named["gates"])
        return {"weights": weights, "logits": named["logits"]}
    if "indices" in named:
        order = named["indices"].argsort(dim=-1)
        named |= {name: named[name].gather(1, order) for name in ("indices", "weights")}
    return named
