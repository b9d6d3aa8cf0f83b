# SPDX-License-Identifier: Apache-2.0
"""An op as a node of a graph of JAX's, and what jax.vmap makes of it."""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from functools import lru_cache, partial
from typing import Any

import jax
import jax.numpy as jnp

from cupy_router.arrays import View, framework_of
from cupy_router.arrays._numpy import DTYPES
from cupy_router.jax import _calls, _mesh, _text
from cupy_router.jax._targets import OPS
from cupy_router.ops import _checks as check
from cupy_router.ops._call import Op
from cupy_router.ops._dense_decode import MAX_TOKENS

# The inputs with a row for each row of the results; all others belong to the layer, but for num_valid.
BY_ROW = ("scores", "lengths", "starts", "logits", "x", "token_ids", "grad_weights", "indices")
NUM_VALID = "num_valid"


def view_of(name: str, array: Any) -> View:
    framework = framework_of(name, array)
    if framework.name == "jax":
        return framework.outline(name, array)
    view = framework.view(name, array, None)
    check.strides(view)
    return view


@lru_cache(maxsize=1024)
def node(name: str, options: Hashable, given: tuple[int, ...], number: int) -> Any:
    """A function of the given arrays, in the order of the op's inputs, to a tuple of its results."""
    op = OPS[name]
    text = _text.encode(_text.Text(options, given, number))

    def call(*arrays: Any) -> tuple[Any, ...]:
        views: list[View | None] = [None] * len(op.inputs)
        for i, array in zip(given, arrays, strict=True):
            views[i] = view_of(op.inputs[i], array)
        with check.named(name):
            outputs = op.check(options, *views)

        def results(*arrays: Any) -> list[Any]:
            """Inside shard_map, what varies over the axes of a mesh over which any of the arrays does."""
            return [
                sum(jax.lax.full_like(array, 0, dtype=DTYPES[dtype], shape=shape) for array in arrays)
                for shape, dtype in outputs
            ]

        return _calls.call(name, text, tuple(jax.make_jaxpr(results)(*arrays).out_avals), arrays)

    call.__name__ = name
    mapped = jax.custom_batching.custom_vmap(call)
    mapped.def_vmap(partial(_batched, op, options, given, number))
    return mapped


def _batched(
    op: Op,
    options: Hashable,
    given: tuple[int, ...],
    number: int,
    size: int,
    in_batched: Sequence[bool],
    *arrays: Any,
) -> tuple[tuple[Any, ...], tuple[bool, ...]]:
    """`size` calls at once, or on each of several devices those that it has."""
    calls = _calls_at_once(op, options, given, number, tuple(in_batched))
    return tuple(_mesh.split(calls, in_batched, arrays, mapped=True)), (True,) * len(op.result._fields)


@lru_cache(maxsize=1024)
def _calls_at_once(op: Op, options: Hashable, given: tuple[int, ...], number: int, in_batched: tuple[bool, ...]) -> Any:
    """A function of arrays of which some have a leading axis of calls.

    Rows know nothing of each other, so those of all calls are rows of one. num_valid counts within each call, so it is
    applied to the results instead. Where calls differ in the layer's own arrays, they come one after the other.
    """

    def calls(_: Any, *arrays: Any) -> tuple[Any, ...]:
        size = next(array.shape[0] for array, batched in zip(arrays, in_batched, strict=True) if batched)
        by_name = {op.inputs[i]: (array, batched) for i, array, batched in zip(given, arrays, in_batched, strict=True)}
        count, count_batched = by_name.pop(NUM_VALID, (None, False))
        rows = {name: pair for name, pair in by_name.items() if name in BY_ROW}
        any_rows = any(batched for _, batched in rows.values())
        shared = any(batched for name, (_, batched) in by_name.items() if name not in BY_ROW)
        if shared or _is_too_long(options, rows, size):
            return _one_by_one(node(op.name, options, given, number), in_batched, arrays)
        merged = {name: array for name, (array, _) in by_name.items()}
        if any_rows:
            merged |= {name: _merge(array, batched, size) for name, (array, batched) in rows.items()}
            num_rows = next(array.shape[1] for array, batched in rows.values() if batched)
        places = tuple(i for i in given if op.inputs[i] in merged)
        results = node(op.name, options, places, -1)(*merged.values())
        if any_rows:
            results = tuple(result.reshape((size, num_rows, result.shape[-1])) for result in results)
        if count is not None or number >= 0:
            valid = number if count is None else count.reshape((size, 1, 1) if count_batched else (1, 1))
            padding = jnp.arange(results[0].shape[-2])[:, None] >= valid
            results = tuple(
                jnp.where(padding, jnp.array(filler, result.dtype), result)
                for result, filler in zip(results, (0, -1), strict=True)
            )
        return tuple(results)

    return calls


def _is_too_long(options: Hashable, rows: dict[str, tuple[Any, bool]], size: int) -> bool:
    """Whether one call with the rows of all could not go the path that was asked for."""
    if not (isinstance(options, tuple) and options[1] == "decode"):
        return False
    x, batched = rows["x"]
    return bool(x.shape[0] * x.shape[1] > MAX_TOKENS) if batched else False


def _merge(array: Any, batched: bool, size: int) -> Any:
    if not batched:
        array = jnp.broadcast_to(array, (size, *array.shape))
    return array.reshape((size * array.shape[1], *array.shape[2:]))


def _one_by_one(one_call: Any, in_batched: Sequence[bool], arrays: Sequence[Any]) -> tuple[Any, ...]:
    def one(slices: Sequence[Any]) -> Any:
        rest = iter(slices)
        return one_call(*(next(rest) if batched else array for array, batched in zip(arrays, in_batched, strict=True)))

    return tuple(jax.lax.map(one, [array for array, batched in zip(arrays, in_batched, strict=True) if batched]))
