# SPDX-License-Identifier: Apache-2.0
"""Ops of torch.library for Routers whose arrays are not tensors. They find the Router by its key.

A Router of tensors needs none: its tensors are inputs of the routing op in the graph. One graph then serves all
layers of the same kind, and an exported program contains their arrays.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import torch

from cupy_router import router as routers
from cupy_router.arrays import _torch as tensors
from cupy_router.ops import _hash_layer, _run, activation_topk_backward, dense_router, expert_layout
from cupy_router.ops._given import as_unset
from cupy_router.ops._invariant import as_batch_invariant
from cupy_router.ops._routed import as_logits_dtype, layout_options
from cupy_router.results import Routing, RoutingWithLogits
from cupy_router.router import Router
from cupy_router.torch import _autograd, _library, _state
from cupy_router.torch._library import no_results, register, register_gradient, register_without_gradient
from cupy_router.torch._routing_gradient import gradients_of, without_padding


def wants(router: Router, inputs: tuple[Any, ...]) -> bool:
    """Return whether the call of a Router becomes one node of the graph; one made while traced has no key for that."""
    return _state.is_tracing() and not _is_of_tensors(router) and bool(router.key)  # in this order: graphs guard keys


def run(router: Router, wanted: tuple[Any, ...], inputs: tuple[Any, ...], out: Any, stream: Any, number: int) -> Any:
    """Return the results of a call that :func:`wants` accepts. A layout becomes a node of its own."""
    layout, return_logits, unset, batch_invariant, physical = wanted
    x, *arrays, num_valid = inputs
    op = _hash_layer.OP if router.is_hash else dense_router.OP
    more: dict[str, Any] = {} if router.is_hash else {"path": None}
    more |= {"logits_dtype": as_logits_dtype("Router", return_logits, "float32"), "unset": as_unset("Router", unset)}
    more |= {"batch_invariant": as_batch_invariant("Router", batch_invariant)}
    options: Any = op.options(router.method, layout=layout, **more)
    outs = _library.flat(op, options, out)
    if physical and not _state.in_dynamo():
        raise ValueError("Router: replicas in a graph need a Router of tensors: convert its arrays")
    if physical or stream is not None or not _library.can_hold(op, (x,), outs):
        if not _state.in_dynamo():
            raise ValueError(f"Router: {_state.REFUSED_IN_GRAPHS}")
        return _state.outside_of_graphs(router.route, inputs, wanted, out, stream)
    number, count = (num_valid, None) if isinstance(num_valid, int) else (-1, num_valid)
    kind: Any = RoutingWithLogits if return_logits else Routing
    arguments = (router.key, x, *arrays, unset, batch_invariant, count, number)
    if out is None:
        routing = kind(*getattr(torch.ops.cupy_router, _NODES[kind])(*arguments))
    else:
        given = {**router.arrays(), "x": x}
        _autograd.refuse_writing(op, options, tuple([given.get(name) for name in op.names]), outs)
        routing = kind(*outs[: len(kind._fields)])
        getattr(torch.ops.cupy_router, f"{_NODES[kind]}_out")(*arguments, *routing)
    if layout is None:
        return routing if out is None else out
    into = None if out is None else out.layout
    laid_out = _run.run(expert_layout.OP, layout_options(options), (routing.indices, None, None, None), into, None)
    return op.returned(options)(*routing, laid_out) if out is None else out


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


def _implementation(kind: Any, key: str, *inputs: Any) -> Any:
    return tuple(_route(kind, key, *inputs, None))


def _implementation_into(kind: Any, key: str, *inputs: Any) -> None:
    _route(kind, key, *inputs[:_NUM_INPUTS], kind(*inputs[_NUM_INPUTS:]))


def _route(kind: Any, key: str, *inputs: Any) -> Any:
    *arrays, unset, batch_invariant, num_valid, number, out = inputs
    wanted: tuple[Any, ...] = None, kind is RoutingWithLogits, unset, batch_invariant, {}
    return _router_of(key).route((*arrays, number if number >= 0 else num_valid), wanted, out, None)


def _fake(kind: Any, key: str, x: Any, *others: Any) -> Any:
    method = _router_of(key).method
    columns = {"weights": method.num_columns, "indices": method.num_columns, "logits": method.num_logits}
    dtypes = {"weights": method.weight_dtype, "indices": method.index_dtype, "logits": "float32"}
    return tuple(
        x.new_empty((x.shape[0], columns[name]), dtype=tensors.dtype_of(dtypes[name])) for name in kind._fields
    )


def _backward(
    key: str,
    x: Any,
    indices: Any,
    grad_weights: Any,
    grad_logits: Any,
    num_valid: Any,
    number: int,
    batch_invariant: bool,
) -> Any:
    """Return the gradient with respect to the x of a Router, whose arrays may be of any framework."""
    layer = _router_of(key).beside(x)
    arrays = {
        name: _autograd.as_tensor(name, getattr(layer, name)) for name in ("weight", "logit_bias", "expert_scale")
    }
    arrays |= {"logits": None, "x": x}
    if grad_logits is not None:
        grad_logits = without_padding(grad_logits, number if num_valid is None else num_valid)
    found = gradients_of(
        layer.method, grad_weights, indices, ("x",), arrays, grad_logits=grad_logits, repeated=True, by_op=False,
        batch_invariant=batch_invariant,
    )  # fmt: skip
    return found["x"]


def _fake_backward(key: str, x: Any, *others: Any) -> Any:
    return x.new_empty(x.shape)


def _remember(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
    key, x, *_, batch_invariant, num_valid, number = inputs
    weights, indices, *_ = output
    ctx.mark_non_differentiable(*((indices,) if _router_of(key).weight is not None else (weights, indices)))
    ctx.set_materialize_grads(False)
    ctx.key, ctx.number, ctx.batch_invariant = key, number, batch_invariant
    ctx.save_for_backward(x, indices, num_valid)


def _differentiate(ctx: Any, grad_weights: Any, grad_indices: Any, grad_logits: Any = None) -> tuple[Any, ...]:
    grad_x = None
    if grad_weights is not None or grad_logits is not None:
        x, indices, num_valid = ctx.saved_tensors
        grads = [None if grad is None else grad.contiguous() for grad in (grad_weights, grad_logits)]
        given = ctx.key, x, indices, *grads, num_valid, ctx.number, ctx.batch_invariant
        grad_x = torch.ops.cupy_router.router_backward(*given)
    return None, grad_x, *[None] * (_NUM_INPUTS - 1)


_NODES: dict[Any, str] = {Routing: "router", RoutingWithLogits: "router_logits"}
_INPUTS = (
    "str router, Tensor x, Tensor? token_ids, Tensor? bias_index, Tensor? given_experts, str unset, "
    "bool batch_invariant, Tensor? num_valid, SymInt num_valid_value"
)
_NUM_INPUTS = _INPUTS.count(",")  # besides the router

for _kind, _node in _NODES.items():
    _results = ", ".join(["Tensor"] * len(_kind._fields))
    register(f"{_node}({_INPUTS}) -> ({_results})", partial(_implementation, _kind), partial(_fake, _kind))
    _outs = [f"Tensor({letter}!) {name}" for letter, name in zip("abc", _kind._fields, strict=False)]
    register(
        f"{_node}_out({_INPUTS}, {', '.join(_outs)}) -> ()",
        partial(_implementation_into, _kind),
        no_results,
        {1 + _NUM_INPUTS + place: f"Router: out.{name}" for place, name in enumerate(_kind._fields)},
    )
    register_gradient(_node, _differentiate, _remember)
    register_without_gradient(f"{_node}_out")
register(
    "router_backward(str router, Tensor x, Tensor indices, Tensor? grad_weights, Tensor? grad_logits, "
    "Tensor? num_valid, SymInt num_valid_value, bool batch_invariant) -> Tensor",
    _backward,
    _fake_backward,
)
register_gradient("router_backward", partial(_autograd.no_second_derivative, activation_topk_backward.OP), None)
