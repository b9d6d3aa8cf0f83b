# SPDX-License-Identifier: Apache-2.0
"""batch_invariant=True in JAX: jit, gradients and vmap."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from cupy_router import Router, RoutingMethod, dense_router, hash_router
from tests import compare, inputs

jax = pytest.importorskip("jax", reason="JAX is not installed")
jnp = jax.numpy
if jax.__version_info__ < (0, 8):
    pytest.skip("calls inside jax.jit need JAX 0.8 or later", allow_module_level=True)

N, HIDDEN = 70, 96
METHODS = {"of the chosen": RoutingMethod(24, 4), "of all": RoutingMethod(24, 4, "softmax")}
SPLITS = [slice(0, 1), slice(1, 40), slice(40, 41), slice(41, N)]


@pytest.mark.parametrize("of_logits", [False, True])
@pytest.mark.parametrize("name", METHODS)
def test_tokens_do_not_depend_on_their_batch(name: str, of_logits: bool) -> None:
    method = METHODS[name]
    x = jnp.asarray(inputs.normal((N, HIDDEN), "bfloat16", seed=80))
    gate = jnp.asarray(inputs.normal((method.num_logits, HIDDEN), "bfloat16", seed=81, scale=0.2))
    factors = jnp.asarray(inputs.normal((N, method.top_k), seed=82))

    def loss(x: Any, factors: Any, batch_invariant: bool = True) -> Any:
        results = dense_router(x, gate, method, batch_invariant=batch_invariant, return_logits=of_logits)
        total = (results.weights * factors).sum()
        return (total + (results.logits**2).sum() if of_logits else total), results

    eager = dense_router(x, gate, method, batch_invariant=True, return_logits=of_logits)
    step = jax.jit(jax.value_and_grad(loss, has_aux=True))
    (_, results), grad_x = step(x, factors)
    for array, want in zip(results, eager, strict=True):
        compare.assert_same_bits(np.asarray(array), np.asarray(want))
    for rows in SPLITS:
        (_, some), some_grad_x = step(x[rows], factors[rows])
        for array, want in zip((*some, some_grad_x), (*results, grad_x), strict=True):
            compare.assert_same_bits(np.asarray(array), np.asarray(want)[rows])
    plain, _ = jax.grad(loss, has_aux=True)(x, factors, False)
    np.testing.assert_allclose(np.asarray(grad_x, np.float32), np.asarray(plain, np.float32), rtol=2e-2, atol=2e-3)


def test_vmap_and_hash_layers() -> None:
    method = METHODS["of the chosen"]
    x = jnp.asarray(inputs.normal((N, HIDDEN), seed=83))
    gate = jnp.asarray(inputs.normal((method.num_logits, HIDDEN), seed=84))
    table, ids = jnp.arange(40, dtype=jnp.int32).reshape(10, 4) % 24, jnp.arange(N, dtype=jnp.int32) % 10
    router = Router(method, weight=gate, table=table)

    def by_op(ids: Any, x: Any) -> Any:
        return hash_router(ids, table, method, x=x, weight=gate, batch_invariant=True)

    def by_router(ids: Any, x: Any) -> Any:
        return router(x, ids, batch_invariant=True)

    for call in (by_op, by_router):
        whole = call(ids, x)
        mapped = jax.vmap(call)(ids.reshape(7, 10), x.reshape(7, 10, HIDDEN))
        for array, want in zip(mapped, whole, strict=True):
            compare.assert_same_bits(np.asarray(array).reshape(want.shape), np.asarray(want))
