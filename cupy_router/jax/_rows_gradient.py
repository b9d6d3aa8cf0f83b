# SPDX-License-Identifier: Apache-2.0
"""Gradients of permute and unpermute: each is the other on the way back, with dot products of rows for the factors.

One call of `permute_backward` or `unpermute_backward` computes all that are asked for, and only what it reads is kept
from the forward pass.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Any

import jax
import jax.numpy as jnp

from cupy_router.jax._vmap import call_of, function_of
from cupy_router.ops import _permute_backward, _unpermute_backward, permute
from cupy_router.ops._declared import FLOATS
from cupy_router.ops._op import Op
from cupy_router.ops._rows import GradientOptions
from cupy_router.ops.unpermute import NEEDS_ORDER

# Of each input: the result that is its gradient, and what that reads besides the incoming one.
_OF_PERMUTE = {"x": ("sums", ("positions", "weights")), "weights": ("dots", ("positions", "x"))}
_OF_UNPERMUTE = {
    "y": ("rows", ("order", "positions", "weights")),
    "weights": ("dots", ("order", "positions", "y")),
    "residual": ("scaled", ("order", "positions", "residual", "residual_scale")),
    "residual_scale": ("residual_dots", ("order", "positions", "residual")),
}

# Before, JAX cannot differentiate one traced function with respect to one input and then another. There all gradients
# are computed.
_KNOWS_ASKED = jax.__version_info__ >= (0, 8, 2)


def rows(op: Op, options: Any, given: tuple[int, ...], number: int) -> Any:
    """Return a call of permute or unpermute with its gradient."""
    names = [op.names[i] for i in given]
    permutes = op is permute.OP
    table = dict(_OF_PERMUTE if permutes else _OF_UNPERMUTE)
    if "residual_scale" not in names:  # then the gradient of the residual is the incoming one
        table.pop("residual", None)
    # The kernel of unpermute does not take the order.
    used = [i for i, name in enumerate(names) if permutes or name != "order"]
    plain = function_of(op, options, tuple(given[i] for i in used), number)
    called = jax.custom_vjp(lambda *arrays: plain(*[arrays[i] for i in used]))

    def forward(*primals: Any) -> tuple[Any, Any]:
        arrays = dict(zip(names, [primal.value for primal in primals] if _KNOWS_ASKED else primals, strict=True))
        # Keys are static parts of a pytree, and empty arrays have a dtype.
        asked = {
            name: array[:0]
            for (name, array), primal in zip(arrays.items(), primals, strict=True)
            if jnp.issubdtype(array.dtype, jnp.inexact) and (not _KNOWS_ASKED or primal.perturbed)
        }
        results = called(*arrays.values())
        _check(op, asked, arrays)
        if not permutes and "order" not in arrays:
            arrays["order"] = jnp.zeros(arrays["y"].shape[:1], jnp.int32)  # only the gradient of y reads it
        read = {name for smooth in asked if smooth in table for name in table[smooth][1]}
        return results, (asked, {name: arrays.get(name) for name in read})

    def backward(saved: Any, cotangents: Any) -> tuple[Any, ...]:
        (asked, arrays), (grad,) = saved, cotangents
        if isinstance(grad, jax.custom_derivatives.SymbolicZero):
            return (None,) * len(names)
        found = {"residual": grad}
        want = {name: table[name][0] for name in names if name in asked and name in table}
        if want:
            backward_op, key = (_permute_backward.OP, "y") if permutes else (_unpermute_backward.OP, "x")
            results = call_of(backward_op, GradientOptions(tuple(want.values())), {**arrays, key: grad})
            found |= dict(zip(want, results, strict=True))
        return tuple(found[name].astype(asked[name].dtype) if name in asked else None for name in names)

    called.defvjp(forward, backward, symbolic_zeros=_KNOWS_ASKED)
    return called


def _check(op: Op, asked: Collection[str], arrays: Mapping[str, Any]) -> None:
    x: Any = arrays.get("x")
    if "x" in asked and x.dtype.name not in FLOATS:
        allowed = " or ".join(FLOATS)
        raise TypeError(f"{op.label}: x must be {allowed} for a gradient, got {x.dtype} {list(x.shape)}")
    if "y" in asked and "order" not in arrays:
        raise ValueError(f"{op.label}: {NEEDS_ORDER}")
