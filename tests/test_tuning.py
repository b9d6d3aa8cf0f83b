# SPDX-License-Identifier: Apache-2.0
"""Which table a GPU gets, what planners make of a GPU, and what a table has to hold."""

from __future__ import annotations

import re
import sys
from collections.abc import Callable, Iterator
from dataclasses import fields, is_dataclass, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from cupy_router import RoutingMethod, compiler, dense_router, topk_select, tuning
from cupy_router.cli import info
from cupy_router.ops import (
    _cached,
    _dense_clusters,
    _dense_decode,
    _expert_layout_launch,
    _row_lanes,
    _topk_select_long,
)
from cupy_router.ops._topk_select_cluster import ClusterShape
from cupy_router.ops._topk_select_long import LaunchShape
from cupy_router.ops.activation_topk import interleaved_lanes
from cupy_router.tuning import DEFAULT, Gpu, lookup
from cupy_router.tuning.schema import Family
from tests import inputs
from tests.backends import Backend
from tests.recorder import recording

ROOT = Path(__file__).parents[1]
SMALL = replace(DEFAULT, name="a quarter", multiprocessors=DEFAULT.multiprocessors // 4, shared_bytes=100 << 10)


@pytest.fixture
def tables(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[Callable[[str], None]]:
    """A function that drops a table, that of sm_90 under another name, into a folder that holds no other."""
    monkeypatch.setattr(tuning, "__path__", [str(tmp_path)])

    def drop(name: str) -> None:
        text = "from dataclasses import replace\nfrom cupy_router.tuning.sm_90 import TABLE as BASE\n"
        (tmp_path / f"{name}.py").write_text(f'{text}TABLE = replace(BASE, architecture="{name}")\n')
        lookup.nearest.cache_clear()

    lookup.nearest.cache_clear()
    yield drop
    lookup.nearest.cache_clear()
    for name in [name for name in sys.modules if re.fullmatch(r"cupy_router\.tuning\.sm_\d+", name)]:
        if sys.modules[name].__file__ == str(tmp_path / f"{name.rpartition('.')[2]}.py"):
            del sys.modules[name]


# -- Tables ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("capability", [(7, 5), (8, 0), (8, 6), (8, 9), (9, 0), (10, 0), (10, 3), (12, 0), (12, 1)])
def test_every_gpu_has_a_table(capability: tuple[int, int]) -> None:
    known = tuning.architectures()
    older = [name for other, name in known.items() if other <= capability]
    table = replace(DEFAULT, capability=capability).table
    assert table.architecture == (older or [*known.values()][:1])[-1]


@pytest.mark.parametrize(
    ("capability", "architecture"),
    [
        ((7, 5), "sm_80"),
        ((8, 0), "sm_80"),
        ((8, 9), "sm_80"),
        ((9, 0), "sm_90"),
        ((10, 0), "sm_100"),
        ((12, 0), "sm_100"),
    ],
)
def test_a_table_is_found_by_its_file_name(
    tables: Callable[[str], None], capability: tuple[int, int], architecture: str
) -> None:
    """The newest that is not newer than the GPU; the oldest for still older GPUs."""
    tables("sm_90")
    assert tuning.nearest(capability).architecture == "sm_90"
    for name in ("sm_80", "sm_100", "sm_x", "notes"):
        tables(name)
    assert [*tuning.architectures().items()] == [((8, 0), "sm_80"), ((9, 0), "sm_90"), ((10, 0), "sm_100")]
    assert tuning.nearest(capability).architecture == architecture


def families() -> Iterator[Any]:
    for capability, name in tuning.architectures().items():
        for field in fields(tuning.Table):
            value = getattr(tuning.nearest(capability), field.name)
            if is_dataclass(value):
                yield pytest.param(value, id=f"{name} {field.name}")


def test_no_table_is_overlooked_for_its_file_name() -> None:
    files = {path.stem for path in Path(tuning.__file__).parent.glob("*.py")}
    assert files - {"__init__", "gpu", "lookup", "schema"} == {*tuning.architectures().values()}


@pytest.mark.parametrize("family", list(families()))
def test_every_family_names_the_benchmark_that_measures_it(family: Any) -> None:
    assert isinstance(family, Family)
    for command in family.measured_by.split(" && "):
        module = re.fullmatch(r"python -m benchmarks\.(\w+)( --?\w.*)?", command)
        assert module is not None, command
        assert (ROOT / "benchmarks" / f"{module[1]}.py").is_file()


@pytest.mark.parametrize(("capability", "name"), tuning.architectures().items())
def test_a_table_keeps_within_the_limits_of_the_kernels(capability: tuple[int, int], name: str) -> None:
    table = tuning.nearest(capability)
    assert table.architecture == name
    for steps in (table.rows.adjacent_blocks, table.rows.interleaved_blocks):
        assert [most for most, _ in steps] == sorted({most for most, _ in steps})
        assert all(block % 32 == 0 and block <= 256 for _, block in (*steps, (0, table.rows.largest_block)))
    assert all(_row_lanes.MAX_LANES % lanes == 0 and most <= lanes for most, lanes in table.rows.lanes_by_results)
    for block in (table.hash_router.block, table.hash_router.held_block):
        assert block % 32 == 0
        assert block <= 256
    assert table.decode.max_tokens <= _dense_decode.MAX_TOKENS
    assert [tile.max_tokens for tile in table.decode.tiles][-1] == _dense_decode.MAX_TOKENS


# -- Planners ----------------------------------------------------------------------------------------------------------


def test_few_is_counted_in_rows_of_each_multiprocessor() -> None:
    limit = DEFAULT.table.rows.few_rows
    assert [_row_lanes.few(DEFAULT, n) for n in (limit, limit + 1)] == [True, False]
    assert [_row_lanes.few(SMALL, n) for n in (limit // 4, limit // 4 + 1)] == [True, False]
    method = RoutingMethod(256, 6)
    assert interleaved_lanes(DEFAULT, method, limit) == interleaved_lanes(SMALL, method, limit // 4) == 32
    assert interleaved_lanes(SMALL, method, limit) == interleaved_lanes(DEFAULT, method, 4 * limit) < 32


def test_fewer_multiprocessors_take_larger_blocks_and_so_smaller_grids() -> None:
    for n, lanes, interleaved in ((128, 32, False), (100, 32, True), (16_384, 32, False), (60_000, 8, True)):
        grid, block = _row_lanes.grid_and_block(DEFAULT, n, lanes, interleaved)
        small_grid, small_block = _row_lanes.grid_and_block(SMALL, n, lanes, interleaved)
        assert small_grid < grid
        assert small_block > block
        assert grid * block == small_grid * small_block >= n * lanes


def test_decode_has_a_block_for_each_multiprocessor() -> None:
    for gpu in (DEFAULT, SMALL, replace(DEFAULT, multiprocessors=16)):
        for dtype in ("float32", "bfloat16"):
            launch = _dense_decode.launch_for(
                gpu, RoutingMethod(128, 6), dtype, dtype, 4, 4096, aligned=True, dense=True
            )
            assert gpu.multiprocessors // 2 < launch.grid <= gpu.multiprocessors


@pytest.mark.parametrize("num_experts", [1, 72, 128, 160, 257, 384, 1024])
@pytest.mark.parametrize("gpu", [DEFAULT, replace(DEFAULT, multiprocessors=78)], ids=["132", "78"])
def test_clusters_for_many_tokens_run_at_once(gpu: Gpu, num_experts: int) -> None:
    for hidden, num_biases in ((40, 1), (4096, 16), (7168, 2)):
        of = num_experts, hidden, "bfloat16", "bfloat16"
        tilings = _dense_clusters.of_many(gpu, num_experts, hidden, num_biases)
        missing = len(gpu.table.decode.clusters) - len(tilings)  # those that do not fit into shared memory
        assert missing == (num_experts in (160, 1024))
        rows = _dense_decode.invariant_rows(gpu, *of, aligned=True, num_biases=num_biases)
        assert rows == max(most for _, most in tilings)
        method, chosen = RoutingMethod(num_experts, 1), []
        for n in (*range(65, rows, 97), rows):
            tiling = _dense_decode.choose(gpu, n, *of, False, num_biases, True, True)
            launch = _dense_decode.launch_for(
                gpu, method, *of[2:], n, hidden, aligned=True, dense=True, tiling=tiling, batch_invariant=True
            )
            assert launch.file == _dense_decode.PREFILL
            assert launch.grid % tiling.cluster == 0
            assert launch.grid <= gpu.multiprocessors
            assert tiling.cluster_tiles == tiling.tiles(num_experts) or tiling.groups(n) <= _dense_decode.COUNTERS
            chosen.append([each for each, _ in tilings].index(tiling))
        assert chosen == sorted(chosen), "more tokens never take a faster shape"
    assert not _dense_clusters.by_clusters(gpu, "bfloat16", "bfloat16", aligned=False)
    assert not _dense_clusters.by_clusters(gpu, "float32", "float32", aligned=True)
    older = replace(gpu, nvrtc=(12, 8))  # which does not compile it beside CuPy's architecture
    assert not _dense_clusters.by_clusters(older, "bfloat16", "bfloat16", aligned=True)
    assert _dense_clusters.by_clusters(gpu, "bfloat16", "bfloat16", aligned=True)
    assert not _dense_clusters.by_clusters(replace(gpu, capability=(10, 0)), "bfloat16", "bfloat16", aligned=True)


def test_long_rows_are_split_over_the_multiprocessors_of_the_gpu() -> None:
    shapes = [_topk_select_long.choose(gpu, 8, 10**6, 1024, "float32") for gpu in (DEFAULT, SMALL)]
    assert [isinstance(shape, LaunchShape) and shape.pieces for shape in shapes] == [
        DEFAULT.multiprocessors // 8,
        SMALL.multiprocessors // 8,
    ]
    small = _topk_select_long.choose(replace(DEFAULT, shared_bytes=48 * 1024), 1, 10**6, 1000, "float32")
    assert isinstance(small, LaunchShape)
    assert small.shared_bytes <= 48 * 1024


def test_a_few_long_rows_have_a_cluster_each() -> None:
    """If all of them run at the same time, and have registers for the row and shared memory for what it can list."""
    older, small = replace(DEFAULT, capability=(8, 9)), replace(DEFAULT, shared_bytes=48 * 1024)
    clusters = 0
    for gpu in (DEFAULT, SMALL, older, small, replace(DEFAULT, capability=(12, 0), shared_bytes=99 * 1024)):
        for rows in (1, 2, 4, 8, 16, 17, 64, 5000):
            for columns in (33, 8191, 8192, 32_768, 131_072, 131_073, 10**6, 2**31 - 1):
                for k in (1, 33, 512, 1365, 1366, 2048, 2049):
                    for dtype in ("float32", "bfloat16"):
                        shape = _topk_select_long.choose(gpu, rows, columns, min(k, columns), dtype)
                        row_bytes = columns * (4 if dtype == "float32" else 2)
                        if not isinstance(shape, ClusterShape):
                            serves = rows <= 16 and k <= 2048 and columns <= 131_072 and row_bytes >= 32 * 1024
                            assert gpu != DEFAULT or not serves
                            continue
                        clusters += 1
                        threads = shape.cluster * shape.block
                        if rows == 1 and row_bytes >= 128 * 1024 and gpu == DEFAULT:
                            assert threads >= min(3 * k, 4096)
                        assert gpu.capability >= (9, 0)
                        assert rows * shape.cluster <= gpu.multiprocessors
                        assert shape.cluster <= 8, "what every GPU with clusters has"
                        assert shape.held * 16 // (4 if dtype == "float32" else 2) <= 32, "a bit for each score"
                        assert row_bytes <= 16 * threads * shape.held
                        assert threads >= 3 * k // 2
                        assert shape.capacity >= k + 512
                        assert shape.sorted >= k
                        assert shape.shared_bytes("value") + shape.static_bytes <= gpu.shared_bytes
    assert clusters > 400


def test_plans_of_layouts_have_a_block_for_each_share_and_no_more_than_run_together() -> None:
    sizes = [1, 8, 9, 512, 513, 1024, 1025, 8192, 16_384, 16_385, 65_536, 524_288, 540_672, 540_673, 10**7, 2**31 - 1]
    older, large = replace(DEFAULT, capability=(8, 0)), replace(DEFAULT, multiprocessors=500)
    paths = set()
    for gpu in (DEFAULT, SMALL, older, large):
        for num_experts in (0, 1, 8, 57, 256, 384, 1000, 1024, 1025, 40_000):
            for alignment in (1, 128):
                for num_pairs in sizes:
                    plan = _expert_layout_launch.choose(gpu, num_pairs, num_experts, alignment)
                    paths.add(plan.path)
                    shares = plan.shares(num_pairs)
                    assert plan.pairs < 65_536, "counts of a share have 16 bits"
                    assert plan.path != "few" or num_pairs <= plan.pairs <= 32
                    assert plan.path != "block" or shares == 1
                    assert plan.path != "cluster" or (shares <= 8 and gpu.capability >= (9, 0))
                    assert plan.path != "grid" or shares <= min(gpu.multiprocessors, plan.threads)
                    assert plan.path == "shares" or 0 < num_experts <= 1024
    assert paths == {"few", "block", "cluster", "grid", "shares"}


def test_ptxas_is_told_the_fewest_blocks_where_it_would_spill() -> None:
    blackwell = replace(DEFAULT, capability=(10, 0))
    cases = [  # lanes, columns of each, columns, interleaved, capped
        ((32, 8, 256, True, False), 0),
        ((32, 8, 256, True, True), 1),
        ((32, 8, 256, False, True), 0),
        ((32, 8, 250, True, False), 1),
        ((8, 20, 160, True, False), 1),
        ((8, 24, 192, True, False), 0),
    ]
    for case, least in cases:
        assert _row_lanes.min_blocks(DEFAULT, *case) == least
        assert _row_lanes.min_blocks(blackwell, *case) == 1


# -- Devices -----------------------------------------------------------------------------------------------------------


def test_backends_that_stand_in_for_a_gpu_are_the_default_with_their_own_shared_memory(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    with recording() as recorder:
        assert tuning.gpu_of(("cpu", 0)) == DEFAULT
        monkeypatch.setattr(recorder, "shared_limit", lambda device: 64 * 1024)
        assert tuning.gpu_of(("cpu", 0)) == replace(DEFAULT, shared_bytes=64 * 1024)
        with tuning.assume(SMALL):
            assert tuning.gpu_of(("cpu", 0)) is tuning.gpu_of(("cuda", 3)) is SMALL
        assert tuning.gpu_of(("cpu", 0)) != SMALL


def test_a_cuda_device_is_asked_once(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[tuple[int, int]] = []

    def attribute(number: int, index: int) -> int:
        asked.append((number, index))
        return 1000 * number

    codes = {"MultiProcessorCount": 16, "L2CacheSize": 38, "MaxSharedMemoryPerBlockOptin": 97}
    runtime = SimpleNamespace(
        deviceGetAttribute=attribute, **{f"cudaDevAttr{name}": code for name, code in codes.items()}
    )
    nvrtc = SimpleNamespace(getVersion=lambda: (12, 8))
    device = SimpleNamespace(compute_capability="103")
    cuda = SimpleNamespace(runtime=runtime, Device=lambda index: device, nvrtc=nvrtc)
    monkeypatch.setattr(compiler, "require_cuda", lambda: SimpleNamespace(cuda=cuda))
    monkeypatch.setitem(compiler.BACKENDS, "cuda", object.__new__(compiler.CudaBackend))
    for _ in range(2):
        assert tuning.gpu_of(("cuda", 77)) == Gpu("cuda:77", (10, 3), 16_000, 97_000, 38_000, (12, 8))
    assert sorted(asked) == [(16, 77), (38, 77), (97, 77)]


@pytest.fixture
def unplanned() -> Iterator[None]:
    """Calls are planned anew, and what they leave is forgotten."""
    _cached.forget()
    yield
    _cached.forget()


@pytest.mark.usefixtures("unplanned")
def test_calls_are_planned_for_the_gpu() -> None:
    x, weight = np.zeros((4, 4096), np.float16), np.zeros((128, 4096), np.float16)
    for gpu in (DEFAULT, SMALL):
        with recording() as recorder, tuning.assume(gpu):
            topk_select(np.zeros((3, 5000), np.float32), 600)
            dense_router(x, weight, RoutingMethod(128, 6))
        long, decode = recorder.launches
        assert long.arguments["rows_ahead"] == gpu.multiprocessors * long.macros["BLOCKS"]
        assert decode.grid[0] <= gpu.multiprocessors


@pytest.mark.needs_kernels
@pytest.mark.parametrize("multiprocessors", [1, 33, 500])
@pytest.mark.usefixtures("unplanned")
def test_kernels_are_right_for_any_number_of_multiprocessors(backend: Backend, multiprocessors: int) -> None:
    gpu = replace(tuning.gpu_of(("cuda" if backend.name == "gpu" else "cpu", 0)), multiprocessors=multiprocessors)
    scores = inputs.distinct(2, 30_000, "float32")
    x, weight = (inputs.rng(n).integers(-8, 9, (n, 256)).astype(np.float32) / 8 for n in (24, 96))
    with tuning.assume(gpu):
        top = topk_select(backend.array(scores), 40)
        routed = dense_router(backend.array(x), backend.array(weight), RoutingMethod(96, 6), path="decode")
    np.testing.assert_array_equal(backend.numpy(top.indices), np.argsort(-scores, axis=1, kind="stable")[:, :40])
    want = np.argsort(-(x @ weight.T), axis=1, kind="stable")[:, :6]
    np.testing.assert_array_equal(backend.numpy(routed.indices), want)


@pytest.mark.backends("gpu")
def test_this_machines_gpu() -> None:
    gpu = tuning.gpu_of(("cuda", 0))
    assert gpu.capability >= (7, 0)
    assert min(gpu.multiprocessors, gpu.l2_bytes) > 0
    properties = compiler.require_cuda().cuda.runtime.getDeviceProperties(0)
    assert gpu == replace(Gpu.from_properties(properties), name=gpu.name)


# -- cupy-router info --------------------------------------------------------------------------------------------------


class FakeCupy:
    """CuPy's runtime with an H200 and a GPU that does not exist."""

    def __init__(self) -> None:
        common = {"sharedMemPerBlockOptin": 1, "l2CacheSize": 1}
        gpus: list[dict[str, Any]] = [
            {"name": b"NVIDIA H200", "major": 9, "minor": 0, "multiProcessorCount": 132, **common},
            {"name": b"NVIDIA H999", "major": 9, "minor": 9, "multiProcessorCount": 108, **common},
        ]
        self.cuda = self.runtime = self
        self.getDeviceCount = lambda: len(gpus)
        self.getDeviceProperties = gpus.__getitem__


def test_info_names_the_table_of_each_gpu() -> None:
    assert info.tables(FakeCupy()).splitlines() == [
        "0: table sm_90, 132 multiprocessors (measured on 132)",
        "1: table sm_90, the nearest to sm_99, 108 multiprocessors (measured on 132)",
    ]
