# SPDX-License-Identifier: Apache-2.0
"""From a call with a tracer among its arguments to a node of the graph that JAX traces."""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from cupy_router.arrays import View
from cupy_router.jax import _exit
from cupy_router.jax._gradients import differentiable
from cupy_router.jax._nodes import view_of
from cupy_router.jax._targets import OPS, why_not
from cupy_router.ops import _checks as check
from cupy_router.ops._call import Op


def run(op: Op, options: Hashable, inputs: Sequence[Any], out: Any, stream: Any, number: int) -> Any:
    """A call of an op of which at least one argument is a tracer."""
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
    return op.result(*differentiable(op.name, options, given, number)(*_varying_alike(arrays)))


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


def _varying_alike(arrays: Sequence[Any]) -> list[Any]:
    """Inside shard_map, arrays that differ from device to device wherever one of them does, as operations of JAX's own
    make them: so do the results, and the gradient of what was the same everywhere is a sum over the devices."""
    axes = [_varying(jax.typeof(array)) for array in arrays]
    union = frozenset().union(*axes)
    return [
        array if own == union else _vary(array, tuple(sorted(union - own)))
        for array, own in zip(arrays, axes, strict=True)
    ]


# JAX 0.8 has other names for both.


def _varying(aval: Any) -> frozenset[str]:
    """The axes of a mesh along which a value differs."""
    kind = getattr(aval, "manual_axis_type", None)
    found: frozenset[str] = getattr(aval, "vma", frozenset()) if kind is None else kind.varying
    return found


def _vary(array: Any, axes: tuple[str, ...]) -> Any:
    return jax.lax.pcast(array, axes, to="varying") if hasattr(jax.lax, "pcast") else jax.lax.pvary(array, axes)
