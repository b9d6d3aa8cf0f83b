# SPDX-License-Identifier: Apache-2.0
"""Every way of the kernels for long rows through a row, at sizes that a CPU executes.

Plans have short lists, which the op makes for longer rows. tests/gpu/test_topk_select_long.py has full sizes.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace
from itertools import product
from typing import Any

import numpy as np
import pytest

from cupy_router import topk_select, tuning
from cupy_router.ops import _cached
from cupy_router.ops import _topk_select_long as long
from cupy_router.ops._topk_select_cluster import ClusterShape
from cupy_router.ops._topk_select_long import LaunchShape
from cupy_router.ops._topk_select_many import HeldShape, ManyShape, entry_bytes
from tests import compare, inputs
from tests.backends import DTYPES, Backend
from tests.topk_calls import PLANS, Plan, choice, edge_lengths, misleading, poisoned, select

pytestmark = pytest.mark.needs_kernels
ITEM = pytest.mark.acceptance

COLUMNS, K = 5000, 300
CLUSTERS = [name for name, plan in PLANS.items() if isinstance(plan, ClusterShape)]

Planned = Callable[[str], Plan]


@pytest.fixture
def planned(monkeypatch: pytest.MonkeyPatch) -> Iterator[Planned]:
    """Has calls go by the plan of this name."""

    def plan(name: str) -> Plan:
        monkeypatch.setattr(long, "choose", choice(name))
        _cached.forget()
        return PLANS[name]

    yield plan
    _cached.forget()


@pytest.mark.parametrize("name", PLANS)
@pytest.mark.parametrize("kind", [pytest.param(kind, marks=ITEM(kind)) for kind in inputs.ROWS])
def test_every_kind_of_rows(backend: Backend, planned: Planned, kind: str, name: str) -> None:
    planned(name)
    dtype = inputs.FLOATS[(list(inputs.ROWS).index(kind) + list(PLANS).index(name)) % 3]
    if kind in inputs.BITS_OF_FLOAT32 or kind.startswith("above 65504"):
        dtype = "float32"
    scores = inputs.ROWS[kind](3, COLUMNS, K, dtype)
    select(backend, scores, K)
    if name in CLUSTERS:
        select(backend, scores, K, order="any")


@pytest.mark.parametrize("name", PLANS)
@pytest.mark.parametrize("levels", [2, 3, 9, 100])
@pytest.mark.parametrize("order", ["column", "value", "any"])
def test_few_values(backend: Backend, planned: Planned, levels: int, order: str, name: str) -> None:
    """Ties at the threshold, above it and in crowded slots; winners side by side in half of the rows."""
    planned(name)
    scores = inputs.rng(levels).integers(0, levels, (4, COLUMNS)).astype(np.float32)
    scores[::2] = np.sort(scores[::2])
    select(backend, scores, K, order=order)


def _close_together(rows: int, columns: int, k: int, dtype: str) -> dict[str, np.ndarray]:
    """Rows whose best scores are neighbours, or tie."""
    normal = inputs.normal((rows, columns), seed=30)
    ramp = np.arange(columns, dtype=np.float32)
    end, few = columns // 20, inputs.rng(31).random((rows, columns)) < k / columns / 2
    made = {
        "slowly ascending": np.broadcast_to(1 + ramp * np.float32(2**-16), normal.shape),
        "random walk": np.cumsum(normal, axis=1),
        "best at the end": normal + 10 * (ramp >= columns - end),
        "best at the beginning": normal + 10 * (ramp < end),
        "periodic": np.sin(ramp / 50) + normal / 10_000,
        "equal neighbours": np.repeat(normal[:, : -(-columns // 32)], 32, axis=1)[:, :columns],
        "half zeros": np.maximum(normal, 0),
        "zeros at the k-th": np.where(few, np.abs(normal), 0),
        "zeros but in one block of a cluster": np.where(ramp // 64 % 4 == 0, np.maximum(normal, 0), 0),
        "one far above": np.where(ramp == 7, np.float32(1e30), normal),
    }
    return {name: np.ascontiguousarray(inputs.cast(scores, dtype)) for name, scores in made.items()}


@pytest.mark.parametrize(
    ("name", "dtype", "order"),
    [
        *product(CLUSTERS, ("float32", "bfloat16"), ("column", "value", "any")),
        *((name, "float32", "any") for name in PLANS if name not in CLUSTERS),
    ],
)
@ITEM("winners that are neighbours, or tie with others")
def test_winners_close_together(backend: Backend, planned: Planned, order: str, dtype: str, name: str) -> None:
    planned(name)
    for scores in _close_together(2, COLUMNS, K, dtype).values():
        select(backend, scores, K, order=order)


@pytest.mark.parametrize("name", PLANS)
@pytest.mark.parametrize("order", ["column", "value", "any"])
@ITEM("index_map and page tables", "return_values=False", "strided rows", "misaligned base", "starts and lengths")
def test_all_options_of_every_plan(backend: Backend, planned: Planned, order: str, name: str) -> None:
    planned(name)
    columns, page_size = 3000, 8
    table = inputs.rng(32).permutation(5 * 400).reshape(5, 400).astype(np.int32)
    lengths = np.array([columns, K - 1, 0, K + 1, 1], np.int32)
    starts = np.array([0, 2, 1, 5, columns - 1], np.int32)
    for dtype, values in (("float32", True), ("bfloat16", False), ("float16", True)):
        scores = poisoned(5, columns, lengths, starts, dtype)
        given = {"index_map": table, "page_size": page_size, "order": order, "return_values": values}
        select(backend, scores, K, lengths, starts, row_pad=3, offset=1, **given)


def k_of_plans() -> Iterator[Any]:
    """k as large as a list holds, of sampled rows; and all but one or all scores of shorter rows."""
    for name, plan in PLANS.items():
        largest = COLUMNS if plan is None else plan.sorted if isinstance(plan, ClusterShape) else plan.capacity
        for k in (1, *inputs.TOP_K):
            if k <= largest:
                yield pytest.param(name, COLUMNS, k, marks=ITEM(f"k = {k}"))
        for columns in (1, 33, 1000):
            yield pytest.param(name, columns, columns, marks=ITEM("k = E"))
            if columns > 1:
                yield pytest.param(name, columns, columns - 1, marks=ITEM("k = E-1"))


@pytest.mark.parametrize(("name", "columns", "k"), list(k_of_plans()))
def test_k(backend: Backend, planned: Planned, name: str, columns: int, k: int) -> None:
    planned(name)
    select(backend, inputs.normal((2, columns), "float16", seed=k), k, return_values=False)


@pytest.mark.parametrize("name", PLANS)
@pytest.mark.parametrize(
    "columns", [pytest.param(w, marks=ITEM(f"all-equal row at E = {w}"), id=str(w)) for w in inputs.WIDTHS]
)
def test_all_equal_rows(backend: Backend, planned: Planned, columns: int, name: str) -> None:
    planned(name)
    k = min(columns, 300)
    scores = np.full((backend.rows(2, columns), columns), -1.5, inputs.FLOATS[columns % 3])
    _, indices = select(backend, scores, k, order="column")
    np.testing.assert_array_equal(indices, np.broadcast_to(np.arange(k), indices.shape))


@pytest.mark.parametrize("name", PLANS)
@pytest.mark.parametrize(
    "candidates", [pytest.param(c, marks=ITEM(f"one bin of {c} candidates"), id=str(c)) for c in (4097, 16_385, 65_537)]
)
def test_one_histogram_bin_holds_the_candidates(backend: Backend, planned: Planned, candidates: int, name: str) -> None:
    planned(name)
    columns = 131_072 if candidates > 16_385 else 2 * candidates
    select(backend, inputs.one_bin(candidates)(backend.rows(2, columns), columns, K, "float32"), K)


@pytest.mark.parametrize("name", PLANS)
@pytest.mark.parametrize("dtype", inputs.FLOATS)
@pytest.mark.parametrize("with_starts", [False, pytest.param(True, marks=ITEM("starts and lengths"))])
@ITEM("lengths 0, 1, k-1, k, k+1, E, all different", "poison outside the row", "strided rows", "misaligned base")
def test_lengths_around_the_limits_of_plans(
    backend: Backend, planned: Planned, with_starts: bool, dtype: str, name: str
) -> None:
    plan = planned(name)
    near = [] if plan is None else [plan.capacity + d for d in (-1, 0, 1, 2)]
    lengths = np.array([*near, *edge_lengths(K, COLUMNS)[:12], 3, 5, 9], np.int32)
    starts = np.resize(np.array([0, 1, 6, 400], np.int32), lengths.size) if with_starts else None
    scores = poisoned(lengths.size, COLUMNS, lengths, starts, dtype)
    select(backend, scores, K, lengths=lengths, starts=starts, row_pad=1, offset=1)


@pytest.mark.parametrize("name", ["one list", "many rows", "held rows"])
@pytest.mark.parametrize("more", [-1, 0, 1])
@pytest.mark.parametrize("dtype", inputs.FLOATS)
def test_rows_that_just_fit_into_the_list(backend: Backend, planned: Planned, dtype: str, more: int, name: str) -> None:
    """A kernel of its own up to as many columns."""
    plan = planned(name)
    assert plan is not None
    columns = plan.capacity + more
    lengths = np.array([columns, K, 1, 0], np.int32)
    select(backend, poisoned(4, columns, lengths, None, dtype), K, lengths=lengths)


@pytest.mark.parametrize("name", PLANS)
@pytest.mark.parametrize("dtype", inputs.FLOATS)
@ITEM("misaligned base")
def test_every_misalignment(backend: Backend, planned: Planned, dtype: str, name: str) -> None:
    """Rows begin at each place of 16 bytes, and the best are at their ends, the very best at one of them."""
    planned(name)
    scores = inputs.normal((8, 1501), dtype)
    scores[:, [0, 1, 2, 7, -1, -2, -3, -8]] = 9
    scores[::2, 0] = scores[1::2, -1] = 10
    select(backend, scores, 100, row_pad=0, offset=3)


@pytest.mark.parametrize("k", [5, 700])
@pytest.mark.parametrize("name", CLUSTERS)
@ITEM("misaligned base")
def test_misaligned_rows_of_ties(backend: Backend, planned: Planned, name: str, k: int) -> None:
    """Too many for a list, so that lines are counted: of head and tail, too."""
    planned(name)
    select(backend, np.zeros((4, 4501), np.float32), k, row_pad=0, offset=3)


@pytest.mark.parametrize("name", ["one list", "2 pieces", "many rows"])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("shows", ["the best", "none of the best"])
@ITEM("a sample that misleads")
def test_a_sample_that_misleads(backend: Backend, planned: Planned, shows: str, dtype: str, name: str) -> None:
    """Too few or too many are above its threshold, whatever it promised: the row is read again."""
    plan = planned(name)
    assert isinstance(plan, LaunchShape | ManyShape)
    select(backend, misleading(plan, 2, 40_000, dtype, shows == "the best"), 400)


@pytest.mark.parametrize("dtype", inputs.FLOATS)
@pytest.mark.parametrize("order", ["column", "value", "any"])
@ITEM("a sample that misleads")
def test_the_best_in_few_groups_of_a_held_row(backend: Backend, planned: Planned, order: str, dtype: str) -> None:
    """More scores than a list holds reach the k-th best group: thresholds are bisected until the list fits."""
    planned("held rows")
    columns = 32 * 1024 // np.dtype(DTYPES[dtype]).itemsize
    scores = inputs.normal((2, columns), seed=11)
    group = np.arange(columns) % 1024
    scores[0, group < 40] += 10
    scores[1, group % 25 == 0] += 10
    select(backend, inputs.cast(scores, dtype), 600, order=order)


@pytest.mark.parametrize("dtype", inputs.FLOATS)
@pytest.mark.parametrize("order", ["column", "value", "any"])
@pytest.mark.parametrize("k", [300, 520])
@pytest.mark.parametrize("others", [0.0, -np.inf, np.nan])
@ITEM("a sample that misleads")
def test_the_best_of_a_held_row_tie_in_few_groups(
    backend: Backend, planned: Planned, others: float, k: int, order: str, dtype: str
) -> None:
    """More ties at the highest score than a list holds, in fewer groups than are wanted: other groups decide first."""
    planned("held rows")
    columns = 32 * 1024 // np.dtype(DTYPES[dtype]).itemsize
    scores = np.full((3, columns), others, np.float32)
    scores[0, ::2] = 1
    scores[1, ::7] = 1
    scores[2, np.arange(columns) % 1024 < 200] = np.inf
    select(backend, inputs.cast(scores, dtype), k, order=order)


@pytest.mark.parametrize("dtype", inputs.FLOATS)
def test_empty_rows_that_are_held(backend: Backend, planned: Planned, dtype: str) -> None:
    planned("held rows")
    lengths, starts = np.array([0, 2000, 2000], np.int32), np.array([0, 0, 2000], np.int32)
    select(backend, inputs.normal((3, 2000), dtype), 10, lengths, starts, order="any")


@pytest.mark.parametrize(
    ("name", "order"),
    [
        *((name, "value") for name in PLANS if name not in CLUSTERS),
        *((name, "any") for name in ("many rows", "held rows", "one list", *CLUSTERS)),
    ],
)
@ITEM("100 bitwise repeats")
def test_a_hundred_repeats_agree_bitwise(backend: Backend, planned: Planned, name: str, order: str) -> None:
    planned(name)
    scores = backend.array(inputs.ROWS["differ in the lowest 8 bits"](2, 3000, K, "float32"))
    first = [backend.numpy(array) for array in topk_select(scores, K, order=order)]
    for _ in range(100):
        for array, want in zip(topk_select(scores, K, order=order), first, strict=True):
            compare.assert_same_bits(backend.numpy(array), want)


@pytest.mark.parametrize("kilobytes", [64, 99, 163, 227])
@pytest.mark.parametrize("dtype", inputs.FLOATS)
def test_lists_hold_what_the_sample_passes(dtype: str, kilobytes: int) -> None:
    gpu = replace(tuning.DEFAULT, capability=(8, 0), shared_bytes=kilobytes * 1024)  # without clusters
    for columns in (1025, 4000, 32_768, 131_072, 10**6, 2**31 - 1):
        for k in (1, 33, 512, 1000, 2048, 4096, 8192):
            for rows in (1, 7, 64, 5000):
                plan = long.choose(gpu, rows, columns, min(k, columns), dtype)
                if plan is None:
                    assert k >= 1000 or columns == 2**31 - 1  # else a list fits everywhere
                    continue
                if isinstance(plan, HeldShape):
                    assert rows > gpu.multiprocessors
                    assert min(k, columns) <= plan.capacity < columns
                    assert columns * np.dtype(DTYPES[dtype]).itemsize <= plan.row_bytes
                    assert plan.blocks * (plan.shared_bytes(dtype, columns, True) + 5 * 1024) <= kilobytes * 1024
                    continue
                if isinstance(plan, ManyShape):
                    assert rows > (plan.blocks - 1) * gpu.multiprocessors
                    assert (
                        plan.blocks * (entry_bytes(dtype, columns, True) * plan.capacity + 5 * 1024) <= kilobytes * 1024
                    )
                sample = plan.block * plan.vectors * 16 // np.dtype(DTYPES[dtype]).itemsize
                expected, _ = long.list_lengths(k, columns, sample)
                assert plan.capacity >= min(columns, expected)
                assert plan.capacity >= min(k, columns)
                if isinstance(plan, LaunchShape):
                    assert plan.shared_bytes + 5 * 1024 <= kilobytes * 1024
                    assert plan.pieces <= 32


@pytest.mark.parametrize(
    ("columns", "k"),
    [pytest.param(9000, 8192, marks=ITEM("k = 8192")), (20_000, 10_000), pytest.param(9000, 9000, marks=ITEM("k = E"))],
)
@pytest.mark.parametrize("order", ["column", "value", "any"])
def test_large_k(backend: Backend, columns: int, k: int, order: str) -> None:
    select(backend, inputs.normal((2, columns)), k, order=order)
