# SPDX-License-Identifier: Apache-2.0
"""Given experts in JAX: values and gradients against a plain twin; eager, traced, mapped, sharded."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from cupy_router import Router, RoutingMethod, activation_topk
from tests.given_calls import KINDS, UNSET, Call
from tests.gradient_cases import SMOOTH, TOLERANCE
from tests.jax_calls import same_bits
from tests.jax_gradients import enable_x64, twin

jax = pytest.importorskip("jax", reason="JAX is not installed")
jnp = jax.numpy
if jax.__version_info__ < (0, 8):
    pytest.skip("calls inside jax.jit need JAX 0.8 or later", allow_module_level=True)

pytestmark = pytest.mark.backends("reference")
TRACED = [kind for kind in KINDS if kind != "dense_router decode"]
NAMES = ("soft cap", "softmax after top-k", "8 groups, best 3, max", "two shared experts", "shared in the normaliser",
         "bfloat16 weights", "uint8 indices", "sigmoid, bias on logits")  # fmt: skip


def on_jax(call: Call) -> dict[str, Any]:
    return {name: jnp.array(array) for name, array in call.arrays().items()}


@pytest.mark.parametrize("dtype", ["uint8", "int16", "uint16", "int32"])
@pytest.mark.parametrize("unset", UNSET)
@pytest.mark.parametrize("kind", TRACED)
def test_traced_results_are_those_of_the_host(kind: str, unset: str, dtype: str) -> None:
    call = Call(kind, "two shared experts", unset, dtype)
    want, arrays = call(call.arrays(), num_valid=20), on_jax(call)
    for got in (call(arrays, num_valid=20), jax.jit(lambda a: call(a, num_valid=20))(arrays)):
        same_bits(got, want)


@pytest.mark.slow("seconds", every=3)
@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("unset", UNSET)
@pytest.mark.parametrize("kind", TRACED)
def test_weights_and_gradients_are_those_of_a_plain_router(kind: str, unset: str, name: str) -> None:
    call = Call(kind, name, unset)
    method, arrays, (experts, exist) = call.method, on_jax(call), call.experts()
    smooth = {name: array for name, array in arrays.items() if name in SMOOTH}
    upstream = np.linspace(-1, 2, call.n * method.num_columns).reshape(call.n, -1)

    def loss(given: dict[str, Any]) -> Any:
        weights = call(arrays | given).weights
        return (weights.astype(jnp.float32) * upstream.astype(np.float32)).sum(), weights

    got, weights = jax.jit(jax.grad(loss, has_aux=True))(smooth)
    with enable_x64():
        wide = {name: jnp.asarray(np.asarray(array), jnp.float64) for name, array in smooth.items()}

        def plain(given: dict[str, Any]) -> Any:
            logits = given["logits"] if "logits" in given else given["x"] @ given["weight"].T
            layer = {name: given.get(name) for name in ("logit_bias", "expert_scale")}
            made = twin(logits[exist], jnp.asarray(experts[exist]), method, **layer)
            return (made * upstream[exist]).sum(), made

        right, values = jax.grad(plain, has_aux=True)(wide)
    rounding = {"float32": 2e-6, "float16": 2.0**-10, "bfloat16": 2.0**-7}[method.weight_dtype]
    np.testing.assert_allclose(np.asarray(weights, np.float64)[exist], values, rtol=rounding, atol=1e-6)
    assert not np.asarray(weights, np.float64)[~exist].any()
    for name, array in smooth.items():
        most = float(np.abs(right[name]).max())
        atol = 4e-6 * max(1.0, most) + (method.weight_dtype != "float32") * 2.0**-6 * most
        rtol = TOLERANCE[str(array.dtype)]
        np.testing.assert_allclose(np.asarray(got[name], np.float64), right[name], rtol=rtol, atol=atol, err_msg=name)


@pytest.mark.parametrize("unset", UNSET)
@pytest.mark.parametrize("kind", ["activation_topk", "dense_router", "Router"])
def test_mapped(kind: str, unset: str) -> None:
    """jax.vmap merges rows; ids are rows like logits and x, and padding of unsigned indices is their highest value."""
    call = Call(kind, "uint8 indices", unset, n=12)
    want, arrays = call(call.arrays()), on_jax(call)
    rows = {name for name in arrays if name in ("logits", "x", "indices")}
    axes = ({name: 0 if name in rows else None for name in arrays},)
    batches = {name: array.reshape(3, 4, -1) if name in rows else array for name, array in arrays.items()}
    got = jax.vmap(lambda given: tuple(call(given)), in_axes=axes)(batches)
    for a, b in zip(got, want, strict=True):
        np.testing.assert_array_equal(np.asarray(a).reshape(b.shape), b)
    padded = jax.vmap(lambda given: tuple(call(given, num_valid=2)), in_axes=axes)(batches)
    assert (np.asarray(padded[1])[:, 2:] == 255).all()
    np.testing.assert_array_equal(np.asarray(padded[1])[:, :2], np.asarray(got[1])[:, :2])


def test_a_router_in_the_closure_of_a_traced_function() -> None:
    call = Call("Router", "two shared experts", "empty")
    arrays = call.arrays()
    x, ids = arrays.pop("x"), arrays.pop("indices")
    router = Router(call.method, **arrays)
    got = jax.jit(lambda x, ids: router(x, indices=ids, unset="empty"))(jnp.array(x), jnp.array(ids))
    same_bits(got, call(call.arrays()))


def test_what_is_wrong_is_refused_while_traced() -> None:
    with pytest.raises(ValueError, match=r"(?m)^activation_topk: indices must have shape .* = \[\d+, 2\], got"):
        jax.jit(lambda x, ids: activation_topk(x, RoutingMethod(8, 2), indices=ids))(
            jnp.zeros((5, 8)), jnp.zeros((5, 3), jnp.int32)
        )
