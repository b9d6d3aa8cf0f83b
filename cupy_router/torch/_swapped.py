# SPDX-License-Identifier: Apache-2.0
"""Subclasses that swapped modules get in place of their class, whose forward calls cupy_router."""

from __future__ import annotations

import copyreg
import functools
import types
from operator import attrgetter
from typing import Any

import torch

from cupy_router.ops.activation_topk import activation_topk
from cupy_router.ops.dense_router import dense_router
from cupy_router.ops.hash_router import hash_router
from cupy_router.torch._derived_class import with_base, written_class
from cupy_router.torch._gate_gemm import gate_gemm
from cupy_router.torch._logits import prepare_logits
from cupy_router.torch._router_spec import FLAT, INLINE, SORTED, ResultTypes, RouterSpec, Unsupported, by_role


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
        return kind._route(self, original, spec, *args, **kwargs)

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

    def _route(self, original: Any, spec: RouterSpec, *args: Any, **kwargs: Any) -> Any:
        given = by_role(spec, args, kwargs)
        weight = attrgetter(spec.gate)(self)
        results = _proved(self, spec, given["x"], (given["x"].dtype, weight.dtype))
        if results is None:
            return original.forward(self, *args, **kwargs)
        given |= {role: attrgetter(path)(self) for role, path in spec.tensors.items()}
        x = given["x"].reshape(-1, given["x"].shape[-1])
        if "input_scale" in given:
            x = self.norm(x) * given["input_scale"] * self.scalar_root_size  # type: ignore[attr-defined]  # of models with a norm
        bias, logit_bias, expert_scale = (_flat(given.get(role)) for role in ("bias", "logit_bias", "expert_scale"))
        layer = {"logit_bias": logit_bias, "expert_scale": expert_scale}
        logits = None
        if "table" in given:
            logits, token_ids = gate_gemm(x, weight), given["token_ids"].reshape(-1)
            weights, indices = hash_router(token_ids, given["table"], results.method, logits=logits, **layer)
        elif {"logits", "probabilities"} & set(spec.outputs):
            logits = gate_gemm(x, weight)
            weights, indices = activation_topk(logits, results.method, bias=bias, **layer)
        else:
            weights, indices = dense_router(x.contiguous(), weight, results.method, bias=bias, **layer)
        if "total_scale" in given:
            weights = weights * given["total_scale"].float()
        if logits is not None and logit_bias is not None:
            logits = logits + logit_bias
        if spec.outputs == SORTED:
            order, rows, gates, sizes, logits = _sorted(results, logits, weights, indices)
            return order, rows, gates, sizes.tolist(), logits  # in this frame, so that a graph breaks no more than once
        return _returned(spec, results, logits, weights, indices)


class LogitsOnly(Swapped):
    """Gate of a block that routes itself; keeps the logits in float32."""

    def _route(self, original: Any, spec: RouterSpec, hidden_states: Any) -> Any:
        weight = attrgetter(spec.gate)(self)
        if _proved(self, spec, hidden_states, (hidden_states.dtype, weight.dtype)) is None:
            return original.forward(self, hidden_states)
        logits = gate_gemm(hidden_states.reshape(-1, hidden_states.shape[-1]), weight)
        return logits if spec.outputs == FLAT else logits.reshape(*hidden_states.shape[:-1], -1)


class InlineRouter(Swapped):
    """Sparse block that routes itself."""

    _method = INLINE

    def _route(self, original: Any, spec: RouterSpec, *args: Any, **kwargs: Any) -> Any:
        logits = by_role(spec, args, kwargs)["logits"]
        dtype = attrgetter(spec.gate)(self).dtype
        results = _proved(self, spec, logits, (dtype, dtype))
        if results is None:
            return getattr(original, INLINE)(self, *args, **kwargs)
        logits = logits.reshape(-1, logits.shape[-1])
        tensors = {role: _flat(attrgetter(path)(self)) for role, path in spec.tensors.items()}
        return _returned(spec, results, logits, *activation_topk(logits, results.method, **tensors))


def _proved(module: Any, spec: RouterSpec, operand: Any, dtypes: tuple[Any, Any]) -> ResultTypes | None:
    """Return the types of the results, or None if nothing was proved of such a call: then the model's code runs."""
    if operand.ndim not in spec.ranks:
        return None
    if module.training and (not spec.in_training or any(getattr(module, name, None) for name in spec.noise)):
        return None
    return spec.results.get(dtypes)


def _flat(tensor: Any) -> Any:
    return None if tensor is None else tensor.reshape(-1).float()


def _sorted(results: ResultTypes, logits: Any, weights: Any, indices: Any) -> tuple[Any, ...]:
    """Return the pairs sorted by expert, with the number of each expert's pairs as a tensor, and logits."""
    method, experts = results.method, indices.reshape(-1)
    order = experts.sort(stable=True).indices
    sizes = experts.new_zeros(method.num_experts).scatter_add_(0, experts, torch.ones_like(experts))
    return order, order // method.top_k, weights.reshape(-1)[order], sizes, logits.to(results.dtypes[-1])


def _returned(spec: RouterSpec, results: ResultTypes, logits: Any, weights: Any, indices: Any) -> tuple[Any, ...]:
    """Return the results in the form of the original module."""
    method = spec.method
    makers = {
        "weights": lambda: weights[:, : method.top_k],
        "shared": lambda: weights[:, method.top_k :],
        "indices": lambda: indices[:, : method.top_k],
        "logits": lambda: _visible_logits(logits, method),
        "probabilities": lambda: torch.softmax(_visible_logits(logits, method), dim=-1),
        "scores": lambda: torch.zeros_like(logits, dtype=weights.dtype).scatter_(1, indices, weights),
    }
    return tuple(
        makers[output]().to(dtype).contiguous() for output, dtype in zip(spec.outputs, results.dtypes, strict=True)
    )


def _visible_logits(logits: Any, method: Any) -> Any:
    """Return the logits as routers do: scaled and capped, without those of shared experts."""
    return prepare_logits(logits, method)[:, : method.num_experts]
