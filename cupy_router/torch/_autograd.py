# SPDX-License-Identifier: Apache-2.0
"""Gradients of the weights, for eager calls with tensors that require grad and for calls in a graph.

An eager call becomes one node of autograd. In a graph the op itself is a node. Both use :func:`gradients` as backward
pass. The forward pass is the call itself, so weights are the same with and without a gradient. If the call took x and
the gate, the backward pass computes the logits again.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from contextlib import nullcontext
from typing import Any

import numpy as np
import torch

from cupy_router.arrays import _torch as tensors
from cupy_router.arrays import framework_of, stream_handle
from cupy_router.method import RoutingMethod
from cupy_router.ops import activation_topk_backward, hash_router
from cupy_router.ops._op import Op
from cupy_router.ops._run import run, run_eagerly
from cupy_router.ops.activation_topk_backward import NO_SECOND_DERIVATIVE, BackwardOptions, without_factors
from cupy_router.ops.hash_router import HashOptions
from cupy_router.torch import _state
from cupy_router.torch._gate_gemm import gate_gemm, gate_gemm_gradients

_is_batched = getattr(torch._C._functorch, "is_legacy_batchedtensor", lambda tensor: False)  # private, may disappear

BACKWARD = activation_topk_backward.OP

# Inputs that the backward pass may need. Those that the call got are also the ones that have a gradient.
_SAVED = ("logits", "x", "weight", "logit_bias", "expert_scale")


# -- Eager calls -------------------------------------------------------------------------------------------------------


def wants_gradient(op: Op, inputs: tuple[Any, ...]) -> bool:
    """Return whether results are tensors and one of their inputs requires grad. Every call in grad mode asks this."""
    for position in op.differentiable:
        array = inputs[position]
        if array is not None and getattr(array, "requires_grad", False):
            return isinstance(inputs[0], torch.Tensor)
    return False


def _is_uniform(op: Op, inputs: tuple[Any, ...]) -> bool:
    """Return whether weights depend on no input, because there are neither logits nor a gate."""
    given = dict(zip(op.names, inputs, strict=True))
    return given.get("logits") is None and given.get("weight") is None


def refuse_out(op: Op, options: Any, inputs: tuple[Any, ...], outs: tuple[Any, ...]) -> None:
    """Refuse `out` inside torch.func, and in grad mode if results have a gradient or a tensor in it requires grad."""
    if outs and _state.is_transformed():
        _state.refuse_out_and_stream(op.label, outs, None)
    if not torch.is_grad_enabled():
        return
    smooth = [inputs[position] for position in op.differentiable]
    if outs and [a for a in smooth if isinstance(a, torch.Tensor) and a.requires_grad] and not _is_uniform(op, inputs):
        raise ValueError(
            f"{op.label}: out cannot be given where weights have a gradient, that is with arrays that require grad "
            "unless under torch.no_grad()"
        )
    arrays = (*inputs, *outs)
    names = op.written_names(options, arrays)
    tensors.refuse_gradient({place: f"{op.label}: {name}" for place, name in names.items()}, arrays)


def run_with_gradient(op: Op, options: Any, inputs: tuple[Any, ...], out: Any, stream: Any, number: int) -> Any:
    """Return the results of a call for which :func:`wants_gradient` is true, with a node of autograd."""
    if out is not None or _is_uniform(op, inputs):  # `refuse_out` has been asked
        return run(op, options, inputs, out, stream, number, eager=True)
    # Make the given stream current, because autograd runs the backward pass on the current stream of the forward pass.
    context: Any = nullcontext()
    if stream is not None and inputs[0].is_cuda:
        context = torch.cuda.stream(torch.cuda.ExternalStream(stream_handle(stream), inputs[0].device))
    with context:
        results = _Routing.apply(op, options, number, *map(_as_tensor, op.names, inputs))
        return op.pack(options, results, lambda: op.sizes_of(options, [None if a is None else a.shape for a in inputs]))


class _Routing(torch.autograd.Function):  # type: ignore[misc]  # PyTorch is untyped to us
    """weights, indices, and the arrays of a layout if there is one = apply(op, options, number, *inputs).

    It has no `setup_context`, which would make each call 15 us longer.
    """

    @staticmethod
    def forward(ctx: Any, op: Op, options: Any, number: int, *inputs: Any) -> tuple[Any, ...]:
        results = op.flatten(options, run_eagerly(op, options, inputs, number))
        for name, array in zip(op.names, inputs, strict=True):
            if array is not None and not isinstance(array, torch.Tensor):
                raise TypeError(
                    f"{op.label}: {name} must be a tensor, or convertible to one by DLPack, where weights have a "
                    f"gradient, got {type(array).__name__}"
                )
        remember_call(ctx, op, options, number, *inputs, output=results)
        return tuple(results)

    @staticmethod
    def backward(ctx: Any, grad_weights: Any, *others: Any) -> tuple[Any, ...]:
        # Only the op of torch.library refuses a second derivative, which may be asked for in grad mode. Also, only that
        # op takes the batched gradients that autograd makes for is_grads_batched.
        by_op = torch.is_grad_enabled() or (grad_weights is not None and _is_batched(grad_weights))
        return backward(ctx, grad_weights, by_op=by_op)


def _as_tensor(name: str, array: Any) -> Any:
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
    ctx: Any, method: RoutingMethod | None, names: tuple[str | None, ...], inputs: tuple[Any, ...], output: Any
) -> None:
    """Save what :func:`backward` needs of a call. `names` has a name for each input, None if it is no array."""
    weights, indices, *layout = output
    given = dict(zip(names, inputs, strict=True))
    ctx.set_materialize_grads(False)
    if method is None or (given.get("logits") is None and given.get("weight") is None):
        ctx.mark_non_differentiable(weights, indices, *layout)
    else:
        ctx.mark_non_differentiable(indices, *layout)
    ctx.method, ctx.names, ctx.repeated = method, names, given.get("table") is not None
    ctx.save_for_backward(indices, *(given.get(name) for name in _SAVED))


def remember_call(ctx: Any, op: Op, options: Any, *inputs: Any, output: Any) -> None:
    """Save the same of an eager call, whose inputs begin with num_valid as an int."""
    remember(ctx, options.method, (None, None, None, *op.names), (op, options, *inputs), output)


def backward(ctx: Any, grad_weights: Any, *others: Any, by_op: bool = True) -> tuple[Any, ...]:
    """Return the gradient with respect to each input of a call, None if it has none or none is needed."""
    found: Mapping[str | None, Any] = {}
    if grad_weights is not None:
        indices, *saved = ctx.saved_tensors
        needed = [name for name, needs in zip(ctx.names, ctx.needs_input_grad, strict=True) if needs]
        arrays = dict(zip(_SAVED, saved, strict=True))
        found = gradients(ctx.method, grad_weights, indices, needed, arrays, repeated=ctx.repeated, by_op=by_op)
    return tuple(found.get(name) for name in ctx.names)


def gradients(
    method: RoutingMethod,
    grad_weights: Any,
    indices: Any,
    needed: Collection[str | None],
    arrays: Mapping[str, Any],
    *,
    repeated: bool,
    by_op: bool,
) -> dict[str | None, Any]:
    """Return the gradients with respect to the needed ones of `arrays`, in their dtypes.

    GEMMs are in float32, with the precision that PyTorch is set to.

    Args:
        arrays: logits or x and weight, logit_bias, expert_scale.
        repeated: a row may name an expert twice.
        by_op: call the ops through PyTorch's dispatcher, as graphs and batched gradients need it.
    """
    # Columns are selected by `narrow`: a slice of all columns is an alias, which PyTorch lacks for batched tensors.
    logits, x, weight, logit_bias, expert_scale = (arrays[name] for name in _SAVED)
    found: dict[str | None, Any] = {}
    with nullcontext() if x is None else torch.autocast(indices.device.type, enabled=False):
        if logits is None:
            logits = gate_gemm(x, weight)
        if not {"logits", "x", "weight", "logit_bias"}.isdisjoint(needed):
            in_float32 = "logit_bias" in needed  # logits computed from x are float32 already
            options = BackwardOptions(method, "float32" if in_float32 else None, repeated)
            given = (grad_weights.contiguous(), indices, logits, logit_bias, expert_scale)
            if by_op:
                grad_logits = torch.ops.cupy_router.activation_topk_backward(options.text, *given)
            else:
                resolved = (tensors.resolved(given[0]), *given[1:])  # PyTorch's dispatcher does so for ops
                (grad_logits,) = run(BACKWARD, (method, options.dtype, repeated), resolved, None, None)
            if "logits" in needed:
                found["logits"] = grad_logits.to(logits.dtype)
            if "logit_bias" in needed:
                found["logit_bias"] = grad_logits.narrow(1, 0, method.num_experts).sum(0)
            if x is not None:
                which = "x" in needed, "weight" in needed
                found["x"], found["weight"] = gate_gemm_gradients(x, weight, grad_logits, which)
        if "expert_scale" in needed:
            found["expert_scale"] = _expert_scale_gradient(
                method, grad_weights, indices, logits, logit_bias, repeated=repeated, by_op=by_op
            )
    return found


def _expert_scale_gradient(
    method: RoutingMethod,
    grad_weights: Any,
    indices: Any,
    logits: Any,
    logit_bias: Any,
    *,
    repeated: bool,
    by_op: bool,
) -> Any:
    """Return the gradient with respect to expert_scale: for each expert, the sum of its unscaled weights times theirs.

    The unscaled weights come from `hash_router`, with the indices as its table.
    """
    rows = torch.arange(len(indices), dtype=torch.int32, device=indices.device)
    experts = indices[:, : method.top_k]
    given = (rows, experts, logits, None, None, logit_bias, None, None)
    options = HashOptions(without_factors(method))
    if by_op:
        plain, _ = torch.ops.cupy_router.hash_router(options.text, *given, -1)
    else:
        plain, _ = run(hash_router.OP, options.method, given, None, None)
    plain = plain[:, : method.top_k]
    products = grad_weights.narrow(1, 0, method.top_k).float() * plain
    # Rows without experts have weights 0. A scatter without repeated places, followed by a sum, is bitwise repeatable.
    dense = products.new_zeros((len(indices), method.num_experts))
    places = experts.clamp(min=0).long()
    dense = dense.scatter_add(1, places, products) if repeated else dense.scatter(1, places, products)
    return dense.sum(0)


def x_gradient(router: Any, x: Any, indices: Any, grad_weights: Any) -> Any:
    """Return the gradient with respect to the x of a Router, whose arrays may be of any framework."""
    layer = router.beside(x)
    arrays = {name: _as_tensor(name, getattr(layer, name)) for name in ("weight", "logit_bias", "expert_scale")}
    arrays |= {"logits": None, "x": x}
    return gradients(layer.method, grad_weights, indices, ("x",), arrays, repeated=layer.is_hash, by_op=False)["x"]


def no_second_derivative(ctx: Any, *grads: Any) -> Any:
    raise RuntimeError(NO_SECOND_DERIVATIVE)
