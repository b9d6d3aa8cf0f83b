# SPDX-License-Identifier: Apache-2.0
"""Faults planted in the kernel that selects from long rows by clusters show in its results, whatever the schedule."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from cupy_router import TopK, topk_select
from cupy_router.ops import _cached
from cupy_router.ops import _topk_select_long as long
from cupy_router.simt import device
from cupy_router.simt.device import SCHEDULES
from tests import inputs, oracle
from tests.simt import planted
from tests.topk_calls import choice

pytestmark = pytest.mark.skipif(device.why_not() is not None, reason=str(device.why_not()))

COLUMNS, K = 8000, 701  # more winners than a block has threads, and not a multiple of its cluster
KERNEL, SHARE, LISTS, NARROW, SORT = (
    "topk_select_cluster.cu",
    *(f"long_rows/{name}.cuh" for name in ("cluster_share", "candidates", "narrow", "list_sort")),
)


def _few_positive() -> np.ndarray:
    """Most winners are zeros, more of them than a list has room for."""
    normal = inputs.normal((3, COLUMNS), seed=41)
    return np.where(inputs.rng(42).random(normal.shape) < 0.03, np.abs(normal), np.float32(0)).astype(np.float32)


ROWS = {
    "normal": lambda: inputs.normal((3, COLUMNS), seed=40),
    "best in one block": lambda: (
        inputs.normal((3, COLUMNS), seed=44) + np.float32(10) * (np.arange(COLUMNS) // 32 % 4 == 0)
    ),
    "in steps": lambda: np.round(inputs.normal((3, COLUMNS), seed=43) * 4) / 4,
    "fine steps": lambda: np.round(inputs.normal((3, COLUMNS), seed=47) * 32) / 32,
    "few values": lambda: np.where(
        inputs.rng(45).random((3, COLUMNS)) < 0.09, 2, inputs.normal((3, COLUMNS), seed=46) / 9
    ).astype(np.float32),
    "few positive": _few_positive,
    "equal": lambda: np.full((3, COLUMNS), 1.5, np.float32),
}

# File, text that is right, text in its place, rows in which it shows.
FAULTS = {
    "thresholds are not waited for": (KERNEL, "memory.keys_mail.wait(0);", "", "normal"),
    "numbers are not waited for": (KERNEL, "memory.numbers_mail.wait(mails);", "", "normal"),
    "lists are not waited for": (KERNEL, "memory.lists_mail.wait(mails++);", "", "normal"),
    "counts are not waited for": (KERNEL, "cluster_barrier();\n        const int ab", "int ab", "few positive"),
    "the highest of the thresholds": (KERNEL, "lowest = warp_min(", "lowest = warp_max(", "best in one block"),
    "a share without its last vector": (SHARE, "(all - first + STEP - 1) / STEP", "(all - first) / STEP", "normal"),
    "a share that overlaps another": (SHARE, "warp * Cluster + rank", "warp * Cluster + rank / 2 * 2", "normal"),
    "places too few by one": (KERNEL, "(wanted + CLUSTER - 1) / CLUSTER;", "wanted / CLUSTER;", "normal"),
    "a list taken twice": (LISTS, "take(list(from)[i]", "take(list(from / 2)[i]", "normal"),
    "the entries of a bin not compared": (KERNEL, "place += winners[j - first_place] > mine", "place += 0", "normal"),
    "a scan without its carry": (LISTS, "put(2 * own_pair(), above + own.high", "put(2 * own_pair(), above", "normal"),
    "ties share a place": (KERNEL, "[j - first_place] > mine", "[j - first_place] >> 32 > mine >> 32", "fine steps"),
    "counts of one block only": (NARROW, "cluster_map(pairs[rank], to)", "cluster_map(pairs[0], to)", "equal"),
    "ties from the end of the row": (KERNEL, "count_line(~share.line(u)", "count_line(share.line(u)", "few positive"),
    "all ties of the last lines": (KERNEL, "equal &= ~Share::bits_of_vector(u)", "equal &= ~0u", "equal"),
    "ties told apart by half the columns": (LISTS, "(end - 1) - BIN_BITS + 1", "(end - 1) - BIN_BITS", "few positive"),
    "the last winner of too many": (KERNEL, "better == wanted - 1", "better == wanted", "few values"),
    "ties not told apart by column": (KERNEL, "if (part.low == part.high) {", "if (false) {", "few values"),
    "equal ranks by slot alone": (SORT, "[order[j]] & mask) > bits", "[order[j]] | 511u) > bits", "few values"),
}  # fmt: skip


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A folder whose kernel files take precedence; calls go by clusters."""
    planted.take_precedence(tmp_path, monkeypatch)
    monkeypatch.setattr(long, "choose", choice("a cluster"))
    _cached.forget()
    yield tmp_path
    _cached.forget()


def is_right(scores: np.ndarray, schedule: str, time_limit: float, monkeypatch: pytest.MonkeyPatch) -> bool:
    """Return True if the best are found in the order of their values, and nothing is written around the results."""
    planted.run_on_executor(schedule, time_limit, monkeypatch)
    values, indices = np.zeros((6, COLUMNS), np.float32), np.full((6, COLUMNS), -7, np.int32)
    results = TopK(values[1:4, :K], indices[1:4, :K])
    topk_select(scores, K, out=results)
    want = oracle.topk(scores, K)
    around = np.delete(indices, slice(1, 4), 0).tolist() + indices[1:4, K:].tolist()
    return (
        bool((results.indices == want[1]).all())
        and bool((results.values == want[0]).all())
        and all(i == -7 for row in around for i in row)
    )


@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.parametrize("kind", ROWS)
def test_right_without_a_fault(folder: Path, kind: str, schedule: str, monkeypatch: pytest.MonkeyPatch) -> None:
    assert is_right(ROWS[kind](), schedule, 60, monkeypatch)


@pytest.mark.parametrize("name", FAULTS)
def test_a_fault_shows(folder: Path, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    file, right, wrong, kind = FAULTS[name]
    scores = ROWS[kind]()
    assert planted.shows(folder, file, right, wrong, lambda schedule: is_right(scores, schedule, 1, monkeypatch))
