# SPDX-License-Identifier: Apache-2.0
"""Interceptor of calls with tracers of JAX: it adds the call to the traced graph."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from functools import lru_cache
from typing import Any

import jax
import jax.numpy as jnp
from jax.core import min_dim

from cupy_router.arrays import NO_DEVICE, View, framework_of
from cupy_router.arrays._jax import constant, dtype_name, held
from cupy_router.arrays._numpy import NAMES
from cupy_router.jax import _exit, _mesh
from cupy_router.jax._ffi_targets import why_not
from cupy_router.jax._gradients import differentiable
from cupy_router.ops import _checks as check
from cupy_router.ops import _run, expert_layout
from cupy_router.ops._declared import NUM_VALID
from cupy_router.ops._op import Op
from cupy_router.ops._routed import layout_options


class _Kinds(dict[type, str]):
    """Cache of what a type is: a "tracer" of JAX, a "holder" of an array or tracer, or something else, ""."""

    def __missing__(self, kind: type) -> str:
        is_tracer, is_holder = issubclass(kind, jax.core.Tracer), hasattr(kind, "__jax_array__")
        found = self[kind] = "tracer" if is_tracer else "holder" if is_holder else ""
        return found


_kind = _Kinds().__getitem__


def wants(op: Op, inputs: tuple[Any, ...]) -> bool:
    """Return whether an argument is a tracer or a holder."""
    return any(map(_kind, map(type, inputs)))


def run(op: Op, options: Any, inputs: tuple[Any, ...], out: Any, stream: Any, number: int) -> Any:
    """Return the results of a call that :func:`wants` accepts. With tracers, check it; the results are tracers."""
    for position, array in enumerate(inputs):
        kind = _kind(type(array))
        if kind == "holder" or (kind == "tracer" and not isinstance(jax.typeof(array), jax.core.ShapedArray)):
            with check.named(op.label):
                plain = held(op.inputs[position].shown, array)
            return _run.run(op, options, (*inputs[:position], plain, *inputs[position + 1 :]), out, stream, number)
    obstacle = why_not()
    if obstacle is not None:
        raise RuntimeError(f"{op.label}: {obstacle}")
    if out is not None or stream is not None:
        raise ValueError(f"{op.label}: out and stream cannot be given inside jax.jit, jax.grad or jax.vmap")
    views: list[View | None] = []
    given: list[int] = []
    arrays: list[Any] = []
    foreign: list[int] = []  # places among the arrays
    try:
        for position, array in enumerate(inputs):
            if array is None:
                views.append(None)
                continue
            name = op.inputs[position].shown
            if _kind(type(array)):
                dtype = NAMES.get(array.dtype) or dtype_name(name, array)
                views.append(View(name, 0, array.shape, (), dtype, NO_DEVICE, True, None))
            else:
                views.append(_view(name, array))
                foreign.append(len(arrays))
            given.append(position)
            arrays.append(array)
        for position in op.written:
            if views[position] is not None:
                name, instead = op.inputs[position].shown, op.instead(options)
                remedy = instead and f": {instead}"
                raise ValueError(f"{name} cannot be written inside jax.jit, where arrays are immutable{remedy}")
        op.check_inputs(options, views)
        for position in given:
            if not op.inputs[position].dtypes:
                _check_width(views[position])
        for place in foreign:
            arrays[place] = _value(views[given[place]], arrays[place])
        if number >= 0:
            check.integer("num_valid", number, 0, arrays[0].shape[0])
    except TypeError as error:
        raise TypeError(f"{op.label}: {error}") from error
    except ValueError as error:
        raise ValueError(f"{op.label}: {error}") from error
    _exit.in_use = True
    results = _on_each_device(op, options, tuple(given), number, arrays)
    return op.pack(options, results, lambda: op.sizes_of(options, [view and view.shape for view in views], min_dim))


def _view(name: str, array: Any) -> View:
    framework = framework_of(name, array)
    return framework.outline(name, array) if framework.name == "jax" else framework.view(name, array, None)


def _check_width(view: Any) -> None:
    """Refuse a dtype that JAX would change, of an input of any dtype."""
    if jax.dtypes.canonicalize_dtype(view.dtype) != view.dtype:
        raise TypeError(f"{view.name} needs JAX's option jax_enable_x64, which is off, got {view}")


def _on_each_device(op: Op, options: Any, given: tuple[int, ...], number: int, arrays: Sequence[Any]) -> Any:
    """Return the existing results of a call, whose rows may be sharded over a mesh."""
    if getattr(options, "layout", None) is None or not _mesh.is_explicit(arrays):
        return _mesh.split(_part(op, options, given, number), op, options, given, arrays)
    # Rows are routed on their devices. Only the indices are gathered for the layout.
    plain = replace(options, layout=None)
    routed = _on_each_device(op, plain, given, number, arrays)
    indices = routed[[result.name for result in op.existing(plain)].index("indices")]
    return *routed, *_on_each_device(expert_layout.OP, layout_options(options), (0,), -1, (indices,))


@lru_cache(maxsize=1024)
def _part(op: Op, options: Any, given: tuple[int, ...], number: int) -> Any:
    """Return a function that calls an op for the rows that are on one device."""
    whole = differentiable(op, options, given, number)
    if number < 0 and NUM_VALID not in [op.inputs[i] for i in given]:
        return lambda axis, *arrays: whole(*arrays)

    def part(axis: Any, *arrays: Any) -> Any:
        if axis is None:
            return whole(*arrays)
        by_place = dict(zip(given, arrays, strict=True))
        place = op.names.index(NUM_VALID.name)
        rows_before = jax.lax.axis_index(axis) * arrays[0].shape[0]
        by_place[place] = jnp.maximum(by_place.get(place, jnp.int32(number)), 0) - rows_before
        return differentiable(op, options, tuple(by_place), -1)(*_mesh.varying_alike(by_place.values()))

    return part


def _value(view: Any, array: Any) -> Any:
    """Return an argument as a JAX array. An array of another framework becomes a constant with its current values."""
    if isinstance(array, jax.Array):
        return array
    check.strides(view)
    return jax.dlpack.from_dlpack(array) if view.host is None else constant(view.host)
