# SPDX-License-Identifier: Apache-2.0
"""Subclasses that swapped modules get in place of their class, whose forward calls cupy_router."""

from __future__ import annotations

import functools
import types
from operator import attrgetter
from typing import Any

import torch

from cupy_router.ops.activation_topk import activation_topk
from cupy_router.ops.dense_router import dense_router
from cupy_router.ops.hash_router import hash_router
from cupy_router.torch._gate_gemm import gate_gemm
from cupy_router.torch._logits import prepare_logits
from cupy_router.torch._router_modules import INLINE, SORTED, ResultTypes, RouterSpec, Unsupported


def swap(module: Any, kind: type, spec: RouterSpec) -> None:
    """Change the class of a module to a subclass of `kind`, one of the classes below.

    Raises:
        Unsupported: The class cannot be changed.
    """
    name = type(module).__name__
    if "forward" in vars(module) and "_old_forward" not in vars(module):
        raise Unsupported(f"the forward of its {name} has been replaced on the instance")
    try:
        _change_class(module, subclass(kind, module.__class__))
    except TypeError as error:  # for example a scripted module
        raise Unsupported(f"the class of its {name} cannot be changed: {error}") from error
    module._cupy_router = spec


def restore(module: Any) -> None:
    """Give a swapped module its original class."""
    del module._cupy_router
    _change_class(module, module.original)


def _change_class(module: Any, new: Any) -> None:
    module.__class__ = new
    if "_old_forward" in vars(module):  # hooks of the accelerate package wrap the forward
        module._old_forward = types.MethodType(new.forward, module)


@functools.cache
def subclass(kind: type, original: type) -> type:
    """Return a subclass with the same name, since some code looks at class names."""
    named = {name: getattr(original, name) for name in ("__module__", "__qualname__", "__doc__")}
    return type(original.__name__, (kind, original), {**named, "original": original})


def _unpickled(kind: type, original: type) -> Any:
    return object.__new__(subclass(kind, original))


class Swapped:
    """Base class of all swapped modules."""

    original: Any  # the original class
    _cupy_router: RouterSpec

    def __reduce_ex__(self, protocol: Any) -> Any:  # pickle cannot find a generated class by name
        return _unpickled, (type(self).__mro__[1], self.original), self.__dict__

    def extra_repr(self) -> str:
        return ", ".join(filter(None, (self.original.extra_repr(self), f"cupy_router={self._cupy_router.method}")))


class Router(Swapped):
    """Router module."""

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        spec = self._cupy_router
        given = _by_role(spec, args, kwargs)
        weight = attrgetter(spec.gate)(self)
        results = spec.results.get((given["x"].dtype, weight.dtype))  # for other dtypes the original raises the error
        if results is None or _adds_noise(self, spec):
            return self.original.forward(self, *args, **kwargs)
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
        return _returned(spec, results, logits, weights, indices)


class LogitsOnly(Swapped):
    """Gate of a block that routes itself; keeps the logits in float32."""

    def forward(self, hidden_states: Any) -> Any:
        spec = self._cupy_router
        x = hidden_states.reshape(-1, hidden_states.shape[-1])
        weight = attrgetter(spec.gate.partition(".")[2])(self)
        if (x.dtype, weight.dtype) not in spec.results or _adds_noise(self, spec):
            return self.original.forward(self, hidden_states)
        return gate_gemm(x, weight)


class InlineRouter(Swapped):
    """Sparse block that routes itself."""

    def _route(self, *args: Any, **kwargs: Any) -> Any:
        spec = self._cupy_router
        logits = _by_role(spec, args, kwargs)["logits"]
        dtype = attrgetter(spec.gate)(self).dtype
        results = spec.results.get((dtype, dtype))
        if results is None or _adds_noise(self, spec):
            return getattr(self.original, INLINE)(self, *args, **kwargs)
        return _returned(spec, results, logits, *activation_topk(logits, results.method))


setattr(InlineRouter, INLINE, InlineRouter._route)


def _by_role(spec: RouterSpec, args: tuple[Any, ...], kwargs: dict[str, Any]) -> dict[str, Any]:
    """Return the arguments of a call by role, with None for those left out."""
    return {
        role: args[place] if place < len(args) else kwargs.get(name)
        for place, (role, name) in enumerate(spec.arguments)
    }


def _adds_noise(module: Any, spec: RouterSpec) -> bool:
    return module.training and any(getattr(module, name, None) for name in spec.noise)


def _flat(tensor: Any) -> Any:
    return None if tensor is None else tensor.reshape(-1).float()


def _returned(spec: RouterSpec, results: ResultTypes, logits: Any, weights: Any, indices: Any) -> tuple[Any, ...]:
    """Return the results in the form of the original module."""
    method = spec.method
    if spec.outputs == SORTED:
        order = indices.reshape(-1).sort(stable=True).indices
        sizes = torch.bincount(indices.reshape(-1), minlength=method.num_experts).tolist()
        return order, order // method.top_k, weights.reshape(-1)[order], sizes, logits.to(results.dtypes[-1])
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
