# SPDX-License-Identifier: Apache-2.0
"""What activation_topk costs inside PyTorch and JAX beyond its kernel: under jit, in CUDA graphs, when compiled.

JAX's calls are timed until their results are ready. What is in a call's time comes apart by calls that do less: an
addition (one result), a selection of columns (two results), a custom call whose handler returns at once.
"""

from __future__ import annotations

import os
import statistics
import time
from collections.abc import Callable, Mapping
from typing import Any

import cupy

from benchmarks.bars import JAX_MORE
from benchmarks.harness import attempt, graph_microseconds, host_rows, main
from benchmarks.rows import OURS, Row
from cupy_router import Routing, RoutingMethod, activation_topk

N, EXPERTS, TOP_K = 64, 256, 6
METHOD = RoutingMethod(EXPERTS, TOP_K)
CELL: Row = {"op": "activation_topk", "n": N, "E": EXPERTS, "k": TOP_K, "dtype": "float32"}
ROUNDS, CALLS = 40, 25


def logits_of_cupy() -> Any:
    return cupy.random.standard_normal((N, EXPERTS), dtype=cupy.float32)


# -- JAX ---------------------------------------------------------------------------------------------------------------


def until_ready(calls: Mapping[str, Callable[[], Any]]) -> dict[str, tuple[float, float]]:
    """Median and interquartile range in microseconds, by turns."""
    import jax

    times: dict[str, list[float]] = {name: [] for name in calls}
    for call in calls.values():
        for _ in range(20):
            jax.block_until_ready(call())
    for _ in range(ROUNDS):
        for name, call in calls.items():
            begin = time.perf_counter_ns()
            for _ in range(CALLS):
                jax.block_until_ready(call())
            times[name].append((time.perf_counter_ns() - begin) / CALLS / 1000)
    quartiles = {name: statistics.quantiles(found, n=4) for name, found in times.items()}
    return {name: (median, high - low) for name, (low, median, high) in quartiles.items()}


def jax_rows() -> list[Row]:
    os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")
    import jax
    import jax.numpy as jnp
    import numpy as np

    from cupy_router.jax import _ffi

    logits = jax.device_put(np.random.default_rng(0).standard_normal((N, EXPERTS), np.float32), jax.devices("gpu")[0])
    nothing = _ffi.handler("nothing", lambda execution: None, True, False)
    jax.ffi.register_ffi_target("cupy_router.nothing", jax.ffi.pycapsule(nothing), platform="CUDA")
    like = [jax.ShapeDtypeStruct((N, TOP_K), dtype) for dtype in (jnp.float32, jnp.int32)]

    def many(count: int) -> Callable[[Any], Any]:
        def program(logits: Any) -> Any:
            for _ in range(count):
                logits = logits + activation_topk(logits, METHOD).weights[:, :1]
            return logits

        return program

    upstream = jnp.ones((N, TOP_K))
    functions: dict[str, Callable[[Any], Any]] = {
        "an addition": lambda a: a + a,
        "two results of XLA": lambda a: (a[:, :TOP_K] + 1, a[:, :TOP_K].astype(jnp.int32)),
        "a handler that returns": lambda a: jax.ffi.ffi_call("cupy_router.nothing", like)(a, **{_ffi.ATTRIBUTE: ""}),
        "activation_topk": lambda a: activation_topk(a, METHOD),
        "its gradient, too": jax.grad(lambda a: (activation_topk(a, METHOD).weights * upstream).sum()),
        "a program of 10": many(10),
        "a program of 30": many(30),
    }
    jitted = {name: jax.jit(function) for name, function in functions.items()}
    calls = {name: (lambda f=function: f(logits)) for name, function in jitted.items()}
    found = until_ready(calls | {"activation_topk, not jitted": lambda: activation_topk(logits, METHOD)})

    def row(name: str, us: float, spread: float, by: str = OURS) -> Row:
        return {"what": "host"} | CELL | {"by": by, "call": name, "us": round(us, 2), "spread_us": round(spread, 2)}

    rows = [row(f"jax.jit until ready: {name}", *times, by="jax") for name, times in found.items()]
    (ours, our_spread), (addition, spread) = found["activation_topk"], found["an addition"]
    more = row("jax.jit until ready: activation_topk less an addition", ours - addition, our_spread + spread)
    ten, thirty = found["a program of 10"], found["a program of 30"]
    each = row("jax.jit until ready: each further call", (thirty[0] - ten[0]) / 20, (thirty[1] + ten[1]) / 20)
    return [*rows, more | {"bar_us": JAX_MORE}, each]


# -- PyTorch -----------------------------------------------------------------------------------------------------------


def graph_rows() -> list[Row]:
    """The kernel alone, by a graph of CuPy's, and as PyTorch captures a call: into the same memory, and into new."""
    logits = logits_of_cupy()
    out = Routing(cupy.empty((N, TOP_K), cupy.float32), cupy.empty((N, TOP_K), cupy.int32))

    def row(name: str, times: tuple[float, float]) -> Row:
        us, spread = times
        return {"what": "gpu"} | CELL | {"by": OURS, "call": name, "us": round(us, 3), "spread_us": round(spread, 3)}

    bare = graph_microseconds(lambda i: activation_topk(logits, METHOD, out=out))
    rows = [row("the kernel alone", bare)]

    def by_torch() -> list[Row]:
        import torch

        tensor, same = torch.from_dlpack(logits), Routing(*map(torch.from_dlpack, out))
        captured = graph_microseconds(lambda i: activation_topk(tensor, METHOD, out=same), torch=True)
        bar = round(bare[0] + bare[1] + captured[1], 3)  # no longer than the kernel, within both spreads
        fresh = graph_microseconds(lambda i: activation_topk(tensor, METHOD), torch=True)
        return [
            row("in a CUDA graph of PyTorch", captured) | {"bar_us": bar},
            row("in a CUDA graph of PyTorch, results apart", fresh),
        ]

    return rows + (attempt("graphs of PyTorch", by_torch) or [])


def torch_rows() -> list[Row]:
    """Host time of calls: eager, compiled, and replayed by reduce-overhead."""
    import torch

    logits = torch.from_dlpack(logits_of_cupy())
    compiled, replayed = (
        torch.compile(lambda a: tuple(activation_topk(a, METHOD)), fullgraph=True, mode=mode)
        for mode in ("default", "reduce-overhead")
    )
    calls = {
        (OURS, "torch, eager"): lambda: activation_topk(logits, METHOD),
        (OURS, "torch.compile"): lambda: compiled(logits),
        (OURS, "torch.compile, reduce-overhead"): lambda: replayed(logits),
        ("PyTorch", "torch.compile of an addition"): torch.compile(lambda: logits + logits, fullgraph=True),
    }
    return host_rows(calls, CELL)


def measure(quick: bool) -> list[Row]:
    rows = graph_rows() + (attempt("JAX", jax_rows) or [])
    return rows if quick else rows + (attempt("torch.compile", torch_rows) or [])


if __name__ == "__main__":
    main("frameworks", measure)
