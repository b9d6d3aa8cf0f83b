# SPDX-License-Identifier: Apache-2.0
"""Device memory: no copy of an input, no allocation but the results, no leak.

What is free is asked of the whole device, so these tests are skipped where pytest-xdist runs others beside them.
"""

from __future__ import annotations

import gc
import os
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import pytest

from cupy_router import RoutingMethod, activation_topk, dense_router, hash_router, topk_select
from tests import frameworks, inputs, jax_calls
from tests.gpu.support import LAUNCHED_BY, NAMES, call, empty_out, launched_by, on_gpu, upload

pytestmark = pytest.mark.skipif("PYTEST_XDIST_WORKER" in os.environ, reason="tests beside this one take memory")

MIB = 2**20
ROWS, COLUMNS = 2**15, 2048  # 256 MiB of float32: a copy would be hard to overlook


def big_calls(gpu: Any) -> dict[str, Any]:
    """Return a call of every op on a large input with strided rows."""
    block = gpu.array(np.zeros((ROWS, COLUMNS + 16), np.float32))
    scores = block if hasattr(gpu, "jax") else block[:, :COLUMNS]
    method = RoutingMethod(scores.shape[1], 8, "sigmoid")
    ids = gpu.array(np.zeros(ROWS, np.int32))
    table = gpu.array(np.arange(8, dtype=np.int32)[None])
    weight = gpu.array(np.zeros((16, scores.shape[1]), np.float32))
    few = RoutingMethod(16, 8)
    return {
        "topk_select": lambda: topk_select(scores, 8),
        "topk_select of wide rows": lambda: topk_select(scores, 40),
        "activation_topk": lambda: activation_topk(scores, method),
        "hash_router": lambda: hash_router(ids, table, method, logits=scores),
        "hash_router of x": lambda: hash_router(ids, table, few, x=scores, weight=weight),
        "dense_router": lambda: dense_router(scores, weight, few),
        "dense_router prefill": lambda: dense_router(scores, weight, few, path="prefill"),
    }


def free_memory(cupy: Any) -> int:
    return int(cupy.cuda.runtime.memGetInfo()[0])


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("framework", tuple(frameworks.ON_GPU))
@pytest.mark.acceptance("no copy of an input")
def test_no_copy_is_made(framework: str, name: str, cupy: Any) -> None:
    """Pools keep freed memory, so their growth over a call shows even temporary allocations."""
    gpu = on_gpu(framework)
    enqueue = big_calls(gpu)[name]
    pool = cupy.get_default_memory_pool()
    enqueue()  # compiled and loaded
    gc.collect()
    cupy.cuda.Device().synchronize()
    pool.free_all_blocks()
    if framework == "torch":
        gpu.torch.cuda.empty_cache()
        gpu.torch.cuda.reset_peak_memory_stats()
        torch_before = gpu.torch.cuda.memory_allocated()
    reserved, free = pool.total_bytes(), free_memory(cupy)
    result = enqueue()
    cupy.cuda.Device().synchronize()
    size = sum(int(np.prod(a.shape)) * 4 for a in result)
    assert size == 2 * ROWS * result[1].shape[1] * 4
    slack = 8 * MIB  # frameworks reserve whole blocks
    assert pool.total_bytes() - reserved <= (0 if framework == "torch" else size + slack)
    assert free - free_memory(cupy) <= size + 24 * MIB
    if framework == "torch":
        assert gpu.torch.cuda.max_memory_allocated() - torch_before <= size + 2048


@contextmanager
def counted(cupy: Any) -> Iterator[list[int]]:
    """Record the sizes of all allocations from CuPy's pool."""
    sizes: list[int] = []

    class Hook(cupy.cuda.MemoryHook):  # type: ignore[misc]
        name = "Counter"

        def malloc_postprocess(self, **kwargs: Any) -> None:
            sizes.append(kwargs["size"])

    with Hook():
        yield sizes


@pytest.mark.parametrize("name", NAMES)
def test_a_warm_call_from_cupy_allocates_its_results_only(name: str, cupy: Any) -> None:
    gpu, case = on_gpu("cupy"), call(name)
    arrays = upload(gpu, case.arrays)
    out = empty_out(gpu, case(arrays))
    case(arrays, out=out)
    with counted(cupy) as sizes:
        for _ in range(20):
            case(arrays, out=out)
    assert sizes == []
    with counted(cupy) as sizes:
        result = case(arrays)
    assert len(sizes) == 1  # the results share a block
    assert sizes[0] <= sum(a.nbytes for a in result) + 2 * 256


@pytest.mark.parametrize("name", NAMES)
def test_a_warm_call_from_torch_allocates_its_results_only(name: str, cupy: Any) -> None:
    gpu, case = on_gpu("torch"), call(name)
    arrays = upload(gpu, case.arrays)
    out = empty_out(gpu, case(arrays))
    case(arrays, out=out)

    def allocations() -> int:
        return int(gpu.torch.cuda.memory_stats()["allocation.all.allocated"])

    before = allocations()
    with counted(cupy) as sizes:
        for _ in range(20):
            case(arrays, out=out)
        assert allocations() == before
        result = case(arrays)
    assert allocations() == before + len(result)
    assert sizes == []


@pytest.mark.parametrize("name", NAMES)
def test_a_warm_call_from_jax_allocates_its_results_only(name: str, cupy: Any) -> None:
    gpu, case = on_gpu("jax"), call(name)
    arrays = upload(gpu, case.arrays)
    gpu.jax.block_until_ready(case(arrays))
    before = gpu.device.memory_stats()
    with counted(cupy) as sizes:
        result = case(arrays)
    gpu.jax.block_until_ready(result)
    assert len(sizes) == 1  # the results share a block
    assert sizes[0] <= sum(a.nbytes for a in result) + 2 * 256
    if before is not None:
        assert gpu.device.memory_stats()["bytes_in_use"] <= before["bytes_in_use"] + sum(sizes)


@pytest.mark.parametrize("framework", tuple(frameworks.ON_GPU))
def test_memory_stays_flat(framework: str, cupy: Any) -> None:
    """Hundreds of calls, also on other streams: memory kept for running kernels is freed."""
    gpu = on_gpu(framework)
    calls = [(case, upload(gpu, case.arrays)) for case in (call(name, n=1000) for name in NAMES)]
    streams = [cupy.cuda.Stream(non_blocking=True) for _ in range(4)]

    def work() -> None:
        for turn in range(40):
            for case, arrays in calls:
                case(arrays)
                case(arrays, stream=streams[turn % 4])
        cupy.cuda.Device().synchronize()

    work()
    gc.collect()
    held = free_memory(cupy)
    for _ in range(4):
        work()
    gc.collect()
    assert held - free_memory(cupy) <= 64 * MIB


@pytest.mark.parametrize("how", LAUNCHED_BY)
def test_memory_stays_flat_inside_jax_jit(how: str, cupy: Any) -> None:
    gpu, case = on_gpu("jax"), jax_calls.calls(n=300)["dense_router prefill, padded"]
    arrays = upload(gpu, case.arrays)
    with launched_by(how, gpu.jax):
        compiled = gpu.jax.jit(case.function)
        for _ in range(20):
            gpu.jax.block_until_ready(compiled(**arrays))
        held = free_memory(cupy)
        for _ in range(300):
            gpu.jax.block_until_ready(compiled(**arrays))
    assert held - free_memory(cupy) < 16 * MIB


@pytest.mark.parametrize("framework", ["cupy", "torch"])
def test_inputs_of_a_finished_call_are_freed(framework: str, cupy: Any) -> None:
    """After a call on another stream its inputs are kept until it is done, and then freed."""
    gpu = on_gpu(framework)
    stream = cupy.cuda.Stream(non_blocking=True)

    def used() -> int:
        return int(
            gpu.torch.cuda.memory_allocated()
            if framework == "torch"
            else gpu.cupy.get_default_memory_pool().used_bytes()
        )

    small = gpu.array(inputs.normal((4, 64)))
    topk_select(small, 2, stream=stream)
    before = used()
    large = gpu.array(np.zeros((ROWS, COLUMNS), np.float32))
    topk_select(large, 2, stream=stream)
    del large
    cupy.cuda.Device().synchronize()
    for _ in range(3):
        topk_select(small, 2, stream=stream)
        cupy.cuda.Device().synchronize()
    gc.collect()
    assert used() - before < 100 * MIB
