# SPDX-License-Identifier: Apache-2.0
"""Timing of all benchmarks.

GPU time: calls are captured in a CUDA graph, one after the other. The graph is replayed directly after another replay,
so that the GPU never waits for the host. A figure is the time of a replay divided by its calls. "warm" calls read the
same inputs, which stay in L2. "cold" calls rotate over inputs of more than twice the size of L2.

Host time: batches of calls, with the GPU idle at the start of each. Calls that are compared take turns.

Both are measured in rounds, each with a new capture or a new turn. The result is the median of all samples. The spread
is the larger of the interquartile range and the range of the rounds' medians.
"""

from __future__ import annotations

import importlib.metadata
import os
import platform
import subprocess
import time
from collections.abc import Callable, Mapping
from datetime import UTC, datetime
from typing import Any

import cupy

from benchmarks import kernel_sources, one_size, timing
from benchmarks import rows as results
from benchmarks.one_size import OneSize
from benchmarks.rows import OURS, Row
from benchmarks.timing import Action, Call, Time, cold_inputs, warm_up
from cupy_router import compiler

# -- Time on the GPU ---------------------------------------------------------------------------------------------------


def gpu_row(call: Call, cell: Row, by: str = OURS, *, rotation: int = 1, torch: bool = False) -> Row:
    """Return a row with the time of a call on the GPU. `rotation`: number of inputs that it rotates over."""
    time, spread = graph_microseconds(call, rotation, torch=torch)
    return {"what": "gpu"} | cell | {"by": by, "us": round(time, 3), "spread_us": round(spread, 3)}


def in_turns(*measures: Callable[[], Row]) -> list[Row]:
    """The median row of each: they draw so much power that the clocks fall from one to the next."""
    turns = [[measure() for measure in measures] for _ in range(3)]
    return [sorted(rows, key=lambda row: row["us"])[1] for rows in zip(*turns, strict=True)]


def graph_microseconds(call: Call, calls: int = 1, *, torch: bool = False) -> Time:
    """Time a call on the GPU, with at least `calls` calls in a graph. `torch`: PyTorch captures it, not CuPy."""
    return results.median_and_spread(timing.graph_rounds(call, calls, torch=torch))


def inputs(shape: tuple[int, int], dtype: str, *, cold: bool) -> list[Any]:
    """Return standard normal matrices: one, or if `cold` enough that a round over them misses L2."""

    def make() -> Any:
        return cupy.random.standard_normal(shape, dtype=cupy.float32).astype(dtype)

    return cold_inputs(make, shape[0] * shape[1] * cupy.dtype(dtype).itemsize) if cold else [make()]


# -- Time on the host --------------------------------------------------------------------------------------------------


def host_rows(calls: Mapping[tuple[str, str], Action], cell: Row, name: str = "call") -> list[Row]:
    """Time calls on the host, by (by, name), and count the objects that they leave to the cycle collector."""
    rows = []
    for (by, label), rounds in timing.host_rounds(calls).items():
        median, spread = results.median_and_spread(rounds)
        row = {"what": "host"} | cell | {"by": by, name: label, "us": round(median, 3), "spread_us": round(spread, 3)}
        rows.append(row | {"garbage": timing.garbage(calls[by, label])})
    return rows


# -- Rows and files ----------------------------------------------------------------------------------------------------


def barred(row: Row, bar: float | None) -> Row:
    """Return the row with its bar, if it has one."""
    return row if bar is None else row | {"bar_us": bar}


def check_same_choice(ours: Any, theirs: Any) -> None:
    """Check that a rival's indices, a tensor, equal ours, except in a few rows where rounding decides."""
    share = float((ours == cupy.from_dlpack(theirs.int())).all(axis=1).mean())
    if share < 0.99:
        raise ValueError(f"selects the same experts as cupy_router in only {share:.1%} of the rows")


def attempt(what: str, function: Action) -> Any:
    """Return the result of the function; print the reason and return None if a rival is not installed or fails."""
    try:
        return function()
    except Exception as error:
        reason = (str(error).strip() or "no message").splitlines()[0]
        print(f"left out: {what}: {type(error).__name__}: {reason}")
        return None


def main(op: str, measure: Callable[[bool], list[Row]], one: OneSize | None = None) -> None:
    """Run a benchmark script: read the command line, measure, print, and write <op>.json if a folder is given.

    `measure` gets True for a quick run. `one` serves a command line that asks for one size, which is only printed.
    """
    request = one_size.parse(one)
    # A checkout checks before every call whether a kernel file has changed. An installed wheel, which users have, does
    # not.
    compiler.WATCHING = False
    begin = time.perf_counter()
    warm_up()
    if one is not None and request.size is not None:
        try:
            rows = one.measure(**request.size)
        except ValueError as error:  # an impossible size, with the error of the op
            raise SystemExit(f"{op}: {error}") from error
        facts = environment()
        print(f"{one_size.table(rows)}\n{results.source(facts)}")
        if request.json is not None:
            results.save(request.json, facts, rows)
        return
    rows = measure(request.quick)
    if request.output is not None:
        results.save(request.output / f"{op}.json", environment(), rows)
    for row in rows:
        print(
            results.label(row),
            *(f"{name}={row[name]}" for name in ("us", "spread_us", "ratio", "garbage") if name in row),
        )
    print(f"\n{results.bars_table(rows)}\n\n{op}: {len(rows)} rows in {time.perf_counter() - begin:.0f} s")


def environment() -> dict[str, Any]:
    """Return the GPU, its clocks, names of all GPUs, versions, commit, date and kernels: every file contains them."""
    query = "name,driver_version,clocks.sm,clocks.mem,clocks.max.sm,power.limit"
    smi = _output("nvidia-smi", f"--query-gpu={query}", "--format=csv,noheader", "-i", "0")
    packages = ("cupy-cuda12x", "cupy-cuda13x", "torch", "jax", "triton", "transformers", "numpy", "nvidia-nccl-cu13")
    return {
        "gpu": dict(zip(query.split(","), (field.strip() for field in smi.split(",")), strict=False)),
        "gpus": _output("nvidia-smi", "--query-gpu=name", "--format=csv,noheader").splitlines(),
        "nvrtc": ".".join(map(str, cupy.cuda.nvrtc.getVersion())),
        "python": platform.python_version(),
        "versions": {name: version for name in packages if (version := _version(name))},
        # COMMIT names the commit where the files have no git history.
        "commit": os.environ.get("COMMIT") or _output("git", "describe", "--always", "--dirty") or "unknown",
        "date": datetime.now(UTC).strftime("%Y-%m-%d"),
        "kernels": kernel_sources.digests(),
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
