# SPDX-License-Identifier: Apache-2.0
"""A Router as a pytree, and the ops under jax.vmap, jax.shard_map and jax.export, on the CPU."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import cupy_router
from cupy_router import Router, RoutingMethod, ScoreFunction, activation_topk, dense_router, topk_select
from tests import inputs
from tests.jax_calls import METHOD, NAMES, SHARED, batch, calls, same_bits
from tests.jax_gradients import Case

jax = pytest.importorskip("jax", reason="JAX is not installed")
jnp = jax.numpy
if jax.__version_info__ < (0, 8):
    pytest.skip("calls inside jax.jit need JAX 0.8 or later", allow_module_level=True)

CALLS = calls()
ROOT = Path(cupy_router.__file__).parents[1]


@pytest.fixture(autouse=True)
def _exact_products() -> Iterator[None]:
    """Ask JAX for exact float32 products, which a GPU otherwise computes with fewer bits."""
    with jax.default_matmul_precision("highest"):
        yield


def on_cpu(arrays: dict[str, np.ndarray]) -> dict[str, Any]:
    return {name: jnp.array(array) for name, array in arrays.items()}


# -- Router ------------------------------------------------------------------------------------------------------------


def test_a_router_is_captured_or_an_argument() -> None:
    arrays = CALLS["a dense Router"].arrays
    x = jnp.array(arrays["x"])
    for of in (jnp.array, np.array):
        router = Router(METHOD, weight=of(arrays["weight"]), bias=of(arrays["bias"]))
        want = router(x) if of is jnp.array else Router(METHOD, **on_cpu({k: arrays[k] for k in ("weight", "bias")}))(x)
        same_bits(jax.jit(lambda x, r=router: r(x))(x), want)
        same_bits(jax.jit(lambda r, x: r(x))(router, x), want)
        same_bits(jax.jit(lambda x, r=router: r(x, num_valid=9))(x), want)


def test_a_router_is_a_pytree_of_its_arrays() -> None:
    router = Router(METHOD, weight=jnp.ones((32, 8)), bias=jnp.zeros(32))
    assert [array.shape for array in jax.tree.leaves(router)] == [(32, 8), (32,)]
    doubled = jax.tree.map(lambda array: array * 2, router)
    assert isinstance(doubled, Router)
    assert (doubled.weight == 2).all()
    assert doubled.method == METHOD
    assert doubled.table is None
    assert doubled.key != router.key
    assert "weight" in repr(doubled)
    paths = [jax.tree_util.keystr(path) for path, _ in jax.tree_util.tree_flatten_with_path(router)[0]]
    assert paths == [".weight", ".bias"]
    traced = []

    @jax.jit
    def route(router: Any, x: Any) -> Any:
        traced.append(repr(router))
        return router(x)

    for given in (router, doubled, router):
        same_bits(route(given, jnp.ones((3, 8))), given(jnp.ones((3, 8))))
    assert len(traced) == 1


def test_a_router_of_a_checkpoint_file(tmp_path: Path) -> None:
    safetensors = pytest.importorskip("safetensors.numpy")
    gate = inputs.normal((32, 16), seed=230)
    safetensors.save_file({"layers.0.ffn.gate.weight": gate}, tmp_path / "model.safetensors")
    router = Router.from_safetensors(tmp_path / "model.safetensors", "layers.0", METHOD)
    x = jnp.array(inputs.normal((5, 16), seed=231))
    same_bits(jax.jit(lambda x: router(x))(x), Router(METHOD, weight=jnp.array(gate))(x))


# -- jax.vmap ----------------------------------------------------------------------------------------------------------


def stacked(results: list[Any]) -> Any:
    return type(results[0])(*(jnp.stack(parts) for parts in zip(*results, strict=True)))


@pytest.mark.slow("seconds", every=17)
@pytest.mark.parametrize("shared", [(), SHARED, ("num_valid",), ("bias", "weight", "table")], ids=str)
@pytest.mark.parametrize("name", NAMES)
def test_vmap_equals_a_loop_of_calls(name: str, shared: tuple[str, ...]) -> None:
    """`shared` are the arrays that are the same for all; the others have a leading axis."""
    call, size = CALLS[name], 3
    axes = {key: None if key in shared else 0 for key in call.arrays}
    many = {key: a if key in shared else batch({key: a}, size)[key] for key, a in call.arrays.items()}
    each = [{key: a if axes[key] is None else a[i] for key, a in many.items()} for i in range(size)]
    want = stacked([call(on_cpu(arrays)) for arrays in each])
    mapped = jax.vmap(lambda arrays: call(arrays), in_axes=(axes,))
    same_bits(mapped(on_cpu(many)), want)
    same_bits(jax.jit(mapped)(on_cpu(many)), want)


@pytest.mark.parametrize("name", NAMES)
def test_vmap_over_tokens_is_one_call(name: str) -> None:
    call = CALLS[name]
    axes = {key: None if key in SHARED else 0 for key in call.arrays}
    many = {key: a if key in SHARED else batch({key: a}, 4)[key] for key, a in call.arrays.items()}
    traced = jax.jit(jax.vmap(lambda arrays: call(arrays), in_axes=(axes,))).trace(on_cpu(many))
    text = traced.lower(lowering_platforms=("cpu",)).as_text()
    assert text.count("custom_call @cupy_router") == 1
    assert "while" not in text


def test_vmap_of_one_row_array_repeats_the_others() -> None:
    call = CALLS["hash_router of logits"]
    arrays = on_cpu(call.arrays)
    logits = jnp.array(batch(call.arrays, 3)["logits"])
    got = jax.vmap(lambda logits: call({**arrays, "logits": logits}))(logits)
    same_bits(got, stacked([call({**arrays, "logits": one}) for one in logits]))


@pytest.mark.slow("seconds")
def test_vmap_of_num_valid_alone() -> None:
    logits = jnp.array(CALLS["activation_topk"].arrays["logits"])
    for counts in (jnp.array([0, 4, 99, -1], jnp.int32), jnp.array([[3], [9]], jnp.int32)):
        got = jax.vmap(lambda count: activation_topk(logits, METHOD, num_valid=count))(counts)
        same_bits(got, stacked([activation_topk(logits, METHOD, num_valid=count) for count in counts]))


def test_vmap_with_num_valid_as_an_int() -> None:
    many = jnp.array(batch(CALLS["activation_topk"].arrays, 3)["logits"])
    got = jax.vmap(lambda logits: activation_topk(logits, METHOD, num_valid=5))(many)
    same_bits(got, stacked([activation_topk(logits, METHOD, num_valid=5) for logits in many]))


@pytest.mark.slow("seconds")
def test_vmap_over_other_axes_and_nested() -> None:
    many = jnp.array(inputs.normal((2, 3, 5, 32), seed=240))
    want = [stacked([topk_select(scores, 4) for scores in part]) for part in many]
    select = jax.vmap(lambda scores: topk_select(scores, 4))
    same_bits(jax.vmap(select)(many), stacked(want))
    same_bits(jax.jit(jax.vmap(select, in_axes=2))(jnp.moveaxis(many, 0, 2)), stacked(want))
    same_bits(jax.vmap(lambda scores: topk_select(scores, 4), in_axes=1)(many[1].swapaxes(0, 1)), want[1])


@pytest.mark.slow("seconds")
def test_vmap_of_no_rows_and_of_too_many_for_decode() -> None:
    weight = jnp.array(CALLS["dense_router"].arrays["weight"])
    for shape in ((3, 0, 48), (0, 3, 48)):
        empty = jax.vmap(lambda x: dense_router(x, weight, METHOD))(jnp.zeros(shape))
        assert [array.shape for array in empty] == [(*shape[:2], 4)] * 2
    x = jnp.array(inputs.rng(241).integers(-4, 5, (3, 40, 48)) / 4, jnp.float32)
    got = jax.vmap(lambda x: dense_router(x, weight, METHOD, path="decode"))(x)
    same_bits(got, stacked([dense_router(one, weight, METHOD, path="decode") for one in x]))


# -- Processes of their own --------------------------------------------------------------------------------------------


def run(program: str, *arguments: str, **environment: str) -> str:
    done = subprocess.run(
        [sys.executable, "-c", program, *arguments],
        cwd=ROOT, capture_output=True, text=True, timeout=120, env={**os.environ, **environment},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    return done.stdout


SHARDED = """
import numpy as np
import jax, jax.numpy as jnp
from jax.sharding import NamedSharding, PartitionSpec as P
from tests.jax_calls import METHOD, NAMES, SHARED, calls, same_bits
import cupy_router

assert len(jax.devices()) == 4
mesh = jax.make_mesh((4,), ("tokens",), axis_types=(jax.sharding.AxisType.Auto,))
for name, call in calls(n=16).items():
    if "padded" in name:
        continue  # num_valid counts the rows of each device there
    arrays = {key: jnp.array(array) for key, array in call.arrays.items()}
    want = call(arrays)
    specs = {key: P() if key in SHARED else P("tokens") for key in arrays}
    placed = {key: jax.device_put(array, NamedSharding(mesh, specs[key])) for key, array in arrays.items()}
    for check_vma in (True, False):
        routed = jax.jit(jax.shard_map(call, mesh=mesh, in_specs=(specs,), out_specs=P("tokens"), check_vma=check_vma))
        got = routed(placed)
        assert got.indices.sharding.spec[0] == "tokens", got.indices.sharding
        same_bits(got, want)
        assert "all-gather" not in routed.lower(placed).compile().as_text()
    same_bits(jax.jit(call.function)(**placed), want)  # gathers first, but is right
logits = jnp.array(calls(n=16)["activation_topk"].arrays["logits"])
count = jnp.array([0, 4, 2, 9], jnp.int32)
padded = jax.shard_map(
    lambda logits, count: cupy_router.activation_topk(logits, METHOD, num_valid=count),
    mesh=mesh, in_specs=P("tokens"), out_specs=P("tokens"),
)
got = jax.jit(padded)(logits, count)
assert ((got.indices[:, 0] >= 0).reshape(4, 4).sum(1) == jnp.array([0, 4, 2, 4])).all()
bias = jnp.array(np.random.default_rng(0).standard_normal(128, np.float32))
other = jax.shard_map(  # the same tokens everywhere, but routed with other biases
    lambda logits, bias: cupy_router.activation_topk(logits, METHOD, bias=bias),
    mesh=mesh, in_specs=(P(), P("tokens")), out_specs=P("tokens"),
)
got_other = jax.jit(other)(logits, bias)
try:  # JAX knows that the results differ from device to device, although the first argument does not
    jax.shard_map(lambda a, b: cupy_router.activation_topk(a, METHOD, bias=b), mesh=mesh,
                  in_specs=(P(), P("tokens")), out_specs=P())(logits, bias)
except ValueError as error:
    assert "replicated" in str(error), error
else:
    raise AssertionError("results count as the same on all devices")
for i in range(4):
    want = cupy_router.activation_topk(logits, METHOD, bias=bias[32 * i : 32 * i + 32])
    same_bits(cupy_router.Routing(*(array[16 * i : 16 * i + 16] for array in got_other)), want)
many = jnp.stack([logits, logits[::-1]])
both = jax.jit(jax.vmap(padded, in_axes=(0, None)))(many, count)
same_bits(cupy_router.Routing(*(array[0] for array in both)), got)
for device in jax.devices():
    logits = jax.device_put(logits, device)
    got = jax.jit(lambda logits: cupy_router.activation_topk(logits, METHOD))(logits)
    assert got.indices.devices() == {device}
print("done")
"""


@pytest.mark.slow("process")
def test_shard_map_routes_tokens_on_their_own_device() -> None:
    assert run(SHARDED, JAX_PLATFORMS="cpu", XLA_FLAGS="--xla_force_host_platform_device_count=4") == "done\n"


LOADED = """
import sys
import jax, jax.numpy as jnp
import cupy_router, cupy_router.jax
cupy_router.RoutingMethod(7, 3)  # so that numbers of methods are others than where it was traced
program = jax.export.deserialize(bytearray(open(sys.argv[1], "rb").read()))
logits = jnp.array([[0.0, 3.0, 2.0, 9.0, 0.0, 0.0, 1.0, 0.0]] * 5)
try:
    print(program.call(logits).indices.tolist())
except Exception as error:
    print(error)
"""


@pytest.mark.slow("process")
def test_an_exported_program_runs_in_another_process(tmp_path: Path) -> None:
    """Also with another number of tokens than at tracing."""
    pytest.importorskip("flatbuffers", reason="flatbuffers is not installed, in which JAX writes programs")
    own = ScoreFunction("own", cuda="-x", numpy=lambda x: -x)
    expected = {
        RoutingMethod(8, 3, "softmax", num_groups=2, top_groups=1): str([[3, 1, 2]] * 5),
        RoutingMethod(8, 2, own): "runs only in the process that traced it",
    }
    (tokens,) = jax.export.symbolic_shape("tokens")
    safe = [jax.export.DisabledSafetyCheck.custom_call("cupy_router.activation_topk")]
    for method, said in expected.items():
        traced = jax.export.export(jax.jit(lambda a, m=method: activation_topk(a, m)), disabled_checks=safe)
        program = traced(jax.ShapeDtypeStruct((tokens, 8), jnp.float32))
        (tmp_path / "program").write_bytes(program.serialize())
        assert said in run(LOADED, str(tmp_path / "program"))


# Calls with an expert_scale, and what the docstring of cupy_router.jax calls their targets beside those of all.
EXPORTED = {
    "activation_topk": ("soft cap", "activation_topk"),
    "hash_router of logits": ("soft cap", "hash_router"),
    "hash_router of x": ("logit scale", "hash_router"),
    "dense_router": ("logit scale", "dense_router"),
    "Router": ("soft cap", "dense_router"),
    "hash Router": ("soft cap", "hash_layer"),
}


@pytest.mark.slow("seconds")
@pytest.mark.parametrize("kind", EXPORTED)
def test_an_exported_gradient(kind: str) -> None:
    """With respect to every input, for any number of tokens."""
    pytest.importorskip("flatbuffers", reason="flatbuffers is not installed, in which JAX writes programs")
    method, target = EXPORTED[kind]
    case = Case(kind, method, jnp.array)
    assert "expert_scale" in case.smooth
    (tokens,) = jax.export.symbolic_shape("tokens")

    def loss(smooth: Any, others: Any, upstream: Any) -> Any:
        weights, indices = case.route({**smooth, **others})
        return (weights * upstream).sum(), indices

    def shapes(arrays: Any) -> Any:
        rows = {name: tokens if name in ("logits", "x", "token_ids") else len(a) for name, a in arrays.items()}
        return {name: jax.ShapeDtypeStruct((rows[name], *a.shape[1:]), a.dtype) for name, a in arrays.items()}

    upstream = jax.ShapeDtypeStruct((tokens, case.method.num_columns), jnp.float32)
    targets = {target, "activation_topk_backward", "hash_router"}
    safe = [jax.export.DisabledSafetyCheck.custom_call(f"cupy_router.{name}") for name in targets]
    traced = jax.export.export(jax.jit(jax.grad(loss, has_aux=True)), disabled_checks=safe)(
        shapes(case.smooth), shapes(case.fixed), upstream
    )
    assert set(re.findall(r"@cupy_router\.(\w+)", traced.mlir_module())) == targets
    case.check(*jax.export.deserialize(traced.serialize()).call(case.smooth, case.fixed, case.upstream))


@pytest.mark.slow("process")
def test_the_compilation_cache_distinguishes_methods(tmp_path: Path) -> None:
    program = """
import sys
import jax, jax.numpy as jnp
import cupy_router
jax.config.update("jax_compilation_cache_dir", sys.argv[1])
jax.config.update("jax_persistent_cache_min_compile_time_secs", 0)
jax.config.update("jax_persistent_cache_min_entry_size_bytes", -1)
sign = float(sys.argv[2])
score = cupy_router.ScoreFunction("own", cuda=f"{sign}f * x", numpy=lambda x: sign * x)
method = cupy_router.RoutingMethod(3, 1, score)
print(jax.jit(lambda a: cupy_router.activation_topk(a, method).indices)(jnp.array([[0.0, 1.0, 2.0]])).tolist())
"""
    assert run(program, str(tmp_path), "1") == "[[2]]\n"
    assert run(program, str(tmp_path), "-1") == "[[0]]\n"
