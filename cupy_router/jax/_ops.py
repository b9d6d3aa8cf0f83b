# SPDX-License-Identifier: Apache-2.0
"""From a call with a tracer among its arguments to a node of the graph that JAX traces."""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from functools import lru_cache
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from cupy_router.arrays import View, framework_of
from cupy_router.jax import _exit, _mesh
from cupy_router.jax._gradients import differentiable
from cupy_router.jax._nodes import BY_ROW, NUM_VALID, view_of
from cupy_router.jax._targets import OPS, why_not
from cupy_router.ops import _checks as check
from cupy_router.ops._call import Op


def run(op: Op, options: Hashable, inputs: Sequence[Any], out: Any, stream: Any, number: int) -> Any:
    """A call of an op of which an argument is a tracer, or lies on several devices; the latter alone is an error."""
    if not any(isinstance(array, jax.core.Tracer) for array in inputs):
        _refuse(op, inputs if out is None else (*inputs, *out))
    obstacle = why_not()
    if obstacle is not None:
        raise RuntimeError(f"{op.name}: {obstacle}")
    if OPS.get(op.name, op) is not op:
        raise ValueError(f"{op.name}: sorted, return_values and index_map cannot be given inside jax.jit")
    if out is not None or stream is not None:
        raise ValueError(f"{op.name}: out and stream cannot be given inside jax.jit, where both are XLA's")
    with check.named(op.name):
        views = [None if array is None else view_of(op.inputs[i], array) for i, array in enumerate(inputs)]
        outputs = op.check(options, *views)
        if number >= 0:
            check.integer("num_valid", number, 0, outputs[0][0][0])
        if any(dtype == "int64" for _, dtype in outputs) and jax.dtypes.canonicalize_dtype(np.int64) != np.int64:
            raise ValueError("index_dtype 'int64' needs JAX's option jax_enable_x64 inside jax.jit")
        arrays = [_value(view, array) for view, array in zip(views, inputs, strict=True) if view is not None]
    given = tuple(i for i, array in enumerate(inputs) if array is not None)
    _exit.in_use = True
    by_row = [op.inputs[i] in BY_ROW for i in given]
    return op.result(*_mesh.split(_part(op, options, given, number), by_row, arrays))


def _refuse(op: Op, arrays: Sequence[Any]) -> None:
    """Raise what is wrong with an array that lies on several devices."""
    with check.named(op.name):
        for i, array in enumerate(arrays):
            if isinstance(array, jax.Array):
                framework_of(op.argument(i), array).view(op.argument(i), array, None)


@lru_cache(maxsize=1024)
def _part(op: Op, options: Hashable, given: tuple[int, ...], number: int) -> Any:
    """A call of an op for the part of all rows that a device has."""

    def part(axis: Any, *arrays: Any) -> Any:
        if axis is None or (number < 0 and NUM_VALID not in (op.inputs[i] for i in given)):
            return differentiable(op.name, options, given, number)(*arrays)
        by_place = dict(zip(given, arrays, strict=True))
        place = op.inputs.index(NUM_VALID)
        rows_before = jax.lax.axis_index(axis) * arrays[0].shape[0]
        by_place[place] = jnp.maximum(by_place.get(place, jnp.int32(number)), 0) - rows_before
        return differentiable(op.name, options, tuple(by_place), -1)(*_mesh.varying_alike(by_place.values()))

    return part


def _value(view: View, array: Any) -> Any:
    """An argument as JAX takes it; what is not of JAX becomes a constant of the graph, with the values of now."""
    if isinstance(array, jax.Array):
        return array
    host = view.host
    if host is None:
        return jax.dlpack.from_dlpack(array)
    if host.dtype == np.int64 and jax.dtypes.canonicalize_dtype(np.int64) != np.int64:
        # JAX would wrap around what int32 cannot hold, into ids that may exist; -1 is as invalid as that is.
        return jnp.array(np.where(host == host.astype(np.int32), host, -1).astype(np.int32))
    return jnp.array(host)
