# SPDX-License-Identifier: Apache-2.0
"""Run cases on several ranks of a group, one process each: `python -m tests.MODULE RANK NUM_RANKS FOLDER BACKEND`.

With "gloo" they run on the CPU. With "nccl" each has a GPU, which is the default device of tensors there.

A rank runs all cases one after the other, and writes what went wrong, by case, to FOLDER/RANK.json. Processes start
once for all cases, because that takes longer than most of these.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import traceback
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

ROOT = Path(__file__).parents[1]
WAIT = 600  # seconds

Cases = Callable[[int, str], dict[str, Callable[[], None]]]  # by name, for a number of ranks and a backend


def assert_all_pass(module: str, num_ranks: int, cases: Cases, folder: Path, where: str) -> None:
    """Run a module on ranks, and assert that every case ran on every rank without an error. where: --backend."""
    backend = "nccl" if where == "gpu" else "gloo"
    if where == "gpu" and torch.cuda.device_count() < num_ranks:
        pytest.skip(f"needs {num_ranks} CUDA devices, one for each rank")
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    started = [
        subprocess.Popen(
            [sys.executable, "-m", module, str(rank), str(num_ranks), str(folder), backend], cwd=ROOT, env=environment
        )
        for rank in range(num_ranks)
    ]
    try:
        for process in started:
            process.wait(WAIT)
    finally:
        for process in started:
            process.kill()
    errors = [json.loads((folder / f"{rank}.json").read_text()) for rank in range(num_ranks)]
    assert [errors_of_rank.keys() for errors_of_rank in errors] == [cases(num_ranks, backend).keys()] * num_ranks
    failed = {(rank, name): error for rank, found in enumerate(errors) for name, error in found.items() if error}
    assert failed == {}


def main(cases: Cases) -> None:
    """Run the cases on the rank that the arguments of the process name. Ranks run them in the same order."""
    rank, num_ranks, folder, backend = int(sys.argv[1]), int(sys.argv[2]), Path(sys.argv[3]), sys.argv[4]
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(num_ranks)}
    store = dist.FileStore(str(folder / "store"), num_ranks)
    if backend == "nccl":
        torch.cuda.set_device(rank)
        torch.set_default_device(f"cuda:{rank}")
    dist.init_process_group(backend, store=store, rank=rank, world_size=num_ranks, timeout=timedelta(seconds=20))
    todo, found = cases(num_ranks, backend), {}
    for name, case in todo.items():
        try:
            case()
            found[name] = ""
        except Exception:  # other ranks may wait in a collective: the group is of no use any more
            found = dict.fromkeys(todo, f"not run after {name!r}") | found | {name: traceback.format_exc()}
            break
    (folder / f"{rank}.json").write_text(json.dumps(found))
    store.set(f"done {rank}", "")
    store.wait([f"done {other}" for other in range(num_ranks)], timedelta(seconds=60))  # others may still need this one
    if backend == "nccl":
        dist.destroy_process_group()
