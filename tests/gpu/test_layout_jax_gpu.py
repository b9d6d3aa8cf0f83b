# SPDX-License-Identifier: Apache-2.0
"""Layouts and rows of experts in JAX on a GPU: eager, and in jax.jit by kernels of XLA's program and by handlers."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest

from cupy_router import LayoutSpec, RoutingMethod, dense_router, expert_layout, permute, unpermute
from tests import inputs
from tests.gpu.support import COMMAND_BUFFER_FLAGS, LAUNCHED_BY, launched_by, on_gpu, printed, upload
from tests.jax_calls import METHOD, calls
from tests.jax_layouts import (
    ARRAYS,
    EXPERTS,
    HIDDEN,
    NAMES,
    ROWS,
    TOP_K,
    arrays_of_rows,
    cases,
    ids,
    plain,
    planned,
    same_layout,
)

TOKENS = (0, 13, 1000, 20_000)  # no pairs, few, for a cluster of blocks, and for kernels with memory of their own
ROUNDING = {"float32": 1e-6, "float16": 2.0**-10, "bfloat16": 2.0**-7}


@pytest.fixture(scope="module", params=LAUNCHED_BY)
def gpu(request: pytest.FixtureRequest) -> Iterator[Any]:
    framework = on_gpu("jax")
    with launched_by(request.param, framework.jax):
        yield framework


BY_ITSELF = """
import jax, numpy as np
from cupy_router import LayoutSpec, activation_topk, expert_layout, permute, unpermute
from cupy_router.jax import _lower_ptx
from tests.jax_calls import METHOD

def layer(x, logits):
    plan = activation_topk(logits, METHOD, layout=LayoutSpec())
    rows = permute(x, plan.layout, weights=plan.weights)
    return (unpermute(rows, plan.layout, plan.weights, residual=x) ** 2).sum()

program = jax.jit(jax.grad(layer)).lower(np.zeros((3, 16), np.float32), np.zeros((3, 32), np.float32))
print("done", program.as_text().count(f"custom_call @{_lower_ptx.TARGET}("))
"""


def test_xla_launches_without_a_handler() -> None:
    """The routing, or its first of two kernels; the layout; the rows and their sums; and the gradients of both."""
    if on_gpu("jax").jax.__version_info__ < (0, 11):
        pytest.skip("not measured with this JAX")
    assert printed(BY_ITSELF, "", "XLA") in (5, 6)
    assert printed(BY_ITSELF, "", "handlers") == 0


# -- Layouts -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", NAMES)
def test_a_layout_is_that_of_the_host(gpu: Any, name: str) -> None:
    for n in TOKENS:
        case = cases(n)[name]
        want = case(case.arrays)
        arrays = upload(gpu, case.arrays)
        for got in (case(arrays), gpu.jax.jit(lambda arrays, case=case: case(arrays))(arrays)):
            same_layout(got, want)
            assert all(array.devices() == {gpu.device} for array in gpu.jax.tree.leaves(got))


@pytest.mark.parametrize("dtype", ["uint8", "int16", "uint16", "int32", "int64"])
def test_ids_of_every_dtype(gpu: Any, dtype: str) -> None:
    with gpu.jax.enable_x64(dtype == "int64"):
        case = cases(70, dtype)["all arrays"]
        arrays = upload(gpu, case.arrays)
        assert str(arrays["indices"].dtype) == dtype
        same_layout(gpu.jax.jit(lambda arrays: case(arrays))(arrays), case(case.arrays))


def test_num_valid_is_no_constant(gpu: Any) -> None:
    for n in TOKENS[1:]:
        lay_out = gpu.jax.jit(lambda indices, count: expert_layout(indices, EXPERTS, alignment=4, num_valid=count))
        for count in (0, 7, n, n + 1, -3):
            array = np.array(count, np.int32)
            want = expert_layout(ids(n), EXPERTS, alignment=4, num_valid=array)
            same_layout(lay_out(gpu.array(ids(n)), gpu.array(array)), want)


def test_vmap_is_a_loop_of_layouts(gpu: Any) -> None:
    jax = gpu.jax
    many = np.stack([ids(13, seed=seed) for seed in range(3)])
    got = jax.jit(jax.vmap(lambda a: expert_layout(a, EXPERTS, alignment=4, want=ARRAYS)))(gpu.array(many))
    for i in range(3):
        want = expert_layout(many[i], EXPERTS, alignment=4, want=ARRAYS)
        same_layout(jax.tree.map(lambda array, i=i: array[i], got), want)


@pytest.mark.parametrize("n", [9, 64, 65, 5000])
@pytest.mark.parametrize("name", ["activation_topk of a layer", "hash_router of logits", "dense_router"])
def test_a_router_returns_the_layout_of_its_indices(gpu: Any, name: str, n: int) -> None:
    call = calls(n=n)[name]
    arrays = upload(gpu, call.arrays)
    spec = LayoutSpec(alignment=4, want=ARRAYS)
    routing = call(arrays)
    want = expert_layout(np.asarray(routing.indices), METHOD.num_experts, alignment=4, want=ARRAYS)
    for got in (planned(name, arrays, spec), gpu.jax.jit(lambda arrays: planned(name, arrays, spec))(arrays)):
        same_layout(got.layout, want)
        np.testing.assert_array_equal(got.indices, routing.indices)
        np.testing.assert_array_equal(got.weights, routing.weights)


# -- Rows --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", inputs.FLOATS)
@pytest.mark.parametrize("name", ROWS)
def test_rows_are_those_of_the_host(gpu: Any, name: str, dtype: str) -> None:
    """Of numbers whose products and sums are exact."""
    function, names = ROWS[name]
    for n in TOKENS:
        host = expert_layout(ids(n), EXPERTS)
        layout = gpu.jax.tree.map(gpu.array, host)
        arrays = {key: array for key, array in arrays_of_rows(n, dtype).items() if key in names}
        want = function(host, **arrays)
        given = upload(gpu, arrays)
        run = gpu.jax.jit(lambda layout, given: function(layout, **given))
        for got in (function(layout, **given), run(layout, given)):
            assert (got.dtype, got.shape, got.devices()) == (want.dtype, want.shape, {gpu.device})
            np.testing.assert_array_equal(np.asarray(got).view(np.uint8), want.view(np.uint8))


@pytest.mark.parametrize("dtype", ["bool", "int8", "uint32", "complex64", "float8_e4m3fn", "float8_e5m2"])
def test_permute_moves_any_dtype(gpu: Any, dtype: str) -> None:
    jnp = gpu.jax.numpy
    host = expert_layout(ids(70), EXPERTS, alignment=8)
    layout = gpu.jax.tree.map(gpu.array, host)
    bits = inputs.rng(580).integers(0, 2, (70, HIDDEN * jnp.dtype(dtype).itemsize), np.uint8)
    x = (bits if dtype == "bool" else bits + 55).view(jnp.dtype(dtype))
    want = permute(x, host)
    for got in (gpu.jax.jit(permute)(gpu.array(x), layout), permute(gpu.array(x), layout)):
        assert (got.dtype, got.devices()) == (x.dtype, {gpu.device})
        np.testing.assert_array_equal(np.asarray(got).view(np.uint8), want.view(np.uint8))


@pytest.mark.parametrize("dtype", inputs.FLOATS)
@pytest.mark.parametrize("name", ["permute, weighted", "unpermute with a residual", "unpermute with all"])
def test_gradients_are_those_of_gathers_and_sums(gpu: Any, name: str, dtype: str) -> None:
    """Of float64 on the CPU, and bitwise the same every time."""
    jax, (function, names) = gpu.jax, ROWS[name]
    host = expert_layout(ids(70), EXPERTS, alignment=8)
    layout = jax.tree.map(gpu.array, host)
    arrays = arrays_of_rows(70, dtype) | {"y": inputs.normal((host.capacity, HIDDEN), dtype, seed=581)}
    arrays = {key: arrays[key] for key in names}
    given = upload(gpu, arrays)
    upstream = inputs.normal(function(layout, **given).shape, dtype, seed=582)

    def loss(given: Any) -> Any:
        return (function(layout, **given) * upstream).astype(np.float32).sum()

    with jax.enable_x64(True), jax.default_device(jax.devices("cpu")[0]):
        on_cpu = jax.tree.map(jax.numpy.asarray, host)
        wide = {key: jax.numpy.asarray(array.astype(np.float64)) for key, array in arrays.items()}
        exact = jax.grad(lambda wide: (plain(name, on_cpu, wide) * upstream.astype(np.float64)).sum())(wide)
        want = {key: np.asarray(array) for key, array in exact.items()}
    gradient = jax.jit(jax.grad(loss))
    found = gradient(given)
    for key in names:
        step = ROUNDING[str(found[key].dtype)]
        got = np.asarray(found[key]).astype(np.float64)
        np.testing.assert_allclose(got, want[key], rtol=2 * step, atol=2 * step * abs(want[key]).max(), err_msg=key)
    for _ in range(20):
        for key, array in gradient(given).items():
            np.testing.assert_array_equal(np.asarray(array).view(np.uint8), np.asarray(found[key]).view(np.uint8))


def test_rows_without_a_pair_are_not_read(gpu: Any) -> None:
    jax, jnp = gpu.jax, gpu.jax.numpy
    layout = expert_layout(gpu.array(ids(70)), EXPERTS, alignment=8)
    y = jnp.where(layout.order[:, None] >= 0, gpu.array(inputs.normal((layout.capacity, HIDDEN))), jnp.nan)
    weights = gpu.array(inputs.normal((70, TOP_K), seed=1))
    by = jax.jit(jax.grad(lambda y, weights: (unpermute(y, layout, weights) ** 2).sum(), (0, 1)))(y, weights)
    assert np.isfinite(by[1]).all()
    assert not np.asarray(by[0])[np.asarray(layout.order) < 0].any()


# -- Streams and memory ------------------------------------------------------------------------------------------------


def test_layers_between_slow_operations(gpu: Any) -> None:
    """A wrong order gives wrong results: the input ends a long chain, and later operations read the results."""
    jax = gpu.jax
    square = gpu.array(np.eye(2048, dtype=np.float32))

    @jax.jit
    def chain(x: Any, indices: Any, square: Any) -> Any:
        for _ in range(20):
            square = square @ square
        layout = expert_layout(indices * square[0, 0].astype(np.int32), EXPERTS, alignment=4)
        rows = permute(x * square[1, 1], layout) * square[2, 2]
        return unpermute(rows * 2, layout, residual=x) + 1, layout

    for seed in range(5):
        indices = ids(500, seed=seed)
        x = (inputs.rng(583, seed).integers(-8, 9, (500, HIDDEN)) / 4).astype(np.float32)
        sums, layout = chain(gpu.array(x), gpu.array(indices), square)
        host = expert_layout(indices, EXPERTS, alignment=4)
        same_layout(layout, host)
        np.testing.assert_array_equal(sums, unpermute(permute(x, host) * 2, host, residual=x) + 1)


COMMAND_BUFFERS = """
import numpy as np
import jax, jax.numpy as jnp
from cupy_router import activation_topk, LayoutSpec, expert_layout, permute, unpermute
from tests.jax_calls import METHOD
from tests.jax_layouts import EXPERTS, arrays_of_rows, ids, same_layout

def layer(x, weights, indices):
    for _ in range(3):
        layout = expert_layout(indices, EXPERTS, alignment=4)
        x = unpermute(permute(x, layout), layout, weights, residual=x)
        indices = indices[::-1]
    plan = activation_topk(jnp.tile(x, 4), METHOD, layout=LayoutSpec())
    return x, layout, plan.layout

compiled = jax.jit(layer)
for n in (40, 4000):
    host = arrays_of_rows(n)
    for turn in range(15):
        x, weights, indices = host["x"], np.sign(host["weights"]), ids(n, seed=turn)
        held = [jnp.ones(100_000 * turn) for _ in range(turn % 3)]  # so that buffers move
        got = compiled(*map(jnp.asarray, (x, weights, indices)))
        want = x, None
        for step in range(3):
            layout = expert_layout(indices, EXPERTS, alignment=4)
            x = unpermute(permute(x, layout), layout, weights, residual=x)
            indices = np.ascontiguousarray(indices[::-1])
        np.testing.assert_array_equal(got[0], x)
        same_layout(got[1], layout)
        same_layout(got[2], activation_topk(np.tile(x, 4), METHOD, layout=LayoutSpec()).layout)
print("done", 0)
"""


@pytest.mark.parametrize("how", LAUNCHED_BY)
@pytest.mark.parametrize("flag", COMMAND_BUFFER_FLAGS[:2])
def test_with_command_buffers(flag: str, how: str) -> None:
    """By XLA's choice and wherever possible. Kernels of many pairs use memory of their own, and are not captured."""
    on_gpu("jax")
    assert printed(COMMAND_BUFFERS, flag, how) == 0


# -- Experts -----------------------------------------------------------------------------------------------------------


def test_experts_by_ragged_dot(gpu: Any) -> None:
    """A layer of experts and its gradients are those of the CPU."""
    jax = gpu.jax
    method = RoutingMethod(EXPERTS, TOP_K, "sigmoid")
    shapes = {"x": (33, 16), "gate": (EXPERTS, 16), "up": (EXPERTS, 16, 16)}
    arrays = {name: inputs.normal(shape, seed=590 + i, scale=0.5) for i, (name, shape) in enumerate(shapes.items())}

    def loss(arrays: Any) -> Any:
        plan = dense_router(arrays["x"], arrays["gate"], method, layout=LayoutSpec())
        rows = jax.nn.silu(jax.lax.ragged_dot(permute(arrays["x"], plan.layout), arrays["up"], plan.layout.counts))
        return (unpermute(rows, plan.layout, plan.weights, residual=arrays["x"]) ** 2).sum()

    with jax.default_matmul_precision("highest"):
        got = jax.jit(jax.grad(loss))(upload(gpu, arrays))
        with jax.default_device(jax.devices("cpu")[0]):
            want = jax.jit(jax.grad(loss))({name: jax.numpy.asarray(array) for name, array in arrays.items()})
    for name in shapes:
        np.testing.assert_allclose(got[name], want[name], rtol=1e-4, atol=1e-4 * abs(np.asarray(want[name])).max())


def test_two_devices(gpu: Any) -> None:
    jax = gpu.jax
    devices = jax.devices("gpu")
    if len(devices) < 2:
        pytest.skip("needs two CUDA devices")
    spec = jax.sharding.PartitionSpec("tokens")
    mesh = jax.sharding.Mesh(np.array(devices[:2]), ("tokens",))
    x, indices = inputs.normal((64, HIDDEN)), ids(64)

    def layer(x: Any, indices: Any) -> Any:
        layout = expert_layout(indices, EXPERTS, alignment=4)
        return unpermute(permute(x, layout), layout, residual=x)

    mapped = jax.jit(jax.shard_map(layer, mesh=mesh, in_specs=spec, out_specs=spec))
    for _ in range(10):
        np.testing.assert_array_equal(mapped(x, indices), layer(x, indices))
