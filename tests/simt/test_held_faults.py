# SPDX-License-Identifier: Apache-2.0
"""Faults planted in the kernel that holds rows in shared memory show under at least one schedule.

They show as wrong results, or as a kernel that does not end.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import ml_dtypes
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

COLUMNS, K = 6000, 520
KERNEL, HELD = "topk_select_held.cu", "long_rows/held_row.cuh"
BARRIER = "    __syncthreads();\n"


def _every(step: int) -> np.ndarray:
    """Return rows whose best are in every `step`-th column: they are in few groups, so the first list is too long."""
    return (inputs.normal((3, COLUMNS), seed=51) + np.float32(10) * (np.arange(COLUMNS) % step == 0)).astype(np.float32)


def _ties(others: float) -> np.ndarray:
    """More ties at the highest score than a list holds, in half of the groups: fewer than are wanted."""
    scores = np.full((3, 16_384), others, ml_dtypes.bfloat16)
    scores[:, ::2] = 1
    return scores


ROWS = {
    "ties in few groups": lambda: _ties(0),
    "NaN and ties": lambda: _ties(np.nan),
    "normal": lambda: inputs.normal((3, COLUMNS), seed=50),
    "in few groups": lambda: _every(4),
    "few values": lambda: np.round(inputs.normal((3, COLUMNS), seed=52)),
    "ends": lambda: (
        inputs.normal((3, COLUMNS), seed=53)
        + 9 * np.isin(np.arange(COLUMNS), [0, 1, COLUMNS - 2, COLUMNS - 1]).astype(np.float32)
    ),
    "ascending": lambda: np.broadcast_to(np.arange(COLUMNS, dtype=np.float32), (3, COLUMNS)).copy(),
}

# File, text that is right, text in its place, rows in which it shows.
FAULTS = {
    "vectors not waited for": (HELD, "copy_async_wait<0>();", "", "normal"),
    "the first score not copied": (HELD, "if (single >= 0) row[single]", "if (single > 0) row[single]", "ends"),
    "single scores left out": (HELD, "if (single_passes) columns[place++] = single;", "", "ends"),
    "no step above the highest": (KERNEL, "keys.high + Passes<DTYPE>::STEP", "keys.high + 1", "ties in few groups"),
    "keys that no score has": (HELD, "(range.low + half) & ~0u << ZERO_BITS", "range.low + half", "NaN and ties"),
    "too few groups": (HELD, "int rest = wanted, round = 0;", "int rest = wanted / 4, round = 0;", "ascending"),
    "a long list taken": (KERNEL, "above >= wanted && above <= CAPACITY", "above >= wanted", "in few groups"),
    "thresholds in the wrong order": (KERNEL, "(above > CAPACITY ?", "(above < wanted ?", "in few groups"),
    "no ties": (KERNEL, "threshold.tied && above < wanted", "false && above < wanted", "few values"),
    "ties that also pass": (KERNEL, "threshold.tied}, sums", "false}, sums", "few values"),
    "a list not waited for": (KERNEL, f"clear<BLOCK>();\n{BARRIER}", "clear<BLOCK>();\n", "normal"),
    "ranks of others": (HELD, "const int i = j * Block +", "const int i = j / 2 * Block +", "normal"),
    "the best not waited for": (KERNEL, f"{BARRIER}    if (!SORTS", "    if (!SORTS", "normal"),
    "the row overwritten too soon": (KERNEL, "__syncthreads();  // all have their ranks", "// all", "few values"),
    "sorted by column": (KERNEL, "by_score ? ~static_cast<Rank>(0) : last", "last", "normal"),
    "a place for all on the list": (KERNEL, "best += ranks.rank[j] >= pivot;", "best += 1;", "normal"),
}  # fmt: skip


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A folder whose kernel files take precedence; rows are held."""
    planted.take_precedence(tmp_path, monkeypatch)
    monkeypatch.setattr(long, "choose", choice("held rows"))
    _cached.forget()
    yield tmp_path
    _cached.forget()


def is_right(scores: np.ndarray, schedule: str, time_limit: float, monkeypatch: pytest.MonkeyPatch) -> bool:
    """Return True if the best of misaligned rows are found, in any order and by value, and nothing else is written."""
    planted.run_on_executor(schedule, time_limit, monkeypatch)
    columns = scores.shape[1]
    rows = np.zeros((3, columns + 3), scores.dtype)[:, 1:-2]
    rows[:] = scores
    for order, by in (("any", "column"), ("value", "value")):
        values, indices = np.zeros((6, columns), scores.dtype), np.full((6, columns), -7, np.int32)
        found = topk_select(rows, K, order=order, out=TopK(values[1:4, :K], indices[1:4, :K]))
        places = np.argsort(found.indices, axis=1) if order == "any" else np.arange(K)[None]
        wanted = oracle.topk(scores, K, order=by)
        for got, want in zip(found, wanted, strict=True):
            if not np.array_equal(np.take_along_axis(got, places, 1), want, equal_nan=True):
                return False
        if not (np.delete(indices, slice(1, 4), 0) == -7).all() or not (indices[1:4, K:] == -7).all():
            return False
    return True


@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.parametrize("kind", ROWS)
def test_right_without_a_fault(folder: Path, kind: str, schedule: str, monkeypatch: pytest.MonkeyPatch) -> None:
    assert is_right(ROWS[kind](), schedule, 60, monkeypatch)


@pytest.mark.parametrize("name", FAULTS)
def test_a_fault_shows(folder: Path, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    file, right, wrong, kind = FAULTS[name]
    scores = ROWS[kind]()
    assert planted.shows(folder, file, right, wrong, lambda schedule: is_right(scores, schedule, 1, monkeypatch))
