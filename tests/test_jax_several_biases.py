# SPDX-License-Identifier: Apache-2.0
"""Several biases in JAX: gradients beside those of plain JAX, eager and compiled; tests/jax_calls.py has the rest."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from cupy_router import Router, RoutingMethod, activation_topk, dense_router, hash_router
from tests import inputs

jax = pytest.importorskip("jax", reason="JAX is not installed")
jnp = jax.numpy
if jax.__version_info__ < (0, 8):
    pytest.skip("calls inside jax.jit need JAX 0.8 or later", allow_module_level=True)

pytestmark = pytest.mark.backends("reference")
N, HIDDEN, EXPERTS, K = 9, 10, 16, 4
METHOD = RoutingMethod(EXPERTS, K, "sigmoid", scale=1.5)
INDEX = np.array([0, 1, 2, 5, 1, -1, 0, 2, 1], np.int32)
TABLE = np.stack([inputs.rng(741, row).permutation(EXPERTS)[:K] for row in range(5)]).astype(np.int32)
IDS = (np.arange(N) % 5).astype(np.int32)


def array(*shape: int, seed: int) -> Any:
    return jnp.array(inputs.normal(shape, seed=740 + seed))


def plain(logits: Any, bias: Any, by_table: bool) -> Any:
    """Return weights [N, K] by operations of JAX, 0 for tokens whose bias does not exist."""
    exist = np.clip(INDEX, 0, len(bias) - 1) == INDEX
    scores = jax.nn.sigmoid(logits)
    experts = jnp.argsort(-(scores + bias[np.where(exist, INDEX, 0)]), axis=1, stable=True)[:, :K]
    if by_table:
        experts = jnp.where((INDEX == 0)[:, None], TABLE[IDS], experts)
    chosen = jnp.take_along_axis(scores, experts, 1)
    return jnp.where(exist[:, None], METHOD.scale * chosen / chosen.sum(1, keepdims=True), 0.0)


def route(kind: str, smooth: Any, bias: Any) -> Any:
    given: dict[str, Any] = {"bias": bias, "bias_index": jnp.array(INDEX)}
    if kind == "activation_topk":
        return activation_topk(*smooth, METHOD, **given).weights
    if kind == "dense_router":
        return dense_router(*smooth, METHOD, **given).weights
    if kind == "of logits":
        return hash_router(jnp.array(IDS), jnp.array(TABLE), METHOD, logits=smooth[0], **given).weights
    if kind == "of x":
        x, weight = smooth
        return hash_router(jnp.array(IDS), jnp.array(TABLE), METHOD, x=x, weight=weight, **given).weights
    table = jnp.array(TABLE) if kind == "hash Router" else None
    return Router(METHOD, weight=smooth[1], bias=bias, table=table)(
        smooth[0], jnp.array(IDS), bias_index=given["bias_index"]
    ).weights


@pytest.mark.parametrize("kind", ["activation_topk", "dense_router", "Router", "of logits", "of x", "hash Router"])
def test_gradients_are_those_of_plain_jax(kind: str) -> None:
    """A bias only selects, so it has the gradient 0."""
    logits, bias = array(N, EXPERTS, seed=2), array(3, EXPERTS, seed=3)
    takes_logits, by_table = kind in ("activation_topk", "of logits"), kind in ("of logits", "of x", "hash Router")
    smooth = (logits,) if takes_logits else (array(N, HIDDEN, seed=0), array(EXPERTS, HIDDEN, seed=1))
    upstream = array(N, K, seed=4)

    def ours(smooth: Any, bias: Any) -> Any:
        return (route(kind, smooth, bias) * upstream).sum()

    def theirs(smooth: Any) -> Any:
        its_logits = smooth[0] if takes_logits else jnp.matmul(*(smooth[0], smooth[1].T), precision="highest")
        return (plain(its_logits, bias, by_table) * upstream).sum()

    want, right = jax.value_and_grad(theirs)(smooth)
    for function in (jax.value_and_grad(ours, (0, 1)), jax.jit(jax.value_and_grad(ours, (0, 1)))):
        value, (got, of_bias) = function(smooth, bias)
        np.testing.assert_allclose(value, want, rtol=1e-5)
        assert not of_bias.any()
        for a, b in zip(got, right, strict=True):
            np.testing.assert_allclose(a, b, rtol=2e-5, atol=1e-6)
