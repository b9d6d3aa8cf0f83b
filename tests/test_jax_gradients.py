# SPDX-License-Identifier: Apache-2.0
"""Gradients of weights by jax.grad on the CPU: under JAX's other transformations, and results without gradients."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import cupy_router
from cupy_router import Router, RoutingMethod, ScoreFunction, activation_topk, dense_router, hash_router, topk_select
from tests import gradients, inputs
from tests.gradient_cases import KINDS, SMALL
from tests.jax_gradients import Case, enable_x64, twin
from tests.methods import METHODS

jax = pytest.importorskip("jax", reason="JAX is not installed")
jnp = jax.numpy
if jax.__version_info__ < (0, 8):
    pytest.skip("calls inside jax.jit need JAX 0.8 or later", allow_module_level=True)

METHOD = RoutingMethod(16, 4, renormalize_eps=1e-20, scale=1.5)
ROOT = Path(cupy_router.__file__).parents[1]


@pytest.fixture(autouse=True)
def _exact_products() -> Iterator[None]:
    """Ask JAX for exact float32 products, which a GPU otherwise computes with fewer bits."""
    with jax.default_matmul_precision("highest"):
        yield


def array(*shape: int, seed: int = 0) -> Any:
    return jnp.array(inputs.normal(shape, seed=200 + seed))


def table(seed: int = 0) -> Any:
    return jnp.array(np.stack([inputs.rng(210, seed, r).permutation(16)[:4] for r in range(9)]).astype(np.int32))


def same(got: Any, want: Any, rtol: float = 0.0, atol: float = 0.0) -> None:
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=rtol, atol=atol), got, want)


def close(got: Any, want: Any) -> None:
    same(got, want, rtol=1e-5, atol=1e-6)


# -- What gradients are ------------------------------------------------------------------------------------------------


# Two kinds of call for each method, by turns: XLA takes a second to compile one with its twin.
PAIRS = [(name, kind) for i, name in enumerate(SMALL) for j, kind in enumerate(KINDS) if (i + j) % 3 == 0]


@pytest.mark.slow("seconds", every=17)
@pytest.mark.parametrize(("name", "kind"), PAIRS)
@pytest.mark.usefixtures("backend")
def test_gradients_are_those_of_plain_jax(name: str, kind: str) -> None:
    case = Case(kind, name, jnp.array)
    with case.wide:
        found, indices = jax.jit(jax.grad(case.loss, has_aux=True))(case.smooth)
    case.check(found, indices)


@pytest.mark.slow("seconds", every=8)
@pytest.mark.parametrize("name", METHODS)
def test_gradients_are_central_differences(name: str) -> None:
    """Central differences of the oracle's float64 weights, without JAX or the reference; under jit."""
    case = Case("activation_topk", name, jnp.array)
    upstream = gradients.upstream_of(len(case.hosts["logits"]), case.method)

    @jax.jit
    def loss(logits: Any, layer: Any) -> Any:
        weights, indices = activation_topk(logits, case.method, **layer)
        return (weights.astype(np.float32) * upstream.astype(np.float32)).sum(), indices

    with case.wide:
        layer = {name: jnp.array(host) for name, host in case.hosts.items() if name != "logits"}
        got, indices = jax.grad(loss, has_aux=True)(case.smooth["logits"], layer)
    logits, indices = case.hosts["logits"], np.asarray(indices)
    gradients.assert_right(np.asarray(got), upstream, indices, logits, case.method, case.layer)


@pytest.mark.slow("seconds", every=15)
@pytest.mark.parametrize("num_valid", [4, np.int32(4), np.array([4], np.int32)], ids=["int", "scalar", "array"])
@pytest.mark.parametrize("kind", ["activation_topk", "dense_router", "hash_router of x", "Router", "hash Router"])
def test_padding_has_no_gradient(kind: str, num_valid: Any) -> None:
    case = Case(kind, "logit scale", jnp.array)
    given = num_valid if isinstance(num_valid, int) else jnp.array(num_valid)
    found, indices = jax.grad(case.loss, has_aux=True)(case.smooth, num_valid=given)
    case.check(found, indices)
    first = found["x" if "x" in found else "logits"]
    assert not first[4:].any()
    assert first[:4].any()


def test_weights_are_the_same_with_a_gradient_and_without() -> None:
    for kind in KINDS:
        case = Case(kind, "everything", jnp.array)
        with case.wide:
            want = case.route({**case.fixed, **case.smooth})
            weights, _, indices = jax.vjp(
                lambda smooth, case=case: case.route({**case.fixed, **smooth}), case.smooth, has_aux=True
            )
        assert (np.asarray(weights) == np.asarray(want.weights)).all()
        assert (np.asarray(indices) == np.asarray(want.indices)).all()


def test_a_bias_that_only_selects_and_integers_have_gradients_of_zero() -> None:
    logits, bias = array(5, 16), array(16, seed=1)
    by_bias = jax.grad(lambda b: (activation_topk(logits, METHOD, bias=b).weights ** 2).sum())(bias)
    assert by_bias.shape == (16,)
    assert not by_bias.any()
    ids = jnp.arange(5)
    by_table = jax.grad(
        lambda t: (hash_router(ids, t, METHOD, logits=logits).weights ** 2).sum(), allow_int=True
    )(table())  # fmt: skip
    assert by_table.dtype == jax.dtypes.float0


def test_uniform_weights_have_gradients_of_zero() -> None:
    router = Router(METHOD, table=table())
    assert not jax.grad(lambda x: (router(x, jnp.arange(5)).weights * x[:, :4]).sum() - x[:, :4].sum() / 4)(
        array(5, 8)
    ).any()


def test_no_tokens() -> None:
    by_x, by_weight = jax.grad(lambda x, w: dense_router(x, w, METHOD).weights.sum(), argnums=(0, 1))(
        array(0, 8), array(16, 8, seed=1)
    )
    assert by_x.shape == (0, 8)
    assert by_weight.shape == (16, 8)
    assert not by_weight.any()


def test_a_gate_of_another_dtype_than_x() -> None:
    x, weight = array(5, 8).astype(jnp.bfloat16), array(16, 8, seed=1)
    got = jax.grad(lambda x, w: (dense_router(x, w, METHOD).weights ** 2).sum(), argnums=(0, 1))(x, weight)
    assert [a.dtype for a in got] == [jnp.bfloat16, jnp.float32]
    wide = x.astype(jnp.float32)
    want = jax.grad(lambda x, w: (dense_router(x, w, METHOD).weights ** 2).sum(), argnums=(0, 1))(wide, weight)
    same(got[0].astype(jnp.float32), want[0], rtol=2.0**-8)
    close(got[1], want[1])


# -- Under other transformations ---------------------------------------------------------------------------------------

LOGITS = array(6, 16, seed=3)


def loss(logits: Any, **more: Any) -> Any:
    return (activation_topk(logits, METHOD, **more).weights ** 2).sum()


def of_twin(logits: Any) -> Any:
    indices = activation_topk(jax.lax.stop_gradient(logits), METHOD).indices
    return (twin(logits, indices, METHOD) ** 2).sum()


def scanned(logits: Any) -> Any:
    return jax.lax.scan(lambda total, rows: (total + loss(rows[None]), None), 0.0, logits)[0]


def of_branches(logits: Any) -> Any:
    return jax.lax.cond(logits[0, 0] > 100, lambda a: a.sum(), loss, logits)


def without_jit(function: Callable[[Any], Any], logits: Any) -> Any:
    with jax.disable_jit():
        return function(logits)


TRANSFORMED: dict[str, Callable[[Any], Any]] = {
    "grad": jax.grad(loss),
    "jit of grad": jax.jit(jax.grad(loss)),
    "grad of jit": jax.grad(jax.jit(loss)),
    "value_and_grad": lambda a: jax.value_and_grad(loss)(a)[1],
    "checkpoint": jax.jit(jax.grad(jax.checkpoint(loss))),
    "checkpoint that saves nothing": jax.grad(
        jax.checkpoint(loss, policy=jax.checkpoint_policies.nothing_saveable)
    ),
    "vmap of grad": jax.vmap(jax.grad(lambda row: loss(row[None]))),
    "grad of vmap": jax.grad(lambda a: jax.vmap(lambda row: loss(row[None]))(a).sum()),
    "jit of grad of vmap": jax.jit(jax.grad(lambda a: jax.vmap(lambda row: loss(row[None]))(a).sum())),
    "vjp": lambda a: jax.vjp(loss, a)[1](1.0)[0],
    "jacrev": lambda a: jax.jacrev(loss)(a),
    "scan": jax.grad(scanned),
    "cond": jax.jit(jax.grad(of_branches)),
    "jit disabled": lambda a: without_jit(jax.grad(loss), a),
    "jit disabled, vmap": lambda a: without_jit(jax.vmap(jax.grad(lambda row: loss(row[None]))), a),
    "an array of JAX beside NumPy's": lambda a: jax.grad(lambda a: loss(a, bias=np.zeros(16, np.float32)))(a),
}  # fmt: skip


@pytest.mark.slow("seconds")
@pytest.mark.parametrize("name", TRANSFORMED)
def test_under_other_transformations(name: str) -> None:
    close(TRANSFORMED[name](LOGITS), jax.grad(of_twin)(LOGITS))


@pytest.mark.slow("seconds")
def test_a_jacobian_is_one_batched_backward_call() -> None:
    """One kernel call computes all rows of the Jacobian."""
    indices = activation_topk(LOGITS, METHOD).indices
    back = jax.jit(jax.jacrev(lambda a: activation_topk(a, METHOD).weights))
    close(back(LOGITS), jax.jacrev(lambda a: twin(a, indices, METHOD))(LOGITS))
    text = back.trace(LOGITS).lower(lowering_platforms=("cpu",)).as_text()
    assert text.count("custom_call @cupy_router.activation_topk_backward") == 1
    assert "while" not in text


@pytest.mark.slow("seconds")
@pytest.mark.parametrize("num_valid", [4, jnp.array([0, 6, 3], jnp.int32)], ids=["int", "arrays"])
def test_vmap_of_padded_calls(num_valid: Any) -> None:
    many = array(3, 6, 16, seed=4)
    counts = jnp.broadcast_to(jnp.asarray(num_valid, jnp.int32), (3,))
    fixed = isinstance(num_valid, int)
    got = jax.vmap(jax.grad(lambda a, n: loss(a, num_valid=4 if fixed else n)))(many, counts)
    want = jnp.stack([jax.grad(loss)(a[:n]).sum() for a, n in zip(many, counts.tolist(), strict=True)])
    close(got.sum((1, 2)), want)
    for rows, n in zip(got, counts.tolist(), strict=True):
        assert not rows[n:].any()


@pytest.mark.slow("seconds")
def test_vmap_over_gates_and_over_tokens() -> None:
    """Models that differ in their gates, as in an ensemble, and one gate for many batches."""

    def by_gate(x: Any, weight: Any) -> Any:
        return (dense_router(x, weight, METHOD).weights ** 2).sum()

    both = jax.grad(by_gate, argnums=(0, 1))
    x, gates = array(3, 6, 8, seed=5), array(3, 16, 8, seed=6)
    for axes in ((0, 0), (None, 0), (0, None)):
        one = [both(x[0] if axes[0] is None else x[i], gates[0] if axes[1] is None else gates[i]) for i in range(3)]
        got = jax.vmap(both, in_axes=axes)(x[0] if axes[0] is None else x, gates[0] if axes[1] is None else gates)
        close(got, tuple(map(jnp.stack, zip(*one, strict=True))))


@pytest.mark.slow("seconds")
def test_a_router_learns_as_a_pytree() -> None:
    x = array(6, 8, seed=7)
    router = Router(METHOD, weight=array(16, 8, seed=8), bias=array(16, seed=9), expert_scale=jnp.ones(16))

    @jax.jit
    def step(router: Any, x: Any) -> Any:
        value, found = jax.value_and_grad(lambda router: (router(x).weights ** 2).sum())(router)
        return value, jax.tree.map(lambda a, g: a - 0.1 * g, router, found)

    want = jax.grad(
        lambda w, s: (dense_router(x, w, METHOD, bias=router.bias, expert_scale=s).weights ** 2).sum(), argnums=(0, 1)
    )(router.weight, router.expert_scale)
    first, moved = step(router, x)
    assert isinstance(moved, Router)
    close((router.weight - moved.weight) / 0.1, want[0])
    close((router.expert_scale - moved.expert_scale) / 0.1, want[1])
    assert (moved.bias == router.bias).all()
    assert step(moved, x)[0] < first


def test_numpy_arrays_in_a_router_are_constants() -> None:
    gate, x = inputs.normal((16, 8), seed=201), array(5, 8)
    got = jax.grad(lambda x: (Router(METHOD, weight=gate)(x).weights ** 2).sum())(x)
    close(got, jax.grad(lambda x: (dense_router(x, jnp.array(gate), METHOD).weights ** 2).sum())(x))


def test_unused_gradients_are_not_computed() -> None:
    x, weight, scale = array(5, 8), array(16, 8, seed=1), jnp.ones(16)

    def routed(x: Any, weight: Any, scale: Any) -> Any:
        return (dense_router(x, weight, METHOD, expert_scale=scale).weights ** 2).sum()

    text = jax.jit(jax.grad(routed)).lower(x, weight, scale).compile().as_text()
    found = {name: text.count(f'custom_call_target="cupy_router.{name}"') for name in ("hash_router", "dense_router")}
    assert found == {"hash_router": 0, "dense_router": 1}
    text = jax.jit(jax.grad(routed, argnums=2)).lower(x, weight, scale).compile().as_text()
    assert "cupy_router.activation_topk_backward" not in text


SHARDED = """
import jax, jax.numpy as jnp, numpy as np
from jax.sharding import NamedSharding, PartitionSpec as P
from cupy_router import Router, activation_topk, dense_router
from tests import inputs
from tests.test_jax_gradients import METHOD, array, close

assert len(jax.devices()) == 4
mesh = jax.make_mesh((4,), ("tokens",), axis_types=(jax.sharding.AxisType.Auto,))
x, weight = array(16, 8), array(16, 8, seed=1)
scale, bias = jnp.exp(array(16, seed=2)), array(16, seed=3)

def loss(x, weight, scale):
    return (dense_router(x, weight, METHOD, logit_bias=bias, expert_scale=scale).weights ** 2).sum()

by = dict(argnums=(0, 1, 2))
want = jax.grad(loss, **by)(x, weight, scale)
placed = jax.device_put(x, NamedSharding(mesh, P("tokens")))
for check_vma in (True, False):
    options = dict(mesh=mesh, in_specs=(P("tokens"), P(), P()), check_vma=check_vma)
    outside = jax.shard_map(lambda *a: jax.lax.psum(loss(*a), "tokens"), out_specs=P(), **options)
    close(jax.grad(outside, **by)(x, weight, scale), want)
    close(jax.jit(jax.grad(outside, **by))(placed, weight, scale), want)

# Inside, JAX sums over the devices what was the same on all of them.
options = dict(mesh=mesh, in_specs=(P("tokens"), P(), P()), out_specs=(P("tokens"), P(), P()))
inside = jax.shard_map(jax.grad(loss, **by), **options)
close(inside(x, weight, scale), want)
close(jax.jit(inside)(placed, weight, scale), want)
close(jax.jit(jax.shard_map(jax.grad(jax.checkpoint(loss), **by), **options))(placed, weight, scale), want)

# jit alone gathers first, but is right.
close(jax.jit(jax.grad(loss, **by))(placed, weight, scale), want)
print("done")
"""


@pytest.mark.slow("process")
def test_gradients_inside_and_outside_of_shard_map() -> None:
    devices = {"JAX_PLATFORMS": "cpu", "XLA_FLAGS": "--xla_force_host_platform_device_count=4"}
    environment = {**os.environ, **devices}
    done = subprocess.run(
        [sys.executable, "-c", SHARDED], cwd=ROOT, capture_output=True, text=True, timeout=240, env=environment
    )
    assert (done.returncode, done.stdout) == (0, "done\n"), done.stderr[-3000:]


def test_a_gradient_of_int64_indices() -> None:
    method = RoutingMethod(16, 4, index_dtype="int64", weight_dtype="float16")
    with enable_x64():
        weights, back, indices = jax.vjp(lambda a: tuple(activation_topk(a, method)), LOGITS, has_aux=True)
        assert (indices.dtype, weights.dtype) == (jnp.int64, jnp.float16)
        (got,) = back(jnp.ones_like(weights))
    assert got.dtype == jnp.float32


# -- What has none -----------------------------------------------------------------------------------------------------

SECOND = {
    "grad of grad": jax.grad(lambda a: (jax.grad(loss)(a) ** 2).sum()),
    "jit of grad of grad": jax.jit(jax.grad(lambda a: (jax.grad(loss)(a) ** 2).sum())),
    "grad of grad of vmap": jax.grad(
        lambda a: jax.grad(lambda a: jax.vmap(lambda row: loss(row[None]))(a).sum())(a).sum()
    ),
    "hessian by reverse": jax.jacrev(jax.jacrev(loss)),
    "by x": lambda a: jax.grad(
        lambda x: jax.grad(lambda x: (dense_router(x, a[:, :8], RoutingMethod(6, 2)).weights ** 2).sum())(x).sum()
    )(array(5, 8)),
}


@pytest.mark.slow("seconds", every=5)
@pytest.mark.parametrize("name", SECOND)
def test_a_second_derivative_is_refused(name: str) -> None:
    said = "^cupy_router: the weights of a routing have first derivatives only, so this has no gradient"
    with pytest.raises(RuntimeError, match=said):
        SECOND[name](LOGITS)


@pytest.mark.parametrize("forward", [jax.jacfwd(loss), jax.hessian(loss), lambda a: jax.jvp(loss, (a,), (a,))])
def test_forward_mode_is_refused_by_jax(forward: Any) -> None:
    with pytest.raises(TypeError, match="forward-mode"):
        forward(LOGITS)


def test_topk_select_has_no_gradient_but_may_be_stopped() -> None:
    with pytest.raises(ValueError, match="topk_select: results have no gradient"):
        jax.grad(lambda a: topk_select(a, 2).values.sum())(LOGITS)
    chosen = topk_select(LOGITS, 2)
    got = jax.grad(
        lambda a: jnp.take_along_axis(a, topk_select(jax.lax.stop_gradient(a), 2).indices, axis=1).sum()
    )(LOGITS)  # fmt: skip
    want = np.zeros((6, 16))
    np.put_along_axis(want, np.asarray(chosen.indices), 1.0, axis=1)
    np.testing.assert_array_equal(got, want)


def test_stopped_gradients_are_zero() -> None:
    got = jax.grad(lambda a: (activation_topk(jax.lax.stop_gradient(a), METHOD).weights * a[:, :4]).sum())(LOGITS)
    np.testing.assert_allclose(got[:, :4], activation_topk(LOGITS, METHOD).weights)


def test_a_custom_score_needs_a_derivative() -> None:
    """Routing works without; the backward pass reports what is missing."""
    cubic = RoutingMethod(16, 4, ScoreFunction("cubic", cuda="x * x * x", numpy=lambda x: x**3))
    assert activation_topk(LOGITS, cubic).weights.shape == (6, 4)
    with pytest.raises(ValueError, match=r"activation_topk_backward: ScoreFunction\('cubic'\) has no gradient: give"):
        jax.grad(lambda a: activation_topk(a, cubic).weights.sum())(LOGITS)
