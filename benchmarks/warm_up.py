# SPDX-License-Identifier: Apache-2.0
"""Time of a warm-up in a new process, by the number of CPUs that it has: `python -m benchmarks.warm_up`.

Each number of CPUs begins with an empty cache folder, from which a second process then loads the same kernels.
"""

from __future__ import annotations

import os
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

from benchmarks import harness
from benchmarks.rows import OURS, Row

CPUS = (1, 2, 4, 8)
ROUNDS = 2
_CODE = """
import os, sys, time
os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[: int(sys.argv[1])])
import cupy
import cupy_router
cupy.zeros(1)  # the context of CUDA, and CuPy
begin = time.perf_counter()
ready = cupy_router.warmup("deepseek-v4-flash", hidden=4096, dtypes=("bfloat16", "float16", "float32"), bias=True)
print(time.perf_counter() - begin, len(ready), sum(kernel.compiled for kernel in ready))
"""


def warm_up(cpus: int, folder: str) -> tuple[float, int, int]:
    """Return seconds, kernels, and how many of them were compiled."""
    done = subprocess.run(
        [sys.executable, "-c", _CODE, str(cpus)],
        cwd=Path(__file__).parents[1], env=os.environ | {"CUPY_CACHE_DIR": folder}, capture_output=True, text=True,
    )  # fmt: skip
    if done.returncode:
        raise RuntimeError(done.stderr)
    seconds, kernels, compiled = done.stdout.split()
    return float(seconds), int(kernels), int(compiled)


def rows_of(cpus: int) -> list[Row]:
    times: dict[str, list[float]] = {"compiled": [], "loaded": []}
    for _ in range(ROUNDS):
        with tempfile.TemporaryDirectory() as folder:
            for how, found in times.items():
                seconds, kernels, compiled = warm_up(cpus, folder)
                if compiled != (kernels if how == "compiled" else 0):
                    raise RuntimeError(f"{compiled} of {kernels} kernels were compiled in the process that {how} them")
                found.append(seconds * 1e6)
    return [
        {"what": "host", "op": "warmup", "by": OURS, "part": f"{kernels} kernels {how}", "cpus": cpus,
         "us": round(statistics.median(found)), "spread_us": round(max(found) - min(found))}
        for how, found in times.items()
    ]  # fmt: skip


def measure(quick: bool) -> list[Row]:
    have = len(os.sched_getaffinity(0))
    return [row for cpus in (CPUS[:: len(CPUS) - 1] if quick else CPUS) if cpus <= have for row in rows_of(cpus)]


if __name__ == "__main__":
    harness.main("warm_up", measure)
