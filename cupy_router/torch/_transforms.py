# SPDX-License-Identifier: Apache-2.0
"""Calls inside torch.func. vmap merges the rows of all calls, grad uses the same backward pass, forward mode raises."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any

import torch

from cupy_router.ops._op import Op
from cupy_router.ops._run import run_eagerly
from cupy_router.torch import _autograd, _library
from cupy_router.torch._state import has_tangent, in_torch_func


def applies(inputs: Sequence[Any]) -> bool:
    """Return whether the inputs are tensors that transforms of torch.func may have wrapped, or that have tangents."""
    return isinstance(inputs[0], torch.Tensor) and (in_torch_func() or any(map(has_tangent, inputs)))


def run(op: Op, options: Any, inputs: Sequence[Any], number: int) -> Any:
    """Return the results of a call that transforms concern."""
    _autograd.refuse_written(op, inputs)
    results = _Call.apply(op, options, number, *map(_autograd.as_tensor, op.names, inputs))
    return op.pack(options, results, partial(_library.sizes_of, op, options, inputs))


class _Call(torch.autograd.Function):  # type: ignore[misc]  # PyTorch is untyped to us
    """results = apply(op, options, number, *inputs)"""

    @staticmethod
    def forward(op: Op, options: Any, number: int, *inputs: Any) -> Any:
        return tuple(op.flatten(options, run_eagerly(op, options, inputs, number)))

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
        ctx.op = inputs[0]
        if ctx.op.differentiable:
            _autograd.remember_call(ctx, *inputs, output=output)
        elif not ctx.op.no_gradient:  # those raise in `backward`
            ctx.mark_non_differentiable(*output)

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> tuple[Any, ...]:
        if not ctx.op.differentiable:
            raise RuntimeError(ctx.op.no_gradient)
        return _autograd.backward(ctx, *grads, by_op=False)

    @staticmethod
    def jvp(ctx: Any, *tangents: Any) -> Any:
        raise RuntimeError(f"{ctx.op.label}: there are no gradients in forward mode (jvp, jacfwd, hessian)")

    @staticmethod
    def vmap(info: Any, in_dims: tuple[Any, ...], op: Op, options: Any, number: int, *inputs: Any) -> Any:
        size, batched = info.batch_size, [dim is not None for dim in in_dims[3:]]
        # Contiguous, because calls refuse arrays whose last axis is not, and PyTorch may have put the mapped axis last.
        pairs = zip(inputs, in_dims[3:], strict=True)
        given = [a if dim is None else a.movedim(dim, 0).contiguous() for a, dim in pairs]
        if info.batch_size == 0:  # for the shapes of the results: an entry of zeros, whose results are left out
            given = [
                torch.cat((a, a.new_zeros(1, *a.shape[1:]))) if b else a for a, b in zip(given, batched, strict=True)
            ]
            size = 1
        if op.mapping(options) == "refuse":
            raise ValueError(f"{op.label}: torch.func.vmap cannot map over it, call it for each entry instead")
        if op.mapping(options) == "merge" and number < 0 and _differ_in_rows(op, options, given, batched):
            rows = _with_rows(op, given, batched)
            merged = [
                (a if own else a.expand(size, *a.shape)).flatten(0, 1) if name in rows else a
                for name, a, own in zip(op.names, given, batched, strict=True)
            ]
            results = _Call.apply(op, options, number, *merged)
            results = tuple(result.unflatten(0, (size, -1)) for result in results)
        else:
            each = [
                _Call.apply(op, options, number, *(a[i] if own else a for a, own in zip(given, batched, strict=True)))
                for i in range(size)
            ]
            results = tuple(map(torch.stack, zip(*each, strict=True)))
        return tuple(result[: info.batch_size] for result in results), (0,) * len(results)


def _with_rows(op: Op, given: Sequence[Any], batched: Sequence[bool]) -> set[str]:
    """Return the names of the inputs that have an entry for each row of a call."""
    lengths = {
        name: array.shape[own]
        for name, array, own in zip(op.names, given, batched, strict=True)
        if array is not None and array.ndim > own
    }
    return {name for name, length in lengths.items() if op.has_rows(name, length, lengths[op.names[0]])}


def _differ_in_rows(op: Op, options: Any, given: Sequence[Any], batched: Sequence[bool]) -> bool:
    """Return whether calls differ in their rows alone, so that these may be the rows of one call."""
    rows = _with_rows(op, given, batched)
    for declared, array, own in zip(op.inputs, given, batched, strict=True):
        if array is not None and (declared.kind == "count" or (own and declared.name not in rows)):
            return False
    num_rows, most = given[0].shape[:2].numel() if batched[0] else 0, op.max_rows(options)
    return most is None or num_rows <= most
