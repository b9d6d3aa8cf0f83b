# SPDX-License-Identifier: Apache-2.0
"""Every way of kernels/topk_select_long.cu and topk_select_large.cu through a row, at sizes that a CPU executes: with
plans for short lists, which the op makes for longer rows. tests/gpu/test_topk_select_long.py has full sizes."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import numpy as np
import pytest

from cupy_router.ops import _call
from cupy_router.ops import _topk_select_long as long
from cupy_router.ops._topk_select_long import Plan
from tests import inputs
from tests.backends import DTYPES, Backend
from tests.topk_calls import edge_lengths, poisoned, select

pytestmark = pytest.mark.needs_kernels

PLANS = {
    "one list": Plan(block=256, blocks=2, capacity=1024, vectors=1, pieces=1),
    "2 pieces": Plan(block=256, blocks=2, capacity=1024, vectors=2, pieces=2),
    "7 pieces": Plan(block=512, blocks=1, capacity=2048, vectors=1, pieces=7),
    "no list": None,
}
COLUMNS, K = 5000, 300

Planned = Callable[[str], "Plan | None"]


@pytest.fixture
def planned(monkeypatch: pytest.MonkeyPatch) -> Iterator[Planned]:
    """Has calls go by the plan of this name."""

    def plan(name: str) -> Plan | None:
        monkeypatch.setattr(long, "choose", lambda *_: PLANS[name])
        _call._plans.clear()
        return PLANS[name]

    yield plan
    _call._plans.clear()


@pytest.mark.parametrize("name", PLANS)
@pytest.mark.parametrize("kind", [pytest.param(kind, marks=pytest.mark.acceptance(kind)) for kind in inputs.ROWS])
def test_what_rows_hold(backend: Backend, planned: Planned, kind: str, name: str) -> None:
    planned(name)
    dtype = inputs.FLOATS[(list(inputs.ROWS).index(kind) + list(PLANS).index(name)) % 3]
    if kind in inputs.BITS_OF_FLOAT32 or kind.startswith("above 65504"):
        dtype = "float32"
    select(backend, inputs.ROWS[kind](3, COLUMNS, K, dtype), K)


@pytest.mark.parametrize("name", PLANS)
@pytest.mark.parametrize("levels", [2, 3, 9, 40])
@pytest.mark.parametrize("in_order", [False, True])
def test_few_values(backend: Backend, planned: Planned, levels: int, in_order: bool, name: str) -> None:
    """Ties at the threshold, above it and in crowded slots; winners side by side in half of the rows."""
    planned(name)
    scores = inputs.rng(levels).integers(0, levels, (4, COLUMNS)).astype(np.float32)
    scores[::2] = np.sort(scores[::2])
    select(backend, scores, K, sorted=in_order)


@pytest.mark.parametrize("name", PLANS)
@pytest.mark.parametrize("k", [1, 2, 31, 33, 299, 301, 400])
def test_k(backend: Backend, planned: Planned, k: int, name: str) -> None:
    planned(name)
    select(backend, inputs.normal((2, COLUMNS), "float16", seed=k), k)


@pytest.mark.parametrize("name", PLANS)
@pytest.mark.parametrize("dtype", inputs.FLOATS)
@pytest.mark.parametrize("with_starts", [False, True])
def test_lengths_around_all_that_plans_know(
    backend: Backend, planned: Planned, with_starts: bool, dtype: str, name: str
) -> None:
    plan = planned(name)
    near = [] if plan is None else [plan.capacity + d for d in (-1, 0, 1, 2)]
    lengths = np.array([*near, *edge_lengths(K, COLUMNS)[:12], 3, 5, 9], np.int32)
    starts = np.resize(np.array([0, 1, 6, 400], np.int32), lengths.size) if with_starts else None
    scores = poisoned(lengths.size, COLUMNS, lengths, starts, dtype)
    select(backend, scores, K, lengths=lengths, starts=starts, row_pad=1, offset=1)


@pytest.mark.parametrize("name", PLANS)
@pytest.mark.parametrize("dtype", inputs.FLOATS)
def test_every_misalignment(backend: Backend, planned: Planned, dtype: str, name: str) -> None:
    """Rows begin at each place of 16 bytes, and the best are at their ends."""
    planned(name)
    scores = inputs.normal((8, 1501), dtype)
    scores[:, [0, 1, 2, 7, -1, -2, -3, -8]] = 9
    select(backend, scores, 100, row_pad=0, offset=3)


def sampled_columns(plan: Plan, columns: int, dtype: str) -> np.ndarray:
    """Where row_sample.cuh looks in a row that begins at a 16-byte boundary."""
    scores, words = 16 // np.dtype(DTYPES[dtype]).itemsize, 2**32
    vectors = plan.block * plan.vectors
    number = np.arange(vectors, dtype=np.uint64)
    first = (number + 1) * 0x9E3779B1 % words
    random = (first ^ first >> 15) * 0x85EBCA6B % words
    part = (words - 1) // vectors * number + random // vectors
    vector = (part * (columns // scores) >> 32).astype(np.int64)
    return np.unique(vector[:, None] * scores + np.arange(scores))


@pytest.mark.parametrize("name", ["one list", "2 pieces"])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("shows", ["the best", "none of the best"])
def test_a_sample_that_misleads(backend: Backend, planned: Planned, shows: str, dtype: str, name: str) -> None:
    """Too few or too many are above its threshold, whatever it promised: the row is read again."""
    plan, columns, k = planned(name), 40_000, 400
    assert plan is not None
    scores = np.sort(inputs.normal((2, columns), seed=5))
    at = sampled_columns(plan, columns, dtype)
    others = np.setdiff1d(np.arange(columns), at)
    first, second = (at, others) if shows == "the best" else (others, at)
    mixed = inputs.rng(6).permuted(scores[:, ::-1], axis=1)
    mixed = np.sort(mixed)[:, ::-1].astype(DTYPES[dtype])
    scores = np.empty_like(mixed)
    scores[:, first], scores[:, second] = mixed[:, : first.size], mixed[:, first.size :]
    select(backend, scores, k)


@pytest.mark.parametrize("kilobytes", [64, 99, 163, 227])
@pytest.mark.parametrize("dtype", inputs.FLOATS)
def test_plans_have_room_for_what_a_sample_lets_through(dtype: str, kilobytes: int) -> None:
    for columns in (1025, 4000, 32_768, 131_072, 10**6, 2**31 - 1):
        for k in (1, 33, 512, 1000, 2048, 4096, 8192):
            for rows in (1, 7, 64, 5000):
                plan = long.choose(rows, columns, min(k, columns), dtype, kilobytes * 1024)
                if plan is None:
                    assert k >= 1000 or columns == 2**31 - 1  # else a list fits everywhere
                    continue
                sample = plan.block * plan.vectors * 16 // np.dtype(DTYPES[dtype]).itemsize
                expected, _ = long.list_lengths(k, columns, sample)
                assert plan.capacity >= min(columns, expected)
                assert plan.capacity >= min(k, columns)
                assert plan.shared_bytes + 5 * 1024 <= kilobytes * 1024
                assert plan.pieces <= 32


@pytest.mark.parametrize(("columns", "k"), [(9000, 8192), (20_000, 10_000), (9000, 9000)])
@pytest.mark.parametrize("in_order", [False, True])
def test_large_k(backend: Backend, columns: int, k: int, in_order: bool) -> None:
    select(backend, inputs.normal((2, columns)), k, sorted=in_order)
