# SPDX-License-Identifier: Apache-2.0
"""Gradients of ops, for eager calls with tensors that require grad and for calls in a graph.

An eager call becomes one node of autograd. In a graph the op itself is a node. Both use the rule that the op declares,
whose backward pass calls ops. The forward pass is the call itself, so results are the same with and without a gradient.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from contextlib import nullcontext
from typing import Any, Protocol

import numpy as np
import torch

from cupy_router.arrays import _torch as tensors
from cupy_router.arrays import framework_of, stream_handle
from cupy_router.ops._cached import NUMBER
from cupy_router.ops._op import Op
from cupy_router.ops._run import run, run_eagerly
from cupy_router.torch import _routing_gradient, _rows_gradient, _state

_is_batched = getattr(torch._C._functorch, "is_legacy_batchedtensor", lambda tensor: False)  # private, may disappear


class Rule(Protocol):
    """The gradients of the ops that name it."""

    SMOOTH: str  # what has a gradient, for errors

    def is_smooth(self, given: Mapping[str, Any]) -> bool:
        """Return whether a call with these inputs has a gradient at all."""

    def remember(
        self, ctx: Any, op: Op, options: Any, given: Mapping[str, Any], needed: Collection[str], output: Any
    ) -> None:
        """Save what `gradients` reads of a call, and mark the results that have no gradient.

        given: the inputs by name, None if left out, and NUMBER if the op has a num_valid.
        needed: the names of those that require grad.
        """

    def gradients(self, ctx: Any, grads: Sequence[Any], needed: Collection[str], by_op: bool) -> Mapping[str, Any]:
        """Return the gradients with respect to the needed inputs, in their dtypes.

        grads: those of the results, at least one of which is not None.
        by_op: call ops through PyTorch's dispatcher, as graphs and batched gradients need it.
        """


RULES: dict[str, Rule] = {"routing": _routing_gradient, "rows": _rows_gradient}


# -- Eager calls -------------------------------------------------------------------------------------------------------


def wants_gradient(op: Op, inputs: tuple[Any, ...]) -> bool:
    """Return whether an input requires grad that results depend on. Every call in grad mode asks this."""
    for position in op.differentiable:
        array = inputs[position]
        if array is not None and getattr(array, "requires_grad", False):
            return True
    return False


def _is_smooth(op: Op, inputs: tuple[Any, ...]) -> bool:
    return bool(op.gradient) and RULES[op.gradient].is_smooth(dict(zip(op.names, inputs, strict=True)))


def refuse_writing(op: Op, options: Any, inputs: tuple[Any, ...], outs: tuple[Any, ...]) -> None:
    """Refuse to write inside torch.func, and in grad mode if a tensor requires grad or results have a gradient."""
    if not outs and all(inputs[position] is None for position in op.written):
        return
    if _state.is_transformed():
        refuse_written(op, inputs)
        _state.refuse_out_and_stream(op.label, outs, None)
    if not torch.is_grad_enabled():
        return
    smooth = [inputs[position] for position in op.differentiable]
    if outs and [a for a in smooth if isinstance(a, torch.Tensor) and a.requires_grad] and _is_smooth(op, inputs):
        raise ValueError(
            f"{op.label}: out cannot be given where {RULES[op.gradient].SMOOTH}, that is with arrays that require grad "
            "unless under torch.no_grad()"
        )
    arrays = (*inputs, *outs)
    names = op.written_names(options, arrays)
    tensors.refuse_gradient({place: f"{op.label}: {name}" for place, name in names.items()}, arrays)


def refuse_written(op: Op, inputs: Sequence[Any]) -> None:
    """Refuse inputs that the op writes into."""
    for position in op.written:
        if inputs[position] is not None:
            raise ValueError(f"{op.label}: {op.names[position]} cannot be written inside torch.func")


def run_with_gradient(op: Op, options: Any, inputs: tuple[Any, ...], out: Any, stream: Any, number: int) -> Any:
    """Return the results of a call for which :func:`wants_gradient` is true, with a node of autograd."""
    if not isinstance(inputs[0], torch.Tensor) and _is_smooth(op, inputs):
        raise TypeError(
            f"{op.label}: {op.inputs[0].shown} must be a tensor where {RULES[op.gradient].SMOOTH}, got "
            f"{type(inputs[0]).__name__}: pass a tensor, or detach the arrays that require grad"
        )
    if out is not None or not _is_smooth(op, inputs):  # `refuse_writing` has been asked
        return run(op, options, inputs, out, stream, number, eager=True)
    # Make the given stream current, because autograd runs the backward pass on the current stream of the forward pass.
    context: Any = nullcontext()
    if stream is not None and inputs[0].is_cuda:
        context = torch.cuda.stream(torch.cuda.ExternalStream(stream_handle(stream), inputs[0].device))
    with context:
        results = _Call.apply(op, options, number, *map(as_tensor, op.names, inputs))
        return op.pack(options, results, lambda: op.sizes_of(options, [None if a is None else a.shape for a in inputs]))


class _Call(torch.autograd.Function):  # type: ignore[misc]  # PyTorch is untyped to us
    """The existing results = apply(op, options, number, *inputs).

    It has no `setup_context`, which would make each call 15 us longer.
    """

    @staticmethod
    def forward(ctx: Any, op: Op, options: Any, number: int, *inputs: Any) -> tuple[Any, ...]:
        results = op.flatten(options, run_eagerly(op, options, inputs, number))
        for declared, array in zip(op.inputs, inputs, strict=True):
            if array is not None and not isinstance(array, torch.Tensor):
                raise TypeError(
                    f"{op.label}: {declared.shown} must be a tensor, or convertible to one by DLPack, where "
                    f"{RULES[op.gradient].SMOOTH}, got {type(array).__name__}"
                )
        remember_call(ctx, op, options, number, *inputs, output=results)
        return tuple(results)

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> tuple[Any, ...]:
        # Only the op of torch.library refuses a second derivative, which may be asked for in grad mode. Also, only that
        # op takes the batched gradients that autograd makes for is_grads_batched.
        by_op = torch.is_grad_enabled() or any(_is_batched(grad) for grad in grads if grad is not None)
        return backward(ctx, *grads, by_op=by_op)


def as_tensor(name: str, array: Any) -> Any:
    """Return an array of another framework as a tensor on the same memory; NumPy arrays are copied.

    Anything that cannot become a tensor is returned as it is, and the checks of the op raise.
    """
    if array is None or isinstance(array, (torch.Tensor, np.ma.MaskedArray)):
        return array
    try:
        if isinstance(array, np.ndarray):
            return tensors.FRAMEWORK.from_host(np.array(array), array)
        return torch.from_dlpack(framework_of(name, array).plain(name, array))
    except (AttributeError, BufferError, RuntimeError, TypeError):
        return array


# -- Backward pass -----------------------------------------------------------------------------------------------------


def remember(
    ctx: Any, op: Op, options: Any, names: tuple[str | None, ...], inputs: tuple[Any, ...], output: Any
) -> None:
    """Save what :func:`backward` needs of a call. `names` has a name for each input, None if no rule wants it."""
    given = {name: array for name, array in zip(names, inputs, strict=True) if name is not None}
    ctx.set_materialize_grads(False)
    ctx.op, ctx.names = op, names
    RULES[op.gradient].remember(ctx, op, options, given, _needed(ctx), output)


def remember_call(ctx: Any, op: Op, options: Any, *inputs: Any, output: Any) -> None:
    """Save the same of an eager call, whose inputs begin with num_valid as an int."""
    remember(ctx, op, options, (None, None, NUMBER, *op.names), (op, options, *inputs), output)


def backward(ctx: Any, *grads: Any, by_op: bool = True) -> tuple[Any, ...]:
    """Return the gradient with respect to each input of a call, None if it has none or none is needed."""
    found: Mapping[str, Any] = {}
    if any(grad is not None for grad in grads):
        found = RULES[ctx.op.gradient].gradients(ctx, grads, _needed(ctx), by_op)
    return tuple([found.get(name) for name in ctx.names])


def _needed(ctx: Any) -> list[str]:
    """Return the names of the inputs that require grad.

    In the forward pass of an op of torch.library, `needs_input_grad` has one entry more than there are inputs.
    """
    return [name for name, needs in zip(ctx.names, ctx.needs_input_grad, strict=False) if needs]


def no_second_derivative(op: Op, ctx: Any, *grads: Any) -> Any:
    """Refuse the gradient of an op that is a gradient itself."""
    raise RuntimeError(op.no_gradient)
