# SPDX-License-Identifier: Apache-2.0
"""Dispatch and combine in autograd: each is the other on the way back.

The anchor, an empty tensor from one to the other, makes their backward passes, which are collective operations, run on
every rank: also where the experts use no rows, or nothing requires grad.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from cupy_router.ops import _unpermute_backward
from cupy_router.ops._rows import GradientOptions, LayoutInts
from cupy_router.ops._run import run_eagerly
from cupy_router.ops.permute import OP as PERMUTE
from cupy_router.torch._transport import Transport, weighted_sum


class _NoSecondDerivative(torch.autograd.Function):  # type: ignore[misc]  # PyTorch is untyped to us
    """gradient = apply(gradient, leaf), whose backward pass raises."""

    @staticmethod
    def forward(ctx: Any, gradient: Any, leaf: Any) -> Any:
        return gradient.view_as(gradient)

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        raise RuntimeError("ExpertParallel: dispatch and combine have first derivatives only, so this has no gradient")


def _first_derivatives(backward: Callable[..., tuple[Any, ...]]) -> Callable[..., tuple[Any, ...]]:
    """Refuse the derivative of a backward pass, which PyTorch's `once_differentiable` does for incoming gradients only.

    These gradients also depend on tensors of the forward pass.
    """

    def refusing(ctx: Any, *grads: Any) -> tuple[Any, ...]:
        with torch.no_grad():
            found = backward(ctx, *grads)
        if not torch.is_grad_enabled():
            return found
        leaf = grads[0].new_empty(0, requires_grad=True)
        return tuple([None if gradient is None else _NoSecondDerivative.apply(gradient, leaf) for gradient in found])

    return refusing


class Dispatch(torch.autograd.Function):  # type: ignore[misc]
    """rows, anchor = apply(transport, exact, x, leaf)."""

    @staticmethod
    def forward(ctx: Any, transport: Transport, exact: bool, x: Any, leaf: Any) -> tuple[Any, Any]:
        ctx.transport, ctx.exact = transport, exact
        # In grad mode the experts' derivatives of rows without a token are 0 times these rows, which must not be NaN.
        options = LayoutInts(clears=leaf.requires_grad)
        inputs = transport.take_tokens(), transport.layout.order, transport.layout.positions, None
        return run_eagerly(PERMUTE, options, inputs), x.new_empty(0)

    @staticmethod
    @_first_derivatives
    def backward(ctx: Any, grad: Any, _: Any) -> tuple[Any, ...]:
        return None, None, weighted_sum(ctx.transport, grad.contiguous(), None, ctx.exact), None


class Combine(torch.autograd.Function):  # type: ignore[misc]
    """sums = apply(transport, exact, y, weights, anchor)."""

    @staticmethod
    def forward(ctx: Any, transport: Transport, exact: bool, y: Any, weights: Any, anchor: Any) -> Any:
        ctx.transport = transport
        ctx.save_for_backward(y)
        return weighted_sum(transport, y.contiguous(), weights, exact)

    @staticmethod
    @_first_derivatives
    def backward(ctx: Any, grad: Any) -> tuple[Any, ...]:
        """Multiply and add on the ranks of the experts: each product is one of a row there and a gradient."""
        transport, (y,) = ctx.transport, ctx.saved_tensors
        grads = transport.share(grad)
        layout, options = transport.layout, GradientOptions(("rows", "dots"))
        inputs = grads, layout.order, layout.positions, transport.weights, y.contiguous(), None, None
        found = run_eagerly(_unpermute_backward.OP, options, inputs)
        return None, None, found.rows, transport.collect(found.dots), grad.new_empty(0)
