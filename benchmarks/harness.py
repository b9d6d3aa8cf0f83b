# SPDX-License-Identifier: Apache-2.0
"""How everything is timed, and how results are kept.

GPU time: calls are captured in a CUDA graph, one after the other, and the graph is replayed; the figure is the median
replay divided by the number of calls. "warm" calls read the same inputs, which stay in L2; "cold" calls rotate over
inputs of more than twice the L2. Host time: the median over batches of calls, with the GPU idle at the start of each
batch.
"""

from __future__ import annotations

import argparse
import gc
import importlib.metadata
import json
import platform
import statistics
import subprocess
import time
from collections.abc import Callable, Sequence
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import cupy

RESULTS = Path(__file__).parent / "results"
COLD_BYTES = 128 << 20

Call = Callable[[int], Any]  # call number i, on the i-th set of inputs


def graph_microseconds(call: Call, calls: int = 50, replays: int = 40) -> tuple[float, float]:
    """Median microseconds per call on the GPU, and the spread (interquartile range) over replays."""
    stream = cupy.cuda.Stream(non_blocking=True)
    with stream:
        for i in range(3):
            call(i)
        stream.synchronize()
        stream.begin_capture()
        for i in range(calls):
            call(i)
        graph = stream.end_capture()
        begin, end = cupy.cuda.Event(), cupy.cuda.Event()
        times = []
        for _ in range(replays + 3):
            begin.record(stream)
            graph.launch(stream)
            end.record(stream)
            end.synchronize()
            times.append(cupy.cuda.get_elapsed_time(begin, end) * 1000 / calls)
    quarters = statistics.quantiles(times[3:], n=4)
    return quarters[1], quarters[2] - quarters[0]


def torch_graph_microseconds(call: Call, calls: int = 20, replays: int = 40) -> tuple[float, float]:
    """The same for calls that PyTorch makes."""
    import torch

    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        for i in range(3):
            call(i)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, stream=stream):
        for i in range(calls):
            call(i)
    begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    times = []
    for _ in range(replays + 3):
        begin.record()
        graph.replay()
        end.record()
        end.synchronize()
        times.append(begin.elapsed_time(end) * 1000 / calls)
    quarters = statistics.quantiles(times[3:], n=4)
    return quarters[1], quarters[2] - quarters[0]


def host_microseconds(call: Callable[[], Any], synchronize: Callable[[], Any], batches: int = 200) -> float:
    """Median microseconds that a call takes on the host, with the cycle collector off as `timeit` has it."""
    batch = 20
    for _ in range(50):
        call()
    times = []
    gc.disable()
    for _ in range(batches):
        synchronize()
        begin = time.perf_counter_ns()
        for _ in range(batch):
            call()
        times.append((time.perf_counter_ns() - begin) / batch / 1000)
    gc.enable()
    return statistics.median(times)


def cold_inputs(make: Callable[[], Any], num_bytes: int, most: int = 512) -> list[Any]:
    """Enough inputs, at most `most`, that a round over them misses L2."""
    return [make() for _ in range(max(2, min(most, -(-COLD_BYTES // num_bytes))))]


def environment() -> dict[str, Any]:
    """The GPU, its clocks, versions, commit and date, which every result file carries."""
    query = "name,driver_version,clocks.sm,clocks.mem,clocks.max.sm"
    smi = _output("nvidia-smi", f"--query-gpu={query}", "--format=csv,noheader", "-i", "0")
    packages = ("cupy-cuda12x", "cupy-cuda13x", "torch", "jax", "triton", "numpy")
    return {
        "gpu": dict(zip(query.split(","), (field.strip() for field in smi.split(",")), strict=False)),
        "nvrtc": ".".join(map(str, cupy.cuda.nvrtc.getVersion())),
        "python": platform.python_version(),
        "versions": {name: _version(name) for name in packages if _version(name)},
        "commit": _output("git", "describe", "--always", "--dirty") or "unknown",
        "date": datetime.now(timezone.utc).strftime("%Y-%m-%d"),
    }


def _version(name: str) -> str | None:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return None


def _output(*command: str) -> str:
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return ""


def save(name: str, rows: Sequence[dict[str, Any]]) -> None:
    """Print the rows and write them to results/<name>.json, or to the folder that --output names."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--output", type=Path, default=RESULTS)
    folder: Path = parser.parse_args().output
    folder.mkdir(parents=True, exist_ok=True)
    content = {"environment": environment(), "rows": list(rows)}
    (folder / f"{name}.json").write_text(json.dumps(content, indent=1) + "\n")
    for row in rows:
        print("  ".join(f"{key}={value}" for key, value in row.items()))
