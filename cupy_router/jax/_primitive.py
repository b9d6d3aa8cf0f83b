# SPDX-License-Identifier: Apache-2.0
"""The JAX primitive of a call of an op: on CUDA a kernel in XLA's program if possible, otherwise a handler."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from functools import lru_cache, partial
from typing import Any

import jax
import numpy as np
from jax.core import min_dim
from jax.extend.core import Primitive
from jax.interpreters import ad, mlir

from cupy_router.arrays._numpy import dtype_of
from cupy_router.jax import _call_text, _ffi, _lower_ptx, _mesh
from cupy_router.jax._ffi_targets import Buffer, load, target
from cupy_router.ops import _hash_layer, expert_layout, hash_router
from cupy_router.ops._op import Op
from cupy_router.ops._routed import layout_options
from cupy_router.ops.registry import OPS

_call_p = Primitive("cupy_router_call")
_call_p.multiple_results = True


def call(op: Op, options: Any, given: tuple[int, ...], text: str, arrays: Sequence[Any]) -> tuple[Any, ...]:
    """Return the existing results of an op for the given inputs; `text` describes the call without its arrays."""
    shapes: list[Any] = [None] * len(op.inputs)
    dtypes: list[Any] = [None] * len(op.inputs)
    for position, array in zip(given, arrays, strict=True):
        shapes[position], dtypes[position] = array.shape, array.dtype.name
    outputs = _outputs(op, options, tuple(shapes), tuple(dtypes), jax.config.jax_enable_x64)
    return tuple(_call_p.bind(*arrays, name=op.name, text=text, avals=_mesh.result_types(outputs, arrays)))


@lru_cache(maxsize=1024)
def _outputs(op: Op, options: Any, shapes: Any, dtypes: Any, has_int64: bool) -> tuple[tuple[Any, Any], ...]:
    """Return shapes and NumPy dtypes of the existing results."""
    outputs = [(shape, dtype_of(dtype)) for shape, dtype in op.outputs(options, shapes, dtypes, min_dim)]
    if not has_int64 and np.int64 in [dtype for _, dtype in outputs]:
        raise ValueError(f"{op.label}: index_dtype 'int64' needs JAX's option jax_enable_x64 inside jax.jit")
    return tuple(outputs)


def _by_handler(*arrays: Any, name: str, text: str, avals: tuple[Any, ...]) -> list[Any]:
    if name == hash_router.OP.name:
        name, text, arrays = _as_hash_layer(name, text, arrays)
    like = [jax.ShapeDtypeStruct(aval.shape, aval.dtype) for aval in avals]  # without sharding: lowering needs none
    return list(jax.ffi.ffi_call(target(name), like)(*arrays, **{_ffi.ATTRIBUTE: text}))


def _as_hash_layer(name: str, text: str, arrays: tuple[Any, ...]) -> tuple[str, str, tuple[Any, ...]]:
    """Return a call that multiplies with the whole gate as one of the hash layer, which does the same.

    XLA may capture the handler of `hash_router` in a command buffer, but not a gate GEMM, which takes scratch memory.
    """
    op, layer = hash_router.OP, _hash_layer.OP
    options, given, number = _call_text.decode(op, text)
    names = [op.names[place] for place in given]
    if options.logits_dtype is None and not {"x", "bias"} <= {*names}:
        return name, text, arrays
    by_name = dict(zip(names, arrays, strict=True))
    places = tuple(place for place, name in enumerate(layer.names) if name in by_name)
    inputs = tuple(by_name[layer.names[place]] for place in places)
    return layer.name, _call_text.encode(options, places, number), inputs


def _in_two(*arrays: Any, name: str, text: str, avals: tuple[Any, ...]) -> list[Any]:
    """Return the results of a router with a layout, by a call without one, followed by `expert_layout`."""
    op, (options, given, number) = OPS[name], _call_text.decode(OPS[name], text)
    plain, inner = replace(options, layout=None), layout_options(options)
    wanted = [result.name for result in op.existing(plain)]
    routed = _call_p.bind(*arrays, name=name, text=_call_text.encode(plain, given, number), avals=avals[: len(wanted)])
    laid_out = {
        "name": expert_layout.OP.name,
        "text": _call_text.encode(inner, (0,), -1),
        "avals": avals[len(wanted) :],
    }
    return [*routed, *_call_p.bind(routed[wanted.index("indices")], **laid_out)]


def _abstract(*arrays: Any, avals: tuple[Any, ...], **_: Any) -> tuple[Any, ...]:
    return avals


def _eagerly(*arrays: Any, **params: Any) -> Any:
    with jax.disable_jit(False):  # otherwise jit would bind the primitive again, which calls this function
        return _jitted(tuple(params.items()))(*arrays)


@lru_cache(maxsize=1024)
def _jitted(params: tuple[tuple[str, Any], ...]) -> Any:
    return jax.jit(partial(_call_p.bind, **dict(params)))


def _refuse(_: Any, tangents: Sequence[Any], *, name: str, text: str, **__: Any) -> Any:
    op = OPS[name]
    given = zip(_call_text.decode(op, text).given, tangents, strict=True)
    names = [op.names[position] for position, tangent in given if not isinstance(tangent, ad.Zero)]
    remedy = ", ".join(f"{name} as jax.lax.stop_gradient({name})" for name in names)
    raise ValueError(f"{op.label}: results have no gradient, pass {remedy}")


_call_p.def_abstract_eval(_abstract)
_call_p.def_impl(_eagerly)
ad.primitive_jvps[_call_p] = _refuse

_lower_by_handler, _lower_in_two = (
    mlir.lower_fun(lowered, multiple_results=True) for lowered in (_by_handler, _in_two)
)


def _lower_to_handler(ctx: Any, *operands: Any, **params: Any) -> Any:
    return (_lower_in_two if _is_better_two(**params) else _lower_by_handler)(ctx, *operands, **params)


def _is_better_two(name: str, text: str, **_: Any) -> bool:
    """Return whether a call is better two: XLA may launch each itself, or capture the handler of a single kernel."""
    op = OPS[name]
    return bool(op.single_kernel) and getattr(_call_text.decode(op, text).options, "layout", None) is not None


def _lower_to_kernel(ctx: Any, *operands: Any, **params: Any) -> Any:
    # An exported program may run on another GPU and XLA, so it calls the target that stays compatible.
    if not getattr(ctx.module_context.lowering_parameters, "for_export", True):
        call = params["name"], params["text"], _buffers(ctx.avals_in), _buffers(ctx.avals_out)
        attributes = _lower_ptx.attributes(*call)
        if attributes is not None:
            return jax.ffi.ffi_lowering(_lower_ptx.TARGET)(ctx, *operands, **attributes)
        if not _is_better_two(**params):
            load(*call)
    return _lower_to_handler(ctx, *operands, **params)


def _buffers(avals: Sequence[Any]) -> tuple[Buffer, ...]:
    return tuple((tuple(aval.shape), str(aval.dtype)) for aval in avals)


mlir.register_lowering(_call_p, _lower_to_handler)
mlir.register_lowering(_call_p, _lower_to_kernel, platform="cuda")
