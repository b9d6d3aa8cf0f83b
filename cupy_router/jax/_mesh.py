# SPDX-License-Identifier: Apache-2.0
"""Calls with arrays that are sharded over a mesh.

Explicit axes of a mesh are in the types of arrays, so a call becomes a jax.shard_map in which each device works on its
rows. Inside a shard_map, axes are manual and arrays are local to one device. Automatic axes are known to XLA only,
which gathers the arrays before a call.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Hashable, Sequence
from functools import lru_cache
from typing import Any

import jax
from jax.sharding import NamedSharding, PartitionSpec

from cupy_router.ops._op import Op

Axis = Hashable  # a name, several as a tuple, or None


def split(function: Callable[..., Any], op: Op, options: Any, given: Sequence[int], arrays: Sequence[Any]) -> Any:
    """Return `function(axis, *arrays)` as :func:`split_rows`, for the inputs of an op at these positions."""
    if not is_in_mesh(arrays):
        return function(None, *arrays)
    lengths = [array.shape[0] if array.ndim else 1 for array in arrays]
    pairs, independent = zip(given, lengths, strict=True), op.is_independent(options)
    has_rows = [independent and op.has_rows(op.names[i], length, lengths[0]) for i, length in pairs]
    return split_rows(function, has_rows, arrays)


def is_in_mesh(arrays: Sequence[Any]) -> bool:
    """Return whether the type of an array has a mesh."""
    empty = [jax.typeof(array).sharding.mesh.empty for array in arrays]
    return False in empty


def is_explicit(arrays: Sequence[Any]) -> bool:
    """Return whether the type of an array has a mesh with explicit axes."""
    return any(_axes(jax.typeof(array).sharding.mesh, "Explicit") for array in arrays)


def split_rows(
    function: Callable[..., Any], has_rows: Sequence[bool], arrays: Sequence[Any], mapped: bool = False
) -> Any:
    """Return `function(axis, *arrays)`, run on each device with its rows if the arrays are sharded over explicit axes.

    Args:
        function: `axis` is the mesh axis that the leading axis of arrays with rows, and of results, is split over; None
            if they are not split. It comes from the first array with rows that is split.
        has_rows: for each array, True if its leading axis counts rows.
        mapped: called for jax.vmap, where an entry of the leading axis is a call.
    """
    shardings = [jax.typeof(array).sharding for array in arrays]
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

    # An empty set means all axes except those that jax.vmap maps over.
    free = _axes(mesh, "Explicit", "Auto") if _axes(mesh, "Manual") else set()
    return jax.jit(jax.shard_map(local, mesh=mesh, in_specs=specs, out_specs=PartitionSpec(axis), axis_names=free))


def _axes(mesh: Any, *types: str) -> set[Any]:
    """Return the axes of a mesh whose types, an enum in JAX, have one of these names."""
    return {axis for axis, its in zip(mesh.axis_names, mesh.axis_types, strict=True) if its.name in types}


def result_types(outputs: Sequence[tuple[tuple[int, ...], Any]], arrays: Sequence[Any]) -> tuple[Any, ...]:
    """Return the types of results of these shapes and dtypes. Inside shard_map they vary over every mesh axis that any
    of the arrays varies over."""
    if not is_in_mesh(arrays):
        return tuple([jax.core.ShapedArray(shape, dtype) for shape, dtype in outputs])

    def results(*arrays: Any) -> list[Any]:
        return [
            sum(jax.lax.full_like(array, 0, dtype=dtype, shape=shape) for array in arrays) for shape, dtype in outputs
        ]

    return tuple(jax.make_jaxpr(results)(*arrays).out_avals)


def varying_alike(arrays: Collection[Any]) -> list[Any]:
    """Return the arrays such that all vary over the same mesh axes inside shard_map, as operations of JAX do.

    Then the results vary over these axes too, and the gradient of an array that did not vary is summed over devices.
    """
    axes = [_varying(jax.typeof(array)) for array in arrays]
    union = frozenset().union(*axes)
    return [
        array if own == union else _vary(array, tuple(sorted(union - own)))
        for array, own in zip(arrays, axes, strict=True)
    ]


# JAX 0.8 has other names for the attribute and for the operation.


def _varying(aval: Any) -> frozenset[str]:
    """Return the mesh axes over which a value varies."""
    kind = getattr(aval, "manual_axis_type", None)
    found: frozenset[str] = getattr(aval, "vma", frozenset()) if kind is None else kind.varying
    return found


def _vary(array: Any, axes: tuple[str, ...]) -> Any:
    return jax.lax.pcast(array, axes, to="varying") if hasattr(jax.lax, "pcast") else jax.lax.pvary(array, axes)
