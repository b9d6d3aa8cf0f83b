# SPDX-License-Identifier: Apache-2.0
"""Gradients of permute and unpermute: each is the other on the way back, with dot products of rows for the factors.

One call of `permute_backward` or `unpermute_backward` computes all that are needed, and only what it reads is saved.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from typing import Any

import torch

from cupy_router.arrays import _torch as tensors
from cupy_router.ops import _permute_backward, _unpermute_backward, permute
from cupy_router.ops._declared import FLOATS
from cupy_router.ops._op import Op
from cupy_router.ops._rows import GradientOptions
from cupy_router.ops._run import run
from cupy_router.ops.unpermute import NEEDS_ORDER

SMOOTH = "the result has a gradient"

# Arrays that the gradient with respect to each input reads, besides the incoming gradient.
_PERMUTE_READS = {"x": ("positions", "weights"), "weights": ("positions", "x")}
_UNPERMUTE_READS = {
    "y": ("order", "positions", "weights"),
    "weights": ("order", "positions", "y"),
    "residual": ("order", "positions", "residual", "residual_scale"),
    "residual_scale": ("order", "positions", "residual"),
}
_NAMES = ("order", "positions", "weights", "x", "y", "residual", "residual_scale")


def is_smooth(given: Mapping[str, Any]) -> bool:
    """Return whether the result depends smoothly on inputs of a call: always."""
    return True


def remember(ctx: Any, op: Op, options: Any, given: Mapping[str, Any], needed: Collection[str], output: Any) -> None:
    """Save what :func:`gradients` needs of a call."""
    reads = _PERMUTE_READS if op is permute.OP else _UNPERMUTE_READS
    if op is permute.OP:
        if "x" in needed and tensors.name_of(given["x"].dtype) not in FLOATS:
            raise TypeError(f"{op.label}: x must be {' or '.join(FLOATS)} for a gradient, got {given['x'].dtype}")
    else:
        if "y" in needed and given["order"] is None:
            raise ValueError(f"{op.label}: {NEEDS_ORDER}")
        if given["residual_scale"] is None:  # then the gradient of the residual is the incoming one
            reads = {name: needs for name, needs in reads.items() if name != "residual"}
    read = {name for smooth in needed for name in reads.get(smooth, ())}
    ctx.permutes, ctx.num_rows = op is permute.OP, output[0].shape[0] if op is permute.OP else given["y"].shape[0]
    ctx.dtypes = {name: given[name].dtype for name in needed}
    ctx.save_for_backward(*(given.get(name) if name in read else None for name in _NAMES))


def gradients(ctx: Any, grads: Sequence[Any], needed: Collection[str], by_op: bool) -> dict[str, Any]:
    """Return the gradients with respect to the needed inputs, in their dtypes."""
    saved = dict(zip(_NAMES, ctx.saved_tensors, strict=True))
    grad = grads[0] if by_op else tensors.resolved(grads[0])  # PyTorch's dispatcher does so for ops
    grad = grad if grad.stride(-1) == 1 else grad.contiguous()
    found = (_of_permute if ctx.permutes else _of_unpermute)(ctx, grad, needed, saved, by_op)
    return {name: gradient.to(ctx.dtypes[name]) for name, gradient in found.items()}


def _of_permute(ctx: Any, grad: Any, needed: Collection[str], saved: Mapping[str, Any], by_op: bool) -> dict[str, Any]:
    want = {"x": "sums", "weights": "dots"}
    weights = saved["weights"] if "x" in needed else None
    x = saved["x"] if "weights" in needed else None
    return _call(_permute_backward.OP, want, needed, (grad, saved["positions"], weights, x), by_op)


def _of_unpermute(
    ctx: Any, grad: Any, needed: Collection[str], saved: Mapping[str, Any], by_op: bool
) -> dict[str, Any]:
    want = {"y": "rows", "weights": "dots", "residual": "scaled", "residual_scale": "residual_dots"}
    found = {}
    if "residual" in needed and saved["residual_scale"] is None:
        found["residual"] = grad
        needed = [name for name in needed if name != "residual"]
    if needed:
        order = saved["order"]
        if order is None:  # only the gradient of y reads it
            order = saved["positions"].new_empty((ctx.num_rows,))
        weights = saved["weights"] if "y" in needed else None
        y = saved["y"] if "weights" in needed else None
        given = (grad, order, saved["positions"], weights, y, saved["residual"], saved["residual_scale"])
        found |= _call(_unpermute_backward.OP, want, needed, given, by_op)
    return found


def _call(
    op: Op, want: Mapping[str, str], needed: Collection[str], given: tuple[Any, ...], by_op: bool
) -> dict[str, Any]:
    """Return results of an op by the inputs whose gradients they are."""
    options = GradientOptions(tuple(result for name, result in want.items() if name in needed))
    if by_op:
        results = getattr(torch.ops.cupy_router, op.name)(options.text, *given)
    else:
        results = run(op, options, given, None, None)
    by_result = dict(zip(op.result_names, results, strict=True))
    return {name: by_result[result] for name, result in want.items() if name in needed}
