# SPDX-License-Identifier: Apache-2.0
"""Schemas, implementations, fakes and gradients of the ops, and how a traced call becomes one of them.

Arguments that are no tensors become the first ones of the schema: a method is its text (empty: none), a Router its key.
Implementations for CPU and CUDA are the ops themselves, past the question whether something is traced.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from cupy_router.method import RoutingMethod
from cupy_router.ops import _call, activation_topk, activation_topk_backward, dense_router, hash_router, topk_select
from cupy_router.ops._topk_select_long import Options
from cupy_router.results import Routing
from cupy_router.torch import _autograd, _state, _transforms
from cupy_router.torch._autograd import is_grad_enabled, run_with_gradient, wants_gradient
from cupy_router.torch._registry import method_of, router_of
from cupy_router.torch._state import is_special as is_tracing

_NO_METHOD = ""

__all__ = ["is_grad_enabled", "is_tracing", "route", "run", "run_with_gradient", "wants_gradient"]  # what calls ask

_SCHEMAS = {
    "topk_select": "int k, Tensor scores, Tensor? lengths, Tensor? starts",
    "topk_select_with_options": "int k, bool sorted, bool return_values, int page_size, Tensor scores, "
    "Tensor? lengths, Tensor? starts, Tensor? index_map",
    "activation_topk": "str method, Tensor logits, Tensor? bias, Tensor? logit_bias, Tensor? expert_scale, "
    "Tensor? num_valid, SymInt num_valid_value",
    "hash_router": "str method, Tensor token_ids, Tensor table, Tensor? logits, Tensor? x, Tensor? weight, "
    "Tensor? logit_bias, Tensor? expert_scale, Tensor? num_valid, SymInt num_valid_value",
    "dense_router": "str method, str path, Tensor x, Tensor weight, Tensor? bias, Tensor? logit_bias, "
    "Tensor? expert_scale, Tensor? num_valid, SymInt num_valid_value",
    "router": "str router, Tensor x, Tensor? token_ids, Tensor? num_valid, SymInt num_valid_value",
    "activation_topk_backward": "str method, Tensor grad_weights, Tensor indices, Tensor logits, Tensor? logit_bias, "
    "Tensor? expert_scale, bool in_float32, bool repeated",
    "router_backward": "str router, Tensor x, Tensor indices, Tensor grad_weights",
}


# -- From a traced call to a node of the graph -------------------------------------------------------------------------


def run(op: _call.Op, options: Any, inputs: tuple[Any, ...], out: Any, stream: Any, number: Any) -> Any:
    """A call of an op while a graph is traced, inside torch.func, or in forward mode."""
    if not _state.is_tracing() and not _transforms.concern(inputs):
        if is_grad_enabled() and wants_gradient(op, inputs):
            return run_with_gradient(op, options, inputs, out, stream, number)
        return _call.run(op, options, inputs, out, stream, number, eager=True)
    _refuse(op.name, out, stream)
    if not _state.is_tracing():
        return _transforms.run(op, options, inputs, number)
    if op.name == "topk_select" and isinstance(options, Options):
        results = torch.ops.cupy_router.topk_select_with_options(*options, *inputs)
        return op.result(*(results if options.return_values else results[1:]))
    if op.name == "topk_select":
        return op.result(*torch.ops.cupy_router.topk_select(options, *inputs))
    if op.name == "dense_router":
        method, path = options
        return op.result(*torch.ops.cupy_router.dense_router(method.text, path or "", *inputs, number))
    key = _NO_METHOD if options is None else options.text
    if op.name == "hash_router":
        return op.result(*torch.ops.cupy_router.hash_router(key, *inputs, number))
    if op.name == "Router":
        x, token_ids, table, weight, *rest = inputs
        gated = None if weight is None else x
        return op.result(*torch.ops.cupy_router.hash_router(key, token_ids, table, None, gated, weight, *rest, number))
    return op.result(*torch.ops.cupy_router.activation_topk(key, *inputs, number))


def route(router: Any, x: Any, token_ids: Any, num_valid: Any, out: Any, stream: Any) -> Routing:
    """The same of a Router, whose arrays a graph sees if they are tensors: one graph then serves all layers alike, and
    an exported program has them."""
    if not _state.is_tracing() or _is_of_tensors(router):
        return router.route(x, token_ids, num_valid, out, stream)  # type: ignore[no-any-return]  # a Routing
    _refuse("Router", out, stream)
    number = num_valid if isinstance(num_valid, int) else -1
    counts = None if isinstance(num_valid, int) else num_valid
    return Routing(*torch.ops.cupy_router.router(router.key, x, token_ids, counts, number))


def _is_of_tensors(router: Any) -> bool:
    if router._follows:  # copies of the arrays, on the device of each x
        return False
    arrays = (router.weight, router.bias, router.logit_bias, router.expert_scale, router.table)
    if is_grad_enabled() and any(isinstance(array, torch.Tensor) and array.requires_grad for array in arrays):
        return True
    return all(array is None or isinstance(array, torch.Tensor) for array in arrays)


def _refuse(name: str, out: Any, stream: Any) -> None:
    if out is not None or stream is not None:
        places = "torch.compile, torch.export, torch.func, torch.jit.trace or a TorchDispatchMode"
        raise ValueError(f"{name}: out and stream cannot be given inside {places}")


# -- From a node of the graph to the op --------------------------------------------------------------------------------


def _topk_select(k: int, *inputs: Any) -> Any:
    return tuple(_call.run(topk_select._OP, k, inputs, None, None, eager=True))


def _topk_select_with_options(k: int, in_order: bool, return_values: bool, page_size: int, *inputs: Any) -> Any:
    options = Options(k, in_order, return_values, page_size)
    if return_values:
        return tuple(_call.run(topk_select._OP_OPTIONS, options, inputs, None, None, eager=True))
    (indices,) = _call.run(topk_select._OP_COLUMNS, options, inputs, None, None, eager=True)
    return inputs[0].new_empty((0,)), indices  # a node always has two results


def _activation_topk(method: str, *inputs: Any) -> Any:
    return tuple(_call.run(activation_topk._OP, method_of(method), inputs[:-1], None, None, inputs[-1], eager=True))


def _hash_router(method: str, *inputs: Any) -> Any:
    options = None if method == _NO_METHOD else method_of(method)
    return tuple(_call.run(hash_router._OP, options, inputs[:-1], None, None, inputs[-1], eager=True))


def _dense_router(method: str, path: str, *inputs: Any) -> Any:
    options = method_of(method), path or None
    return tuple(_call.run(dense_router._OP, options, inputs[:-1], None, None, inputs[-1], eager=True))


def _router(router: str, x: Any, token_ids: Any, num_valid: Any, number: int) -> Any:
    return tuple(router_of(router).route(x, token_ids, number if number >= 0 else num_valid, None, None))


def _activation_topk_backward(method: str, *inputs: Any) -> Any:
    *arrays, in_float32, repeated = inputs
    options = activation_topk_backward.Options(method_of(method), "float32" if in_float32 else None, repeated)
    return _call.run(activation_topk_backward._OP, options, tuple(arrays), None, None, eager=True)[0]


def _router_backward(router: str, x: Any, indices: Any, grad_weights: Any) -> Any:
    return _autograd.gradient_by_x(router_of(router), x, indices, grad_weights)


# -- What results look like --------------------------------------------------------------------------------------------


def _routing_like(first: Any, method: RoutingMethod) -> tuple[Any, Any]:
    shape = (first.shape[0], method.num_columns)
    weights = first.new_empty(shape, dtype=getattr(torch, method.weight_dtype))
    return weights, first.new_empty(shape, dtype=getattr(torch, method.index_dtype))


def _fake_topk_select(k: int, scores: Any, lengths: Any, starts: Any) -> Any:
    shape = (scores.shape[0], k)
    return scores.new_empty(shape), scores.new_empty(shape, dtype=torch.int32)


def _fake_topk_select_with_options(
    k: int, in_order: bool, return_values: bool, page_size: int, scores: Any, *others: Any
) -> Any:
    shape = (scores.shape[0], k)
    return scores.new_empty(shape if return_values else (0,)), scores.new_empty(shape, dtype=torch.int32)


def _fake_activation_topk(method: str, logits: Any, *others: Any) -> Any:
    return _routing_like(logits, method_of(method))


def _fake_hash_router(method: str, token_ids: Any, table: Any, *others: Any) -> Any:
    uniform = RoutingMethod(table.shape[1], table.shape[1])
    return _routing_like(token_ids, uniform if method == _NO_METHOD else method_of(method))


def _fake_dense_router(method: str, path: str, x: Any, *others: Any) -> Any:
    return _routing_like(x, method_of(method))


def _fake_router(router: str, x: Any, *others: Any) -> Any:
    return _routing_like(x, router_of(router).method)


def _fake_activation_topk_backward(method: str, grad_weights: Any, indices: Any, logits: Any, *others: Any) -> Any:
    *_, in_float32, _ = others
    return logits.new_empty(logits.shape, dtype=torch.float32 if in_float32 else logits.dtype)


def _fake_router_backward(router: str, x: Any, *others: Any) -> Any:
    return x.new_empty(x.shape)


# -- The way back ------------------------------------------------------------------------------------------------------


def _remember(*names: str | None) -> Callable[..., None]:
    """For an op with these inputs behind the method."""

    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
        method = None if inputs[0] == _NO_METHOD else method_of(inputs[0])
        _autograd.remember(ctx, method, (None, *names), inputs, output)

    return setup_context


def _remember_router(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
    router, x, *_ = inputs
    weights, indices = output
    ctx.mark_non_differentiable(*((indices,) if router_of(router).weight is not None else (weights, indices)))
    ctx.set_materialize_grads(False)
    ctx.router = router
    ctx.save_for_backward(x, indices)


def _back_through_router(ctx: Any, grad_weights: Any, grad_indices: Any) -> tuple[Any, ...]:
    by_x = None
    if grad_weights is not None:
        by_x = torch.ops.cupy_router.router_backward(ctx.router, *ctx.saved_tensors, grad_weights.contiguous())
    return None, by_x, None, None, None


_BACKWARD: dict[str, tuple[Callable[..., Any], Callable[..., Any] | None]] = {
    "activation_topk": (_autograd.backward, _remember(*activation_topk._OP.inputs, None)),
    "hash_router": (_autograd.backward, _remember(*hash_router._OP.inputs, None)),
    "dense_router": (_autograd.backward, _remember(None, *dense_router._OP.inputs, None)),
    "router": (_back_through_router, _remember_router),
    "activation_topk_backward": (_autograd.no_second_derivative, None),
    "router_backward": (_autograd.no_second_derivative, None),
}

_OPS: dict[str, tuple[Callable[..., Any], Callable[..., Any]]] = {
    "topk_select": (_topk_select, _fake_topk_select),
    "topk_select_with_options": (_topk_select_with_options, _fake_topk_select_with_options),
    "activation_topk": (_activation_topk, _fake_activation_topk),
    "hash_router": (_hash_router, _fake_hash_router),
    "dense_router": (_dense_router, _fake_dense_router),
    "router": (_router, _fake_router),
    "activation_topk_backward": (_activation_topk_backward, _fake_activation_topk_backward),
    "router_backward": (_router_backward, _fake_router_backward),
}

_library = torch.library.Library("cupy_router", "DEF")
for _name, (_implementation, _fake) in _OPS.items():
    _returned = "Tensor" if _name.endswith("_backward") else "(Tensor, Tensor)"
    _library.define(f"{_name}({_SCHEMAS[_name]}) -> {_returned}", tags=(torch.Tag.pt2_compliant_tag,))
    _library.impl(_name, _implementation, "CPU")
    _library.impl(_name, _implementation, "CUDA")
    torch.library.register_fake(f"cupy_router::{_name}", _fake, lib=_library)
    if _name in _BACKWARD:
        _back, _setup = _BACKWARD[_name]
        torch.library.register_autograd(f"cupy_router::{_name}", _back, setup_context=_setup, lib=_library)
    else:
        _library.impl(_name, torch.library.fallthrough_kernel, "Autograd")  # results have no gradient
