# SPDX-License-Identifier: Apache-2.0
"""Experts modules of every form that transformers knows, to compare experts implementations."""

from __future__ import annotations

import inspect
from types import SimpleNamespace
from typing import Any

import torch
from transformers.activations import ACT2FN
from transformers.integrations import moe

from cupy_router.torch import _experts

EXPERTS, TOP_K, HIDDEN, INTERMEDIATE = 24, 4, 64, 48
_FORMS: dict[str, dict[str, bool]] = {
    "gated": {},
    "ungated": {"has_gate": False},
    "transposed": {"is_transposed": True},
    "biased": {"has_bias": True},
    "transposed and biased": {"is_transposed": True, "has_bias": True},
    "ungated and biased": {"has_gate": False, "has_bias": True},
    "with a norm": {"has_post_expert_norm": True},
    "biased, with a norm": {"has_bias": True, "has_post_expert_norm": True},
}
_KNOWN = inspect.signature(moe.use_experts_implementation).parameters.keys()  # options, of this release of transformers
FORMS = {form: options for form, options in _FORMS.items() if options.keys() <= _KNOWN}


def experts(form: str, device: str = "cpu", dtype: Any = torch.float32, interface: Any = None, seed: int = 0) -> Any:
    """Return a module with random weights."""
    options = FORMS[form]
    given = options if interface is None else options | {"experts_interface": interface}

    @moe.use_experts_implementation(**given)
    class Experts(torch.nn.Module):
        def __init__(self, config: Any) -> None:
            super().__init__()
            self.num_experts, self.act_fn = EXPERTS, ACT2FN["silu"]
            first = "gate_up_proj" if options.get("has_gate", True) else "up_proj"
            width = INTERMEDIATE * (2 if first == "gate_up_proj" else 1)
            for name, rows, columns in ((first, width, HIDDEN), ("down_proj", HIDDEN, INTERMEDIATE)):
                shape = (columns, rows) if options.get("is_transposed") else (rows, columns)
                setattr(self, name, torch.nn.Parameter(torch.randn(EXPERTS, *shape) * columns**-0.5))
                if options.get("has_bias"):
                    setattr(self, f"{name}_bias", torch.nn.Parameter(torch.randn(EXPERTS, rows)))
            if options.get("has_post_expert_norm"):
                self.post_expert_norm = torch.nn.RMSNorm(HIDDEN, eps=1e-6)

        def forward(self, *args: Any) -> Any:
            raise AssertionError("no implementation was chosen")

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return Experts(SimpleNamespace(_experts_implementation="grouped_mm")).to(device, dtype)


def inputs(num_tokens: int, device: str = "cpu", dtype: Any = torch.float32, elsewhere: bool = False) -> list[Any]:
    """Return hidden states, experts and weights of tokens. Some experts are elsewhere, if that is asked for."""
    generator = torch.Generator().manual_seed(num_tokens)
    x = torch.randn(num_tokens, HIDDEN, generator=generator)
    chosen = torch.rand(num_tokens, EXPERTS, generator=generator).argsort(dim=1)[:, :TOP_K]
    weights = torch.rand(num_tokens, TOP_K, generator=generator)
    if elsewhere:
        away = torch.rand(num_tokens, TOP_K, generator=generator) < 0.5
        away[-1] = True  # the last token has no expert here
        chosen, weights = chosen.masked_fill(away, EXPERTS), weights.masked_fill(away, 0)
    return [x.to(device, dtype), chosen.to(device), weights.to(device, dtype)]


def run(module: Any, implementation: str, given: list[Any], forward: Any = None) -> dict[str, Any]:
    """Return the output, and the gradients with respect to hidden states, weights and parameters."""
    module.config._experts_implementation = implementation
    x, chosen, weights = given[0].detach().requires_grad_(), given[1], given[2].detach().requires_grad_()
    y = (module if forward is None else forward)(x, chosen, weights)
    names = [name for name, _ in module.named_parameters()]
    seed = torch.linspace(-1, 1, y.numel(), device=y.device).reshape(y.shape).to(y.dtype)
    grads = torch.autograd.grad(y, [x, weights, *module.parameters()], seed)
    return {"output": y.detach(), **dict(zip(["x", "weights", *names], grads, strict=True))}


def assert_close(got: dict[str, Any], want: dict[str, Any], tolerance: float) -> None:
    """Assert equal names, dtypes and shapes, and values that differ by no more than a part of the largest one."""
    assert got.keys() == want.keys()
    for name, value in got.items():
        assert (value.dtype, value.shape) == (want[name].dtype, want[name].shape), name
        error = (value.float() - want[name].float()).abs().max() if value.numel() else 0.0
        largest = want[name].float().abs().max() if value.numel() else 0.0
        assert error <= tolerance * largest, f"{name}: {error} of {largest}"


class _Garbage(torch.autograd.Function):
    """Put NaN into the rows behind the last group, and into their gradients."""

    @staticmethod
    def forward(ctx: Any, rows: Any, ends: Any) -> Any:
        ctx.end = int(ends[-1])
        return _Garbage._planted(rows, ctx.end)

    @staticmethod
    def backward(ctx: Any, grad: Any) -> Any:
        return _Garbage._planted(grad, ctx.end), None

    @staticmethod
    def _planted(rows: Any, end: int) -> Any:
        return torch.cat((rows[:end], torch.full_like(rows[end:], float("nan"))))


def grouped_mm_with_garbage(rows: Any, weight: Any, ends: Any) -> Any:
    """Multiply as `grouped_mm` may: what it does not write, neither there nor back, is NaN."""
    return _Garbage.apply(_grouped_mm(_Garbage.apply(rows, ends), weight, ends), ends)


_grouped_mm = _experts._grouped_mm
