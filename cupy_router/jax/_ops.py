# SPDX-License-Identifier: Apache-2.0
"""How a call becomes a node of a graph that JAX traces, and what jax.vmap and shard_map make of it."""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from functools import lru_cache, partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from cupy_router.arrays import View, framework_of
from cupy_router.arrays._numpy import DTYPES
from cupy_router.jax import _exit, _ffi, _text
from cupy_router.jax._targets import OPS, target, why_not
from cupy_router.ops import _checks as check
from cupy_router.ops._call import Op
from cupy_router.ops._dense_decode import MAX_TOKENS

# The inputs with a row for each row of the results; all others belong to the layer, but for num_valid.
_BY_ROW = ("scores", "lengths", "starts", "logits", "x", "token_ids")
_NUM_VALID = "num_valid"


# -- From a traced call to a node --------------------------------------------------------------------------------------


def run(op: Op, options: Hashable, inputs: Sequence[Any], out: Any, stream: Any, number: int) -> Any:
    """A call of an op of which at least one argument is a tracer."""
    obstacle = why_not()
    if obstacle is not None:
        raise RuntimeError(f"{op.name}: {obstacle}")
    if OPS[op.name] is not op:
        raise ValueError(f"{op.name}: sorted, return_values and index_map cannot be given inside jax.jit")
    if out is not None or stream is not None:
        raise ValueError(f"{op.name}: out and stream cannot be given inside jax.jit, where both are XLA's")
    with check.named(op.name):
        views = [None if array is None else _view(op.inputs[i], array) for i, array in enumerate(inputs)]
        outputs = op.check(options, *views)
        if number >= 0:
            check.integer("num_valid", number, 0, outputs[0][0][0])
        if "int64" in (outputs[0][1], outputs[1][1]) and jax.dtypes.canonicalize_dtype(np.int64) != np.int64:
            raise ValueError("index_dtype 'int64' needs JAX's option jax_enable_x64 inside jax.jit")
        arrays = [_value(view, array) for view, array in zip(views, inputs, strict=True) if view is not None]
    given = tuple(i for i, array in enumerate(inputs) if array is not None)
    _exit.in_use = True
    return op.result(*_node(op.name, options, given, number)(*arrays))


def _view(name: str, array: Any) -> View:
    framework = framework_of(name, array)
    if framework.name == "jax":
        return framework.outline(name, array)
    view = framework.view(name, array, None)
    check.strides(view)
    return view


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


@lru_cache(maxsize=1024)
def _node(name: str, options: Hashable, given: tuple[int, ...], number: int) -> Any:
    """A function of the given arrays, in the order of the op's inputs, to its two results.

    Gradients have their place here: a `jax.custom_vjp` around the function that is returned, since a `custom_vmap` has
    none of its own. Without one, jax.grad raises JAX's error that the call cannot be differentiated.
    """
    op = OPS[name]
    text = _text.encode(_text.Text(options, given, number))

    def call(*arrays: Any) -> tuple[Any, ...]:
        views: list[View | None] = [None] * len(op.inputs)
        for i, array in zip(given, arrays, strict=True):
            views[i] = _view(op.inputs[i], array)
        outputs = op.check(options, *views)

        def results(*arrays: Any) -> list[Any]:
            """Inside shard_map, what varies over the axes of a mesh over which any of the arrays does."""
            return [
                sum(jax.lax.full_like(array, 0, dtype=DTYPES[dtype], shape=shape) for array in arrays)
                for shape, dtype in outputs
            ]

        like = jax.eval_shape(results, *arrays)
        return tuple(jax.ffi.ffi_call(target(name), like)(*arrays, **{_ffi.ATTRIBUTE: text}))

    call.__name__ = name
    node = jax.custom_batching.custom_vmap(call)
    node.def_vmap(partial(_batched, op, options, given, number))
    return node


# -- jax.vmap ----------------------------------------------------------------------------------------------------------


def _batched(
    op: Op,
    options: Hashable,
    given: tuple[int, ...],
    number: int,
    size: int,
    in_batched: Sequence[bool],
    *arrays: Any,
) -> tuple[tuple[Any, Any], tuple[bool, bool]]:
    """`size` calls at once: rows know nothing of each other, so those of all calls are rows of one.

    num_valid counts within each call, so it is applied to the results instead. Where calls differ in the layer's own
    arrays, they come one after the other.
    """
    by_name = {op.inputs[i]: (array, batched) for i, array, batched in zip(given, arrays, in_batched, strict=True)}
    count, count_batched = by_name.pop(_NUM_VALID, (None, False))
    rows = {name: pair for name, pair in by_name.items() if name in _BY_ROW}
    any_rows = any(batched for _, batched in rows.values())
    shared = any(batched for name, (_, batched) in by_name.items() if name not in _BY_ROW)
    if shared or _is_too_long(options, rows, size):
        return _one_by_one(_node(op.name, options, given, number), in_batched, arrays), (True, True)
    merged = {name: array for name, (array, _) in by_name.items()}
    if any_rows:
        merged |= {name: _merge(array, batched, size) for name, (array, batched) in rows.items()}
        num_rows = next(array.shape[1] for array, batched in rows.values() if batched)
    places = tuple(i for i in given if op.inputs[i] in merged)
    results = _node(op.name, options, places, -1)(*merged.values())
    if any_rows:
        results = tuple(result.reshape((size, num_rows, result.shape[-1])) for result in results)
    if count is not None or number >= 0:
        valid = number if count is None else count.reshape((size, 1, 1) if count_batched else (1, 1))
        padding = jnp.arange(results[0].shape[-2])[:, None] >= valid
        results = tuple(
            jnp.where(padding, jnp.array(filler, result.dtype), result)
            for result, filler in zip(results, (0, -1), strict=True)
        )
    return (results[0], results[1]), (True, True)


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


def _one_by_one(node: Any, in_batched: Sequence[bool], arrays: Sequence[Any]) -> tuple[Any, Any]:
    def one(slices: Sequence[Any]) -> Any:
        rest = iter(slices)
        return node(*(next(rest) if batched else array for array, batched in zip(arrays, in_batched, strict=True)))

    first, second = jax.lax.map(one, [array for array, batched in zip(arrays, in_batched, strict=True) if batched])
    return first, second
