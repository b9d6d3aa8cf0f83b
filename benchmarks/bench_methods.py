# SPDX-License-Identifier: Apache-2.0
"""activation_topk of every preset beside plain sqrt(softplus) of its size, and what compiling its kernel takes."""

from __future__ import annotations

import os
import statistics
import tempfile
import time
from collections.abc import Iterator
from typing import Any

import cupy

from benchmarks.bars import COMPILE, GROUPED_RATIO, METHOD_RATIO
from benchmarks.bench_activation_topk import empty
from benchmarks.harness import barred, gpu_row, inputs, main
from benchmarks.rows import OURS, Row
from cupy_router import RoutingMethod, activation_topk, presets

N = (64, 8192)
COMPILES = 3
BIASED = ("deepseek-v3", "deepseek-v4", "ernie", "glm", "kimi", "minimax")  # families whose bias selects
LOGIT_BIASED = ("gpt-oss",)


def arrays(name: str, num_experts: int) -> dict[str, Any]:
    """What a layer of this family has beside its gate."""
    given = {"bias": BIASED, "logit_bias": LOGIT_BIASED}
    return {
        argument: cupy.random.standard_normal(num_experts, dtype=cupy.float32)
        for argument, families in given.items()
        if name.startswith(families)
    }


def preset_rows(name: str, method: RoutingMethod) -> Iterator[Row]:
    """Each with a bar of so many times the plain method's time in this run; then the plain method."""
    plain = RoutingMethod(method.num_experts, method.top_k, renormalize_eps=1e-20, scale=2.5)
    bias = cupy.random.standard_normal(method.num_experts, dtype=cupy.float32)
    layer = arrays(name, method.num_experts)
    for n in N:
        (logits,) = inputs((n, method.num_experts), "float32", cold=False)
        out = empty(n, method.top_k)
        cell: Row = {"op": "activation_topk", "E": method.num_experts, "k": method.top_k, "n": n, "preset": name}

        def of_preset(_: int, logits: Any = logits, out: Any = out) -> Any:
            return activation_topk(logits, method, **layer, out=out)

        def of_plain(_: int, logits: Any = logits, out: Any = out) -> Any:
            return activation_topk(logits, plain, bias=bias, out=out)

        base = gpu_row(of_plain, cell | {"method": "plain sqrtsoftplus"})
        ratio = GROUPED_RATIO if method.num_groups > 1 else METHOD_RATIO
        yield barred(gpu_row(of_preset, cell), round(base["us"] * ratio, 3))
        yield base


def compile_rows(name: str, method: RoutingMethod) -> Iterator[Row]:
    """The first call of a process that has compiled nothing of this kind: plan, NVRTC, loading, launch."""
    logits = cupy.zeros((64, method.num_experts), cupy.float32)
    times = []
    before = os.environ.get("CUPY_CACHE_DIR")
    for _ in range(COMPILES):
        with tempfile.TemporaryDirectory() as folder:
            os.environ["CUPY_CACHE_DIR"] = folder
            _forget()
            begin = time.perf_counter_ns()
            activation_topk(logits, method, **arrays(name, method.num_experts))
            cupy.cuda.Device().synchronize()
            times.append((time.perf_counter_ns() - begin) / 1000)
        if before is None:
            del os.environ["CUPY_CACHE_DIR"]
        else:
            os.environ["CUPY_CACHE_DIR"] = before
    row = {"what": "host", "op": "activation_topk", "by": OURS, "part": f"compile {name}"}
    yield barred(row | {"us": round(statistics.median(times)), "spread_us": round(max(times) - min(times))}, COMPILE)


def _forget() -> None:
    """What this process has compiled and planned."""
    from cupy_router import compiler
    from cupy_router.ops import _call

    compiler._functions.clear()
    _call._plans.clear()


def measure(quick: bool) -> list[Row]:
    parts = (preset_rows,) if quick else (preset_rows, compile_rows)
    return [row for part in parts for name, method in presets().items() for row in part(name, method)]


if __name__ == "__main__":
    main("methods", measure)
