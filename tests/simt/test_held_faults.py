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

from cupy_router import TopK, compiler, topk_select
from cupy_router.ops import _cached
from cupy_router.ops import _topk_select_long as long
from cupy_router.simt import device
from cupy_router.simt.device import SCHEDULES, KernelFault, SimtBackend
from tests import inputs, oracle
from tests.topk_calls import choice

pytestmark = pytest.mark.skipif(device.why_not() is not None, reason=str(device.why_not()))

COLUMNS, K = 6000, 520
KERNEL, HELD = "topk_select_held.cu", "long_rows/held_row.cuh"
BARRIER = "    __syncthreads();\n"


def _every(step: int) -> np.ndarray:
    """The best are in every so many columns, so in few groups: the first list is too long."""
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
    "a threshold that no score has": (HELD, "(range.low + half) & ~0u << LEAST", "range.low + half", "NaN and ties"),
    "too few groups": (HELD, "int rest = wanted, round = 0;", "int rest = wanted / 4, round = 0;", "ascending"),
    "a long list taken": (KERNEL, "above >= wanted && above <= CAPACITY", "above >= wanted", "in few groups"),
    "thresholds in the wrong order": (KERNEL, "(above > CAPACITY ?", "(above < wanted ?", "in few groups"),
    "no ties": (KERNEL, "threshold.tied && above < wanted", "false && above < wanted", "few values"),
    "ties that also pass": (KERNEL, "threshold.tied}, sums", "false}, sums", "few values"),
    "a list not waited for": (KERNEL, f"clear<BLOCK>();\n{BARRIER}", "clear<BLOCK>();\n", "normal"),
    "ranks of others": (HELD, "const int i = j * Block +", "const int i = j / 2 * Block +", "normal"),
    "the best not waited for": (KERNEL, f"{BARRIER}    if (!SORTS", "    if (!SORTS", "normal"),
    "a place for all on the list": (KERNEL, "best += ranks.rank[j] >= pivot;", "best += 1;", "normal"),
}  # fmt: skip


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A folder whose kernel files take precedence; rows are held."""
    monkeypatch.setenv("CUPY_ROUTER_KERNELS", str(tmp_path))
    monkeypatch.setattr(compiler, "WATCHING", True)
    monkeypatch.setattr(long, "choose", choice("held rows"))
    _cached.forget()
    yield tmp_path
    _cached.forget()


def is_right(scores: np.ndarray, schedule: str, time_limit: float, monkeypatch: pytest.MonkeyPatch) -> bool:
    """Whether the best are found, by misaligned rows, and nothing is written around the results."""
    monkeypatch.setitem(compiler.BACKENDS, "cpu", SimtBackend(schedule, seed=1, time_limit=time_limit))
    _cached.forget()
    compiler.forget()
    columns = scores.shape[1]
    rows = np.zeros((3, columns + 3), scores.dtype)[:, 1:-2]
    rows[:] = scores
    values, indices = np.zeros((6, columns), scores.dtype), np.full((6, columns), -7, np.int32)
    results = TopK(values[1:4, :K], indices[1:4, :K])
    topk_select(rows, K, order="any", out=results)
    found = np.argsort(results.indices, axis=1)
    want = oracle.topk(scores, K, order="column")
    around = np.delete(indices, slice(1, 4), 0).tolist() + indices[1:4, K:].tolist()
    return (
        bool((np.take_along_axis(results.indices, found, 1) == want[1]).all())
        and bool((np.take_along_axis(results.values, found, 1) == want[0]).all())
        and all(i == -7 for row in around for i in row)
    )


@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.parametrize("kind", ROWS)
def test_right_without_a_fault(folder: Path, kind: str, schedule: str, monkeypatch: pytest.MonkeyPatch) -> None:
    assert is_right(ROWS[kind](), schedule, 60, monkeypatch)


@pytest.mark.parametrize("name", FAULTS)
def test_a_fault_shows(folder: Path, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    file, right, wrong, kind = FAULTS[name]
    text = (compiler.kernel_folders()[-1] / file).read_text()
    assert text.count(right) == 1, f"{file} has to be read again: where is {right}"
    (folder / file).parent.mkdir(exist_ok=True)
    (folder / file).write_text(text.replace(right, wrong))

    def is_right_or_ends(schedule: str) -> bool:
        try:
            return is_right(ROWS[kind](), schedule, 1, monkeypatch)
        except KernelFault:
            return False

    assert not all(is_right_or_ends(schedule) for schedule in SCHEDULES)
