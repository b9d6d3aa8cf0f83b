# SPDX-License-Identifier: Apache-2.0
"""A Router as a pytree: its arrays are the leaves, so that it can be an argument of jax.jit and a part of a model."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import jax

from cupy_router.method import RoutingMethod
from cupy_router.router import Router

_Form = tuple[RoutingMethod, tuple[str, ...]]


def register() -> None:
    jax.tree_util.register_pytree_with_keys(Router, _flatten, _unflatten)


def _flatten(router: Router) -> tuple[list[tuple[Any, Any]], _Form]:
    arrays = router.arrays()
    return [(jax.tree_util.GetAttrKey(name), array) for name, array in arrays.items()], (router.method, tuple(arrays))


def _unflatten(form: _Form, leaves: Sequence[Any]) -> Router:
    method, names = form
    return Router.of_leaves(method, dict(zip(names, leaves, strict=True)))
