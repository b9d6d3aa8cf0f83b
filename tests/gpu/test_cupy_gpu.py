# SPDX-License-Identifier: Apache-2.0
"""CuPy's allocators and current devices: pools, stream-ordered memory, none; graphs with each."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest

from cupy_router import topk_select
from tests import inputs
from tests.gpu.support import NAMES, call, on_gpu, spin, upload


@pytest.fixture(params=["pool", "stream-ordered pool", "managed memory", "no pool"])
def allocator(request: pytest.FixtureRequest, cupy: Any) -> Iterator[str]:
    before = cupy.cuda.get_allocator()
    chosen = {
        "pool": cupy.cuda.MemoryPool().malloc,
        "stream-ordered pool": cupy.cuda.MemoryAsyncPool().malloc,
        "managed memory": cupy.cuda.MemoryPool(cupy.cuda.malloc_managed).malloc,
        "no pool": None,
    }[request.param]
    cupy.cuda.set_allocator(chosen)
    yield request.param
    cupy.cuda.Device().synchronize()
    cupy.cuda.set_allocator(before)


@pytest.mark.parametrize("name", NAMES)
def test_every_allocator(allocator: str, name: str, cupy: Any) -> None:
    """Results are freed and made again while a stream is busy, where memory reused too early would show."""
    gpu, case = on_gpu("cupy"), call(name)
    arrays = upload(gpu, case.arrays)
    case(arrays)
    spin(0)
    cupy.cuda.Device().synchronize()
    stream = cupy.cuda.Stream(non_blocking=True)
    with stream:
        spin(50, stream)
        kept = [case(arrays) for _ in range(10)][::3]
        kept += [case(arrays, stream=stream) for _ in range(2)]
        if allocator in ("pool", "stream-ordered pool"):
            assert not stream.done, "a call waited"
    stream.synchronize()
    for result in kept:
        case.check(*map(gpu.numpy, result))


@pytest.mark.parametrize("name", ["activation_topk", "dense_router"])
def test_a_graph_with_every_allocator(allocator: str, name: str, cupy: Any) -> None:
    """Results of a captured call need memory that capture permits: a warm pool's, or preallocated."""
    gpu, case = on_gpu("cupy"), call(name)
    arrays = upload(gpu, case.arrays)
    out = case(arrays)
    stream = cupy.cuda.Stream(non_blocking=True)
    cupy.cuda.Device().synchronize()
    with stream:
        case(arrays, out=out)
        stream.synchronize()
        stream.begin_capture()
        case(arrays, out=out)
        graph = stream.end_capture()
        for array in out:
            array.fill(77)
        graph.launch(stream)
    stream.synchronize()
    case.check(*map(gpu.numpy, out))


def test_under_another_current_device(cupy: Any) -> None:
    """`with cupy.cuda.Device(1)` around a call on arrays of device 0, and the other way round."""
    if cupy.cuda.runtime.getDeviceCount() < 2:
        pytest.skip("needs two CUDA devices")
    gpu = on_gpu("cupy")
    for name in NAMES:
        case = call(name)
        for where, current in ((0, 1), (1, 0), (1, 1)):
            with cupy.cuda.Device(where):
                arrays = upload(gpu, case.arrays)
                cupy.cuda.Device().synchronize()
            with cupy.cuda.Device(current):
                result = case(arrays)
                assert cupy.cuda.runtime.getDevice() == current
            assert all(a.device.id == where for a in result)
            with cupy.cuda.Device(where):
                cupy.cuda.Device().synchronize()
                case.check(*map(gpu.numpy, result))


def test_a_subclass_counts_as_its_array(cupy: Any) -> None:
    class Plain(cupy.ndarray):  # type: ignore[misc,name-defined]
        pass

    host = inputs.normal((5, 40))
    scores = Plain(host.shape, cupy.float32)
    scores.set(host)
    assert type(scores) is Plain
    result = topk_select(scores, 3)
    assert [type(array) for array in result] == [cupy.ndarray] * 2
    assert (result.indices.get() == topk_select(host, 3).indices).all()
