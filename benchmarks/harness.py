# SPDX-License-Identifier: Apache-2.0
"""How everything is timed.

GPU time: calls are captured in a CUDA graph, one after the other, and the graph is replayed right behind another
replay, so that the GPU never waits for the host; a figure is the time of a replay divided by its calls. "warm" calls
read the same inputs, which stay in L2; "cold" calls rotate over inputs of more than twice the L2. Host time: batches of
calls, with the GPU idle at the start of each; the calls that are compared take turns.

Both are taken in rounds (each with a new capture, or a new turn). The result is the median over all, and the spread is
the larger of the interquartile range and the range of the rounds' medians.
"""

from __future__ import annotations

import gc
import importlib.metadata
import os
import platform
import statistics
import subprocess
import time
from collections.abc import Callable, Mapping
from datetime import datetime, timezone
from typing import Any

import cupy

from benchmarks import one_size
from benchmarks import rows as results
from benchmarks.one_size import OneSize
from benchmarks.rows import OURS, Row
from cupy_router import compiler

COLD_BYTES = 2 * (50 << 20) + (20 << 20)  # more than twice the L2 of an H100
REPLAY_MICROSECONDS = 1000  # a replay of about this length drowns what its ends cost
ROUNDS, REPLAYS = 3, 12
HOST_ROUNDS, HOST_BATCHES, HOST_CALLS = 5, 40, 20
GARBAGE_CALLS = 100

Call = Callable[[int], Any]  # call number i, on the i-th set of inputs
Action = Callable[[], Any]
Time = tuple[float, float]  # median and spread in microseconds


# -- Time on the GPU ---------------------------------------------------------------------------------------------------


def gpu_row(call: Call, cell: Row, by: str = OURS, *, rotation: int = 1, torch: bool = False) -> Row:
    """A row with the time of a call on the GPU. `rotation`: how many inputs it rotates over."""
    time, spread = graph_microseconds(call, rotation, torch=torch)
    return {"what": "gpu"} | cell | {"by": by, "us": round(time, 3), "spread_us": round(spread, 3)}


def graph_microseconds(call: Call, calls: int = 1, *, torch: bool = False) -> Time:
    """Time a call on the GPU, with at least so many calls in a graph. `torch`: PyTorch captures it, not CuPy."""
    capture = _capture_by_torch if torch else _capture
    cupy.cuda.Device().synchronize()  # inputs were made on another stream
    probe_calls = 8
    probe = capture(call, probe_calls)
    estimate = min(probe() for _ in range(3)) / probe_calls
    calls = max(calls, min(500, max(5, int(REPLAY_MICROSECONDS / estimate))))
    rounds = []
    for _ in range(ROUNDS):
        replay = capture(call, calls)
        rounds.append([replay() / calls for _ in range(REPLAYS)])
    return _median_and_spread(rounds)


def _capture(call: Call, calls: int) -> Callable[[], float]:
    stream = cupy.cuda.Stream(non_blocking=True)
    with stream:
        call(0)  # compiles
        stream.synchronize()
        stream.begin_capture()
        for i in range(calls):
            call(i)
        graph = stream.end_capture()
    begin, end = cupy.cuda.Event(), cupy.cuda.Event()

    def replay() -> float:
        graph.launch(stream)
        begin.record(stream)
        graph.launch(stream)
        end.record(stream)
        end.synchronize()
        return float(cupy.cuda.get_elapsed_time(begin, end)) * 1000

    replay()
    return replay


def _capture_by_torch(call: Call, calls: int) -> Callable[[], float]:
    import torch

    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        for _ in range(2):
            call(0)  # compiles and allocates
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, stream=stream):
        for i in range(calls):
            call(i)
    begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)

    def replay() -> float:
        with torch.cuda.stream(stream):
            graph.replay()
            begin.record(stream)
            graph.replay()
            end.record(stream)
        end.synchronize()
        return float(begin.elapsed_time(end)) * 1000

    replay()
    return replay


def inputs(shape: tuple[int, int], dtype: str, *, cold: bool) -> list[Any]:
    """Standard normal matrices: one, or so many that a round over them misses L2."""

    def make() -> Any:
        return cupy.random.standard_normal(shape, dtype=cupy.float32).astype(dtype)

    return cold_inputs(make, shape[0] * shape[1] * cupy.dtype(dtype).itemsize) if cold else [make()]


def cold_inputs(make: Callable[[], Any], num_bytes: int) -> list[Any]:
    """So many inputs of so many bytes that a round over them misses L2."""
    count = max(2, -(-COLD_BYTES // num_bytes))
    if count > 4096:
        raise ValueError(f"{num_bytes} bytes are too few to be read cold")
    return [make() for _ in range(count)]


def warm_up(seconds: float = 0.5) -> None:
    """Bring the clocks up."""
    array = cupy.zeros(1 << 24, cupy.float32)
    end = time.perf_counter() + seconds
    while time.perf_counter() < end:
        for _ in range(50):
            array += 1
        cupy.cuda.get_current_stream().synchronize()


# -- Time on the host --------------------------------------------------------------------------------------------------


def host_rows(calls: Mapping[tuple[str, str], Action], cell: Row, name: str = "call") -> list[Row]:
    """Time what calls, each under (by, name), take on the host, and count what they leave to the cycle collector.

    It is off meanwhile, as `timeit` has it.
    """
    synchronize = cupy.cuda.Device().synchronize
    rounds: dict[tuple[str, str], list[list[float]]] = {call: [] for call in calls}
    for function in calls.values():
        for _ in range(50):
            function()
    gc.collect()
    gc.disable()
    try:
        for _ in range(HOST_ROUNDS):
            for call, function in calls.items():
                times = []
                for _ in range(HOST_BATCHES):
                    synchronize()
                    begin = time.perf_counter_ns()
                    for _ in range(HOST_CALLS):
                        function()
                    times.append((time.perf_counter_ns() - begin) / HOST_CALLS / 1000)
                rounds[call].append(times)
    finally:
        gc.enable()
    rows = []
    for (by, label), function in calls.items():
        median, spread = _median_and_spread(rounds[by, label])
        row = {"what": "host"} | cell | {"by": by, name: label, "us": round(median, 3), "spread_us": round(spread, 3)}
        rows.append(row | {"garbage": garbage(function)})
    return rows


def garbage(call: Action) -> int:
    """How many objects 100 calls leave to the cycle collector."""
    call()
    gc.collect()
    gc.disable()
    try:
        for _ in range(GARBAGE_CALLS):
            call()
        return gc.collect()
    finally:
        gc.enable()


# -- Rows and files ----------------------------------------------------------------------------------------------------


def _median_and_spread(rounds: list[list[float]]) -> Time:
    low, median, high = statistics.quantiles([time for times in rounds for time in times], n=4)
    medians = [statistics.median(times) for times in rounds]
    return median, max(high - low, max(medians) - min(medians))


def barred(row: Row, bar: float | None) -> Row:
    """The row with its bar, if it has one."""
    return row if bar is None else row | {"bar_us": bar}


def check_same_choice(ours: Any, theirs: Any) -> None:
    """ValueError unless a rival's indices, a tensor, are ours but for a few rows where rounding decides."""
    share = float((ours == cupy.from_dlpack(theirs.int())).all(axis=1).mean())
    if share < 0.99:
        raise ValueError(f"chooses as we do in only {share:.1%} of the rows")


def attempt(what: str, function: Action) -> Any:
    """What the function returns; None, with the reason printed, where a rival is not installed or fails."""
    try:
        return function()
    except Exception as error:
        reason = (str(error).strip() or "no message").splitlines()[0]
        print(f"left out: {what}: {type(error).__name__}: {reason}")
        return None


def main(op: str, measure: Callable[[bool], list[Row]], one: OneSize | None = None) -> None:
    """Read the command line; measure, write <op>.json and print. What every script runs.

    `measure` is told whether to be quick. `one` is for a command line that asks for one size, which is only printed.
    """
    request = one_size.parse(one)
    # A checkout asks before every call whether a kernel file has changed; an installed wheel, which is what users
    # call, does not.
    compiler.WATCHING = False
    begin = time.perf_counter()
    warm_up()
    if one is not None and request.size is not None:
        try:
            rows = one.measure(**request.size)
        except ValueError as error:  # a size that cannot be, in the words of the op
            raise SystemExit(f"{op}: {error}") from error
        facts = environment()
        print(f"{one_size.table(rows)}\n{results.source(facts)}")
        if request.json is not None:
            results.save(request.json, facts, rows)
        return
    rows = measure(request.quick)
    results.save(request.output / f"{op}.json", environment(), rows)
    for row in rows:
        print(results.label(row), *(f"{name}={row[name]}" for name in ("us", "spread_us", "garbage") if name in row))
    print(f"\n{results.bars_table(rows)}\n\n{op}: {len(rows)} rows in {time.perf_counter() - begin:.0f} s")


def environment() -> dict[str, Any]:
    """The GPU, its clocks, versions, commit and date, which every file of results carries."""
    query = "name,driver_version,clocks.sm,clocks.mem,clocks.max.sm,power.limit"
    smi = _output("nvidia-smi", f"--query-gpu={query}", "--format=csv,noheader", "-i", "0")
    packages = ("cupy-cuda12x", "cupy-cuda13x", "torch", "jax", "triton", "numpy")
    return {
        "gpu": dict(zip(query.split(","), (field.strip() for field in smi.split(",")), strict=False)),
        "nvrtc": ".".join(map(str, cupy.cuda.nvrtc.getVersion())),
        "python": platform.python_version(),
        "versions": {name: version for name in packages if (version := _version(name))},
        # Where only the files are, without their history, the environment says which commit they are.
        "commit": os.environ.get("COMMIT") or _output("git", "describe", "--always", "--dirty") or "unknown",
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
