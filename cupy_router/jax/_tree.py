# SPDX-License-Identifier: Apache-2.0
"""A Router as a pytree with its arrays as leaves: it can be an argument of jax.jit and a part of a model."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import jax

from cupy_router.method import RoutingMethod
from cupy_router.router import Router

_Structure = tuple[RoutingMethod, tuple[str, ...]]  # the method, and the names of the leaves


def register() -> None:
    jax.tree_util.register_pytree_with_keys(Router, _flatten, _unflatten)


def _flatten(router: Router) -> tuple[list[tuple[Any, Any]], _Structure]:
    arrays = router.arrays()
    return [(jax.tree_util.GetAttrKey(name), array) for name, array in arrays.items()], (router.method, tuple(arrays))


def _unflatten(structure: _Structure, leaves: Sequence[Any]) -> Router:
    method, names = structure
    return Router.of_leaves(method, dict(zip(names, leaves, strict=True)))
