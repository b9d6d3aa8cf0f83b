# SPDX-License-Identifier: Apache-2.0
"""Every variant of every kernel under compute-sanitizer: memcheck, racecheck, initcheck, synccheck.

    python -m tests.gpu.sanitize [--output FILE_OR_FOLDER] [--tools memcheck racecheck] [--every N] [--only TEXT]
                                 [--jobs N]

Each tool runs processes of its own, which share the calls of tests/gpu/variants.py, compare them with the reference and
say how many there were. Arrays lie in CUDA memory of exactly their own size, each its own allocation, and of it only
the elements are ever written: a pool would hide a read one element too far. Before that each tool has to find a planted
fault, so that a tool that sees nothing is not mistaken for a clean result.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import shutil
import subprocess
import sys
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np

from tests.backends import GpuBackend
from tests.fuzz.case import Case, arguments, call, check
from tests.gpu.variants import cases

# What each tool is given, and every which case it runs: races are looked for in every access to shared memory, slowly.
TOOLS: dict[str, tuple[tuple[str, ...], int]] = {
    "memcheck": (("--padding", "32"), 1),
    "racecheck": ((), 3),
    "initcheck": ((), 1),
    "synccheck": ((), 2),
}
PLANTED = {
    "memcheck": "x[n] = 1;",
    "racecheck": "__shared__ int s[64]; s[t] = t; x[t % n] = s[63 - t];",
    "initcheck": "x[0] = y[t % n];",
    "synccheck": "if (t < 16) __syncthreads(); x[0] = 1;",
}
_FOLDERS = ("/usr/local/cuda/bin", "/usr/local/cuda/compute-sanitizer", "/opt/nvidia/compute-sanitizer")
_MARK = "calls made: "
_ROOT = Path(__file__).parents[2]


class ExactBackend(GpuBackend):
    """CuPy arrays by cudaMalloc, one allocation each, which ends with the last element."""

    name = "gpu"

    def __init__(self) -> None:
        super().__init__()
        from cupy_router.arrays import _cupy  # which needs CuPy

        self.xp.cuda.set_allocator(None)  # no pool
        _cupy.MAX_SHARED_BYTES = 0  # nor results in one block

    def array(self, host: np.ndarray, row_pad: int = 0, offset: int = 0) -> Any:
        """Rows are copied one by one, so that what lies between them is never written."""
        matrix = np.ascontiguousarray(host if host.ndim == 2 else host.reshape(1, -1))
        rows, columns = matrix.shape
        size, stride = matrix.itemsize, columns + row_pad
        memory = self.xp.cuda.alloc((offset + max(rows - 1, 0) * stride + columns) * size)
        start = memory + offset * size
        for row in range(rows):
            runtime = self.xp.cuda.runtime
            to_device = runtime.memcpyHostToDevice
            runtime.memcpy(start.ptr + row * stride * size, matrix[row].ctypes.data, columns * size, to_device)
        array = self.xp.ndarray(matrix.shape, matrix.dtype, start, strides=(stride * size, size))
        return array if host.ndim == 2 else array.reshape(host.shape)


def call_exactly(case: Case, backend: Any) -> tuple[np.ndarray, ...]:
    """Call the op on arrays of exactly their size, results included if the case preallocates them."""
    given = arguments(case, backend)
    if case.out_padding >= 0:
        arrays = (backend.array(np.ones(shape, dtype), case.out_padding) for shape, dtype in case.results)
        given["out"] = case.kind(*arrays)
    result = call(case.op, case.as_of_rows, case.plan, **given)
    return tuple(backend.numpy(array) for array in result)


def make_calls(backend: Any, chosen: Sequence[Case]) -> int:
    """Make all calls and return their number; AssertionError if one is wrong."""
    for case in chosen:
        check(case, call_exactly(case, backend))
    return len(chosen)


def make_fault(tool: str) -> None:
    """Run a kernel with the fault that the tool detects."""
    import cupy

    cupy.cuda.set_allocator(None)
    source = (
        f'extern "C" __global__ void planted(int *x, const int *y, int n) {{ int t = threadIdx.x; {PLANTED[tool]} }}'
    )
    kernel = cupy.RawKernel(source, "planted")
    x, y = cupy.empty(100, cupy.int32), cupy.empty(100, cupy.int32)
    kernel((1,), (64,), (x, y, np.int32(100)))
    cupy.cuda.Device().synchronize()


# -- Outside the tool --------------------------------------------------------------------------------------------------


def find_sanitizer() -> str:
    """Return the command; SystemExit if there is none."""
    found = shutil.which("compute-sanitizer")
    for folder in _FOLDERS:
        found = found or shutil.which("compute-sanitizer", path=folder)
    if found is None:
        sys.exit(f"compute-sanitizer is neither on the PATH nor in {', '.join(_FOLDERS)}: install the CUDA toolkit")
    return found


def errors_in(text: str) -> int | None:
    """Return the number of errors or hazards that a tool reports at its end; None without such a report."""
    found = re.findall(r"ERROR SUMMARY: (\d+) error|RACECHECK SUMMARY: (\d+) hazard", text)
    return sum(int(error or hazard) for error, hazard in found) if found else None


def run_jobs(command: Sequence[str], every: int, jobs: int, timeout: float) -> dict[str, Any]:
    """Share every Nth call among processes that run at once; return the sums of errors and calls, and the seconds."""
    begin = time.monotonic()
    commands = [[*command, "--calls", str(every * jobs), "--first", str(every * job)] for job in range(jobs)]
    with ThreadPoolExecutor(jobs) as pool:
        done = list(pool.map(lambda each: run_tool(each, timeout), commands))
    errors = [each["errors"] for each in done]
    return {
        "errors": None if None in errors else sum(errors),
        "calls": sum(each["calls"] for each in done) if all(each["calls"] for each in done) else 0,
        "exit": next((each["exit"] for each in done if each["exit"]), 0),
        "seconds": round(time.monotonic() - begin, 1),
        "text": "".join(each["text"][-6000:] for each in done if each["exit"] or each["errors"] != 0),
    }


def run_tool(command: Sequence[str], timeout: float) -> dict[str, Any]:
    """Run one process under a tool; return errors, calls and seconds."""
    begin = time.monotonic()
    try:
        done = subprocess.run(
            command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, timeout=timeout, cwd=_ROOT
        )
        text, status = done.stdout, done.returncode
    except subprocess.TimeoutExpired as expired:
        output = expired.stdout or b""
        text, status = output.decode(errors="replace") if isinstance(output, bytes) else output, -1
    calls = re.search(rf"{_MARK}(\d+)", text)
    return {
        "errors": errors_in(text),
        "calls": int(calls[1]) if calls else 0,
        "exit": status,
        "seconds": round(time.monotonic() - begin, 1),
        "text": text,
    }


def report(tool: str, every: int, jobs: int, timeout: float, only: str = "") -> dict[str, Any]:
    """Run one tool: it must find its planted fault, then nothing in our kernels."""
    options, default = TOOLS[tool]
    command = [find_sanitizer(), "--tool", tool, *options, sys.executable, "-m", "tests.gpu.sanitize"]
    planted = run_tool([*command, "--planted", tool], timeout)
    ours = run_jobs([*command, "--only", only], every or default, jobs, timeout)
    clean = ours["errors"] == 0 and ours["exit"] == 0 and ours["calls"] > 0
    if not clean:
        print(ours["text"][-6000:])
    if not planted["errors"]:
        print(f"{tool} does not see its planted fault:\n{planted['text'][-2000:]}")
    figures = {name: ours[name] for name in ("calls", "errors", "exit", "seconds")}
    return {"tool": tool, **figures, "planted_errors": planted["errors"], "ok": clean and bool(planted["errors"])}


def main(given: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.gpu.sanitize")
    parser.add_argument("--output", type=Path, help="write the figures as JSON, into a folder as sanitizers.json")
    parser.add_argument("--tools", nargs="+", choices=TOOLS, default=list(TOOLS))
    parser.add_argument("--every", type=int, default=0, help="run every Nth case (default: 1 to 3, by the tool)")
    parser.add_argument("--only", default="", metavar="TEXT", help="run only cases whose description has this text")
    parser.add_argument("--jobs", type=int, default=max(1, (os.cpu_count() or 1) * 3 // 4), help="processes at once")
    parser.add_argument("--timeout", type=float, default=170.0, help="seconds for each process")
    parser.add_argument("--calls", type=int, metavar="N", help="only make every Nth call, here and now")
    parser.add_argument("--first", type=int, default=0, metavar="N", help="with --calls: the number of the first")
    parser.add_argument("--planted", choices=TOOLS, help="only make the fault that this tool is for")
    chosen = parser.parse_args(given)
    if chosen.planted:
        make_fault(chosen.planted)
        return 0
    if chosen.calls:
        those = [case for case in cases() if chosen.only in repr(case)]
        print(f"{_MARK}{make_calls(ExactBackend(), those[chosen.first :: chosen.calls])}")
        return 0
    from benchmarks.harness import environment  # which needs CuPy

    # Once without a tool: all kernels are compiled then, and wrong results are seen before anything else.
    command = [sys.executable, "-m", "tests.gpu.sanitize", "--only", chosen.only]
    warm = run_jobs(command, 1, chosen.jobs, chosen.timeout)
    print(f"no tool: {warm['calls']} calls, exit {warm['exit']}, {warm['seconds']} s")
    if warm["exit"]:
        print(warm["text"][-6000:])
        return 1
    version = subprocess.run([find_sanitizer(), "--version"], capture_output=True, text=True).stdout
    found = re.search(r"Version ([\d.]+)", version)
    about = {"compute_sanitizer": found[1] if found else version.strip()}
    content: dict[str, Any] = {"environment": environment() | about, "tools": []}
    for tool in chosen.tools:
        row = report(tool, chosen.every, chosen.jobs, chosen.timeout, chosen.only)
        content["tools"].append(row)
        print("  ".join(f"{key}={value}" for key, value in row.items()))
        if chosen.output:  # what is known so far, should a later tool take too long
            chosen.output.parent.mkdir(parents=True, exist_ok=True)
            file = chosen.output / "sanitizers.json" if chosen.output.is_dir() else chosen.output
            file.write_text(json.dumps(content, indent=1) + "\n")
    return 0 if all(row["ok"] for row in content["tools"]) else 1


if __name__ == "__main__":
    sys.exit(main())
