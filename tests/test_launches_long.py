# SPDX-License-Identifier: Apache-2.0
"""What topk_select launches for long rows and for its options, recorded as in test_launches.py."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from itertools import pairwise

import pytest

from cupy_router import TopK, scratch, topk_select, tuning
from cupy_router.arrays import FRAMEWORKS
from tests.recorder import Recorder, recording
from tests.test_launches import HEAP, Array, Fake, assert_kernel, only

SCRATCH = 0x7000_0000


@pytest.fixture
def recorder(monkeypatch: pytest.MonkeyPatch) -> Iterator[Recorder]:
    monkeypatch.setitem(FRAMEWORKS, Array, Fake())
    monkeypatch.setattr(scratch, "buffer", lambda *_: SCRATCH)
    with recording("cuda") as recorder:
        yield recorder


LIMITED = {"lengths": 0, "starts": 0, "index_map": 0}


def test_topk_select_of_long_rows(recorder: Recorder) -> None:
    out = TopK(Array(0x500, (3, 600), "bfloat16", row_stride=700), Array(0x600, (3, 600), "int32", row_stride=800))
    assert topk_select(Array(0x400, (3, 5000), "bfloat16"), 600, out=out) is out
    launch = only(recorder)
    assert_kernel(launch, "topk_select_long", "topk_select_long", DTYPE=2, SPLIT=0, FITS=0)
    assert launch.grid == (3, 1, 1)
    assert launch.macros["CAPACITY"] >= 600
    assert launch.arguments == LIMITED | {
        "scores": 0x400, "values": 0x500, "indices": 0x600, "counters": 0, "piece_counts": 0, "lists": 0,
        "pieces": 1, "list_capacity": 0, "rows_ahead": 132, "first_row": 0, "num_columns": 5000, "k": 600, "sorted": 1,
        "page_size": 1, "scores_stride": 5000, "values_stride": 700, "indices_stride": 800, "map_stride": 0,
    }  # fmt: skip


@pytest.mark.parametrize(
    ("order", "dtype", "shape"),
    [
        ("any", "float32", {"BLOCK": 256, "BLOCKS": 4, "SORTS": 0, "SHORT": 0}),
        ("column", "bfloat16", {"BLOCK": 256, "BLOCKS": 4, "SORTS": 1, "SHORT": 1}),
    ],
)
def test_more_long_rows_than_multiprocessors_share_them(
    recorder: Recorder, order: str, dtype: str, shape: dict[str, int]
) -> None:
    topk_select(Array(0x400, (500, 40_000), dtype, row_stride=41_000), 300, order=order, return_values=False)
    launch = only(recorder)
    assert_kernel(launch, "topk_select_many", "topk_select_many", FITS=0, **shape)
    assert launch.grid == (500, 1, 1)
    assert launch.arguments == LIMITED | {
        "scores": 0x400, "values": 0, "indices": HEAP, "by_column": int(order == "column"), "rows_ahead": 4 * 132,
        "first_row": 0, "num_columns": 40_000, "k": 300, "page_size": 1, "scores_stride": 41_000,
        "values_stride": 300, "indices_stride": 300, "map_stride": 0,
    }  # fmt: skip


@pytest.mark.parametrize(("order", "shape"), [("any", {"BLOCKS": 5, "SORTS": 0}), ("value", {"BLOCKS": 5, "SORTS": 1})])
def test_a_multiprocessor_holds_several_rows(recorder: Recorder, order: str, shape: dict[str, int]) -> None:
    topk_select(Array(0x400, (500, 16_000), "bfloat16", row_stride=17_000), 300, order=order)
    launch = only(recorder)
    assert_kernel(launch, "topk_select_held", "topk_select_held", BLOCK=128, ROW_BYTES=32 * 1024, SHORT=1, **shape)
    assert launch.grid == (500, 1, 1)
    assert 5 * (launch.shared_bytes + 5 * 1024) <= 228 * 1024
    assert {name: launch.arguments[name] for name in ("by_column", "rows_ahead", "first_row", "num_columns", "k")} == {
        "by_column": 0, "rows_ahead": 5 * 132, "first_row": 0, "num_columns": 16_000, "k": 300,
    }  # fmt: skip


@pytest.mark.parametrize(
    ("columns", "k", "dtype", "held"),
    [
        (16_384, 512, "float16", True), (16_385, 512, "float16", False), (16_384, 547, "float16", False),
        (4096, 512, "float32", True), (4097, 512, "float32", False), (1024, 512, "bfloat16", False),
    ],
)  # fmt: skip
def test_rows_are_held_by_their_bytes_and_k(recorder: Recorder, columns: int, k: int, dtype: str, held: bool) -> None:
    topk_select(Array(0x400, (1000, columns), dtype), k)
    assert (only(recorder).kernel == "topk_select_held") == held


@pytest.mark.parametrize(("rows", "k", "many"), [(132, 512, False), (133, 512, True), (133, 4096, False)])
def test_the_kernel_follows_from_rows_and_k(recorder: Recorder, rows: int, k: int, many: bool) -> None:
    topk_select(Array(0x400, (rows, 70_000)), k)
    assert (only(recorder).kernel == "topk_select_many") == many


@pytest.mark.parametrize("rows_of_map", [1, 3])
@pytest.mark.parametrize("k", [6, 40])
def test_topk_select_with_options(recorder: Recorder, rows_of_map: int, k: int) -> None:
    pages = Array(0x700, (rows_of_map, 20), "int32", row_stride=30)
    result = topk_select(Array(0x400, (3, 70)), k, order="column", return_values=False, index_map=pages, page_size=4)
    assert result.values is None
    launch = only(recorder)
    if k > 32:
        assert_kernel(launch, "topk_select_long", "topk_select_long", DTYPE=0, SPLIT=0, FITS=1)
        assert launch.arguments["sorted"] == 0
    else:
        assert_kernel(launch, "topk_select", "topk_select", BY_COLUMN=1, HAS_VALUES=0, HAS_MAP=1, ROW_PER_BLOCK=1)
        assert (launch.grid, launch.block) == ((3, 1, 1), (32, 1, 1))
    wanted = {"index_map": 0x700, "values": 0, "indices": HEAP, "page_size": 4, "indices_stride": k}
    assert launch.arguments.items() >= (wanted | {"map_stride": 0 if rows_of_map == 1 else 30}).items()


def test_topk_select_of_k_too_large_for_a_list(recorder: Recorder) -> None:
    topk_select(Array(0x400, (3, 50_000)), 40_000)
    launch = only(recorder)
    assert_kernel(launch, "topk_select_large", "topk_select_large", DTYPE=0)
    assert launch.arguments == LIMITED | {
        "scores": 0x400, "values": HEAP, "indices": launch.arguments["indices"], "num_rows": 3, "num_columns": 50_000,
        "k": 40_000, "sorted": 1, "page_size": 1, "scores_stride": 50_000, "values_stride": 40_000,
        "indices_stride": 40_000, "map_stride": 0,
    }  # fmt: skip


@pytest.mark.parametrize("n", [1, 300, 70_000, 2**31 - 1, 2**31, 10**10])
@pytest.mark.acceptance("more than 65,535 rows", "rows * E above 2**31")
def test_long_rows_have_a_block_each(recorder: Recorder, n: int) -> None:
    topk_select(Array(0x1000, (n, 5000)), 100)
    rows = [range(first, first + launch.grid[0]) for launch in recorder.launches
            for first in [launch.arguments["first_row"]]]  # fmt: skip
    assert rows[0][0] == 0
    assert rows[-1][-1] == n - 1
    assert all(a[-1] + 1 == b[0] for a, b in pairwise(rows))


@pytest.mark.parametrize("order", ["any", "column", "value"])
def test_a_few_long_rows_have_a_cluster_each(recorder: Recorder, order: str) -> None:
    pages = Array(0x700, (8, 8192), "int32", row_stride=9000)
    topk_select(Array(0x400, (8, 65_536), "bfloat16"), 512, order=order, index_map=pages, page_size=8)
    launch = only(recorder)
    macros = {"DTYPE": 2, "ORDER": ["any", "column", "value"].index(order)}
    assert_kernel(launch, "topk_select_cluster", "topk_select_cluster", **macros)
    assert launch.grid == (8 * launch.macros["CLUSTER"], 1, 1)
    assert launch.block[0] == launch.macros["BLOCK"]
    lists = launch.macros["CLUSTER"] * launch.macros["CAPACITY"] + launch.macros["SORTED"] + 256
    sort = 0 if order == "any" else 8 * launch.macros["SORTED"] + 64
    assert launch.shared_bytes == max(8 * lists + sort, 48 * 1024 + 16)  # opted in
    assert launch.arguments == LIMITED | {
        "scores": 0x400, "values": launch.arguments["values"], "indices": launch.arguments["indices"],
        "index_map": 0x700, "num_columns": 65_536, "k": 512, "page_size": 8, "scores_stride": 65_536,
        "values_stride": 512, "indices_stride": 512, "map_stride": 9000,
    }  # fmt: skip


@pytest.mark.parametrize("rows", [1, 4, 8])
def test_few_long_rows_are_split(recorder: Recorder, rows: int) -> None:
    """Before sm_90: one block per piece, and scratch memory in which the lists of pieces do not overlap."""
    with tuning.assume(replace(tuning.DEFAULT, capability=(8, 0))):
        topk_select(Array(0x1000, (rows, 131_072)), 2048)
    launch = only(recorder)
    assert_kernel(launch, "topk_select_long", "topk_select_long", DTYPE=0, SPLIT=1, FITS=0)
    numbers = launch.arguments
    assert launch.grid[0] == rows * numbers["pieces"]
    assert numbers["pieces"] * numbers["list_capacity"] >= 131_072
    assert numbers["counters"] == SCRATCH
    assert numbers["piece_counts"] - numbers["counters"] >= 4 * rows
    assert numbers["lists"] - numbers["piece_counts"] == 8 * launch.grid[0]
