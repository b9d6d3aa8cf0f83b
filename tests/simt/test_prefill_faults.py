# SPDX-License-Identifier: Apache-2.0
"""Faults planted in the kernel of dense_router for many tokens show in its logits or experts under some schedule."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from cupy_router import RoutingMethod, compiler, dense_router, tuning
from cupy_router.ops import _cached, _dense_clusters
from cupy_router.simt import device
from cupy_router.simt.device import SCHEDULES, SimtBackend
from tests import inputs
from tests.simt import planted

pytestmark = pytest.mark.skipif(device.why_not() is not None, reason=str(device.why_not()))

N, EXPERTS, HIDDEN = 70, 130, 1184  # 37 steps of 32 columns: parts of 2 and 3, so that not all stages are full
METHOD = RoutingMethod(EXPERTS, 6, "sigmoid")
GEMM, KERNEL = "gate/gemm_wgmma.cuh", "dense_router_prefill.cu"
SHAPES = {"one part": (32, 64, 1, 1), "two pairs of a block": (64, 128, 1, 4), "eight parts": (64, 64, 1, 8)}

# File, text that is right, text in its place, shape of clusters in which it shows.
FAULTS = {
    "copies are not waited for": (GEMM, "mbarrier_wait(ring.full(), ring.parity);", "", "one part"),
    "products are not waited for": (GEMM, "mbarrier_wait(ring.empty(), ring.parity ^ 1);", "", "one part"),
    "the last place of the ring is never given back": (GEMM, "multiplied = ring.empty();", "", "one part"),
    "a stage multiplied to its end": (GEMM, "if (!EVEN && k / STEP >= steps) break;", "", "one part"),
    "the second of a pair twice": (GEMM, "multiplier.start(first, 2 * pair);", "multiplier.start(first, 2 * pair + 1);",
                                   "one part"),
    "sums of another part of hidden": (GEMM, "multiplier.start(second, 2 * (first_pair + pair) + 1);",
                                       "multiplier.start(second, 2 * first_pair + 1);", "two pairs of a block"),
    "pairs in another order": (GEMM, "(i % SETS * TILE_TOKENS + token)",
                               "((SETS - 1 - i % SETS) * TILE_TOKENS + token)", "two pairs of a block"),
    "sums of one block only": (GEMM, "cluster_map(shared, first_rank + i / SETS)", "cluster_map(shared, first_rank)",
                               "eight parts"),
    "the sums of a token that another block routes": (KERNEL, "first_routed = rank * TOKENS;", "first_routed = 0;",
                                                      "eight parts"),
    "sums are read before they are there": (KERNEL, "        cluster_barrier();\n", "", "eight parts"),
    "no room for the scores of a second tile": (KERNEL, "shared + SUMS_BYTES", "shared", "eight parts"),
}  # fmt: skip


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A folder whose kernel files take precedence."""
    planted.take_precedence(tmp_path, monkeypatch)
    yield tmp_path
    _cached.forget()
    compiler.forget()
    _dense_clusters.of_many.cache_clear()


def results(shape: str, schedule: str, time_limit: float, monkeypatch: pytest.MonkeyPatch) -> list[np.ndarray]:
    """Return logits, weights and indices of a call in clusters of this shape."""
    planted.run_on_executor(schedule, time_limit, monkeypatch)
    table = tuning.DEFAULT.table
    changed = replace(table, decode=replace(table.decode, clusters=(SHAPES[shape],)))
    monkeypatch.setattr(tuning.Gpu, "table", property(lambda gpu: changed))
    _dense_clusters.of_many.cache_clear()  # which remembers tilings by another table
    x = inputs.normal((N, HIDDEN), "bfloat16", seed=50)
    weight = inputs.normal((EXPERTS, HIDDEN), "bfloat16", seed=51)
    routed = dense_router(x, weight, METHOD, batch_invariant=True, return_logits=True)
    return [routed.logits, routed.weights, routed.indices]


@pytest.fixture
def want(monkeypatch: pytest.MonkeyPatch) -> list[np.ndarray]:
    """By the kernel for few tokens, which has the same bits."""
    monkeypatch.setitem(compiler.BACKENDS, "cpu", SimtBackend())
    x = inputs.normal((N, HIDDEN), "bfloat16", seed=50)
    weight = inputs.normal((EXPERTS, HIDDEN), "bfloat16", seed=51)
    parts = [dense_router(rows, weight, METHOD, batch_invariant=True, return_logits=True) for rows in (x[:35], x[35:])]
    return [np.concatenate([getattr(part, name) for part in parts]) for name in ("logits", "weights", "indices")]


@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.parametrize("shape", SHAPES)
def test_right_without_a_fault(
    want: list[np.ndarray], folder: Path, shape: str, schedule: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert all(map(np.array_equal, results(shape, schedule, 60, monkeypatch), want))


@pytest.mark.parametrize("name", FAULTS)
def test_a_fault_shows(want: list[np.ndarray], folder: Path, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    file, right, wrong, shape = FAULTS[name]

    def is_right(schedule: str) -> bool:
        return all(map(np.array_equal, results(shape, schedule, 2, monkeypatch), want))

    assert planted.shows(folder, file, right, wrong, is_right)
