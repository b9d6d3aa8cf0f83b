# SPDX-License-Identifier: Apache-2.0
"""Gradients for jax.grad, jax.vjp and others: a call with the rule that its op declares.

The forward pass is the call itself, so results are the same with and without a gradient.
"""

from __future__ import annotations

from functools import lru_cache
from typing import Any

from cupy_router.jax._routing_gradient import routing
from cupy_router.jax._rows_gradient import rows
from cupy_router.jax._vmap import function_of
from cupy_router.ops._op import Op

_RULES = {"routing": routing, "rows": rows}


@lru_cache(maxsize=1024)
def differentiable(op: Op, options: Any, given: tuple[int, ...], number: int) -> Any:
    """Return a call of an op with its gradient. If the op has none, JAX raises when the call is differentiated.

    JAX reaches `custom_vjp` before the `custom_vmap` inside, in either order of jax.grad and jax.vmap.
    """
    return _RULES.get(op.gradient, function_of)(op, options, given, number)
