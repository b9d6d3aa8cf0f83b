# SPDX-License-Identifier: Apache-2.0
"""What the ops launch for arrays on a GPU, recorded: kernel, macros, grid, block and every argument by its name.

The arrays describe device memory that does not exist, so they may have any size. Of the macros, those
that define what is computed are checked; tuning is free, as long as every row has its threads.
"""

from __future__ import annotations

import math
import threading
from collections.abc import Hashable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import pytest

from cupy_router import Routing, RoutingMethod, TopK, activation_topk, dense_router, hash_router, topk_select
from cupy_router.arrays import FRAMEWORKS, ITEM_SIZES, Framework, Output, View
from cupy_router.ops import _run
from cupy_router.ops._method import method_arguments
from tests.recorder import Launch, Recorder, recording

HEAP = 1 << 40  # results of the fake framework lie from here on


@dataclass(frozen=True)
class Array:
    """An array in device memory with `row_stride` elements from row to row, dense by default."""

    pointer: int
    shape: tuple[int, ...]
    dtype: str = "float32"
    row_stride: int | None = None
    device: int = 0

    @property
    def strides(self) -> tuple[int, ...]:
        if len(self.shape) < 2:
            return (1,) * len(self.shape)
        return (self.shape[1] if self.row_stride is None else self.row_stride, 1)


class Fake(Framework):
    """The framework of these arrays. `stream` is its current stream, `entered` the streams it was switched to."""

    name = "fake"

    def __init__(self) -> None:
        self.stream = 77
        self.entered: list[int] = []
        self._lock = threading.Lock()
        self._end = HEAP

    def current_stream(self, array: Array) -> int:
        return self.stream

    def describe(self, array: Array, stream: int, owners: list[object]) -> tuple[int, Hashable]:
        return array.pointer, replace(array, pointer=array.pointer % 16)

    def view(self, name: str, array: Array, stream: int | None) -> View:
        return View(name, array.pointer, array.shape, array.strides, array.dtype, ("cuda", array.device), False, None)

    def allocator(self, outputs: Sequence[Output], like: Array) -> Any:
        def allocate(pointers: list[int]) -> tuple[Array, ...]:
            arrays = []
            for shape, dtype in outputs:
                with self._lock:
                    arrays.append(Array(self._end, shape, dtype, device=like.device))
                    self._end += math.prod(shape) * ITEM_SIZES[dtype] + 256
            pointers.extend(array.pointer for array in arrays)
            return tuple(arrays)

        return allocate

    @contextmanager
    def on_stream(self, stream: int, like: Array) -> Iterator[None]:
        self.entered.append(stream)
        yield


@pytest.fixture
def fake(monkeypatch: pytest.MonkeyPatch) -> Fake:
    framework = Fake()
    monkeypatch.setitem(FRAMEWORKS, Array, framework)
    monkeypatch.setattr(_run, "in_flight", [])  # of tests on a real GPU
    return framework


@pytest.fixture
def recorder(fake: Fake) -> Iterator[Recorder]:
    with recording("cuda") as recorder:
        yield recorder


def only(recorder: Recorder) -> Launch:
    (launch,) = recorder.launches
    return launch


def assert_kernel(launch: Launch, kernel: str, function: str, **macros: int) -> None:
    """Assert these macros; there may be others."""
    assert (launch.kernel, launch.function) == (kernel, function)
    assert launch.macros | macros == launch.macros


def assert_rows_share_warps(launch: Launch, n: int) -> None:
    """Assert LANES threads for each of n rows, and no superfluous block."""
    threads = launch.grid[0] * launch.block[0]
    assert (launch.grid[1:], launch.block[1:], launch.block[0] % 32) == ((1, 1), (1, 1), 0)
    assert threads - launch.block[0] < n * launch.macros["LANES"] <= threads


# -- Every argument of every kernel ------------------------------------------------------------------------------------


def test_topk_select(recorder: Recorder, fake: Fake) -> None:
    scores = Array(0x10000000000, (7, 256), "float16", row_stride=2**33)
    lengths, starts = Array(0x2004, (7,), "int32"), Array(0x3008, (7,), "int32")
    result = topk_select(scores, 8, lengths=lengths, starts=starts)
    launch = only(recorder)
    given = {"HAS_LENGTHS": 1, "HAS_STARTS": 1, "DENSE": 0}
    assert_kernel(launch, "topk_select", "topk_select", DTYPE=1, TOP_K=8, WHOLE_ROWS=0, ALIGNED=0, **given)
    assert_rows_share_warps(launch, 7)
    assert (launch.shared_bytes, launch.stream) == (0, 77)
    assert launch.arguments == {
        "scores": 0x10000000000, "lengths": 0x2004, "starts": 0x3008, "index_map": 0,
        "values": result.values.pointer, "indices": result.indices.pointer,
        "num_rows": 7, "num_columns": 256, "k": 8, "page_size": 1,
        "scores_stride": 2**33, "values_stride": 8, "indices_stride": 8, "map_stride": 0,
    }  # fmt: skip
    assert (result.values.shape, result.values.dtype) == ((7, 8), "float16")
    assert (result.indices.shape, result.indices.dtype) == ((7, 8), "int32")


METHOD = RoutingMethod(384, 6, "softmax", renormalize_min=0.25, scale=2.5)
# Of a method, those that METHOD leaves at their defaults; None reaches kernels as 0.
NUMBERS = {
    name: getattr(METHOD, name) or 0.0
    for name in method_arguments(None)
    if name not in ("renormalize_eps", "renormalize_min", "scale")
}


@pytest.mark.parametrize("columns", [384, 2000])
def test_activation_topk(recorder: Recorder, fake: Fake, columns: int) -> None:
    method = replace(METHOD, num_experts=columns)
    logits, bias = Array(0x1000, (33, columns), "bfloat16", row_stride=-5000), Array(0x2000, (columns,))
    num_valid = Array(0x3004, (1,), "int32")
    result = activation_topk(logits, method, bias=bias, num_valid=num_valid)
    launch = only(recorder)
    method_macros = {"NUM_EXPERTS": columns, "TOP_K": 6, "SCORE": 3, "RENORMALIZE": 1, "DTYPE": 2, "HAS_BIAS": 1}
    method_macros["HAS_NUM_VALID"] = 1
    if columns == 384:
        of_rows = {"ALIGNED": 1, "BIAS_ALIGNED": 1, "DENSE": 0}
        assert_kernel(launch, "activation_topk", "activation_topk", **method_macros, **of_rows)
        assert_rows_share_warps(launch, 33)
    else:
        assert_kernel(launch, "activation_topk_wide", "activation_topk_wide", **method_macros)
        assert (launch.grid, launch.block) == ((33, 1, 1), (256, 1, 1))
    assert launch.arguments == {
        "logits": 0x1000, "bias": 0x2000, "bias_index": 0, "logit_bias": 0, "expert_scale": 0,
        "given_experts": 0, "given_stride": 0, "num_valid": 0x3004,
        "replicas": 0, "replica_counts": 0, "replica_offset": 0,
        "weights": result.weights.pointer, "indices": result.indices.pointer,
        "num_valid_value": -1, "num_tokens": 33, "logits_stride": -5000, "weights_stride": 6, "indices_stride": 6,
        "logits_out": 0, "logits_out_stride": 0, "token_ids": 0,
        "renormalize_eps": 0.0, "renormalize_min": 0.25, "scale": 2.5, **NUMBERS,
    }  # fmt: skip


IDS, TABLE = Array(0x100, (33,), "int64"), Array(0x200, (1000, 6), "int32", row_stride=9)
HASH_ARGUMENTS = {
    "token_ids": 0x100, "table": 0x200, "logits": 0, "x": 0, "weight": 0, "logit_bias": 0, "expert_scale": 0,
    "num_valid": 0, "num_valid_value": -1, "logits_out": 0, "logits_out_stride": 0,
    "num_tokens": 33, "vocab_size": 1000, "hidden": 0, "table_stride": 9, "logits_stride": 0, "x_stride": 0,
    "weight_stride": 0, "weights_stride": 6, "indices_stride": 6, **NUMBERS,
}  # fmt: skip
HASH_MACROS = {"TOKEN_ID_BYTES": 8, "TABLE_BYTES": 4, "TOP_K": 6}


def assert_hash_arguments(launch: Launch, result: Routing, arguments: dict[str, Any]) -> None:
    results = {"weights": result.weights.pointer, "indices": result.indices.pointer}
    assert launch.arguments == HASH_ARGUMENTS | results | arguments


def test_hash_router_with_uniform_weights(recorder: Recorder, fake: Fake) -> None:
    result = hash_router(IDS, TABLE, num_valid=20)
    launch = only(recorder)
    assert_kernel(launch, "hash_router", "hash_router", **HASH_MACROS, NUM_EXPERTS=0, SOURCE=0)
    assert_rows_share_warps(launch, 33)
    numbers = {"num_valid_value": 20, "renormalize_eps": 0.0, "renormalize_min": -math.inf, "scale": 1.0}
    assert_hash_arguments(launch, result, numbers)


def test_hash_router_with_logits(recorder: Recorder, fake: Fake) -> None:
    method = RoutingMethod(256, 6, "sigmoid", renormalize=False, renormalize_eps=0.5, scale=3)
    logits = Array(0x300, (33, 256), "float16", row_stride=300)
    result = hash_router(IDS, TABLE, method, logits=logits)
    launch = only(recorder)
    method_macros = {"NUM_EXPERTS": 256, "SCORE": 1, "RENORMALIZE": 0}
    assert_kernel(launch, "hash_router", "hash_router", **HASH_MACROS, **method_macros, SOURCE=1, DTYPE=1)
    assert_rows_share_warps(launch, 33)
    more = {"logits": 0x300, "logits_stride": 300, "renormalize_eps": 0.5, "renormalize_min": -math.inf, "scale": 3.0}
    assert_hash_arguments(launch, result, more)


def test_hash_router_with_products(recorder: Recorder, fake: Fake) -> None:
    method = RoutingMethod(256, 6)
    x = Array(0x1000, (33, 4096), "float32", row_stride=4104)
    weight = Array(0x2000, (256, 4096), "bfloat16", row_stride=2**32)
    result = hash_router(IDS, TABLE, method, x=x, weight=weight)
    launch = only(recorder)
    method_macros = {"NUM_EXPERTS": 256, "SCORE": 2, "RENORMALIZE": 1}
    sources = {"SOURCE": 2, "DTYPE": 0, "WEIGHT_DTYPE": 2, "ALIGNED": 1}
    assert_kernel(launch, "hash_router", "hash_router", **HASH_MACROS, **method_macros, **sources)
    assert (launch.grid, launch.block) == ((33, 1, 1), (32 * launch.macros["WARPS"], 1, 1))
    more = {
        "x": 0x1000, "weight": 0x2000, "hidden": 4096, "x_stride": 4104, "weight_stride": 2**32,
        "renormalize_eps": 0.0, "renormalize_min": -math.inf, "scale": 1.0,
    }  # fmt: skip
    assert_hash_arguments(launch, result, more)


def test_dense_router_of_few_tokens() -> None:
    """On NumPy arrays, since the plan depends on the GPU's compute capability."""
    method = RoutingMethod(256, 6, renormalize_eps=0.25, scale=1.5)
    x = np.zeros((4, 600), np.float16)[:, :512]
    weight, bias = np.zeros((256, 512), np.float32), np.zeros(256, np.float32)
    with recording() as recorder:
        weights, indices = dense_router(x, weight, method, bias=bias, num_valid=3)
    launch = only(recorder)
    assert_kernel(
        launch, "dense_router_decode", "dense_router_decode", NUM_EXPERTS=256, TOP_K=6, SCORE=2, RENORMALIZE=1,
        HIDDEN=512, DTYPE=1, WEIGHT_DTYPE=0, HAS_BIAS=1, ALIGNED=1,
    )  # fmt: skip
    tiles = -(-256 // launch.macros["EXPERTS_PER_BLOCK"])
    groups = -(-4 // launch.macros["TOKENS"])
    assert launch.grid == (groups * tiles * launch.macros["SPLITS"], 1, 1)
    assert launch.block == (32 * launch.macros["WARPS"], 1, 1)
    counters, partials = launch.arguments["counters"], launch.arguments["partials"]
    assert launch.arguments == {
        "x": x.ctypes.data, "weight": weight.ctypes.data, "bias": bias.ctypes.data, "bias_index": 0, "logit_bias": 0,
        "expert_scale": 0, "given_experts": 0, "given_stride": 0, "num_valid": 0,
        "replicas": 0, "replica_counts": 0, "replica_offset": 0,
        "weights": weights.ctypes.data, "indices": indices.ctypes.data, "token_ids": 0, "logits_out": 0,
        "logits_out_stride": 0, "counters": counters, "partials": partials, "num_valid_value": 3,
        "num_tokens": 4, "x_stride": 600, "weight_stride": 512, "weights_stride": 6,
        "indices_stride": 6, "renormalize_eps": 0.25, "renormalize_min": -math.inf, "scale": 1.5, **NUMBERS,
    }  # fmt: skip
    assert partials % 16 == 0
    assert partials - counters >= 4 * groups


# -- Shapes of launches ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("n", [1, 2, 15, 16, 17, 1023, 1024, 1025, 8192, 70_000, 2**31 - 1, 2**31 + 5, 5 * 10**9])
@pytest.mark.parametrize("columns", [2, 8, 64, 256, 1000])
def test_few_lanes_are_idle(recorder: Recorder, fake: Fake, n: int, columns: int) -> None:
    topk_select(Array(0x1000, (n, columns)), 2)
    launch = only(recorder)
    threads, lanes = launch.grid[0] * launch.block[0], launch.macros["LANES"]
    assert launch.block[0] % 32 == 0
    assert lanes * launch.macros["PER_LANE"] >= columns
    assert threads - launch.block[0] < n * lanes <= threads
    assert launch.arguments["num_rows"] == n


@pytest.mark.parametrize("n", [1, 300, 2**31 - 1, 2**31, 10**10])
def test_wide_rows_have_a_block_each(recorder: Recorder, fake: Fake, n: int) -> None:
    activation_topk(Array(0x1000, (n, 2000)), RoutingMethod(2000, 6))
    assert only(recorder).grid[0] == min(n, 2**31 - 1)


def test_no_rows_launch_nothing(recorder: Recorder, fake: Fake) -> None:
    topk_select(Array(0, (0, 256)), 8)
    activation_topk(Array(0, (0, 384)), METHOD, num_valid=0)
    hash_router(Array(0, (0,), "int32"), TABLE)
    assert (recorder.launches, recorder.sources) == ([], [])


@pytest.mark.slow("seconds", every=4)
@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
@pytest.mark.parametrize("columns", [256, 384, 36])
def test_vector_loads_only_where_every_row_is_aligned(recorder: Recorder, fake: Fake, dtype: str, columns: int) -> None:
    """ALIGNED promises loads of up to 16 bytes: checked against every address that the kernel would read."""
    size = ITEM_SIZES[dtype]
    for offset in range(16 // size + 1):
        for padding in range(9):
            stride = columns + padding
            topk_select(Array(0x1000 + offset * size, (5, columns), dtype, row_stride=stride), 6)
            macros = recorder.launches[-1].macros
            word = next(bytes for bytes in (16, 8) if macros["PER_LANE"] * size % bytes == 0)
            starts = [0x1000 + (offset + row * stride) * size for row in range(5)]
            assert macros["ALIGNED"] == all(start % word == 0 for start in starts), (offset, padding)


@pytest.mark.parametrize("padded", [None, "logits", "weights", "indices"])
def test_strides_are_compiled_in_only_for_contiguous_rows(recorder: Recorder, fake: Fake, padded: str | None) -> None:
    def array(name: str, columns: int, dtype: str = "float32") -> Array:
        return Array(0x1000, (9, columns), dtype, row_stride=columns + 4 * (name == padded))

    out = Routing(array("weights", 6), array("indices", 6, "int32"))
    activation_topk(array("logits", 384), METHOD, out=out)
    assert only(recorder).macros["DENSE"] == (padded is None)
    top = TopK(array("weights", 6), array("indices", 6, "int32"))
    topk_select(array("logits", 384), 6, out=top)
    assert recorder.launches[-1].macros["DENSE"] == (padded is None)


# -- Calls -------------------------------------------------------------------------------------------------------------


def test_a_second_call_has_its_own_addresses_and_compiles_nothing(recorder: Recorder, fake: Fake) -> None:
    for pointer in (0x1000, 0x2000, 0x3000):
        result = topk_select(Array(pointer, (7, 256)), 8)
        assert recorder.launches[-1].arguments["scores"] == pointer
        assert recorder.launches[-1].arguments["values"] == result.values.pointer
    assert len(recorder.sources) == 1


def test_plans_of_different_calls_do_not_mix(recorder: Recorder, fake: Fake) -> None:
    """Calls that differ in one property, twice each and interleaved: every launch matches its own call."""
    for _ in range(2):
        for n in (7, 70_000):
            topk_select(Array(0x1000, (n, 256)), 8)
            assert recorder.launches[-1].arguments["num_rows"] == n
        for k in (8, 9):
            topk_select(Array(0x1000, (7, 256)), k)
            assert recorder.launches[-1].macros["TOP_K"] == k
        for stride in (256, 300):
            topk_select(Array(0x1000, (7, 256), row_stride=stride), 8)
            assert recorder.launches[-1].arguments["scores_stride"] == stride
        for offset in (0, 4):
            topk_select(Array(0x1000 + offset, (7, 256)), 8)
            assert recorder.launches[-1].macros["ALIGNED"] == (offset == 0)
        for dtype in (0, 1, 2):
            topk_select(Array(0x1000, (7, 256), ("float32", "float16", "bfloat16")[dtype]), 8)
            assert recorder.launches[-1].macros["DTYPE"] == dtype
        for scale in (1.0, 2.0):
            activation_topk(Array(0x1000, (7, 384)), replace(METHOD, scale=scale))
            assert recorder.launches[-1].arguments["scale"] == scale
        for number in (0, 5, 7, None):
            activation_topk(Array(0x1000, (7, 384)), METHOD, num_valid=number)
            assert recorder.launches[-1].arguments["num_valid_value"] == (-1 if number is None else number)
    assert len(recorder.launches) == 2 * 17
    kinds = {(launch.function, *sorted(launch.macros.items())) for launch in recorder.launches}
    assert len(recorder.sources) == len(kinds) < 10


def test_the_kernel_runs_on_the_device_of_the_arrays(recorder: Recorder, fake: Fake) -> None:
    for device in (0, 1, 0, 1):
        result = topk_select(Array(0x1000, (7, 256), device=device), 8)
        assert (recorder.launches[-1].device, result.values.device, recorder.current) == (device, device, 0)
    assert len(recorder.sources) == 2  # one for each device


class Stream:
    def __cuda_stream__(self) -> tuple[int, int]:
        return 0, 99


@pytest.mark.parametrize(("given", "handle"), [(None, 77), (0, 0), (77, 77), (12345, 12345), (Stream(), 99)])
def test_the_stream(recorder: Recorder, fake: Fake, monkeypatch: pytest.MonkeyPatch, given: Any, handle: int) -> None:
    """The framework's current stream unless another is given; then inputs are kept until the kernel has read them."""
    kept: list[Any] = []
    monkeypatch.setattr(_run, "keep_until_done", lambda owners, stream, device: kept.append((owners, stream, device)))
    scores = Array(0x1000, (7, 256))
    topk_select(scores, 8, stream=given)
    assert only(recorder).stream == handle
    another = handle != 77
    assert fake.entered == ([handle] if another else [])
    assert kept == ([([scores, None, None, None], handle, 0)] if another else [])


def test_eight_threads_never_mix_their_arguments(recorder: Recorder, fake: Fake) -> None:
    recorder.patience = 1e-3
    threads, calls = 8, 20
    start = threading.Barrier(threads)

    def work(number: int) -> None:
        start.wait()
        for call in range(calls):
            rows = 1 + number * calls + call
            activation_topk(Array(rows << 20, (rows, 384)), METHOD, num_valid=rows)

    workers = [threading.Thread(target=work, args=(number,)) for number in range(threads)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join(timeout=60)
    seen = [launch.arguments for launch in recorder.launches]
    assert sorted(arguments["num_tokens"] for arguments in seen) == list(range(1, 1 + threads * calls))
    for arguments in seen:
        assert arguments["num_valid_value"] == arguments["num_tokens"] == arguments["logits"] >> 20
    assert len({arguments["weights"] for arguments in seen}) == threads * calls
    assert len(recorder.sources) == 1
