# SPDX-License-Identifier: Apache-2.0
"""One op of torch.library for Routers whose arrays are not tensors. It finds the Router by its key.

A Router of tensors needs no such op: its tensors are inputs of the routing op in the graph. One graph then serves all
layers of the same kind, and an exported program contains their arrays.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import torch

from cupy_router import router as routers
from cupy_router.arrays import _torch as tensors
from cupy_router.ops import _hash_layer, _run, activation_topk_backward, dense_router, expert_layout
from cupy_router.ops._routed import layout_options
from cupy_router.results import Routing, RoutingPlan
from cupy_router.router import Router
from cupy_router.torch import _autograd, _library, _state
from cupy_router.torch._library import no_results, register, register_gradient, register_without_gradient
from cupy_router.torch._routing_gradient import gradients_of


def wants(router: Router, inputs: tuple[Any, ...]) -> bool:
    """Return whether the call of a Router becomes one node of the graph; one made while traced has no key for that."""
    return _state.is_tracing() and not _is_of_tensors(router) and bool(router.key)  # in this order: graphs guard keys


def run(router: Router, layout: Any, inputs: tuple[Any, ...], out: Any, stream: Any, number: int) -> Any:
    """Return the results of a call that :func:`wants` accepts. A layout becomes a node of its own."""
    x, token_ids, num_valid = inputs
    op = _hash_layer.OP if router.is_hash else dense_router.OP
    options: Any = op.options(router.method, layout=layout, **({} if router.is_hash else {"path": None}))
    outs = _library.flat(op, options, out)
    if stream is not None or not _library.can_hold(op, (x,), outs):
        if not _state.in_dynamo():
            raise ValueError(f"Router: {_state.REFUSED_IN_GRAPHS}")
        return _state.outside_of_graphs(router.route, x, token_ids, layout, num_valid, out, stream)
    number, count = (num_valid, None) if isinstance(num_valid, int) else (-1, num_valid)
    if out is None:
        routing = Routing(*torch.ops.cupy_router.router(router.key, x, token_ids, count, number))
    else:
        given = {**router.arrays(), "x": x}
        _autograd.refuse_writing(op, options, tuple([given.get(name) for name in op.names]), outs)
        torch.ops.cupy_router.router_out(router.key, x, token_ids, count, number, *outs[:2])
        routing = Routing(*outs[:2])
    if layout is None:
        return routing if out is None else out
    into = None if out is None else out.layout
    laid_out = _run.run(expert_layout.OP, layout_options(options), (routing.indices, None, None, None), into, None)
    return RoutingPlan(*routing, laid_out) if out is None else out


def _is_of_tensors(router: Router) -> bool:
    if router.follows_inputs:  # copies of the arrays, on the device of each x
        return False
    arrays = (router.weight, router.bias, router.logit_bias, router.expert_scale, router.table)
    if torch.is_grad_enabled() and any(isinstance(a, torch.Tensor) and a.requires_grad for a in arrays):
        return True
    return all(array is None or isinstance(array, torch.Tensor) for array in arrays)


def _router_of(key: str) -> Router:
    found = routers.routers.get(key)
    if found is None:
        raise RuntimeError(
            "a compiled graph calls a Router that is gone: keep it as long as the graph, and export a Router of tensors"
        )
    return found


def _implementation(key: str, x: Any, token_ids: Any, num_valid: Any, number: int) -> Any:
    return tuple(_router_of(key).route(x, token_ids, None, number if number >= 0 else num_valid, None, None))


def _implementation_into(
    key: str, x: Any, token_ids: Any, num_valid: Any, number: int, weights: Any, indices: Any
) -> None:
    _router_of(key).route(x, token_ids, None, number if number >= 0 else num_valid, Routing(weights, indices), None)


def _fake(key: str, x: Any, *others: Any) -> Any:
    method = _router_of(key).method
    shape = (x.shape[0], method.num_columns)
    return tuple(x.new_empty(shape, dtype=tensors.dtype_of(n)) for n in (method.weight_dtype, method.index_dtype))


def _backward(key: str, x: Any, indices: Any, grad_weights: Any) -> Any:
    """Return the gradient with respect to the x of a Router, whose arrays may be of any framework."""
    layer = _router_of(key).beside(x)
    arrays = {
        name: _autograd.as_tensor(name, getattr(layer, name)) for name in ("weight", "logit_bias", "expert_scale")
    }
    arrays |= {"logits": None, "x": x}
    found = gradients_of(layer.method, grad_weights, indices, ("x",), arrays, repeated=layer.is_hash, by_op=False)
    return found["x"]


def _fake_backward(key: str, x: Any, *others: Any) -> Any:
    return x.new_empty(x.shape)


def _remember(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
    key, x, *_ = inputs
    weights, indices = output
    ctx.mark_non_differentiable(*((indices,) if _router_of(key).weight is not None else (weights, indices)))
    ctx.set_materialize_grads(False)
    ctx.key = key
    ctx.save_for_backward(x, indices)


def _differentiate(ctx: Any, grad_weights: Any, grad_indices: Any) -> tuple[Any, ...]:
    grad_x = None
    if grad_weights is not None:
        grad_x = torch.ops.cupy_router.router_backward(ctx.key, *ctx.saved_tensors, grad_weights.contiguous())
    return None, grad_x, None, None, None


register(
    "router(str router, Tensor x, Tensor? token_ids, Tensor? num_valid, SymInt num_valid_value) -> (Tensor, Tensor)",
    _implementation,
    _fake,
)
register(
    "router_out(str router, Tensor x, Tensor? token_ids, Tensor? num_valid, SymInt num_valid_value, "
    "Tensor(a!) weights, Tensor(b!) indices) -> ()",
    _implementation_into,
    no_results,
    {5: "Router: out.weights", 6: "Router: out.indices"},
)
register(
    "router_backward(str router, Tensor x, Tensor indices, Tensor grad_weights) -> Tensor", _backward, _fake_backward
)
register_gradient("router", _differentiate, _remember)
register_gradient("router_backward", partial(_autograd.no_second_derivative, activation_topk_backward.OP), None)
register_without_gradient("router_out")
