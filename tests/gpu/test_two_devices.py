# SPDX-License-Identifier: Apache-2.0
"""Tests of two GPUs: threads on both at once, streams of a device that is not current, graphs, gradients, XLA.

`pytest --backend=gpu tests/gpu -k "two_devices or second_device or not_current or another_current"` runs these and
those of the other files.
"""

from __future__ import annotations

import threading
from itertools import product
from typing import Any

import numpy as np
import pytest

from cupy_router import RoutingMethod, activation_topk, dense_router
from tests import compare, frameworks, inputs, oracle
from tests.gpu.support import METHOD, NAMES, Call, Raw, call, launched_by, on_gpu, spin, upload
from tests.gpu.test_streams import Streams
from tests.gpu.test_threads import THREADS, together

SPIN = 100  # milliseconds


@pytest.fixture(autouse=True)
def _both(cupy: Any) -> None:
    if cupy.cuda.runtime.getDeviceCount() < 2:
        pytest.skip("needs two CUDA devices")
    cupy.cuda.Device(0).use()  # XLA leaves the last of its devices current


def uploaded(framework: str, case: Call, device: int, cupy: Any) -> dict[str, Any]:
    gpu = on_gpu(framework)
    if framework == "torch":
        gpu = type(gpu)(f"cuda:{device}")
    if framework == "jax":
        return {name: gpu.jax.device_put(a, gpu.jax.devices("gpu")[device]) for name, a in case.arrays.items()}
    with cupy.cuda.Device(device):
        arrays = upload(gpu, case.arrays)
        cupy.cuda.Device().synchronize()
    return arrays


def device_of(array: Any) -> int:
    device = array.device
    return int(getattr(device, "index", None) or getattr(device, "id", None) or 0)


def check(framework: str, case: Call, result: Any, device: int, cupy: Any) -> None:
    assert [device_of(array) for array in result] == [device] * len(result)
    with cupy.cuda.Device(device):
        cupy.cuda.Device().synchronize()
        case.check(*map(on_gpu(framework).numpy, result))


# -- Threads -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("framework", tuple(frameworks.ON_GPU))
@pytest.mark.acceptance("8 threads at once")
def test_eight_threads_on_both(framework: str, cupy: Any) -> None:
    """Every thread alternates between devices without making one current, also on its own streams."""
    cases = [call(name, seed) for name in NAMES for seed in range(2)]
    arrays = {(i, device): uploaded(framework, case, device, cupy) for i, case in enumerate(cases) for device in (0, 1)}
    start = threading.Barrier(THREADS, timeout=60)

    def work(number: int) -> None:
        streams = []
        for device in (0, 1):
            with cupy.cuda.Device(device):
                streams.append(cupy.cuda.Stream(non_blocking=True))
        start.wait()
        for turn in range(40):
            at, device = (number + turn) % len(cases), (number + turn // 2) % 2
            given = {"stream": streams[device]} if turn % 3 == 0 else {}
            check(framework, cases[at], cases[at](arrays[at, device], **given), device, cupy)
            assert framework == "jax" or cupy.cuda.runtime.getDevice() == 0

    together(work)


@pytest.mark.acceptance("8 threads at once")
def test_eight_threads_compile_for_both(cupy: Any) -> None:
    """New kernels that both devices need at the same moment."""
    experts = 97  # no other test has this number
    logits = inputs.normal((17, experts))
    on_device = []
    for device in (0, 1):
        with cupy.cuda.Device(device):
            on_device.append(cupy.asarray(logits))
            cupy.cuda.Device().synchronize()
    start = threading.Barrier(THREADS, timeout=60)

    def work(number: int) -> None:
        for k in (3, 5):
            method = RoutingMethod(experts, k, "sigmoid")
            start.wait()
            result = activation_topk(on_device[number % 2], method)
            with cupy.cuda.Device(number % 2):
                cupy.cuda.Device().synchronize()
                got = oracle.Routing(cupy.asnumpy(result.weights), cupy.asnumpy(result.indices))
            compare.assert_routes(got, oracle.route(logits, method), logits, method)

    together(work)


# -- Streams -----------------------------------------------------------------------------------------------------------

HOW = ("current", "given", "as a handle")


@pytest.mark.parametrize(("framework", "name", "how"), [*product(("cupy", "torch"), NAMES, HOW)])
def test_a_busy_stream_of_the_second(framework: str, name: str, how: str, cupy: Any) -> None:
    """A slow producer on device 1, the call on its stream, device 0 current: a wrong order is a wrong result."""
    streams, right, wrong = Streams(framework), call(name, seed=0), call(name, seed=1)
    source, target, other = (uploaded(framework, case, 1, cupy) for case in (right, wrong, wrong))
    with cupy.cuda.Device(1):
        producer = streams.module.Stream(1) if streams.is_torch else streams.new()
        stream = Raw(streams.handle(producer))
        spin(0, stream)
        for given in ({}, {"stream": streams.handle(producer)}):
            for array in right(target, **given):
                streams.clone(array)
        with streams.use(producer):
            for key in target:
                streams.copy(target[key], other[key])
        streams.synchronize()
        with streams.use(producer):
            spin(SPIN, stream)
            for key in target:
                streams.copy(target[key], source[key])
    assert cupy.cuda.runtime.getDevice() == 0
    if how == "current" and streams.is_torch:
        with streams.use(producer), streams.module.device(0):  # a stream is current for its own device
            result = right(target)
    elif how == "current":
        with cupy.cuda.Device(1), producer, cupy.cuda.Device(0):
            result = right(target)
    else:
        result = right(target, stream=streams.handle(producer) if how == "as a handle" else producer)
    assert cupy.cuda.runtime.getDevice() == 0
    with cupy.cuda.Device(1):
        assert streams.busy(producer), "the host waited, so that order could not go wrong"
    check(framework, right, result, 1, cupy)


# -- PyTorch -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", NAMES)
def test_a_graph_of_the_second(name: str, cupy: Any) -> None:
    torch, case, later = on_gpu("torch").torch, call(name), call(name, seed=1)
    arrays = uploaded("torch", case, 1, cupy)
    case(arrays)
    with torch.cuda.device(1):
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            result = case(arrays)
    for key, array in uploaded("torch", later, 1, cupy).items():
        arrays[key].copy_(array)
    with torch.cuda.device(1):
        graph.replay()
    check("torch", later, result, 1, cupy)


@pytest.mark.parametrize("compiled", [False, True])
def test_gradients_on_the_second(compiled: bool, cupy: Any) -> None:
    torch = on_gpu("torch").torch
    torch.compiler.reset()

    def loss(x: Any, weight: Any) -> Any:
        return dense_router(x, weight, METHOD).weights.square().sum()

    x, weight = inputs.normal((33, 64), seed=260), inputs.normal((256, 64), seed=261)
    found = []
    for device in ("cuda:1", "cuda:0"):
        given = [torch.from_numpy(a).to(device).requires_grad_() for a in (x, weight)]
        function = torch.compile(loss, fullgraph=True) if compiled else loss
        found.append([g.cpu() for g in torch.autograd.grad(function(*given), given)])
    assert torch.cuda.current_device() == 0
    for second, first in zip(*found, strict=True):
        torch.testing.assert_close(second, first, rtol=1e-5, atol=1e-6)


# -- JAX ---------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("how", ["XLA", "handlers"])
@pytest.mark.parametrize("name", NAMES)
def test_one_program_on_either(name: str, how: str, cupy: Any) -> None:
    jax, case = on_gpu("jax").jax, call(name)
    with launched_by(how, jax):
        routed = jax.jit(lambda arrays: case(arrays))
        for device in (1, 0, 1):
            check("jax", case, routed(uploaded("jax", case, device, cupy)), device, cupy)


@pytest.mark.parametrize("how", ["XLA", "handlers"])
@pytest.mark.parametrize("n", [64, 2 * 2049])
def test_shard_map_over_both(n: int, how: str, cupy: Any) -> None:
    """Each device routes its tokens; gradients of replicated arrays are summed."""
    jax = on_gpu("jax").jax
    devices, spec = np.array(jax.devices("gpu")[:2]), jax.sharding.PartitionSpec
    mesh = jax.sharding.Mesh(devices, ("tokens",))
    logits, bias, scale = inputs.normal((n, 256)), inputs.normal((256,), scale=0.1), np.exp(inputs.normal((256,)))
    specs = {"in_specs": (spec("tokens"), spec(), spec()), "out_specs": spec("tokens")}

    def route(logits: Any, bias: Any, scale: Any) -> Any:
        return activation_topk(logits, METHOD, bias=bias, expert_scale=scale)

    with launched_by(how, jax):
        got = jax.jit(jax.shard_map(route, mesh=mesh, **specs))(logits, bias, scale)
        assert got.weights.sharding.device_set == set(devices)
        want = route(logits, bias, scale)
        np.testing.assert_array_equal(got.indices, want.indices)
        compare.assert_weights_close(np.asarray(got.weights), want.weights, 2e-6)

        def loss(logits: Any, scale: Any, routed: Any) -> Any:
            return (routed(logits, bias, scale).weights ** 2).sum()

        back = jax.jit(jax.grad(loss, argnums=(0, 1)), static_argnums=2)
        for a, b in zip(
            back(logits, scale, jax.shard_map(route, mesh=mesh, **specs)), back(logits, scale, route), strict=True
        ):
            np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5)
