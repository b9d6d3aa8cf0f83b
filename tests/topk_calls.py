# SPDX-License-Identifier: Apache-2.0
"""Calls of topk_select that are checked as they are made, limits of rows for them, and plans for long rows."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any
from unittest import mock

import numpy as np

from cupy_router import TopK, topk_select
from cupy_router.ops import _cached, _topk_select_long
from cupy_router.ops._topk_select_cluster import ClusterShape
from cupy_router.ops._topk_select_long import LaunchShape
from cupy_router.ops._topk_select_many import HeldShape, ManyShape
from cupy_router.reference.topk_select import topk_select as reference
from tests import compare, inputs, oracle
from tests.backends import DTYPES, Backend

Plan = LaunchShape | HeldShape | ManyShape | ClusterShape | None

# With short lists: the op makes such for longer rows than a CPU executes in time. None: without any list.
PLANS: dict[str, Plan] = {
    "one list": LaunchShape(block=256, blocks=2, capacity=1024, vectors=1, pieces=1),
    "2 pieces": LaunchShape(block=256, blocks=2, capacity=1024, vectors=2, pieces=2),
    "7 pieces": LaunchShape(block=512, blocks=1, capacity=2048, vectors=1, pieces=7),
    "many rows": ManyShape(block=128, blocks=8, capacity=1024, vectors=2),
    "held rows": HeldShape(block=128, blocks=4, capacity=1024, row_bytes=32 * 1024),
    "no list": None,
    "a cluster": ClusterShape(cluster=4, block=256, blocks=1, held=2, capacity=1024, sorted=1024),
    "a cluster of two": ClusterShape(cluster=2, block=256, blocks=1, held=4, capacity=2048, sorted=1024),
}


def choice(name: str) -> Callable[..., Plan]:
    """Return a function that takes the place of `choose` and goes by the plan of this name. Rows too long for the
    threads of a cluster are left to larger ones, or to the kernel that needs no list; so are those too long to be held.
    """

    def choose(_: Any, __: int, num_columns: int, ___: int, dtype: str, ____: bool = True) -> Any:
        plan = PLANS[name]
        size = np.dtype(DTYPES[dtype]).itemsize
        if isinstance(plan, HeldShape):
            return plan if num_columns * size <= plan.row_bytes else None
        if not isinstance(plan, ClusterShape):
            return plan
        for shape in (plan, plan._replace(cluster=8, block=512, held=32 // (16 // size))):
            if num_columns * size <= 16 * shape.held * shape.cluster * shape.block:
                return shape
        return None

    return choose


def select(
    backend: Backend, scores: np.ndarray, k: int, lengths: Any = None, starts: Any = None, *, index_map: Any = None,
    row_pad: int = 0, offset: int = 0, **options: Any,
) -> tuple[np.ndarray, np.ndarray]:  # fmt: skip
    """Return the op's result on this backend, checked against the reference (the reference against the oracle)."""
    device = [None if a is None else backend.array(a) for a in (lengths, starts, index_map)]
    on_device = backend.array(scores, row_pad=row_pad, offset=offset)
    given = options if index_map is None else options | {"index_map": device[2]}
    result = topk_select(on_device, k, lengths=device[0], starts=device[1], **given)
    assert type(result) is TopK
    has_values = options.pop("return_values", True)
    want = (reference if backend.runs_kernels else oracle.topk)(
        scores, k, lengths=lengths, starts=starts, index_map=index_map, **options
    )
    indices = backend.numpy(result.indices)
    assert indices.dtype == np.int32
    compare.assert_same_bits(backend.numpy(on_device), scores)
    assert (result.values is not None) == has_values
    values = backend.numpy(result.values) if has_values else want[0]
    if options.get("order") == "any":
        compare.assert_same_bits(indices < 0, want[1] < 0)  # empty entries are last
        found = by_index(values, indices), by_index(indices, indices)
        want = by_index(want[0], want[1]), by_index(want[1], want[1])
    else:
        found = values, indices
    np.testing.assert_array_equal(found[1], want[1])
    if has_values:
        compare.assert_same_bits(found[0], want[0])
    return values, indices


def select_by_plan(scores: np.ndarray, k: int, plan: str, **options: Any) -> TopK:
    """Call the op with one of PLANS, in a child process too."""
    with mock.patch.object(_topk_select_long, "choose", choice(plan)):
        _cached.forget()
        return topk_select(scores, k, **options)


def by_index(results: np.ndarray, indices: np.ndarray) -> np.ndarray:
    """Return values or indices of rows in the order of their indices, those of one index in the order of their bits.

    An index_map may have one index for several columns.
    """
    bits = np.ascontiguousarray(results).view(f"u{results.dtype.itemsize}")
    order = np.argsort(bits, axis=1, kind="stable")
    order = np.take_along_axis(order, np.argsort(np.take_along_axis(indices, order, 1), axis=1, kind="stable"), 1)
    return np.take_along_axis(results, order, axis=1)


def edge_lengths(k: int, columns: int) -> np.ndarray:
    edges = [0, 1, k - 1, k, k + 1, columns, columns - 1, columns + 1, -1, -(2**31), 2**31 - 1]
    return np.array([*edges, *range(2, columns, max(1, columns // 20))], np.int32)


def poisoned(rows: int, columns: int, lengths: Any, starts: Any, dtype: str) -> np.ndarray:
    """Scores whose entries outside their row would win (+inf) or break the order (NaN)."""
    scores = inputs.normal((rows, columns), dtype)
    outside = np.ones((rows, columns), bool)
    for r in range(rows):
        start = 0 if starts is None else int(starts[r])
        length = columns if lengths is None else max(int(lengths[r]), 0)
        if 0 <= start < columns:
            outside[r, start : start + length] = False
    scores[outside] = np.inf
    scores[outside & (np.arange(columns) % 2 == 1)] = np.nan
    return scores


def misleading(plan: LaunchShape | ManyShape, rows: int, columns: int, dtype: str, shows_best: bool) -> np.ndarray:
    """Rows, aligned if `columns` are, whose sample holds the best scores or none of them."""
    sampled = np.isin(np.arange(columns), _sampled_columns(plan, columns, dtype))
    first = sampled if shows_best else ~sampled
    best_first = np.sort(inputs.normal((rows, columns), seed=5))[:, ::-1]
    best, others = np.split(best_first, [np.count_nonzero(first)], axis=1)
    scores = np.empty((rows, columns), np.float32)
    scores[:, first] = inputs.rng(6).permuted(best, axis=1)
    scores[:, ~first] = inputs.rng(7).permuted(others, axis=1)
    return scores.astype(DTYPES[dtype])


def _sampled_columns(plan: LaunchShape | ManyShape, columns: int, dtype: str) -> np.ndarray:
    """Where long_rows/sample.cuh looks in a row that begins at a 16-byte boundary."""
    scores, words = 16 // np.dtype(DTYPES[dtype]).itemsize, 2**32
    pairs = plan.block * plan.vectors // 2
    number = np.arange(pairs, dtype=np.uint64)
    first = (number + 1) * 0x9E3779B1 % words
    random = (first ^ first >> 15) * 0x85EBCA6B % words
    part = (words - 1) // pairs * number + random // pairs
    pair = (part * (columns // (2 * scores)) >> 32).astype(np.int64)
    return np.asarray(pair[:, None] * 2 * scores + np.arange(2 * scores)).ravel()
