# SPDX-License-Identifier: Apache-2.0
"""dense_router and Router on a GPU: cuBLAS, scratch memory of streams and graphs, torch.compile."""

from __future__ import annotations

import threading
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from cupy_router import Router, RoutingMethod, dense_router, gemm, scratch
from cupy_router.ops import _chunks
from tests import compare, inputs, oracle
from tests.backends import DTYPES
from tests.gpu.support import METHOD, call, on_gpu, spin, upload
from tests.gpu.test_graphs import capture, put

PATHS = ("dense_router", "dense_router prefill")


def test_cublas_is_available() -> None:
    """Without it the tests of the prefill path would test the decode kernel."""
    assert gemm.why_no_cublas() is None


@pytest.mark.parametrize("n", [65, 1025, 8192])
@pytest.mark.parametrize("dtype", inputs.FLOATS)
def test_cublas_logits_are_within_their_error_bound(n: int, dtype: str) -> None:
    """float32 is as exact as float32 sums, unlike tf32; 16-bit inputs are as exact as tensor cores."""
    gpu = on_gpu("cupy")
    experts, hidden = 64, 4096
    x, weight = inputs.normal((n, hidden), dtype, 130), inputs.normal((experts, hidden), dtype, 131, hidden**-0.5)
    method = RoutingMethod(experts, experts, "identity", renormalize=False)
    result = dense_router(gpu.array(x), gpu.array(weight), method, path="prefill")
    got, chosen = (gpu.numpy(a) for a in result)
    want = x.astype(np.float64) @ weight.astype(np.float64).T
    norms = np.linalg.norm(x.astype(np.float64), axis=1)[:, None] * np.linalg.norm(weight.astype(np.float64), axis=1)
    error = np.abs(got - np.take_along_axis(want, chosen.astype(np.int64), 1))
    assert (error / np.take_along_axis(norms, chosen.astype(np.int64), 1)).max() < (
        2e-6 if dtype == "float32" else 1e-5
    )


@pytest.mark.parametrize("name", PATHS)
@pytest.mark.parametrize("framework", ["cupy", "torch"])
def test_two_streams_at_once(framework: str, name: str, cupy: Any) -> None:
    """Each stream has its own scratch memory, so overlapping calls do not share it."""
    gpu = on_gpu(framework)
    cases = [call(name, seed) for seed in range(4)]
    arrays = [upload(gpu, case.arrays) for case in cases]
    streams = [cupy.cuda.Stream(non_blocking=True) for _ in cases]
    for case, given in zip(cases, arrays, strict=True):
        case(given)
    spin(0)
    cupy.cuda.Device().synchronize()
    for stream in streams:
        spin(5, stream)
    results = [
        [case(given, stream=stream) for _ in range(20)]
        for case, given, stream in zip(cases, arrays, streams, strict=True)
    ]
    cupy.cuda.Device().synchronize()
    for case, of_stream in zip(cases, results, strict=True):
        for result in of_stream:
            case.check(*map(gpu.numpy, result))


@pytest.mark.parametrize("name", PATHS)
def test_two_graphs_of_one_stream_replayed_at_once(name: str, cupy: Any) -> None:
    """Each capture has its own scratch memory, which replays on other streams do not share."""
    stream = cupy.cuda.Stream(non_blocking=True)
    captured = []
    for case in (call(name, seed) for seed in (0, 1)):
        arrays = {key: cupy.asarray(a) for key, a in case.arrays.items()}
        cupy.cuda.Device().synchronize()
        with stream:
            case(arrays)
            stream.synchronize()
            stream.begin_capture()
            results = [case(arrays) for _ in range(10)]
            captured.append((case, arrays, results, stream.end_capture()))
    others = [cupy.cuda.Stream(non_blocking=True) for _ in captured]
    for _ in range(5):
        for (*_, graph), other in zip(captured, others, strict=True):
            graph.launch(other)
    cupy.cuda.Device().synchronize()
    for case, _, results, _ in captured:
        for result in results:
            case.check(*(cupy.asnumpy(a) for a in result))


@pytest.mark.parametrize("name", PATHS)
def test_first_use_of_a_stream_under_capture(name: str, cupy: Any) -> None:
    """Kernels are compiled, but scratch memory and workspace are allocated while capturing."""
    case = call(name)
    arrays = {key: cupy.asarray(a) for key, a in case.arrays.items()}
    out = case(arrays)
    cupy.cuda.Device().synchronize()
    stream = cupy.cuda.Stream(non_blocking=True)
    with stream:
        stream.begin_capture()
        case(arrays, out=out)
        graph = stream.end_capture()
    for array in out:
        array.fill(0)
    cupy.cuda.Device().synchronize()
    graph.launch(stream)
    stream.synchronize()
    case.check(*(cupy.asnumpy(a) for a in out))


def test_each_capture_has_its_own_number(cupy: Any) -> None:
    stream = cupy.cuda.Stream(non_blocking=True)
    assert scratch.capture_of(stream.ptr) == 0
    assert scratch.capture_of(0) == 0
    numbers = []
    with stream:
        for _ in range(2):
            stream.begin_capture()
            numbers.append(scratch.capture_of(stream.ptr))
            assert scratch.capture_of(stream.ptr) == numbers[-1]
            stream.end_capture()
    assert 0 not in numbers
    assert numbers[0] != numbers[1]


@pytest.mark.parametrize("framework", ["cupy", "torch"])
def test_a_graph_in_chunks_with_another_num_valid(framework: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_chunks, "budget", lambda gpu: 16 * 32 * 4)
    gpu, method = on_gpu(framework), RoutingMethod(32, 5, scale=1.125)  # whose plans no other test has made
    x = (inputs.rng(132).integers(-8, 9, (70, 64)) / 8).astype(np.float32)
    weight = (inputs.rng(133).integers(-8, 9, (32, 64)) / 16).astype(np.float32)
    on_device, gate, count = gpu.array(x), gpu.array(weight), gpu.array(np.array([70], np.int32))
    result, replay = capture(gpu, lambda: dense_router(on_device, gate, method, path="prefill", num_valid=count))
    want = oracle.route(x @ weight.T, method)
    for valid in (70, 0, 15, 16, 17, 64, 69, 71, -1):
        put(gpu, count, np.array([valid], np.int32))
        replay()
        rows = min(max(valid, 0), 70)
        got = gpu.numpy(result.indices)
        np.testing.assert_array_equal(got[:rows], want.indices[:rows])
        assert (got[rows:] == -1).all()


def test_threads_on_one_stream(cupy: Any) -> None:
    """GEMM and selection of one call stay together, though all threads use the buffers of one stream."""
    cases = [call("dense_router prefill", seed) for seed in range(4)]
    given = [{key: cupy.asarray(a) for key, a in case.arrays.items()} for case in cases]
    failures: list[BaseException] = []

    def work(case: Any, arrays: dict[str, Any]) -> None:
        try:
            results = [case(arrays) for _ in range(50)]
            cupy.cuda.Device().synchronize()
            for result in results:
                case.check(*(cupy.asnumpy(a) for a in result))
        except BaseException as error:
            failures.append(error)

    threads = [threading.Thread(target=work, args=pair) for pair in zip(cases, given, strict=True)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert failures == []


@pytest.mark.parametrize("n", [1, 64, 300])
@pytest.mark.parametrize("hashed", [False, True])
def test_a_router_from_a_file_serves_every_framework(n: int, hashed: bool, tmp_path: Path) -> None:
    save = pytest.importorskip("safetensors.numpy").save_file
    x = (inputs.rng(134).integers(-8, 9, (n, 512)) / 16).astype(DTYPES["bfloat16"])
    weight = (inputs.rng(135).integers(-8, 9, (256, 512)) / 64).astype(DTYPES["bfloat16"])
    table = np.stack([inputs.rng(136, r).permutation(256)[:6] for r in range(50)])
    ids = inputs.rng(137, n).integers(0, 50, n).astype(np.int32)
    save({"gate.weight": weight, **({"gate.tid2eid": table} if hashed else {})}, tmp_path / "one.safetensors")
    router = Router.from_safetensors(tmp_path / "one.safetensors", "", METHOD)
    want = router(x, ids)
    for name in ("cupy", "torch", "jax"):
        gpu = on_gpu(name)
        got = router(gpu.array(x), gpu.array(ids))
        np.testing.assert_array_equal(gpu.numpy(got.indices), want.indices)
        compare.assert_weights_close(gpu.numpy(got.weights), want.weights, 2e-6)


@pytest.mark.parametrize("n", [5, 100])
def test_a_router_in_a_compiled_model(n: int) -> None:
    gpu = on_gpu("torch")
    torch = gpu.torch
    case = call("dense_router")
    arrays = upload(gpu, case.arrays)
    router = Router(METHOD, weight=arrays["weight"], bias=arrays["bias"])
    torch.compiler.reset()
    compiled = torch.compile(lambda x: router(x * 1), backend="aot_eager", fullgraph=True)
    x = arrays["x"].repeat(2, 1)[:n].contiguous()
    for got, want in zip(compiled(x), router(x), strict=True):
        assert torch.equal(got, want)
