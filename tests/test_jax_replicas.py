# SPDX-License-Identifier: Apache-2.0
"""Replicas of experts in JAX: compiled calls, vmap, and gradients of the weights, which go to the experts."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from cupy_router import LayoutSpec
from tests.replica_calls import KINDS, Call

jax = pytest.importorskip("jax", reason="JAX is not installed")
if jax.__version_info__ < (0, 8):
    pytest.skip("calls inside jax.jit need JAX 0.8 or later", allow_module_level=True)

pytestmark = pytest.mark.backends("reference")
EVERY = pytest.mark.parametrize("kind", KINDS)
SMOOTH = ("logits", "x", "weight", "logit_bias", "expert_scale")


def same(got: Any, want: Any) -> None:
    for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
        np.testing.assert_array_equal(np.asarray(a), np.asarray(b))


@EVERY
def test_compiled_calls(kind: str) -> None:
    call = Call(kind, "two shared experts")
    arrays = jax.tree.map(jax.numpy.asarray, call.arrays())
    want = call(call.arrays(), layout=LayoutSpec(4), num_valid=20)
    same(jax.jit(lambda arrays: call(arrays, layout=LayoutSpec(4), num_valid=20))(arrays), want)


@pytest.mark.parametrize("given", ["", "route"])
@EVERY
def test_gradients_are_those_of_the_experts(kind: str, given: str) -> None:
    call = Call(kind, "two shared experts", given=given)
    arrays = jax.tree.map(jax.numpy.asarray, call.arrays())
    smooth = {name: arrays[name] for name in SMOOTH if name in arrays}
    upstream = np.linspace(-1, 2, 23 * 8, dtype=np.float32).reshape(23, 8)

    def gradients(route: Any) -> Any:
        return jax.jit(jax.grad(lambda some: (route({**arrays, **some}, num_valid=20).weights * upstream).sum()))(
            smooth
        )

    want = gradients(call.logical)
    assert all(gradient.any() for gradient in want.values())
    same(gradients(call), want)


def test_vmap_counts_the_tokens_of_each_call() -> None:
    call = Call("activation_topk", "two shared experts", 12)
    arrays = jax.tree.map(jax.numpy.asarray, call.arrays())
    logits = arrays.pop("logits").reshape(3, 4, -1)
    got = jax.vmap(lambda rows: call({**arrays, "logits": rows}))(logits)
    for i in range(3):
        same([array[i] for array in got], call({**arrays, "logits": logits[i]}))
