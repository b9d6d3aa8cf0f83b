# SPDX-License-Identifier: Apache-2.0
"""A call of an op as a function of arrays, and its rule for jax.vmap."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import lru_cache, partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from cupy_router.jax import _call_text, _mesh, _primitive
from cupy_router.ops._op import Op


@lru_cache(maxsize=1024)
def function_of(op: Op, options: Any, given: tuple[int, ...], number: int) -> Any:
    """Return a function of the given arrays, in the order of the op's inputs, to a tuple of its results.

    It checks nothing, because the call has been checked already. A gradient refuses to be differentiated.
    """
    text = _call_text.encode(options, given, number)

    def call(*arrays: Any) -> tuple[Any, ...]:
        return _primitive.call(op, options, given, text, arrays)

    call.__name__ = op.name
    mapped = jax.custom_batching.custom_vmap(call)
    mapped.def_vmap(partial(_batched, op, options, given, number))
    if not op.no_gradient:
        return mapped
    once = jax.custom_vjp(mapped)

    def refuse(*arrays: Any) -> Any:
        raise RuntimeError(op.no_gradient)

    once.defvjp(refuse, refuse)
    return once


def call_of(op: Op, options: Any, arrays: Mapping[str, Any]) -> tuple[Any, ...]:
    """Return the results of a call with the arrays by name, None for those left out."""
    places = tuple(place for place, name in enumerate(op.names) if arrays.get(name) is not None)
    results: tuple[Any, ...] = function_of(op, options, places, -1)(*[arrays[op.names[place]] for place in places])
    return results


def _batched(
    op: Op,
    options: Any,
    given: tuple[int, ...],
    number: int,
    size: int,
    in_batched: Sequence[bool],
    *arrays: Any,
) -> tuple[tuple[Any, ...], tuple[bool, ...]]:
    """Return the results of `size` calls. If the calls are sharded over devices, each device runs its own."""
    if op.mapping(options) == "refuse":
        raise ValueError(f"{op.label}: jax.vmap cannot map over it, call it for each entry instead")
    calls = _calls_at_once(op, options, given, number, tuple(in_batched))
    return tuple(_mesh.split_rows(calls, in_batched, arrays, mapped=True)), (True,) * len(op.existing(options))


@lru_cache(maxsize=1024)
def _calls_at_once(op: Op, options: Any, given: tuple[int, ...], number: int, in_batched: tuple[bool, ...]) -> Any:
    """Return a function of arrays, some of which have a leading axis of calls.

    If rows are independent of each other, the rows of all calls are merged into one call. num_valid counts within each
    call, so it is applied to the results instead. Calls that differ in arrays of the layer run one after the other.
    """

    # Compiled also in eager calls, where JAX would transfer each constant to the device, which its guard refuses.
    @partial(jax.jit, static_argnums=0, inline=True)
    def calls(_: Any, *arrays: Any) -> tuple[Any, ...]:
        size = arrays[in_batched.index(True)].shape[0]
        by_name = {op.names[i]: (array, batched) for i, array, batched in zip(given, arrays, in_batched, strict=True)}
        count, _ = by_name.pop("num_valid", (None, False))
        lengths = {
            name: array.shape[batched] for name, (array, batched) in by_name.items()
        }  # without the axis of calls
        num_rows = lengths[op.names[0]]
        rows = {name: pair for name, pair in by_name.items() if op.has_rows(name, lengths[name], num_rows)}
        batched_rows = True in [batched for _, batched in rows.values()]
        shared = True in [batched for name, (_, batched) in by_name.items() if name not in rows]
        most = op.max_rows(options)
        too_many = most is not None and batched_rows and size * num_rows > most
        if op.mapping(options) == "loop" or shared or too_many:
            return _one_by_one(function_of(op, options, given, number), in_batched, arrays)
        merged = {name: array for name, (array, _) in by_name.items()}
        if batched_rows:
            merged |= {name: _merge(array, batched, size) for name, (array, batched) in rows.items()}
        places = [i for i in given if op.names[i] in merged]
        results = function_of(op, options, tuple(places), -1)(*merged.values())
        leading = size if batched_rows else 1
        results = [result.reshape((leading, num_rows, *result.shape[1:])) for result in results]
        if count is not None or number >= 0:
            valid = number if count is None else count.reshape((-1, 1))
            padding = jnp.arange(num_rows)[None] >= valid  # [size, num_rows], or [1, num_rows] where it is the same
            results = [
                jnp.where(
                    padding.reshape(*padding.shape, *[1] * (result.ndim - 2)),
                    np.array(declared.fill).astype(result.dtype),
                    result,
                )
                for result, declared in zip(results, op.existing(options), strict=True)
            ]
        return tuple(results)

    return calls


def _merge(array: Any, batched: bool, size: int) -> Any:
    if not batched:
        array = jnp.broadcast_to(array, (size, *array.shape))
    return array.reshape((size * array.shape[1], *array.shape[2:]))


def _one_by_one(one_call: Any, in_batched: Sequence[bool], arrays: Sequence[Any]) -> tuple[Any, ...]:
    def one(entries: Sequence[Any]) -> Any:
        rest = iter(entries)
        return one_call(*(next(rest) if batched else array for array, batched in zip(arrays, in_batched, strict=True)))

    return tuple(jax.lax.map(one, [array for array, batched in zip(arrays, in_batched, strict=True) if batched]))
