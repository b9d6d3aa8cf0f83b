# SPDX-License-Identifier: Apache-2.0
"""Order without waiting: after a slow producer, on the caller's stream or a given one, with inputs freed at once."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

from cupy_router import topk_select
from tests import inputs
from tests.gpu.support import NAMES, Raw, call, empty_out, on_gpu, spin, upload

SPIN = 100  # milliseconds in which a call that does not wait has long returned


class Streams:
    """The same operations in PyTorch and CuPy."""

    def __init__(self, framework: str) -> None:
        self.gpu = on_gpu(framework)
        self.module: Any = self.gpu.torch.cuda if framework == "torch" else self.gpu.cupy.cuda
        self.is_torch = framework == "torch"

    def new(self) -> Any:
        return self.module.Stream() if self.is_torch else self.module.Stream(non_blocking=True)

    def use(self, stream: Any) -> Any:
        return self.module.stream(stream) if self.is_torch else stream

    def handle(self, stream: Any) -> int:
        return int(stream.cuda_stream if self.is_torch else stream.ptr)

    def busy(self, stream: Any) -> bool:
        return not (stream.query() if self.is_torch else stream.done)

    def copy(self, target: Any, source: Any) -> None:
        if self.is_torch:
            target.copy_(source)
        else:
            target[...] = source

    def clone(self, array: Any) -> Any:
        return array.clone() if self.is_torch else array.copy()

    def garbage(self, array: Any) -> Any:
        """Return another array of that size, filled with bytes 0x7B: no small index, no plausible number."""
        if self.is_torch:
            fresh = self.gpu.torch.empty_like(array)
            fresh.view(self.gpu.torch.uint8).fill_(0x7B)
        else:
            fresh = self.gpu.cupy.empty_like(array)
            fresh.view(np.uint8).fill(0x7B)
        return fresh

    def synchronize(self) -> None:
        self.gpu.torch.cuda.synchronize() if self.is_torch else self.gpu.cupy.cuda.Device().synchronize()


@pytest.fixture(params=["cupy", "torch"])
def streams(request: pytest.FixtureRequest) -> Streams:
    made = Streams(request.param)
    spin(0)
    return made


def warm(streams: Streams, name: str) -> tuple[Any, Any, dict[str, Any], dict[str, Any]]:
    """Return two calls of the same shapes and their arrays, with everything compiled."""
    right, wrong = call(name, seed=0), call(name, seed=1)
    source, target = upload(streams.gpu, right.arrays), upload(streams.gpu, wrong.arrays)
    right(target)
    right(target, stream=streams.new())
    streams.copy(streams.clone(next(iter(source.values()))), next(iter(source.values())))
    streams.garbage(next(iter(source.values())))
    streams.synchronize()
    return right, wrong, source, target


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.acceptance("after a slow producer on a stream of the caller's")
def test_after_a_slow_producer(streams: Streams, name: str) -> None:
    """Inputs become valid at the end of a busy stream: reading them earlier or elsewhere gives other values."""
    right, _, source, target = warm(streams, name)
    stream = streams.new()
    with streams.use(stream):
        spin(SPIN, stream)
        for key in target:
            streams.copy(target[key], source[key])
        begin = time.perf_counter()
        result = right(target)
        took = time.perf_counter() - begin
        assert streams.busy(stream), "the call waited for the GPU"
        assert took < SPIN / 2000
    stream.synchronize()
    right.check(*map(streams.gpu.numpy, result))


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("out", [False, True])
@pytest.mark.parametrize("given", ["object", "protocol", "handle"])
def test_on_a_given_stream(streams: Streams, name: str, given: str, out: bool) -> None:
    right, _, source, target = warm(streams, name)
    filled = {"out": empty_out(streams.gpu, right(source))} if out else {}
    stream = streams.new()
    streams.synchronize()
    with streams.use(stream):
        spin(SPIN, stream)
        for key in target:
            streams.copy(target[key], source[key])
    handle = streams.handle(stream)
    as_given: dict[str, Callable[[], Any]] = {
        "object": lambda: stream,
        "protocol": lambda: Raw(handle),
        "handle": lambda: handle,
    }
    result = right(target, stream=as_given[given](), **filled)
    assert streams.busy(stream), "the call waited for the GPU"
    stream.synchronize()
    right.check(*map(streams.gpu.numpy, result))


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("elsewhere", [False, True], ids=["on-the-current-stream", "on-a-given-stream"])
@pytest.mark.acceptance("inputs freed right after the call")
def test_inputs_are_freed_right_after_the_call(streams: Streams, name: str, elsewhere: bool) -> None:
    """The kernel waits on a busy stream while the memory of its inputs is freed and overwritten."""
    right, _, source, _ = warm(streams, name)
    side, other = streams.new(), streams.new()
    with streams.use(side):
        mine = {key: streams.clone(a) for key, a in source.items()}
        side.synchronize()
        busy = other if elsewhere else side
        spin(SPIN, busy)
        result = right(mine, stream=other) if elsewhere else right(mine)
        shapes = list(source.values())
        del mine
        garbage = [streams.garbage(a) for _ in range(20) for a in shapes]
        assert streams.busy(busy), "the garbage came too late to hurt"
    busy.synchronize()
    right.check(*map(streams.gpu.numpy, result))
    assert garbage


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.acceptance("100 bitwise repeats under load from another stream")
def test_repeats_under_load_from_another_stream(streams: Streams, name: str) -> None:
    case = call(name, n=200)
    arrays = upload(streams.gpu, case.arrays)
    first = list(map(streams.gpu.numpy, case(arrays)))
    case.check(*first)
    load, stream = streams.new(), streams.new()
    wide = streams.gpu.array(inputs.normal((400, 5000)))
    with streams.use(load):
        loads = [topk_select(wide, 600) for _ in range(100)]
    with streams.use(stream):
        results = [case(arrays) for _ in range(100)]
    streams.synchronize()
    assert len(loads) == 100
    for result in results:
        for a, b in zip(first, map(streams.gpu.numpy, result), strict=True):
            np.testing.assert_array_equal(b.view(np.uint8), a.view(np.uint8))


# -- JAX, whose streams nobody sees ------------------------------------------------------------------------------------


def slow(jax: Any) -> Any:
    """Return a jitted function that returns its argument after about a tenth of a second of matrix products."""
    numpy = jax.numpy

    @jax.jit  # type: ignore[untyped-decorator]
    def produce(arrays: dict[str, Any]) -> dict[str, Any]:
        matrix = jax.lax.fori_loop(
            0, 200, lambda _, m: numpy.tanh(m @ m), numpy.full((4096, 4096), 0.01, numpy.float32)
        )
        late = (matrix[0, 0] > 2).astype(numpy.int32)  # 0, which the compiler cannot know
        return {key: a + late.astype(a.dtype) for key, a in arrays.items()}

    return produce


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.acceptance("after a slow producer on a stream of the caller's", "inputs freed right after the call")
def test_jax_after_a_slow_producer_with_inputs_freed_at_once(name: str) -> None:
    gpu, case = on_gpu("jax"), call(name)
    source, produce = upload(gpu, case.arrays), slow(on_gpu("jax").jax)
    gpu.jax.block_until_ready(produce(source))
    gpu.jax.block_until_ready(case(source))
    begin = time.perf_counter()
    gpu.jax.block_until_ready(produce(source))
    duration = time.perf_counter() - begin
    assert duration > 0.02, "the producer is too fast to show anything"

    begin = time.perf_counter()
    late = produce(source)
    result = case(late)
    took = time.perf_counter() - begin
    del late
    garbage = [gpu.jax.numpy.full_like(a, 123) for _ in range(20) for a in source.values()]
    doubled = [a + a for a in result]  # consumed by XLA after our kernel
    case.check(*map(gpu.numpy, result))
    for a, b in zip(doubled, result, strict=True):
        np.testing.assert_array_equal(np.asarray(a), np.asarray(b) * 2)
    assert took < duration / 2, f"the call took {took:.3f} s of the producer's {duration:.3f} s: it waited for the GPU"
    assert garbage


def test_jax_results_after_the_inputs_are_gone() -> None:
    gpu = on_gpu("jax")
    for seed in range(50):
        case = call("activation_topk", seed=seed % 5)
        result = case(upload(gpu, case.arrays))
        garbage = [gpu.array(inputs.normal((65, 256), seed=7)) for _ in range(3)]
        case.check(*map(gpu.numpy, result))
        assert garbage
