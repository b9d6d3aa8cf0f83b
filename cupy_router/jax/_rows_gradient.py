# SPDX-License-Identifier: Apache-2.0
"""Gradients of permute and unpermute. That of the rows is the other op, those of factors are dot products of rows.

Only what is asked for is computed, and only what that needs is kept from the forward pass.
"""

from __future__ import annotations

from collections.abc import Callable, Collection
from typing import Any

import jax
import jax.numpy as jnp

from cupy_router.jax._vmap import call_of, function_of
from cupy_router.ops import _permute_backward, _unpermute_backward, permute
from cupy_router.ops._declared import FLOATS
from cupy_router.ops._op import Op
from cupy_router.ops._rows import GradientOptions
from cupy_router.ops.unpermute import NEEDS_ORDER

_Arrays = dict[str, Any]


def rows(op: Op, options: Any, given: tuple[int, ...], number: int) -> Any:
    """Return a call of permute or unpermute with its gradient."""
    names = [op.names[i] for i in given]
    save, backward_of = _PERMUTE if op is permute.OP else _UNPERMUTE
    used = given if op is permute.OP else tuple(i for i in given if op.names[i] != "order")
    plain = function_of(op, options, used, number)

    def call(*arrays: Any) -> Any:
        return plain(*[arrays[given.index(i)] for i in used])

    called = jax.custom_vjp(call)

    def forward(*primals: Any) -> tuple[Any, Any]:
        arrays = {name: primal.value for name, primal in zip(names, primals, strict=True)}
        asked = {
            name: None  # keys are static parts of a pytree
            for name, primal in zip(names, primals, strict=True)
            if primal.perturbed and jnp.issubdtype(primal.value.dtype, jnp.inexact)
        }
        return called(*arrays.values()), (asked, save(arrays, asked))

    def backward(saved: Any, cotangents: Any) -> tuple[Any, ...]:
        (grad,) = cotangents
        is_zero = isinstance(grad, jax.custom_derivatives.SymbolicZero)
        found = {} if is_zero else backward_of(grad, *saved)
        return tuple(map(found.get, names))  # None: no gradient, or 0

    called.defvjp(forward, backward, symbolic_zeros=True)
    return called


def _save_permute(arrays: _Arrays, asked: Collection[str]) -> _Arrays:
    x = arrays["x"]
    if "x" in asked and x.dtype.name not in FLOATS:
        allowed = " or ".join(FLOATS)
        raise TypeError(f"permute: x must be {allowed} for a gradient, got {x.dtype} {list(x.shape)}")
    return {
        "positions": arrays["positions"],
        "weights": arrays.get("weights"),
        "x": x if "weights" in asked else None,
    }


def _permute_gradients(grad: Any, asked: Collection[str], saved: _Arrays) -> _Arrays:
    results = {"x": "sums", "weights": "dots"}
    found = _wanted(_permute_backward.OP, results, asked, {**saved, "y": grad})
    if "weights" in found:
        found["weights"] = found["weights"].astype(saved["weights"].dtype)
    return found


def _save_unpermute(arrays: _Arrays, asked: Collection[str]) -> _Arrays:
    given: Callable[[str], Any] = arrays.get
    if "order" not in arrays:
        raise ValueError(f"unpermute: {NEEDS_ORDER}")
    residual = given("residual")
    return {
        "positions": given("positions"),
        "order": given("order"),
        "weights": given("weights"),
        "y": given("y") if "weights" in asked else None,
        "residual": residual if "residual_scale" in arrays else None,
        "residual_scale": given("residual_scale"),
        "like": None if residual is None else residual[:0],  # its dtype
    }


def _unpermute_gradients(grad: Any, asked: Collection[str], saved: _Arrays) -> _Arrays:
    results = {"y": "rows", "weights": "dots", "residual": "scaled", "residual_scale": "residual_dots"}
    if saved["residual_scale"] is None:
        del results["residual"]
    found = _wanted(_unpermute_backward.OP, results, asked, {**saved, "x": grad})
    if "weights" in found:
        found["weights"] = found["weights"].astype(saved["weights"].dtype)
    if "residual" in asked and "residual" not in found:
        found["residual"] = grad.astype(saved["like"].dtype)
    return found


_PERMUTE, _UNPERMUTE = (_save_permute, _permute_gradients), (_save_unpermute, _unpermute_gradients)


def _wanted(op: Op, results: dict[str, str], asked: Collection[str], arrays: _Arrays) -> _Arrays:
    """Return the gradients that are asked for, by input; `results` are those of `op` that they are."""
    want = {name: result for name, result in results.items() if name in asked}
    if not want:
        return {}
    return dict(zip(want, call_of(op, GradientOptions(tuple(want.values())), arrays), strict=True))
