# SPDX-License-Identifier: Apache-2.0
"""Interceptor of calls with tracers of JAX: it adds the call to the traced graph."""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from cupy_router.arrays import NO_DEVICE, View, framework_of
from cupy_router.arrays._numpy import NAMES
from cupy_router.jax import _exit, _mesh
from cupy_router.jax._ffi_targets import why_not
from cupy_router.jax._gradients import differentiable
from cupy_router.ops import _checks as check
from cupy_router.ops._cached import dense_view
from cupy_router.ops._op import NUM_VALID, Op


class _Tracers(dict[type, bool]):
    """Cache of whether a type is a tracer of JAX."""

    def __missing__(self, kind: type) -> bool:
        found = self[kind] = issubclass(kind, jax.core.Tracer)
        return found


_is_tracer = _Tracers().__getitem__


def wants(op: Op, inputs: tuple[Any, ...]) -> bool:
    """Return whether an argument is a tracer."""
    return any(map(_is_tracer, map(type, inputs)))


def run(op: Op, options: Any, inputs: Sequence[Any], out: Any, stream: Any, number: int) -> Any:
    """Check a call that :func:`wants` accepts, and return its results, which are tracers."""
    obstacle = why_not()
    if obstacle is not None:
        raise RuntimeError(f"{op.label}: {obstacle}")
    if out is not None or stream is not None:
        raise ValueError(f"{op.label}: out and stream cannot be given inside jax.jit, where both are XLA's")
    with check.named(op.label):
        views = [None if array is None else _view(op.names[i], array) for i, array in enumerate(inputs)]
        for position in op.written:
            if views[position] is not None:
                raise ValueError(f"{op.names[position]} cannot be written inside jax.jit, where arrays are immutable")
        op.check_inputs(options, views)
        if number >= 0:
            check.integer("num_valid", number, 0, views[0].shape[0])  # type: ignore[union-attr]  # never left out
        arrays = [_value(view, array) for view, array in zip(views, inputs, strict=True) if view is not None]
    given = tuple([i for i, array in enumerate(inputs) if array is not None])
    _exit.in_use = True
    lengths = [array.shape[0] if array.ndim else 1 for array in arrays]
    has_rows = [
        op.rows_independent and op.has_rows(op.names[i], length, lengths[0])
        for i, length in zip(given, lengths, strict=True)
    ]
    return op.pack(options, _mesh.split(_part(op, options, given, number), has_rows, arrays))


def _view(name: str, array: Any) -> View:
    if _is_tracer(type(array)):
        return dense_view(name, 0, array.shape, NAMES.get(array.dtype) or str(array.dtype), NO_DEVICE)
    framework = framework_of(name, array)
    if framework.name == "jax":
        return framework.outline(name, array)
    view = framework.view(name, array, None)
    check.strides(view)
    return view


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


def _value(view: View, array: Any) -> Any:
    """Return an argument as a JAX array. An array of another framework becomes a constant with its current values."""
    if isinstance(array, jax.Array):
        return array
    host = view.host
    if host is None:
        return jax.dlpack.from_dlpack(array)
    if host.dtype == np.int64 and jax.dtypes.canonicalize_dtype(np.int64) != np.int64:
        # JAX would wrap ids that do not fit int32 around to ids that may be valid. -1 is invalid, as they are.
        return jnp.array(np.where(host == host.astype(np.int32), host, -1).astype(np.int32))
    return jnp.array(host)
