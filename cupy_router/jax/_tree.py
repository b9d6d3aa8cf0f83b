# SPDX-License-Identifier: Apache-2.0
"""A Router and an ExpertLayout as pytrees with their arrays as leaves, so that they can be arguments of jax.jit.

JAX would take the ints of an ExpertLayout, a named tuple, for leaves too. They are static instead.

`jax.export` writes pytrees of arguments and results into a program, so it is told how to write Routers and the named
tuples of all ops.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any

import jax

from cupy_router.jax._ffi_targets import why_not
from cupy_router.method import RoutingMethod, from_text
from cupy_router.ops.registry import RESULTS
from cupy_router.results import ExpertLayout
from cupy_router.router import Router
from cupy_router.score_function import ScoreFunction

_Structure = tuple[RoutingMethod, tuple[str, ...]]  # the method, and the names of the leaves

_ARRAYS = ExpertLayout._fields[: ExpertLayout._fields.index("num_tokens")]  # the ints follow


def register() -> None:
    jax.tree_util.register_pytree_with_keys(Router, _flatten, _unflatten)
    jax.tree_util.register_pytree_with_keys(ExpertLayout, _flatten_layout, _unflatten_layout)
    if why_not() is not None:
        return
    jax.export.register_pytree_node_serialization(
        Router, serialized_name="cupy_router.Router", serialize_auxdata=_as_bytes, deserialize_auxdata=_from_bytes
    )
    jax.export.register_pytree_node_serialization(
        ExpertLayout,
        serialized_name="cupy_router.ExpertLayout",
        serialize_auxdata=_ints_as_bytes,
        deserialize_auxdata=lambda written: tuple(json.loads(bytes(written))),
    )
    for name, kind in RESULTS.items():
        if kind is not ExpertLayout:
            jax.export.register_namedtuple_serialization(kind, serialized_name=f"cupy_router.{name}")


def _flatten(router: Router) -> tuple[list[tuple[Any, Any]], _Structure]:
    arrays = router.arrays()
    return [(jax.tree_util.GetAttrKey(name), array) for name, array in arrays.items()], (router.method, tuple(arrays))


def _unflatten(structure: _Structure, leaves: Sequence[Any]) -> Router:
    method, names = structure
    return Router.of_leaves(method, dict(zip(names, leaves, strict=True)))


def _flatten_layout(layout: ExpertLayout) -> tuple[list[tuple[Any, Any]], tuple[Any, ...]]:
    arrays = [(jax.tree_util.GetAttrKey(name), getattr(layout, name)) for name in _ARRAYS]
    return arrays, layout[len(_ARRAYS) :]


def _ints_as_bytes(ints: tuple[Any, ...]) -> bytes:
    symbolic = [number for number in ints if jax.export.is_symbolic_dim(number)]
    if symbolic:
        raise ValueError(
            "ExpertLayout: a program for any number of tokens cannot have one as an argument or a result, got the size "
            f"{symbolic[0]}: pass its arrays instead"
        )
    return json.dumps(ints).encode()


def _unflatten_layout(ints: tuple[Any, ...], arrays: Sequence[Any]) -> ExpertLayout:
    return ExpertLayout(*arrays, *ints)


def _as_bytes(structure: _Structure) -> bytes:
    method, names = structure
    if isinstance(method.score, ScoreFunction):
        raise ValueError(
            f"Router: {method.score!r} exists in this process only, so a program with this router as an argument or a "
            "result cannot be serialized: pass the arrays of the router instead"
        )
    return json.dumps([method.text, names]).encode()


def _from_bytes(written: bytes) -> _Structure:
    text, names = json.loads(bytes(written))
    return from_text(text), tuple(names)
