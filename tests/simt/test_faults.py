# SPDX-License-Identifier: Apache-2.0
"""Proof that the executor catches things.

Every kernel in broken/ is right with faulty=0; with faulty=1 its fault is reported by name, or shows in the result.
"""

from __future__ import annotations

import numpy as np
import pytest

from cupy_router.simt import device
from cupy_router.simt.device import SCHEDULES, KernelFault, SimtBackend, launch
from cupy_router.simt.sanitized import Call, call_sanitized, run_sanitized, why_not_sanitized
from tests.simt.sources import BROKEN, build_all, source

pytestmark = pytest.mark.skipif(device.why_not() is not None, reason=str(device.why_not()))

BLOCKS, N = 4, 256
X = np.round(np.random.default_rng(3).normal(size=N) * 3).astype(np.float32)  # with ties
BLOCK_ROWS, WARP_ROWS = X.reshape(BLOCKS, 64), X.reshape(-1, 32)

# What the kernel writes when it is right: the head of `out`, whose rest stays 0.
RIGHT = {
    "removed_barrier": BLOCK_ROWS[:, ::-1],
    "conditional_barrier": np.roll(BLOCK_ROWS, -1, 1),
    "early_return": np.roll(BLOCK_ROWS, -1, 1),
    "different_barriers": BLOCK_ROWS[:, ::-1],
    "shared_off_by_one": X,
    "array_index": X,
    "global_off_by_one": np.append(X[1:], 0),
    "misaligned_load": X.reshape(-1, 4)[:-1].sum(1),
    "wrong_mask": np.hstack([np.roll(WARP_ROWS[:, :16], -1, 1), np.zeros((8, 16))]),
    "exited_lane": WARP_ROWS.sum(1).repeat(32),
    "outside_mask": (WARP_ROWS > 0).sum(1).repeat(32),
    "mixed_collectives": np.ones(N),
    "inactive_source": np.hstack([np.zeros((8, 16)), np.roll(WARP_ROWS[:, 16:], -1, 1)]),
    "uninitialised_shared": BLOCK_ROWS.sum(1).repeat(64),
    "missing_syncwarp": WARP_ROWS[:, ::-1],
    "missing_fence": np.array([*BLOCK_ROWS.sum(1), X.sum(), BLOCKS]),
    "missing_arrival_wait": WARP_ROWS[:, ::-1],
    "swapped_tie": np.argsort(-WARP_ROWS, 1, kind="stable")[:, :8],
    "missing_copy_wait": X,
    "missing_cluster_barrier": BLOCK_ROWS[[1, 0, 3, 2]],
    "lone_cluster_barrier": X,
    "lost_mail": BLOCK_ROWS[[1, 0, 3, 2]],
    "missing_mail_wait": BLOCK_ROWS[[1, 0, 3, 2]],
    "endless_loop": np.array([1, BLOCKS]),
}

# How the fault is found: by the executor's own report, a sanitizer's, or a wrong result.
REPORTED = {
    "conditional_barrier": ("barrier not reached by all threads", "in __syncthreads at conditional_barrier.cu:"),
    "early_return": ("barrier not reached by all threads", "threads 59-63 exited"),
    "different_barriers": ("threads at different barriers", "others at different_barriers.cu:"),
    "wrong_mask": ("warp collective not reached by all lanes of its mask", "mask 0xffffffff, missing lanes 0xffff0000"),
    "exited_lane": ("warp collective not reached by all lanes of its mask", "missing lanes 0x80000000"),
    "outside_mask": ("lane outside its own mask", "__ballot_sync with mask 0x7fffffff"),
    "mixed_collectives": ("warp collective not reached by all lanes of its mask", "(warp 0) in __any_sync"),
    "lone_cluster_barrier": ("cluster barrier not reached by all threads", "threads 0-63 exited"),
    "lost_mail": ("mail that does not come", "threads 0-63 in a wait for mail at mailbox.cuh:"),
    "endless_loop": ("time limit", "thread 0"),
}
SANITIZED = {
    "array_index": ("address", "array index out of bounds"),
    "shared_off_by_one": ("address", "shared memory out of bounds"),
    "global_off_by_one": ("address", "global memory out of bounds"),
    "misaligned_load": ("address", "misaligned access"),
    "removed_barrier": ("thread", "data race"),
    "missing_syncwarp": ("thread", "data race"),
    "missing_fence": ("thread", "data race"),
}
VISIBLE = {  # under which schedules the result is wrong, and whether NaN gives it away
    "removed_barrier": ({"round_robin", "reversed", "shuffled", "run_ahead"}, True),
    "missing_syncwarp": ({"round_robin", "reversed", "shuffled", "run_ahead"}, True),
    "inactive_source": (set(SCHEDULES), True),
    "uninitialised_shared": (set(SCHEDULES), True),
    "swapped_tie": (set(SCHEDULES), False),
    "missing_copy_wait": ({"shuffled", "run_ahead"}, True),
    "missing_cluster_barrier": (set(SCHEDULES), True),
    "missing_arrival_wait": ({"round_robin", "shuffled", "run_ahead"}, True),
    "missing_mail_wait": (set(SCHEDULES), True),
}


@pytest.fixture(scope="module", autouse=True)
def _built() -> None:
    build_all([*((name, None) for name in RIGHT), *((name, which) for name, (which, _) in SANITIZED.items())])


def arguments(faulty: bool) -> tuple[object, ...]:
    return X.copy(), np.zeros(N, np.float32), np.int32(N), np.int32(faulty)


def is_right(name: str, out: np.ndarray) -> bool:
    right = RIGHT[name].reshape(-1)
    return bool((out[: len(right)] == right).all()) and not out[len(right) :].any()


def run(name: str, faulty: bool, schedule: str) -> np.ndarray:
    backend = SimtBackend(schedule, seed=1, time_limit=0.5)
    out: np.ndarray = launch(backend, source(name), name, (BLOCKS,), (64,), arguments(faulty))[1]
    return out


def test_every_broken_kernel_is_listed() -> None:
    files = {path.stem for path in BROKEN.glob("*.cu")}
    assert files == set(RIGHT) == set(REPORTED) | set(SANITIZED) | set(VISIBLE)


@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.parametrize("name", sorted(RIGHT))
def test_right_without_the_fault(name: str, schedule: str) -> None:
    assert is_right(name, run(name, False, schedule))


@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.parametrize("name", sorted(REPORTED))
def test_the_executor_reports(name: str, schedule: str) -> None:
    with pytest.raises(KernelFault) as error:
        run(name, True, schedule)
    fault, detail = REPORTED[name]
    assert error.value.name == fault
    assert detail in str(error.value)


@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.parametrize("name", sorted(VISIBLE))
def test_the_result_shows(name: str, schedule: str) -> None:
    schedules, as_nan = VISIBLE[name]
    out = run(name, True, schedule)
    assert is_right(name, out) == (schedule not in schedules)
    assert np.isnan(out).any() == (as_nan and schedule in schedules)


@pytest.mark.parametrize("sanitizer", device.SANITIZERS)
def test_sanitizers_find_nothing_without_the_fault(sanitizer: str) -> None:
    skip_without(sanitizer)
    names = sorted(name for name, (which, _) in SANITIZED.items() if which == sanitizer)
    launches = [(source(name), name, (BLOCKS,), (64,), arguments(False)) for name in names]
    report = call_sanitized(
        [Call("cupy_router.simt.sanitized:launch_here", args) for args in launches], sanitizer=sanitizer
    )
    assert (report.fault, len(report.results)) == (None, len(names)), report.text
    for name, result in zip(names, report.results, strict=True):
        assert is_right(name, result[1])


@pytest.mark.parametrize("name", sorted(SANITIZED))
def test_a_sanitizer_reports(name: str) -> None:
    sanitizer, fault = SANITIZED[name]
    skip_without(sanitizer)
    report = run_sanitized(source(name), name, (BLOCKS,), (64,), arguments(True), sanitizer=sanitizer)
    assert report.fault == fault, report.text
    assert f"{name}.cu:" in report.text
    assert report.results == []


def skip_without(sanitizer: str) -> None:
    reason = why_not_sanitized(sanitizer)
    if reason is not None:
        pytest.skip(reason)
