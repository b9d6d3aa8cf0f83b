# SPDX-License-Identifier: Apache-2.0
"""ExpertParallel on two GPUs: dispatch, experts and combine, beside bare collectives and copies of the same bytes.

Starts a process for each GPU. On one GPU, and first on two, ExpertParallel with one rank is compared with its ops.
"""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Any

import cupy
import torch
import torch.distributed as dist

from benchmarks import bars, expert_parallel_ranks
from benchmarks import rows as results
from benchmarks.expert_parallel_ranks import HIDDEN, NUM_EXPERTS, STEPS, TOP_K
from benchmarks.harness import barred, gpu_row, main
from benchmarks.rows import OURS, Row, select
from cupy_router import expert_layout, permute, unpermute
from cupy_router.torch import ExpertParallel

NUM_RANKS = 2
FAILURES = torch.multiprocessing.ProcessRaisedException, torch.multiprocessing.ProcessExitedException
ALONE_N = 1024


def alone() -> list[Row]:
    """Return the time of dispatch and combine with one rank, and of the ops that they call."""
    dist.init_process_group("nccl", store=dist.HashStore(), rank=0, world_size=1)
    parallel = ExpertParallel(None, NUM_EXPERTS, max_tokens=ALONE_N)
    x = torch.randn(ALONE_N, HIDDEN, device="cuda").bfloat16()
    chosen = torch.randn(ALONE_N, NUM_EXPERTS, device="cuda").topk(TOP_K)
    weights, indices = chosen.values.softmax(dim=1), chosen.indices.int()

    def ours(i: int) -> Any:
        rows, _, ticket = parallel.dispatch(x, weights, indices)
        return parallel.combine(rows, ticket)

    def without(i: int) -> Any:
        layout = expert_layout(indices, NUM_EXPERTS)
        return unpermute(permute(x, layout), layout, weights)

    cell = {"op": "expert_parallel", "E": NUM_EXPERTS, "k": TOP_K, "H": HIDDEN, "n": ALONE_N}
    cell |= {"ranks": 1, "dtype": "bfloat16", "call": "CUDA graph", "part": "dispatch + combine"}
    with torch.no_grad():
        plain = gpu_row(without, cell, "layout, permute and unpermute", torch=True)
        row = gpu_row(ours, cell, OURS, torch=True)
    dist.destroy_process_group()
    return [barred(row, round(bars.EXPERT_PARALLEL_ALONE * plain["us"], 2)), plain]


def several(sizes: tuple[int, ...]) -> list[Row]:
    """Return the rows of NUM_RANKS processes, with bars."""
    with tempfile.TemporaryDirectory() as folder:
        arguments = (NUM_RANKS, folder, sizes)
        ranks = torch.multiprocessing.spawn(expert_parallel_ranks.run, arguments, NUM_RANKS, join=False)
        try:
            while not ranks.join():
                pass
        except (*FAILURES, KeyboardInterrupt) as error:  # what was measured until then is kept
            print(f"left out: {error!r}")
        finally:
            for process in ranks.processes:
                process.kill()
        path = Path(folder) / "rows.json"
        found: list[Row] = results.load(path)["rows"] if path.exists() else []
    for row in select(found, part="dispatch + combine", call="CUDA graph"):
        same = [other for other in select(found, n=row["n"]) if other["by"] in ("NCCL", "copy")]
        parts = [other for other in same if other["part"] in ("all_gather", "reduce_scatter", "permute", "unpermute")]
        ratio = bars.EXPERT_PARALLEL_RATIO[row["n"]]
        row["bar_us"] = round(ratio * sum(part["us"] for part in parts) + bars.EXPERT_PARALLEL_MORE, 2)
    return found


def measure_ranks(quick: bool) -> list[Row]:
    found = alone()
    if cupy.cuda.runtime.getDeviceCount() < NUM_RANKS:
        print(f"left out: {NUM_RANKS} ranks: there is one GPU")
        return found
    return found + several(tuple(STEPS))


if __name__ == "__main__":
    main("expert_parallel", measure_ranks)
