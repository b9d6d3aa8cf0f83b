# SPDX-License-Identifier: Apache-2.0
"""Time on the host of each part of an eager call from PyTorch, of imports and of the first call."""

from __future__ import annotations

import statistics
import subprocess
import sys
from functools import partial
from pathlib import Path
from typing import Any

from benchmarks import harness
from benchmarks.bars import FIRST_CALL, IMPORT
from benchmarks.harness import Action
from benchmarks.rows import OURS, Row
from cupy_router import RoutingMethod, activation_topk

CELL = {"op": "activation_topk", "E": 256, "k": 6, "n": 64}
STARTS = 5

_IMPORT = """
import time
begin = time.perf_counter()
import cupy_router
print(time.perf_counter() - begin)
"""
_IMPORT_NUMPY = """
import time
begin = time.perf_counter()
import numpy, ml_dtypes
print(time.perf_counter() - begin)
"""
_IMPORT_OP = """
import time
import numpy, ml_dtypes, cupy_router
begin = time.perf_counter()
cupy_router.activation_topk
print(time.perf_counter() - begin)
"""
_FIRST_CALL = """
import time
import cupy, cupy_router
logits, route = cupy.zeros((64, 256), cupy.float32), cupy_router.activation_topk
cupy.cuda.Device().synchronize()
begin = time.perf_counter()
route(logits, "deepseek-v4-flash")
cupy.cuda.Device().synchronize()
print(time.perf_counter() - begin)
"""


def part_rows() -> list[Row]:
    """Measure the whole call, each of its parts, and calls of PyTorch for comparison."""
    import torch

    method = RoutingMethod(256, 6)
    logits, bias = torch.randn(64, 256, device="cuda"), torch.zeros(256, device="cuda")
    out = activation_topk(logits, method, bias=bias)
    parts: dict[tuple[str, str], Action] = {
        (OURS, "activation_topk"): lambda: activation_topk(logits, method, bias=bias),
        (OURS, "activation_topk, out="): lambda: activation_topk(logits, method, bias=bias, out=out),
        ("PyTorch", "torch.relu"): lambda: torch.relu(logits),
        ("PyTorch", "torch.empty"): lambda: torch.empty((64, 6), dtype=torch.float32, device=logits.device),
        ("PyTorch", "torch.empty_like"): lambda: torch.empty_like(out.weights),
        ("PyTorch", "Tensor.new_empty"): lambda: logits.new_empty((64, 6)),
    }
    # These are private names. A part whose name no longer exists is left out.
    for name, call in (harness.attempt("parts of the call", lambda: _inner_parts(logits, bias, out)) or {}).items():
        if harness.attempt(name[1], partial(_runs, call)):
            parts[name] = call
    return harness.host_rows(parts, CELL, "part")


def _runs(call: Action) -> bool:
    call()
    return True


def _inner_parts(logits: Any, bias: Any, out: Any) -> dict[tuple[str, str], Action]:
    from cupy_router import compiler
    from cupy_router.arrays import framework_of
    from cupy_router.ops import _cached

    framework = framework_of("logits", logits)
    stream = framework.current_stream(logits) or 0
    allocate = framework.allocator((((64, 6), "float32"), ((64, 6), "int32")), logits)
    parts: dict[tuple[str, str], Action] = {
        (OURS, "current stream"): lambda: framework.current_stream(logits),
        (OURS, "a tensor described"): lambda: framework.describe(logits, stream, []),
        (OURS, "outputs allocated"): lambda: allocate([]),
        (OURS, "kernel files checked (checkout only)"): compiler.changed,
    }
    activation_topk(logits, RoutingMethod(256, 6), bias=bias, out=out)
    key, call = next(reversed(_cached.calls.items()))
    work, arrays = call.work, [logits, bias, *[None] * 3, *out]
    if work is not None:
        pointers = [*[0 if array is None else array.data_ptr() for array in arrays], -1]
        parts[OURS, "cached call looked up"] = lambda: _cached.calls.get(key)
        parts[OURS, "arguments packed, kernel launched"] = lambda: work(stream, pointers)
        parts[OURS, "device checked"] = lambda: work.function.backend.use(0)
    return parts


def start_rows() -> list[Row]:
    """Measure the import of the package, and the first call after CuPy is imported and has a context.

    Kernels are in the disk cache.
    """
    rows = []
    parts: tuple[tuple[str, str, float | None], ...] = (
        ("import cupy_router", _IMPORT, IMPORT),
        ("first op imported, after NumPy", _IMPORT_OP, None),
        ("import numpy, ml_dtypes", _IMPORT_NUMPY, None),
        ("first call", _FIRST_CALL, FIRST_CALL),
    )
    for part, code, bar in parts:
        times = [_seconds(code) * 1e6 for _ in range(STARTS + 1)][1:]  # the first may fill caches
        low, median, high = statistics.quantiles(times, n=4)
        row = {
            "what": "host",
            "op": "activation_topk",
            "by": OURS,
            "part": part,
            "us": round(median),
            "spread_us": round(high - low),
        }
        rows.append(harness.barred(row, bar))
    return rows


def _seconds(code: str) -> float:
    root = Path(__file__).parents[1]
    return float(subprocess.run([sys.executable, "-c", code], cwd=root, capture_output=True, check=True).stdout)


def measure(quick: bool) -> list[Row]:
    return part_rows() + (harness.attempt("start", start_rows) or [])


if __name__ == "__main__":
    harness.main("host_profile", measure)
