# SPDX-License-Identifier: Apache-2.0
"""Count events of the main cells with Nsight Compute: `python -m benchmarks.ncu`, which writes ncu.json.

Needs `ncu` and permission to read the GPU's counters. Clocks are not changed. ncu measures each kernel alone, so
durations are longer than in a graph.
"""

from __future__ import annotations

import argparse
import csv
import glob
import shutil
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

from benchmarks import rows as results
from benchmarks.rows import OURS, Row, text_table

METRICS = {  # name in the results -> ncu's name
    "duration_us": "gpu__time_duration.sum",
    "issue_active_percent": "smsp__issue_active.avg.pct_of_peak_sustained_active",
    "instructions": "smsp__inst_executed.sum",
    "registers": "launch__registers_per_thread",
    "blocks": "launch__grid_size",
    "threads_per_block": "launch__block_size",
    "tensor_cores_active_percent": "sm__pipe_tensor_cycles_active.avg.pct_of_peak_sustained_active",
    "warps_active_percent": "sm__warps_active.avg.pct_of_peak_sustained_active",
    "l2_bytes": "lts__t_bytes.sum",
    "dram_read_bytes": "dram__bytes_read.sum",
    "dram_write_bytes": "dram__bytes_write.sum",
}
SCALE = {"duration_us": 1e-3}  # ncu's base unit of time is the nanosecond
CELLS = {  # name -> module, arguments of its Problem, what ncu does to caches before each pass
    "activation_topk E 256 n 64 warm": ("activation_topk", (256, 6, 64), "none"),
    "activation_topk E 256 n 8192 warm": ("activation_topk", (256, 6, 8192), "none"),
    "topk_select E 256 n 8192 cold": ("topk_select", (256, 8, 8192), "all"),
    "hash_router logits E 256 n 64 warm": ("hash_router", ("deepseek-v4-flash", "logits", 64), "none"),
    "dense_router batch invariant E 256 n 1024 warm": ("dense_router", (256, 4096, 1024), "none"),
    "dense_router batch invariant E 256 n 8192 warm": ("dense_router", (256, 4096, 8192), "none"),
    "dense_router batch invariant E 384 n 8192 warm": ("dense_router", (384, 7168, 8192), "none"),
}
LAUNCHES = 3


def child(cell: str) -> None:
    """Run a cell; ncu profiles the launches between start and stop of the profiler."""
    import cupy

    from benchmarks import bench_activation_topk, bench_dense_router, bench_hash_router, bench_topk_select

    op, arguments, _ = CELLS[cell]
    module = {
        "activation_topk": bench_activation_topk,
        "dense_router": bench_dense_router,
        "topk_select": bench_topk_select,
        "hash_router": bench_hash_router,
    }[op]
    problem = module.Problem(*arguments)
    for _ in range(3):
        problem.call()
    cupy.cuda.Device().synchronize()
    cupy.cuda.profiler.start()
    for _ in range(LAUNCHES):
        problem.call()
    cupy.cuda.Device().synchronize()
    cupy.cuda.profiler.stop()


def find() -> str | None:
    """Return the path of ncu, from PATH or from where its installer puts it."""
    places = [shutil.which("ncu"), *sorted(glob.glob("/opt/nvidia/nsight-compute/*/ncu"), reverse=True)]
    places += sorted(glob.glob("/usr/local/cuda*/bin/ncu"), reverse=True)
    return next((place for place in places if place), None)


def parse(text: str) -> dict[str, float]:
    """Return the median over launches of each metric, from the output of `ncu --csv --page raw`."""
    lines = text.splitlines()
    start = next((i for i, line in enumerate(lines) if line.startswith('"ID"')), None)
    if start is None:
        raise ValueError("ncu counted nothing:\n" + "\n".join(lines[-8:]))
    launches = [
        line for line in csv.DictReader(lines[start:]) if line["ID"].isdigit()
    ]  # the line after the header has units
    figures = {}
    for name, metric in METRICS.items():
        values = [float(line[metric].replace(",", "")) for line in launches if line.get(metric, "n/a") != "n/a"]
        if values:
            figures[name] = round(statistics.median(values) * SCALE.get(name, 1), 3)
    return figures


def count(ncu: str, cell: str) -> Row:
    """Run a cell under ncu, and return its row."""
    with tempfile.TemporaryDirectory() as folder:
        log = Path(folder) / "log.csv"
        command = [ncu, "--clock-control", "none", "--cache-control", CELLS[cell][2], "--profile-from-start", "off"]
        command += ["--csv", "--page", "raw", "--print-units", "base", "--metrics", ",".join(METRICS.values())]
        command += ["--log-file", str(log), sys.executable, "-m", "benchmarks.ncu", "--child", cell]
        done = subprocess.run(command, cwd=Path(__file__).parents[1], capture_output=True, text=True)
        text = log.read_text() if log.is_file() else done.stdout + done.stderr
        if done.returncode:
            raise ValueError(f"ncu failed:\n{text[-1500:]}\n{done.stderr[-1500:]}")
    return {"what": "ncu", "op": CELLS[cell][0], "by": OURS, "cell": cell} | parse(text)


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, help="write ncu.json into this folder")
    parser.add_argument("--child", choices=CELLS, help="run one cell, for ncu")
    options = parser.parse_args(arguments)
    if options.child:
        child(options.child)
        return 0
    ncu = find()
    if ncu is None:
        print("ncu is not installed: it comes with the CUDA toolkit, as Nsight Compute")
        return 1
    rows = []
    for cell in CELLS:
        try:
            rows.append(count(ncu, cell))
        except ValueError as error:
            print(f"left out: {cell}: {error}")
    if not rows:
        return 1
    if options.output is not None:
        from benchmarks.harness import environment

        results.save(options.output / "ncu.json", environment(), rows)
    cells = [str(row["cell"]) for row in rows]
    print(text_table(["", *cells], [[name, *(f"{row.get(name, '')}" for row in rows)] for name in METRICS]))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
