# SPDX-License-Identifier: Apache-2.0
"""Layouts and rows on a GPU: the same bits under load, graphs, streams, memory, dtypes of every framework."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import ml_dtypes
import numpy as np
import pytest

from cupy_router import ExpertLayout, LayoutSpec, activation_topk, expert_layout, permute, presets, unpermute
from tests import inputs, oracle_layout
from tests.gpu.support import on_gpu, spin
from tests.gpu.test_graphs import capture, put
from tests.gpu.test_memory import counted
from tests.layout_calls import same_bytes
from tests.layout_inputs import hidden_states, uniform, zipf

ALL = oracle_layout.NAMES
REPEATS = 1000


@contextmanager
def busy_gpu(cupy: Any) -> Iterator[Callable[[], None]]:
    """Return what keeps other streams of the GPU busy with memory traffic and arithmetic."""
    streams = [cupy.cuda.Stream(non_blocking=True) for _ in range(3)]
    memory = [cupy.ones(2**24, np.float32) for _ in streams]

    def work() -> None:
        for stream, array in zip(streams, memory, strict=True):
            with stream:
                cupy.multiply(array, np.float32(1.0001), out=array)

    yield work
    cupy.cuda.Device().synchronize()


def assert_repeats(cupy: Any, call: Callable[[], tuple[Any, ...]], repeats: int = REPEATS) -> None:
    """Assert that each call gives the bytes of the first, compared on the GPU while other streams are busy."""
    first = [array.view(np.uint8).copy() for array in call()]
    different = cupy.zeros((), np.int64)
    with busy_gpu(cupy) as work:
        for turn in range(repeats):
            if turn % 4 == 0:
                work()
            for one, other in zip(first, call(), strict=True):
                different += (one != other.view(np.uint8)).sum()
    assert int(different) == 0


def arrays_of(layout: ExpertLayout) -> tuple[Any, ...]:
    return tuple(array for array in layout[:7] if array is not None)


@pytest.mark.parametrize(("n", "k", "experts"), [(1, 6, 256), (64, 8, 256), (1024, 6, 384), (8192, 8, 256)])
@pytest.mark.parametrize("alignment", [1, 128])
@pytest.mark.acceptance("layout: 100 bitwise repeats under load")
def test_a_layout_is_the_same_a_thousand_times_under_load(
    cupy: Any, n: int, k: int, experts: int, alignment: int
) -> None:
    ids = cupy.asarray(zipf(n, k, experts).astype(np.int32))
    assert_repeats(cupy, lambda: arrays_of(expert_layout(ids, experts, alignment=alignment, want=ALL)))


@pytest.mark.parametrize("n", [1, 64, 1024])
@pytest.mark.acceptance("layout: 100 bitwise repeats under load")
def test_a_router_gives_the_same_layout_under_load(cupy: Any, n: int) -> None:
    method = presets()["deepseek-v4-flash"]
    logits = cupy.asarray(inputs.normal((n, method.num_experts)))

    def call() -> tuple[Any, ...]:
        plan = activation_topk(logits, method, layout=LayoutSpec(16, None, ALL))
        return (plan.weights, plan.indices, *arrays_of(plan.layout))

    assert_repeats(cupy, call)


@pytest.mark.parametrize("n", [1, 64, 1024])
@pytest.mark.acceptance("rows: 100 bitwise repeats under load")
def test_rows_and_sums_are_the_same_under_load(cupy: Any, n: int) -> None:
    layout = expert_layout(cupy.asarray(zipf(n, 6, 256).astype(np.int32)), 256)
    x, weights = (cupy.asarray(inputs.normal(shape)) for shape in ((n, 1000), (n, 6)))
    y = permute(x, layout, weights=weights)
    assert_repeats(cupy, lambda: (permute(x, layout, weights=weights), unpermute(y, layout, weights)), 200)


# -- Graphs and streams ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("n", [5, 64, 3000])
@pytest.mark.parametrize("framework", ["cupy", "torch"])
@pytest.mark.acceptance("layout: graph replay with indices and num_valid changed in place")
def test_a_captured_layout_follows_its_inputs(framework: str, n: int) -> None:
    """And its load counts every replay."""
    gpu, experts = on_gpu(framework), 60
    ids, count = gpu.array(uniform(n, 6, experts).astype(np.int32)), gpu.array(np.full(1, n, np.int32))
    load = gpu.array(np.zeros(experts, np.int64))
    layout, replay = capture(
        gpu, lambda: expert_layout(ids, experts, alignment=8, num_valid=count, load=load, want=ALL)
    )
    put(gpu, load, np.zeros(experts, np.int64))
    total = np.zeros(experts, np.int64)
    for seed, valid in enumerate((n, 0, n // 2, n + 3, -1)):
        host = uniform(n, 6, experts, seed).astype(np.int32)
        put(gpu, ids, host)
        put(gpu, count, np.full(1, valid, np.int32))
        replay()
        rows = min(max(valid, 0), n)
        right = oracle_layout.expert_layout(host, experts, alignment=8, num_valid=rows, want=ALL)
        for name, array in right.items():
            np.testing.assert_array_equal(gpu.numpy(getattr(layout, name)), array)
        total += right["counts"]
        np.testing.assert_array_equal(gpu.numpy(load), total)


@pytest.mark.parametrize("framework", ["cupy", "torch"])
@pytest.mark.acceptance("layout: graph replay of a layer")
def test_a_captured_layer_follows_its_inputs(framework: str) -> None:
    """From logits to rows and back, in one graph."""
    gpu, n, method = on_gpu(framework), 64, presets()["deepseek-v4-flash"]
    logits, x = gpu.array(inputs.normal((n, method.num_experts))), gpu.array(hidden_states((n, 136), np.float32))

    def layer() -> tuple[Any, Any]:
        plan = activation_topk(logits, method, layout=LayoutSpec(16))
        return plan, unpermute(permute(x, plan.layout), plan.layout)

    (plan, back), replay = capture(gpu, layer)
    for seed in (1, 2):
        host = hidden_states((n, 136), np.float32, seed)
        put(gpu, logits, inputs.normal((n, method.num_experts), seed=seed))
        put(gpu, x, host)
        replay()
        right = oracle_layout.expert_layout(gpu.numpy(plan.indices), method.num_experts, alignment=16)
        for name, array in right.items():
            np.testing.assert_array_equal(gpu.numpy(getattr(plan.layout, name)), array)
        np.testing.assert_array_equal(gpu.numpy(back), method.top_k * host)


@pytest.mark.parametrize("n", [5, 64, 3000])
@pytest.mark.parametrize("framework", ["cupy", "torch"])
def test_layouts_and_rows_on_a_given_stream(framework: str, n: int, cupy: Any) -> None:
    """All calls follow a slow producer on that stream, and the scratch memory of each stream is its own."""
    gpu = on_gpu(framework)
    streams = [cupy.cuda.Stream(non_blocking=True) for _ in range(3)]
    host = [uniform(n, 6, 256, seed).astype(np.int32) for seed in range(len(streams))]
    ids = [gpu.array(array) for array in host]
    x = gpu.array(hidden_states((n, 72), np.float32))
    expert_layout(ids[0], 256, want=ALL)  # compiled
    spin(0)
    cupy.cuda.Device().synchronize()
    found = []
    for stream, array in zip(streams, ids, strict=True):
        spin(20, stream)
        layout = expert_layout(array, 256, want=ALL, stream=stream)
        rows = permute(x, layout, stream=stream)
        found.append((layout, unpermute(rows, layout, stream=stream)))
        del rows
    cupy.cuda.Device().synchronize()
    for array, (layout, back) in zip(host, found, strict=True):
        for name, right in oracle_layout.expert_layout(array, 256, want=ALL).items():
            np.testing.assert_array_equal(gpu.numpy(getattr(layout, name)), right)
        np.testing.assert_array_equal(gpu.numpy(back), 6 * gpu.numpy(x))


# -- Memory ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("n", [1, 64, 3000])
@pytest.mark.parametrize("framework", ["cupy", "torch"])
def test_a_warm_call_with_out_allocates_nothing(framework: str, n: int, cupy: Any) -> None:
    gpu = on_gpu(framework)
    ids, x = gpu.array(uniform(n, 6, 256).astype(np.int32)), gpu.array(inputs.normal((n, 64)))
    layout = expert_layout(ids, 256, want=ALL)
    rows = permute(x, layout)
    sums = unpermute(rows, layout)

    def work() -> None:
        assert expert_layout(ids, 256, want=ALL, out=layout) is layout
        assert permute(x, layout, out=rows) is rows
        assert unpermute(rows, layout, out=sums) is sums

    def of_torch() -> int:
        return int(gpu.torch.cuda.memory_stats()["allocation.all.allocated"]) if framework == "torch" else 0

    work()
    before = of_torch()
    with counted(cupy) as allocated:
        for _ in range(20):
            work()
    assert allocated == []
    assert of_torch() == before


@pytest.mark.parametrize("framework", ["cupy", "torch", "jax"])
def test_a_warm_call_lets_no_wrong_argument_pass(framework: str) -> None:
    gpu, ids = on_gpu(framework), uniform(9, 2, 7).astype(np.int32)
    on_host, layout = expert_layout(ids, 7), expert_layout(gpu.array(ids), 7)
    x = gpu.array(inputs.normal((9, 8)))
    rows = permute(x, layout)
    unpermute(rows, layout)
    for said, call in (
        ("x .*layout.order .*cpu", lambda: permute(x, on_host)),
        ("y .*layout.positions .*cpu", lambda: unpermute(rows, on_host)),
        ("x must have a row for each of the 9 tokens", lambda: permute(x[:8], layout)),
        ("y must have the 18 rows of the layout", lambda: unpermute(rows[:17], layout)),
        ("layout.positions must have shape", lambda: permute(x[:8], layout._replace(positions=layout.positions[:8]))),
        (r"out\.num_tokens must be 8 or None, got 9", lambda: expert_layout(gpu.array(ids[:8]), 7, out=layout)),
    ):
        if framework == "jax" and said.startswith("out"):
            continue  # refused as it is
        with pytest.raises(ValueError, match=said):
            call()


# -- Sizes -------------------------------------------------------------------------------------------------------------


@pytest.fixture
def memory(cupy: Any) -> Any:
    pool = cupy.get_default_memory_pool()
    pool.free_all_blocks()
    yield lambda gib: cupy.cuda.runtime.memGetInfo()[0] >= gib * 2**30 or pytest.skip(f"needs {gib} GiB free")
    pool.free_all_blocks()


def assert_sorted(cupy: Any, ids: Any, layout: ExpertLayout) -> None:
    """Assert what a layout of alignment 1 without ids outside is, in pieces: a stable order, and its inverse."""
    flat, positions = ids.reshape(-1), layout.positions.reshape(-1)
    counts, step = cupy.zeros(256, np.int64), 2**26
    for begin in range(0, flat.size, step):
        counts += cupy.bincount(flat[begin : begin + step], minlength=256)
        order = layout.order[begin : begin + step + 1]
        experts = flat[order]
        after = (experts[1:] > experts[:-1]) | ((experts[1:] == experts[:-1]) & (order[1:] > order[:-1]))
        assert bool(after.all())
        assert bool((positions[order] == cupy.arange(begin, begin + order.size)).all())
    assert bool((layout.counts == counts).all())


@pytest.mark.parametrize("num_pairs", [pytest.param(40_000_000, id="40M"), pytest.param(2**31 - 8, id="2**31 - 8")])
@pytest.mark.acceptance("layout: as many pairs as int32 counts")
def test_as_many_pairs_as_int32_counts(cupy: Any, memory: Any, num_pairs: int) -> None:
    memory(60 if num_pairs > 2**30 else 4)
    ids = cupy.empty((num_pairs // 8, 8), np.uint8)
    tokens = cupy.arange(len(ids), dtype=np.int64) * 2654435761
    for slot in range(8):
        ids[:, slot] = (tokens >> (3 * slot)) & 255
    del tokens
    layout = expert_layout(ids, 256)
    assert layout.capacity == num_pairs
    assert_sorted(cupy, ids, layout)


@pytest.mark.parametrize("dtype", ["uint8", "bfloat16"])
@pytest.mark.acceptance("rows: more than 2**31 elements")
def test_more_elements_than_31_bits(cupy: Any, memory: Any, dtype: str) -> None:
    memory(40)
    n, hidden, experts = 2**15 + 300, 2**16 + 8, 7
    ids = uniform(n, 1, experts).astype(np.int32)
    layout = expert_layout(cupy.asarray(ids), experts)
    order = layout.order
    x = cupy.zeros((n, hidden), DTYPE[dtype])
    x[:, -1] = x[:, 0] = (cupy.arange(n) % 128).astype(x.dtype)
    rows = permute(x, layout)
    assert rows.size > 2**31
    for column in (0, -1):
        assert bool((rows[:, column] == x[order, column]).all())
    assert not bool(rows[:, 1:-1].any())
    if dtype == "bfloat16":
        del x
        back = unpermute(rows, layout)
        assert bool((back[:, -1] == (cupy.arange(n) % 128).astype(back.dtype)).all())
        assert not bool(back[:, 1:-1].any())


DTYPE: dict[str, Any] = {"uint8": np.uint8, "bfloat16": ml_dtypes.bfloat16}


# -- Dtypes ------------------------------------------------------------------------------------------------------------

BYTES = (
    "bool", "int8", "uint8", "int16", "int32", "int64", "float16", "float32", "float64", "complex64", "bfloat16",
    "float8_e4m3fn", "float8_e5m2",
)  # fmt: skip


def any_bytes(name: str) -> np.ndarray:
    dtype = np.dtype(getattr(ml_dtypes, name, name))
    high = 2 if name == "bool" else 127
    return inputs.rng(450).integers(0, high, (9, 40 * dtype.itemsize)).astype(np.uint8).view(dtype)


@pytest.mark.parametrize("name", BYTES)
@pytest.mark.acceptance("rows: any dtype as bytes")
def test_torch_moves_any_dtype(name: str) -> None:
    gpu, x = on_gpu("torch"), any_bytes(name)
    if not hasattr(gpu.torch, name):
        pytest.skip(f"this PyTorch has no {name}")
    tensor = gpu.torch.from_numpy(x.view(np.uint8)).cuda().view(getattr(gpu.torch, name))
    layout = expert_layout(gpu.array(uniform(9, 2, 7).astype(np.int32)), 7, alignment=4)
    rows = permute(tensor, layout)
    assert rows.dtype == tensor.dtype
    right = oracle_layout.permute(x, gpu.numpy(layout.order), 2)
    assert rows.view(gpu.torch.uint8).cpu().numpy().tobytes() == right.tobytes()


@pytest.mark.parametrize("name", [name for name in BYTES if name not in ("int64", "float64")])
@pytest.mark.parametrize("traced", [False, True])
@pytest.mark.acceptance("rows: any dtype as bytes")
def test_jax_moves_any_dtype(name: str, traced: bool) -> None:
    gpu, x = on_gpu("jax"), any_bytes(name)
    layout = expert_layout(gpu.array(uniform(9, 2, 7).astype(np.int32)), 7, alignment=4)
    move = gpu.jax.jit(permute) if traced else permute
    rows = move(gpu.array(x), layout)
    assert rows.dtype == x.dtype
    same_bytes(np.asarray(rows), oracle_layout.permute(x, gpu.numpy(layout.order), 2))
