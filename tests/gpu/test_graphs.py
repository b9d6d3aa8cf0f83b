# SPDX-License-Identifier: Apache-2.0
"""CUDA graphs of CuPy and PyTorch: captured once, replayed on other values, num_valid and lengths changed in place."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

from cupy_router import activation_topk, hash_router, topk_select
from tests import compare, inputs, oracle
from tests.gpu.support import METHOD, NAMES, call, empty_out, on_gpu, upload


def capture(gpu: Any, enqueue: Callable[[], Any]) -> tuple[Any, Callable[[], None]]:
    """Return the result of the captured call, and a function that replays it and waits."""
    if hasattr(gpu, "torch"):
        torch = gpu.torch
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            enqueue()
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            result = enqueue()

        def replay() -> None:
            graph.replay()
            torch.cuda.synchronize()

        return result, replay

    stream = gpu.cupy.cuda.Stream(non_blocking=True)
    with stream:
        enqueue()  # compiles, and leaves memory of the results' size in the pool
        stream.synchronize()
        stream.begin_capture()
        result = enqueue()
        recorded = stream.end_capture()

    def replay_cupy() -> None:
        gpu.cupy.cuda.Device().synchronize()
        recorded.launch(stream)
        stream.synchronize()

    return result, replay_cupy


def put(gpu: Any, target: Any, host: np.ndarray) -> None:
    """Write other values into the same memory."""
    if hasattr(gpu, "torch"):
        target.copy_(gpu.array(host))
    else:
        target[...] = gpu.array(host)


@pytest.mark.parametrize("out", [False, True], ids=["new-results", "out"])
@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("framework", ["cupy", "torch"])
@pytest.mark.acceptance("graph replay with lengths changed in place")
def test_replay_on_changed_inputs(framework: str, name: str, out: bool) -> None:
    """All inputs change between replays: scores, lengths, bias, token ids, the table."""
    gpu, first = on_gpu(framework), call(name)
    arrays = upload(gpu, first.arrays)
    filled = {"out": empty_out(gpu, first(arrays))} if out else {}
    result, replay = capture(gpu, lambda: first(arrays, **filled))
    for seed in (0, 1, 2, 0):
        case = call(name, seed)
        for key, host in case.arrays.items():
            put(gpu, arrays[key], host)
        replay()
        case.check(*map(gpu.numpy, result))


@pytest.mark.parametrize("shape", [(), (1,)])
@pytest.mark.parametrize("framework", ["cupy", "torch"])
@pytest.mark.acceptance("graph replay with num_valid changed in place")
def test_replay_with_another_num_valid(framework: str, shape: tuple[int, ...]) -> None:
    gpu, logits = on_gpu(framework), inputs.normal((40, 256))
    on_device, count = gpu.array(logits), gpu.array(np.full(shape, 40, np.int32))
    result, replay = capture(gpu, lambda: activation_topk(on_device, METHOD, num_valid=count))
    want = oracle.route(logits, METHOD)
    for valid in (40, 7, 0, 41, -3, 39):
        put(gpu, count, np.full(shape, valid, np.int32))
        replay()
        rows = min(max(valid, 0), 40)
        indices, weights = gpu.numpy(result.indices), gpu.numpy(result.weights)
        np.testing.assert_array_equal(indices[:rows], want.indices[:rows])
        assert (indices[rows:] == -1).all()
        assert (weights[rows:] == 0).all()


@pytest.mark.parametrize("framework", ["cupy", "torch"])
def test_a_graph_of_all_ops_in_a_row(framework: str) -> None:
    """Select from scores of another op in the same graph."""
    gpu, logits = on_gpu(framework), inputs.normal((33, 256))
    table = np.stack([inputs.rng(110, r).permutation(256)[:6] for r in range(50)]).astype(np.int32)
    ids = inputs.rng(111).integers(0, 50, 33).astype(np.int32)
    arrays = [gpu.array(a) for a in (logits, ids, table)]

    def enqueue() -> Any:
        routing = activation_topk(arrays[0], METHOD)
        best = topk_select(routing.weights, 2)
        return routing, best, hash_router(arrays[1], arrays[2], METHOD, logits=arrays[0])

    (routing, best, hashed), replay = capture(gpu, enqueue)
    for seed in range(3):
        logits = inputs.normal((33, 256), seed=112 + seed)
        put(gpu, arrays[0], logits)
        replay()
        got = oracle.Routing(gpu.numpy(routing.weights), gpu.numpy(routing.indices))
        compare.assert_routes(got, oracle.route(logits, METHOD), logits, METHOD)
        np.testing.assert_array_equal(gpu.numpy(best.indices), oracle.topk(got.weights, 2)[1])
        want = oracle.hash_route(ids, table, METHOD, logits)
        compare.assert_weights_close(gpu.numpy(hashed.weights), want.weights, 2e-6)


@pytest.mark.parametrize("framework", ["cupy", "torch"])
def test_a_graph_keeps_its_memory_from_others(framework: str) -> None:
    """Memory that the framework allocates between replays never overlaps a captured result."""
    gpu, case = on_gpu(framework), call("activation_topk")
    arrays = upload(gpu, case.arrays)
    result, replay = capture(gpu, lambda: case(arrays))
    for _ in range(20):
        other = [gpu.array(np.full(a.shape, 9, np.float32)) for a in result for _ in range(5)]
        replay()
        case.check(*map(gpu.numpy, result))
        assert all((gpu.numpy(a) == 9).all() for a in other)
