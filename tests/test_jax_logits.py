# SPDX-License-Identifier: Apache-2.0
"""The logits that routers return in JAX: traced, mapped, sharded, exported, and their gradients."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import cupy_router
from cupy_router import (
    LayoutSpec,
    Router,
    RoutingMethod,
    RoutingPlanWithLogits,
    RoutingWithLogits,
    hash_router,
)
from tests import inputs
from tests.jax_calls import same_bits
from tests.jax_gradients import enable_x64, twin
from tests.jax_layouts import same_layout
from tests.logit_calls import KINDS, LAYER, Call

jax = pytest.importorskip("jax", reason="JAX is not installed")
jnp = jax.numpy
if jax.__version_info__ < (0, 8):
    pytest.skip("calls inside jax.jit need JAX 0.8 or later", allow_module_level=True)

pytestmark = pytest.mark.backends("reference")  # tests/gpu/test_jax_logits_gpu.py is for a GPU
EVERY = pytest.mark.parametrize("kind", KINDS)
ROOT = Path(cupy_router.__file__).parents[1]
WITH_LOGITS = {"return_logits": True}
METHOD = RoutingMethod(16, 4, renormalize_eps=1e-20, scale=1.5)


def on_jax(call: Call) -> dict[str, Any]:
    return {name: jnp.array(array) for name, array in call.arrays().items()}


def options_of(kind: str, logits_dtype: str) -> dict[str, Any]:
    return WITH_LOGITS | ({"logits_dtype": logits_dtype} if kind.startswith("dense_router") else {})


# -- Traced calls ------------------------------------------------------------------------------------------------------


@pytest.mark.slow("seconds", every=2)
@pytest.mark.parametrize("num_valid", [None, 4, np.array(4, np.int32)], ids=["all rows", "number", "array"])
@EVERY
def test_traced_results_are_those_of_the_host(kind: str, num_valid: Any) -> None:
    call = Call(kind, "two shared experts", given=LAYER)
    more = {} if num_valid is None else {"num_valid": num_valid}
    want = call(call.arrays(), **WITH_LOGITS, **more)
    arrays = on_jax(call)
    on_device = {name: jnp.array(n) if isinstance(n, np.ndarray) else n for name, n in more.items()}
    for got in (
        call(arrays, **WITH_LOGITS, **on_device),
        jax.jit(lambda arrays: call(arrays, **WITH_LOGITS, **on_device))(arrays),
    ):
        assert type(got) is RoutingWithLogits
        same_bits(got, want)
    assert np.asarray(want.logits).any(axis=1).sum() == (9 if num_valid is None else 4)


@pytest.mark.parametrize("logits_dtype", inputs.FLOATS)
@pytest.mark.parametrize("kind", ["dense_router", "dense_router prefill"])
def test_logits_of_another_dtype(kind: str, logits_dtype: str) -> None:
    call = Call(kind, given=LAYER)
    more = options_of(kind, logits_dtype)
    got = jax.jit(lambda arrays: call(arrays, **more))(on_jax(call))
    assert str(got.logits.dtype) == logits_dtype
    same_bits(got, call(call.arrays(), **more))


@EVERY
def test_with_a_layout(kind: str) -> None:
    call, spec = Call(kind, "two shared experts", given=LAYER), LayoutSpec(alignment=4, want=("order", "counts"))
    got = jax.jit(lambda arrays: call(arrays, **WITH_LOGITS, layout=spec, num_valid=7))(on_jax(call))
    want = call(call.arrays(), **WITH_LOGITS, layout=spec, num_valid=7)
    assert type(got) is RoutingPlanWithLogits
    same_bits(RoutingWithLogits(*got[:3]), RoutingWithLogits(*want[:3]))
    same_layout(got.layout, want.layout)


def test_what_is_wrong_is_refused_while_traced() -> None:
    call = Call("hash_router")
    arrays = on_jax(call)
    with pytest.raises(ValueError, match=r"(?m)^hash_router: return_logits needs x and weight"):
        jax.jit(lambda ids, table: hash_router(ids, table, call.method, return_logits=True))(
            arrays["token_ids"], arrays["table"]
        )
    with pytest.raises(ValueError, match="out and stream cannot be given inside jax"):
        jax.jit(lambda a: call(a, return_logits=True, out=call(call.arrays(), return_logits=True)))(arrays)


def test_no_handler_that_xla_may_capture_multiplies_by_the_gate() -> None:
    """A captured handler must not take scratch memory; that of hash_router is captured."""
    call = Call("hash_router")
    for more, target in ((WITH_LOGITS, "hash_layer"), ({}, "hash_router")):
        text = jax.jit(lambda arrays, more=more: call(arrays, **more)).lower(on_jax(call)).as_text()
        assert [line for line in text.splitlines() if "custom_call @cupy_router" in line]
        assert f"custom_call @cupy_router.{target}(" in text
        assert text.count("custom_call @cupy_router") == 1


# -- Mapped, sharded, exported -----------------------------------------------------------------------------------------


@pytest.mark.slow("seconds", every=7)
@pytest.mark.parametrize("shared", [True, False], ids=["one gate", "gates"])
@pytest.mark.parametrize("num_valid", [None, 4, np.array([9, 0, 5], np.int32)], ids=["all rows", "number", "arrays"])
@EVERY
def test_vmap(kind: str, num_valid: Any, shared: bool) -> None:
    call = Call(kind, given=LAYER)
    host = call.arrays()
    names = [name for name in host if name in ("x", "token_ids") or not (shared or name == "table")]
    many = {name: np.stack([np.roll(host[name], turn, axis=0) for turn in range(3)]) for name in names}
    counts = np.full(3, 9 if num_valid is None else num_valid, np.int32)

    def one(rows: dict[str, Any], count: Any) -> Any:
        more = {} if num_valid is None else {"num_valid": count if isinstance(num_valid, np.ndarray) else num_valid}
        return call({**{name: jnp.array(array) for name, array in host.items()}, **rows}, **WITH_LOGITS, **more)

    got = jax.jit(jax.vmap(one))(many, counts)
    for place in range(3):
        rows = {name: array[place] for name, array in many.items()}
        want = call({**host, **rows}, **WITH_LOGITS, num_valid=int(counts[place]))
        same_bits(RoutingWithLogits(*(array[place] for array in got)), want)


SHARDED = """
import jax, jax.numpy as jnp, numpy as np
from jax.sharding import NamedSharding, PartitionSpec as P
from cupy_router import LayoutSpec, RoutingWithLogits
from tests.jax_calls import same_bits
from tests.logit_calls import KINDS, LAYER, Call
from tests.test_jax_logits import loss, on_jax

assert len(jax.devices()) == 4
for kind in KINDS:
    call = Call(kind, n=16, given=LAYER)
    arrays = on_jax(call)
    rows = [name for name in arrays if name in ("x", "token_ids")]
    specs = {name: P("tokens") if name in rows else P() for name in arrays}
    for num_valid in (None, 6):
        want = call(call.arrays(), return_logits=True, num_valid=num_valid)
        gradients = jax.grad(loss(call, num_valid=num_valid))
        smooth = {name: array for name, array in arrays.items() if array.dtype == jnp.float32}
        fixed = {name: array for name, array in arrays.items() if name not in smooth}
        by = gradients(smooth, fixed)
        for kinds in (("Explicit",), ("Auto",)):
            mesh = jax.make_mesh((4,), ("tokens",), axis_types=tuple(getattr(jax.sharding.AxisType, k) for k in kinds))
            placed = {name: jax.device_put(array, NamedSharding(mesh, specs[name])) for name, array in arrays.items()}
            with jax.set_mesh(mesh):
                got = jax.jit(lambda a: call(a, return_logits=True, num_valid=num_valid))(placed)
                same_bits(got, want)
                if kinds == ("Explicit",):
                    assert jax.typeof(got.logits).sharding.spec[0] == "tokens"
                plan = jax.jit(lambda a: call(a, return_logits=True, num_valid=num_valid, layout=LayoutSpec()))(placed)
                same_bits(RoutingWithLogits(*plan[:3]), want)
                found = jax.jit(gradients)({n: placed[n] for n in smooth}, {n: placed[n] for n in fixed})
            for name, right in by.items():
                np.testing.assert_allclose(found[name], right, rtol=1e-5, atol=1e-5, err_msg=name)
    mesh = jax.make_mesh((4,), ("tokens",), axis_types=(jax.sharding.AxisType.Auto,))
    out = RoutingWithLogits(P("tokens"), P("tokens"), P("tokens"))
    inside = jax.shard_map(lambda a: call(a, return_logits=True), mesh=mesh, in_specs=(specs,), out_specs=out)
    same_bits(jax.jit(inside)(arrays), call(call.arrays(), return_logits=True))
print("done")
"""


@pytest.mark.slow("process")
def test_sharded_rows() -> None:
    devices = {"JAX_PLATFORMS": "cpu", "XLA_FLAGS": "--xla_force_host_platform_device_count=4"}
    environment = {**os.environ, **devices, "PYTHONPATH": str(ROOT)}
    done = subprocess.run(
        [sys.executable, "-c", SHARDED], cwd=ROOT, capture_output=True, text=True, timeout=240, env=environment
    )
    assert (done.returncode, done.stdout) == (0, "done\n"), done.stderr[-3000:]


@pytest.mark.slow("seconds")
@pytest.mark.parametrize("kind", [kind for kind in KINDS if kind != "dense_router decode"])  # for a few tokens only
def test_exported_gradients_for_any_number_of_tokens(kind: str) -> None:
    pytest.importorskip("flatbuffers", reason="flatbuffers is not installed, in which JAX writes programs")
    call = Call(kind)
    (tokens,) = jax.export.symbolic_shape("tokens")
    smooth, fixed = split(call)

    def shapes(arrays: dict[str, Any]) -> dict[str, Any]:
        rows = {name: tokens if name in ("x", "token_ids") else len(array) for name, array in arrays.items()}
        return {name: jax.ShapeDtypeStruct((rows[name], *a.shape[1:]), a.dtype) for name, a in arrays.items()}

    def squares(smooth: dict[str, Any], fixed: dict[str, Any]) -> Any:
        routing = call({**smooth, **fixed}, return_logits=True)
        return (routing.logits**2).sum() + (routing.weights**2).sum()

    targets = ["hash_layer" if call.is_hash else "dense_router", "activation_topk_backward"]
    safe = [jax.export.DisabledSafetyCheck.custom_call(f"cupy_router.{target}") for target in targets]
    exported = jax.export.export(jax.jit(jax.grad(squares)), disabled_checks=safe)(shapes(smooth), shapes(fixed))
    program = jax.export.deserialize(exported.serialize())
    for name, want in jax.grad(squares)(smooth, fixed).items():
        np.testing.assert_allclose(program.call(smooth, fixed)[name], want, rtol=1e-5, atol=1e-4, err_msg=name)


# -- Gradients ---------------------------------------------------------------------------------------------------------


def loss(call: Call, weights: float = 1.0, logits: float = 1.0, **more: Any) -> Any:
    """Return a loss of weights and logits, each with its factor. Its gradient is not 0 where logits are."""

    def function(smooth: dict[str, Any], fixed: dict[str, Any]) -> Any:
        routing = call({**smooth, **fixed}, **{**WITH_LOGITS, **more})
        return (routing.weights.astype(jnp.float32) * upstream(routing.weights) * weights).sum() + (
            (routing.logits.astype(jnp.float32) + 1) ** 2 * upstream(routing.logits) * logits
        ).sum()

    return function


def upstream(array: Any) -> Any:
    return jnp.asarray(inputs.normal(array.shape, seed=720))


def wanted(call: Call, indices: np.ndarray, weights: float, logits: float, num_valid: int | None) -> dict[str, Any]:
    """Return the gradients of the same loss by plain JAX in float64."""
    hosts, n = call.arrays(), call.n if num_valid is None else num_valid
    smooth = [name for name, array in hosts.items() if array.dtype.kind != "i"]
    routed = np.flatnonzero(indices[:, 0] >= 0)

    def function(wide: dict[str, Any]) -> Any:
        product = wide["x"] @ wide["weight"].T
        bias = wide.get("logit_bias")
        layer = {name: wide.get(name) for name in LAYER}
        found = twin(product[routed], jnp.asarray(indices[routed]), call.method, **layer)
        full = product if bias is None else product + jnp.pad(bias, (0, product.shape[1] - bias.shape[0]))
        up = inputs.normal(indices.shape, seed=720)[routed], inputs.normal(full.shape, seed=720)[:n]
        return (found * up[0] * weights).sum() + ((full[:n] + 1) ** 2 * up[1] * logits).sum()

    with enable_x64():
        wide = {name: jnp.asarray(hosts[name].astype(np.float64)) for name in smooth}
        return {name: np.asarray(array) for name, array in jax.jit(jax.grad(function))(wide).items()}


def split(call: Call) -> tuple[dict[str, Any], dict[str, Any]]:
    arrays = on_jax(call)
    smooth = {name: array for name, array in arrays.items() if not jnp.issubdtype(array.dtype, jnp.integer)}
    return smooth, {name: array for name, array in arrays.items() if name not in smooth}


@pytest.mark.slow("seconds", every=36)
@pytest.mark.parametrize("num_valid", [None, 4], ids=["all rows", "padded"])
@pytest.mark.parametrize(("weights", "logits"), [(1.0, 1.0), (0.0, 1.0), (1.0, 0.0)])
@pytest.mark.parametrize("name", ["logit scale and soft cap", "shared in the normaliser", "softmax after top-k"])
@pytest.mark.parametrize("kind", [kind for kind in KINDS if " " not in kind or kind == "hash Router"])
def test_gradients_of_weights_and_logits_add_up(
    kind: str, name: str, weights: float, logits: float, num_valid: int | None
) -> None:
    call = Call(kind, name, 7, given=LAYER)
    smooth, fixed = split(call)
    more = {} if num_valid is None else {"num_valid": jnp.array(num_valid, jnp.int32)}
    found = jax.jit(jax.grad(loss(call, weights, logits, **more)))(smooth, fixed)
    want = wanted(call, call(call.arrays(), num_valid=num_valid).indices, weights, logits, num_valid)
    assert found.keys() == want.keys()
    for key, got in found.items():
        np.testing.assert_allclose(got, want[key], rtol=2e-5, atol=2e-5 * max(1, abs(want[key]).max()), err_msg=key)


@pytest.mark.parametrize("kind", ["hash_router", "hash Router"])
def test_tokens_without_experts_have_gradients_of_their_logits(kind: str) -> None:
    call = Call(kind)
    smooth, fixed = split(call)
    by_x = jax.grad(loss(call))(smooth, fixed)["x"]
    bad = np.isin(call.arrays()["token_ids"], (-1, 7))
    assert np.asarray(by_x)[bad].any(axis=1).all()
    assert not np.asarray(jax.grad(loss(call, logits=0.0))(smooth, fixed)["x"])[bad].any()


@pytest.mark.slow("seconds", every=5)
@pytest.mark.parametrize("num_valid", [0, 4, np.array([4], np.int32)], ids=str)
@EVERY
def test_padding_has_no_gradient(kind: str, num_valid: Any) -> None:
    call = Call(kind)
    smooth, fixed = split(call)
    count = jnp.array(num_valid) if isinstance(num_valid, np.ndarray) else num_valid
    by_x = np.asarray(jax.grad(loss(call, num_valid=count))(smooth, fixed)["x"])
    valid = 4 if isinstance(num_valid, np.ndarray) else num_valid
    assert not by_x[valid:].any()
    assert by_x[:valid].any(axis=1).all()


@pytest.mark.slow("seconds")
@pytest.mark.parametrize("logits_dtype", ["float16", "bfloat16"])
def test_gradients_of_16_bit_logits(logits_dtype: str) -> None:
    call = Call("dense_router", dtype=logits_dtype)
    smooth, fixed = split(call)
    found = jax.grad(loss(call, logits_dtype=logits_dtype))(smooth, fixed)
    want = jax.grad(loss(call))(smooth, fixed)
    for key, got in found.items():
        assert str(got.dtype) == logits_dtype
        most = float(abs(want[key]).max())
        np.testing.assert_allclose(got.astype(np.float32), want[key].astype(np.float32), rtol=0.02, atol=0.02 * most)


@pytest.mark.slow("seconds")
def test_gradients_under_vmap() -> None:
    call = Call("dense_router")
    smooth, fixed = split(call)
    many = jnp.stack([smooth["x"], -smooth["x"]])
    by = jax.grad(loss(call, num_valid=6))
    got = jax.vmap(lambda x: by({**smooth, "x": x}, fixed))(many)
    for place in range(2):
        want = by({**smooth, "x": many[place]}, fixed)
        for name, right in want.items():
            np.testing.assert_allclose(got[name][place], right, rtol=1e-5, atol=1e-5, err_msg=name)


@pytest.mark.slow("seconds")
def test_a_router_as_an_argument_learns_from_its_logits() -> None:
    x, gate = jnp.array(inputs.normal((6, 8))), jnp.array(inputs.normal((16, 8), seed=1))
    found = jax.jit(jax.grad(lambda router, x: (router(x, return_logits=True).logits ** 2).sum()))(
        Router(METHOD, weight=gate), x
    )
    want = jax.grad(lambda gate: ((x @ gate.T) ** 2).sum())(gate)
    np.testing.assert_allclose(found.weight, want, rtol=1e-5, atol=1e-5)


def test_results_are_the_same_with_a_gradient_and_without() -> None:
    for kind in KINDS:
        call = Call(kind, given=LAYER)
        smooth, fixed = split(call)
        want = call(call.arrays(), **WITH_LOGITS)
        got, _ = jax.vjp(lambda smooth, call=call, fixed=fixed: call({**smooth, **fixed}, **WITH_LOGITS), smooth)
        same_bits(got, want)
