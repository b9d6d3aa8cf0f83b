# SPDX-License-Identifier: Apache-2.0
"""Arrays that are sharded over a mesh: each device works on the rows that it has, where their types say so.

That is a matter of the type of a mesh's axes. Explicit ones are in the types of arrays, and a call becomes a
jax.shard_map over them. Inside one they are manual, and arrays are those of one device. Automatic ones are up to XLA,
which gathers what goes into a call.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Hashable, Sequence
from functools import lru_cache
from typing import Any

import jax
from jax.sharding import NamedSharding, PartitionSpec

Axis = Hashable  # a name, several as a tuple, or None


def split(function: Callable[..., Any], has_rows: Sequence[bool], arrays: Sequence[Any], mapped: bool = False) -> Any:
    """`function(axis, *arrays)`, where `axis` is what the leading axis of results, and of arrays with rows, is split
    over: that of the first such array that is split. `mapped`: jax.vmap asks, and rows are calls."""
    shardings = [jax.typeof(array).sharding for array in arrays]
    if all(sharding.mesh.empty for sharding in shardings):
        return function(None, *arrays)
    mesh = next((sharding.mesh for sharding in shardings if _axes(sharding.mesh, "Explicit")), None)
    if mesh is None:
        return function(None, *varying_alike(arrays))
    if mapped and jax.__version_info__ < (0, 9, 1):
        raise ValueError(
            "jax.vmap over an axis of arrays that is sharded over an explicit axis of a mesh needs JAX 0.9.1 or later, "
            f"this is {jax.__version__}: use jax.shard_map"
        )
    found = (sharding.spec[0] for sharding, rows in zip(shardings, has_rows, strict=True) if rows)
    axis = next((axis for axis in found if axis is not None), None)
    specs = tuple(PartitionSpec(axis) if rows else PartitionSpec() for rows in has_rows)
    placed = (jax.sharding.reshard(a, NamedSharding(mesh, spec)) for a, spec in zip(arrays, specs, strict=True))
    return _sharded(function, axis, specs, mesh)(*placed)


@lru_cache(maxsize=1024)
def _sharded(function: Callable[..., Any], axis: Axis, specs: tuple[PartitionSpec, ...], mesh: Any) -> Any:
    def local(*arrays: Any) -> Any:
        return function(axis, *varying_alike(arrays))

    # Without names, all axes but those that jax.vmap maps over.
    free = _axes(mesh, "Explicit", "Auto") if _axes(mesh, "Manual") else set()
    return jax.jit(jax.shard_map(local, mesh=mesh, in_specs=specs, out_specs=PartitionSpec(axis), axis_names=free))


def _axes(mesh: Any, *types: str) -> set[Any]:
    """Those of the given types, which JAX has for an enum."""
    return {axis for axis, its in zip(mesh.axis_names, mesh.axis_types, strict=True) if its.name in types}


def result_types(outputs: Sequence[tuple[tuple[int, ...], Any]], arrays: Sequence[Any]) -> tuple[Any, ...]:
    """Return the types of results of these shapes and dtypes. Inside shard_map they vary over the axes of a mesh over
    which any of the arrays does."""
    if all(jax.typeof(array).sharding.mesh.empty for array in arrays):
        return tuple([jax.core.ShapedArray(shape, dtype) for shape, dtype in outputs])

    def results(*arrays: Any) -> list[Any]:
        return [
            sum(jax.lax.full_like(array, 0, dtype=dtype, shape=shape) for array in arrays) for shape, dtype in outputs
        ]

    return tuple(jax.make_jaxpr(results)(*arrays).out_avals)


def varying_alike(arrays: Collection[Any]) -> list[Any]:
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
