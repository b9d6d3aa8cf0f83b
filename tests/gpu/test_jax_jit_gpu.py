# SPDX-License-Identifier: Apache-2.0
"""The ops inside jax.jit on a GPU: kernels on XLA's stream, from XLA's buffers, with the results of eager calls."""

from __future__ import annotations

import os
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from cupy_router import RoutingMethod, activation_topk, dense_router, topk_select
from tests import compare, inputs, oracle
from tests.gpu.support import COMMAND_BUFFER_FLAGS, LAUNCHED_BY, launched_by, on_gpu, printed, upload
from tests.gpu.support import NAMES as SUPPORTED
from tests.gpu.support import call as supported
from tests.jax_calls import METHOD, NAMES, SHARED, batch, calls, same_bits
from tests.methods import METHODS, layer_of


@pytest.fixture(scope="module", params=LAUNCHED_BY)
def gpu(request: pytest.FixtureRequest) -> Iterator[Any]:
    framework = on_gpu("jax")
    with launched_by(request.param, framework.jax):
        yield framework


BY_ITSELF = """
import jax, numpy as np
from cupy_router import activation_topk, topk_select
from cupy_router.jax import _lower_ptx
from tests.jax_calls import METHOD
program = jax.jit(lambda a: topk_select(activation_topk(a, METHOD).weights, 2)).lower(np.zeros((3, 32), np.float32))
print("done", program.as_text().count(f"custom_call @{_lower_ptx.TARGET}("))
"""


def test_xla_launches_without_a_handler() -> None:
    """Where XLA supports it: otherwise a fallback to handlers would go unnoticed."""
    if on_gpu("jax").jax.__version_info__ < (0, 11):
        pytest.skip("not measured with this JAX")
    assert printed(BY_ITSELF, "", "XLA") == 2
    assert printed(BY_ITSELF, "", "handlers") == 0


# -- Results -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", inputs.FLOATS)
@pytest.mark.parametrize("name", SUPPORTED)
def test_results_are_right(gpu: Any, name: str, dtype: str) -> None:
    """Large calls, against the oracle."""
    case = supported(name, dtype=dtype)
    result = gpu.jax.jit(lambda arrays: case(arrays))(upload(gpu, case.arrays))
    assert all(array.devices() == {gpu.device} for array in result)
    case.check(*map(gpu.numpy, result))


@pytest.mark.parametrize("dtype", inputs.FLOATS)
@pytest.mark.parametrize("name", NAMES)
def test_a_traced_call_gives_what_an_eager_call_gives(gpu: Any, name: str, dtype: str) -> None:
    for n in (1, 9, 64, 65):
        call = calls(dtype, n)[name]
        if n <= 64 or "decode" not in name:
            arrays = upload(gpu, call.arrays)
            same_bits(gpu.jax.jit(call.function)(**arrays), call(arrays))


@pytest.mark.parametrize("name", NAMES)
def test_no_tokens(gpu: Any, name: str) -> None:
    call = calls(n=0)[name]
    result = gpu.jax.jit(call.function)(**upload(gpu, call.arrays))
    assert all(array.shape[0] == 0 for array in result)


@pytest.mark.parametrize("name", METHODS)
def test_every_step_of_a_method(gpu: Any, name: str) -> None:
    method, kind = METHODS[name], list(METHODS).index(name)
    logits = inputs.distinct(5, method.num_logits)
    layer = layer_of(method, kind)
    with gpu.jax.enable_x64(method.index_dtype == "int64"):
        routed = gpu.jax.jit(lambda logits, layer: activation_topk(logits, method, **layer))
        weights, indices = routed(gpu.array(logits), layer.arguments(gpu.array))
    compare.assert_right((np.asarray(weights), np.asarray(indices)), logits, method, layer)


@pytest.mark.parametrize("shared", [(), SHARED, ("num_valid",)], ids=str)
@pytest.mark.parametrize("name", NAMES)
def test_vmap_equals_a_loop_of_calls(gpu: Any, name: str, shared: tuple[str, ...]) -> None:
    call, size = calls()[name], 3
    axes = {key: None if key in shared else 0 for key in call.arrays}
    many = {key: a if key in shared else batch({key: a}, size)[key] for key, a in call.arrays.items()}
    each = [{key: a if axes[key] is None else a[i] for key, a in many.items()} for i in range(size)]
    results = [call(upload(gpu, arrays)) for arrays in each]
    want = type(results[0])(*(gpu.jax.numpy.stack(parts) for parts in zip(*results, strict=True)))
    mapped = gpu.jax.vmap(lambda arrays: call(arrays), in_axes=(axes,))
    same_bits(gpu.jax.jit(mapped)(upload(gpu, many)), want)


def test_num_valid_is_no_constant(gpu: Any) -> None:
    logits = gpu.array(inputs.normal((40, 32)))
    padded = gpu.jax.jit(lambda logits, count: activation_topk(logits, METHOD, num_valid=count))
    whole = activation_topk(logits, METHOD)
    for count in (0, 7, 40, 100, -3):
        got = padded(logits, np.int32(count))
        rows = min(max(count, 0), 40)
        np.testing.assert_array_equal(got.indices[:rows], whole.indices[:rows])
        assert (got.indices[rows:] == -1).all()
        assert (got.weights[rows:] == 0).all()


# -- Streams and memory ------------------------------------------------------------------------------------------------


def test_calls_between_slow_operations(gpu: Any) -> None:
    """A wrong order gives wrong results: the input ends a long chain, and later operations read the results."""
    jax = gpu.jax
    square = gpu.array(np.eye(2048, dtype=np.float32))

    @jax.jit
    def chain(logits: Any, square: Any) -> Any:
        for _ in range(20):
            square = square @ square
        weights, indices = activation_topk(logits * square[0, 0], METHOD)
        best = topk_select(weights * square[1, 1], 2)
        return weights, weights + 1, indices * 2, best

    for seed in range(10):
        logits = inputs.normal((500, 32), seed=300 + seed)
        weights, more, indices, best = chain(gpu.array(logits), square)
        want = oracle.route(logits, METHOD)
        np.testing.assert_array_equal(indices, want.indices * 2)
        compare.assert_weights_close(np.asarray(weights), want.weights, 2e-6)
        np.testing.assert_array_equal(more, np.asarray(weights) + 1)
        np.testing.assert_array_equal(best.indices, oracle.topk(np.asarray(weights), 2)[1])


def test_parts_of_arrays_at_any_offset(gpu: Any) -> None:
    """Kernels may assume buffers at multiples of 16 bytes, which XLA guarantees."""
    jax = gpu.jax
    method = RoutingMethod(32, 4)
    logits = inputs.normal((6, 3, 33), seed=310)
    whole = gpu.array(np.ascontiguousarray(logits[..., :32]))
    apart = gpu.array(logits)
    for start in (1, 2, 5):
        got = jax.jit(lambda a, start=start: activation_topk(a.reshape(-1)[start : start + 96].reshape(3, 32), method))
        same_bits(got(apart), activation_topk(gpu.array(logits.reshape(-1)[start : start + 96].reshape(3, 32)), method))
    for call in (
        lambda a: activation_topk(a[..., :32], method),
        lambda a: topk_select(a.reshape(-1)[1:].reshape(2, -1), 3),
    ):
        mapped = jax.jit(lambda arrays, call=call: jax.lax.map(call, arrays))(apart)
        for i, step in enumerate(apart):
            same_bits(type(mapped)(*(part[i] for part in mapped)), call(step))
    same_bits(jax.jit(lambda a: activation_topk(a[3], method))(whole), activation_topk(whole[3], method))


def test_the_host_does_not_wait(gpu: Any) -> None:
    jax = gpu.jax
    square = gpu.array(np.eye(8192, dtype=np.float32))

    @jax.jit
    def slow(square: Any, logits: Any) -> Any:
        for _ in range(30):
            square = square @ square
        return activation_topk(logits * square[0, 0], METHOD)

    logits = gpu.array(inputs.normal((64, 32)))
    jax.block_until_ready(slow(square, logits))
    begin = time.perf_counter()
    result = slow(square, logits)
    dispatched = time.perf_counter() - begin
    jax.block_until_ready(result)
    whole = time.perf_counter() - begin
    print(f"dispatched after {dispatched * 1e3:.2f} ms, ready after {whole * 1e3:.2f} ms")
    assert dispatched < whole / 3


def test_donated_arguments_and_inputs_that_are_kept(gpu: Any) -> None:
    jax = gpu.jax
    for name in ("activation_topk", "dense_router", "topk_select"):
        call = calls()[name]
        first = next(iter(call.arrays))
        rest = upload(gpu, {key: array for key, array in call.arrays.items() if key != first})
        want = call(upload(gpu, call.arrays))

        def both(given: Any, rest: Any, call: Any = call, first: str = first) -> Any:
            return call({first: given, **rest}), given * 2

        donated = jax.jit(both, donate_argnums=0)
        for _ in range(5):
            got, doubled = donated(gpu.array(call.arrays[first]), rest)
            same_bits(got, want)
            np.testing.assert_array_equal(doubled, call.arrays[first] * 2)
        for key, array in rest.items():
            np.testing.assert_array_equal(array, call.arrays[key])


COMMAND_BUFFERS = """
import numpy as np
import jax, jax.numpy as jnp
from cupy_router import activation_topk, dense_router, hash_router, topk_select
from cupy_router.ops import _cached
from tests.jax_calls import METHOD, calls, same_bits

found = calls(n=40)
arrays = {**found["hash_router of x, padded"].arrays, **found["dense_router"].arrays}
x, weight, ids, table = (jnp.array(arrays[name]) for name in ("x", "weight", "token_ids", "table"))

def model(x, weight, ids, table):
    found = []
    for i in range(6):
        logits = (x + i) @ weight.T  # exact, whatever XLA makes of it
        found += [activation_topk(logits, METHOD), hash_router(ids, table, METHOD, logits=logits)]
        found += [topk_select(found[-1].weights, 2)]
    return [*found, dense_router(x, weight, METHOD)]

asked = []
work_for = _cached.work_for
_cached.work_for = lambda *arguments: asked.append(1) or work_for(*arguments)
compiled = jax.jit(model)
for turn in range(30):
    x = jnp.roll(x, 1, axis=0)
    held = [jnp.ones(100_000 * turn) for _ in range(turn % 3)]  # so that buffers move
    for got, want in zip(compiled(x, weight, ids, table), model(x, weight, ids, table), strict=True):
        same_bits(got, want)
print("done", len(asked))
"""


@pytest.mark.parametrize("how", LAUNCHED_BY)
@pytest.mark.parametrize("flag", COMMAND_BUFFER_FLAGS)
def test_with_and_without_command_buffers(flag: str, how: str) -> None:
    """Command buffers by XLA's choice, wherever possible, and never. Captured handlers are not called again."""
    on_gpu("jax")
    calls = printed(COMMAND_BUFFERS, flag, how)
    print(f"{flag or 'by default'}: {calls} of {30 * 19} calls passed through the handlers")
    assert calls == 30 or how == "handlers"  # dense_router has memory of its own


CACHED = """
import jax, numpy as np
from cupy_router import activation_topk
from tests.jax_calls import METHOD, calls, same_bits

hits = []
jax.monitoring.register_event_listener(lambda event, **_: hits.append(event) if event.endswith("/cache_hits") else None)
logits = jax.device_put(calls(n=40)["activation_topk"].arrays["logits"])
routed = jax.jit(lambda a: activation_topk(a * 2, METHOD))
same_bits(jax.block_until_ready(routed(logits)), activation_topk(logits * 2, METHOD))
print("done", len(hits))
"""


@pytest.mark.parametrize("how", LAUNCHED_BY)
def test_programs_of_the_compilation_cache(how: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """One process loads what another compiled: kernels are included, handlers have names."""
    on_gpu("jax")
    monkeypatch.setenv("JAX_COMPILATION_CACHE_DIR", str(tmp_path))
    monkeypatch.setenv("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0")
    monkeypatch.setenv("JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES", "-1")
    assert printed(CACHED, "", how) == 0
    assert printed(CACHED, "", how) > 0


# -- Threads, devices, errors, time ------------------------------------------------------------------------------------


def test_eight_threads(gpu: Any) -> None:
    found = {name: calls(n=33)[name] for name in NAMES}
    compiled = {name: gpu.jax.jit(call.function) for name, call in found.items()}
    arrays = {name: upload(gpu, call.arrays) for name, call in found.items()}
    wanted = {name: call(arrays[name]) for name, call in found.items()}

    def work(turn: int) -> None:
        for name in (*NAMES[turn:], *NAMES[:turn]):
            for _ in range(10):
                same_bits(compiled[name](**arrays[name]), wanted[name])

    with ThreadPoolExecutor(8) as threads:
        for done in [threads.submit(work, turn) for turn in range(8)]:
            done.result(timeout=240)


def test_two_devices(gpu: Any) -> None:
    jax, jnp = gpu.jax, gpu.jax.numpy
    devices = jax.devices("gpu")
    if len(devices) < 2:
        pytest.skip("needs two CUDA devices")
    logits, weight = inputs.normal((64, 32)), jnp.array(calls()["dense_router"].arrays["weight"])
    want = oracle.route(logits, METHOD)
    for device in devices[:2]:
        got = jax.jit(lambda a: activation_topk(a, METHOD))(jax.device_put(logits, device))
        assert got.indices.devices() == {device}
        np.testing.assert_array_equal(got.indices, want.indices)
    mesh = jax.sharding.Mesh(np.array(devices[:2]), ("tokens",))
    spec = jax.sharding.PartitionSpec
    x = jnp.array(calls(n=200)["dense_router"].arrays["x"])
    sharded = jax.shard_map(
        lambda x, weight: dense_router(x, weight, METHOD), mesh=mesh,
        in_specs=(spec("tokens"), spec()), out_specs=spec("tokens"),
    )  # fmt: skip
    for _ in range(20):
        same_bits(jax.jit(sharded)(x, weight), dense_router(x, weight, METHOD))


def test_handler_errors_are_raised(gpu: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    from cupy_router.ops import _cached

    jax = gpu.jax
    scores = gpu.array(inputs.normal((3, 1700)))  # long rows have a handler always
    compiled = jax.jit(lambda a: topk_select(a, 2)).lower(scores).compile()

    def fail(*arguments: Any) -> None:
        raise RuntimeError("broken")

    with monkeypatch.context() as patch:
        patch.setattr(_cached, "work_for", fail)
        with pytest.raises(Exception, match="topk_select: RuntimeError: broken"):
            jax.block_until_ready(compiled(scores))
    same_bits(compiled(scores), topk_select(scores, 2))


def test_a_call_costs_little_more_than_an_addition(gpu: Any, request: pytest.FixtureRequest) -> None:
    """The limit is 30 us until ready, which handlers exceed."""
    if "PYTEST_XDIST_WORKER" in os.environ:
        pytest.skip("tests beside this one take its time")
    jax = gpu.jax
    method = RoutingMethod(256, 6)
    logits = gpu.array(inputs.normal((64, 256)))
    routed, added = jax.jit(lambda a: activation_topk(a, method)), jax.jit(lambda a: a + a)

    def microseconds(function: Any) -> float:
        best = float("inf")
        for _ in range(20):
            begin = time.perf_counter()
            for _ in range(50):
                jax.block_until_ready(function(logits))
            best = min(best, (time.perf_counter() - begin) / 50 * 1e6)
        return best

    call, addition = microseconds(routed), microseconds(added)
    print(f"activation_topk {call:.1f} us, addition {addition:.1f} us")
    assert call - addition < (60 if "handlers" in request.node.name else 30)
