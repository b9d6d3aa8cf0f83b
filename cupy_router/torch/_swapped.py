# SPDX-License-Identifier: Apache-2.0
"""Subclasses that swapped modules get in place of their class, whose forward calls cupy_router."""

from __future__ import annotations

import copyreg
import functools
import types
from collections.abc import Callable
from operator import attrgetter
from typing import Any

import torch

from cupy_router.method import RoutingMethod
from cupy_router.ops import activation_topk, dense_router, hash_router
from cupy_router.ops._run import run
from cupy_router.torch._derived_class import with_base, written_class
from cupy_router.torch._gate_gemm import gate_gemm
from cupy_router.torch._invariant import batch_invariant_gate_gemm
from cupy_router.torch._logits import prepare_logits
from cupy_router.torch._router_spec import FLAT, INLINE, SORTED, Plan, RouterSpec, Unsupported, argument, by_role

NO_REPLICAS = (None, None)


def swap(module: Any, kind: type, spec: RouterSpec) -> None:
    """Change the class of a module to a subclass of `kind`, one of the classes below.

    Raises:
        Unsupported: The class cannot be changed.
    """
    name = type(module).__name__
    _forget_bound_methods(module)
    if {"forward", INLINE} & set(vars(module)) and "_old_forward" not in vars(module):
        raise Unsupported(f"the forward of its {name} has been replaced on the instance")
    try:
        _change_class(module, swapped_class(type(module), kind))
    except TypeError as error:  # for example a scripted module
        raise Unsupported(f"the class of its {name} cannot be changed: {error}") from error
    module._cupy_router = spec


def restored_class(module: Any) -> type:
    """Return the class of a swapped module without ours.

    Raises:
        Unsupported: A class was derived from ours that cannot be derived from the original.
    """
    try:
        return with_base(type(module), module.swapped, module.original)
    except TypeError as error:
        raise Unsupported(f"its class was derived from the swapped one, and {error}") from error


def restore(module: Any) -> None:
    """Give a swapped module its original class. What PyTorch derived from ours is then derived from the original.

    Raises:
        Unsupported: As `restored_class`.
    """
    _change_class(module, restored_class(module))
    del module._cupy_router


def _change_class(module: Any, new: Any) -> None:
    _forget_bound_methods(module)
    module.__class__ = new
    if "_old_forward" in vars(module):  # hooks of the accelerate package wrap the forward
        module._old_forward = types.MethodType(new.forward, module)


def _forget_bound_methods(module: Any) -> None:
    """Delete methods of the class from the instance, where code that wraps them for a while puts them afterwards."""
    for name in ("forward", INLINE):
        function = getattr(type(module), name, None)
        if name in vars(module) and function and vars(module)[name] == types.MethodType(function, module):
            delattr(module, name)


def swapped_class(current: type, kind: type) -> type:
    """Return a class like that of a module, with ours in place of the class that is written in the model's code.

    Raises:
        Unsupported: There is none.
    """
    written = written_class(current)
    try:
        return with_base(current, written, subclass(kind, written))
    except TypeError as error:
        raise Unsupported(f"no class like its {current.__name__} can be made: {error}") from error


@functools.cache
def subclass(kind: Any, original: Any) -> type:
    """Return a subclass with the same name, since some code looks at class names."""

    def call(self: Any, *args: Any, **kwargs: Any) -> Any:
        spec = getattr(self, "_cupy_router", None)
        if spec is None:  # routers were restored, and somebody has kept this method, maybe calls it from that of self
            return getattr(original, kind._method)(self, *args, **kwargs)
        return kind._route(self, original, spec, args, kwargs)

    named = {name: getattr(original, name) for name in ("__module__", "__qualname__", "__doc__")}
    members = {**named, kind._method: call, "kind": kind, "original": original}
    made: Any = type(original.__name__, (kind, original), members)
    made.swapped = made
    return made  # type: ignore[no-any-return]


def _unpickled(kind: type, original: type) -> Any:
    return object.__new__(subclass(kind, original))


class Swapped:
    """Base class of all swapped modules."""

    _method = "forward"  # name of the method that calls `_route`
    kind: type  # one of the classes below
    original: Any  # the original class
    swapped: type  # the generated class, of which others may have derived that of the module
    _cupy_router: RouterSpec

    def __reduce_ex__(self, protocol: Any) -> Any:  # pickle cannot find a generated class by name
        reduced: Any = super().__reduce_ex__(max(protocol, 2))
        if reduced[:2] == (copyreg.__newobj__, (self.swapped,)):  # type: ignore[attr-defined]
            return _unpickled, (self.kind, self.original), *reduced[2:]
        return reduced  # the class is one that was derived from ours, or says itself how it is pickled

    def extra_repr(self) -> str:
        return ", ".join(filter(None, (self.original.extra_repr(self), f"cupy_router={self._cupy_router.method}")))


class Router(Swapped):
    """Router module."""

    def _route(self, original: Any, spec: RouterSpec, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        x, weight = argument(spec, 0, args, kwargs), _tensor_at(self, spec.gate)
        plan = _plan(self, spec, x, (x.dtype, weight.dtype))
        if plan is None:
            return original.forward(self, *args, **kwargs)
        if x.ndim != 2:
            x = x.reshape(-1, x.shape[-1])
        if "input_scale" in spec.tensors:  # of models with a norm
            x = self.norm(x) * _tensor_at(self, spec.tensors["input_scale"]) * self.scalar_root_size  # type: ignore[attr-defined]
        x, weight = _dense(x), _dense(weight)
        layer = [at if at is None else _vector(self, spec, at, args, kwargs) for at in spec.layer]
        op: Any = dense_router.OP
        inputs = x, weight, *layer, *NO_REPLICAS, None
        if "table" in spec.tensors:
            token_ids, table = argument(spec, 1, args, kwargs), _dense(_tensor_at(self, spec.tensors["table"]))
            if token_ids.ndim != 1:
                token_ids = token_ids.reshape(-1)
            op, inputs = hash_router.OP, (_dense(token_ids), table, None, x, weight, None, None, *layer[2:4], None)
        if torch.compiler.is_dynamo_compiling():
            results = plan.node(*inputs, -1)
        else:
            results = run(op, plan.options, inputs, None, None)
        if plan.places is not None:
            return tuple([results[place] for place in plan.places])
        weights, *others = results
        if "total_scale" in spec.tensors:
            total_scale = _tensor_at(self, spec.tensors["total_scale"])
            weights = weights * total_scale.float()
        if spec.outputs == SORTED:
            order, rows, gates, sizes, logits = _sorted(plan, weights, *others)
            return order, rows, gates, sizes.tolist(), logits  # in this frame, so that a graph breaks no more than once
        return _returned(spec, plan, weights, *others)


class LogitsOnly(Swapped):
    """Gate of a block that routes itself; keeps the logits in float32."""

    def _route(self, original: Any, spec: RouterSpec, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        x, weight = argument(spec, 0, args, kwargs), _tensor_at(self, spec.gate)
        if _plan(self, spec, x, (x.dtype, weight.dtype)) is None:
            return original.forward(self, *args, **kwargs)
        product = batch_invariant_gate_gemm if spec.batch_invariant else gate_gemm
        logits = product(x.reshape(-1, x.shape[-1]), weight)
        return logits if spec.outputs == FLAT else logits.reshape(*x.shape[:-1], -1)


class InlineRouter(Swapped):
    """Sparse block that routes itself."""

    _method = INLINE

    def _route(self, original: Any, spec: RouterSpec, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        logits = by_role(spec, args, kwargs)["logits"]
        dtype = _tensor_at(self, spec.gate).dtype
        plan = _plan(self, spec, logits, (dtype, dtype))
        if plan is None:
            return getattr(original, INLINE)(self, *args, **kwargs)
        layer = [at if at is None else _vector(self, spec, at, args, kwargs) for at in spec.layer]
        given = (logits.reshape(-1, logits.shape[-1]), *layer, *NO_REPLICAS, None)
        weights, indices = run(activation_topk.OP, plan.method, given, None, None)
        return _returned(spec, plan, weights, indices, logits)


def _plan(module: Any, spec: RouterSpec, operand: Any, dtypes: tuple[Any, Any]) -> Plan | None:
    """Return what to do in a call, or None if nothing was proved of such a call: then the model's code runs."""
    if operand.ndim not in spec.ranks:
        return None
    if module.training and (not spec.in_training or any(getattr(module, name, None) for name in spec.noise)):
        return None
    return spec.plans.get(dtypes)


def _tensor_at(module: Any, path: str) -> Any:
    """Return a tensor of a module. `torch.nn.Module.__getattr__` would take longer to find the same."""
    found = module._parameters.get(path)
    if found is None:
        found = module._buffers.get(path)
    return attrgetter(path)(module) if found is None else found


def _dense(tensor: Any) -> Any:
    """Return a tensor whose last axis is contiguous, as ops take it."""
    return tensor if tensor.is_contiguous() or tensor.stride(-1) == 1 else tensor.contiguous()


def _vector(module: Any, spec: RouterSpec, source: str | int, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """Return a tensor with an entry for each expert, in float32, of the module or of the call."""
    tensor = _tensor_at(module, source) if isinstance(source, str) else argument(spec, source, args, kwargs)
    if tensor is None:
        return None
    if tensor.dtype != torch.float32:
        tensor = tensor.float()
    return _dense(tensor if tensor.ndim == 1 else tensor.reshape(-1))


def _sorted(plan: Plan, weights: Any, indices: Any, logits: Any) -> tuple[Any, ...]:
    """Return the pairs sorted by expert, with the number of each expert's pairs as a tensor, and logits."""
    method, experts = plan.method, indices.reshape(-1)
    order = experts.sort(stable=True).indices
    sizes = experts.new_zeros(method.num_experts).scatter_add_(0, experts, torch.ones_like(experts))
    return order, order // method.top_k, weights.reshape(-1)[order], sizes, logits.to(plan.dtypes[-1])


def _returned(spec: RouterSpec, plan: Plan, weights: Any, indices: Any, logits: Any = None) -> tuple[Any, ...]:
    """Return the results of a module that are computed from those of the op."""
    found = [_MAKERS[output](plan.method, weights, indices, logits) for output in spec.outputs]
    return tuple([result.to(dtype).contiguous() for result, dtype in zip(found, plan.dtypes, strict=True)])


def _visible_logits(method: RoutingMethod, logits: Any) -> Any:
    """Return the logits as routers do: scaled and capped, without those of shared experts."""
    return prepare_logits(logits, method)[:, : method.num_experts]


# From the method and the results of `dense_router` to a result of a module.
_MAKERS: dict[str, Callable[[RoutingMethod, Any, Any, Any], Any]] = {
    "weights": lambda method, weights, indices, logits: weights[:, : method.top_k],
    "shared": lambda method, weights, indices, logits: weights[:, method.top_k :],
    "indices": lambda method, weights, indices, logits: indices[:, : method.top_k],
    "logits": lambda method, weights, indices, logits: _visible_logits(method, logits),
    "probabilities": lambda method, weights, indices, logits: torch.softmax(_visible_logits(method, logits), dim=-1),
    "scores": lambda method, weights, indices, logits: weights.new_zeros(logits.shape).scatter_(1, indices, weights),
}
