# SPDX-License-Identifier: Apache-2.0
"""What activation_topk costs inside PyTorch and JAX beyond its kernel: under jit, in CUDA graphs, when compiled.

JAX's calls are timed until their results are ready. What is in a call's time comes apart by calls that do less: an
addition (one result), a selection of columns (two results), a custom call whose handler returns at once. XLA launches
our kernels by itself; rows "by handlers" show what calls cost where it cannot.
"""

from __future__ import annotations

import os
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any
from unittest.mock import patch

import cupy

from benchmarks.bars import JAX_MORE
from benchmarks.harness import Time, attempt, graph_microseconds, host_rows, main
from benchmarks.rows import OURS, Row
from cupy_router import Routing, RoutingMethod, activation_topk

N, EXPERTS, TOP_K = 64, 256, 6
METHOD = RoutingMethod(EXPERTS, TOP_K)
CELL: Row = {"op": "activation_topk", "n": N, "E": EXPERTS, "k": TOP_K, "dtype": "float32"}
ROUNDS, CALLS, TURNS = 40, 25, 5


def logits_of_cupy() -> Any:
    return cupy.random.standard_normal((N, EXPERTS), dtype=cupy.float32)


# -- JAX ---------------------------------------------------------------------------------------------------------------


def until_ready(calls: Mapping[str, Callable[[], Any]]) -> dict[str, list[float]]:
    """Microseconds of each, in rounds in which they take turns."""
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
    return times


def jax_rows() -> list[Row]:
    os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")
    import jax
    import jax.numpy as jnp
    import numpy as np

    from cupy_router.jax import _ffi, _lower_ptx

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
    of_others: dict[str, Callable[[Any], Any]] = {
        "an addition": lambda a: a + a,
        "two results of XLA": lambda a: (a[:, :TOP_K] + 1, a[:, :TOP_K].astype(jnp.int32)),
        "a handler that returns": lambda a: jax.ffi.ffi_call("cupy_router.nothing", like)(a, **{_ffi.ATTRIBUTE: ""}),
    }
    of_ours: dict[str, Callable[[Any], Any]] = {
        "activation_topk": lambda a: activation_topk(a, METHOD),
        "its gradient, too": jax.grad(lambda a: (activation_topk(a, METHOD).weights * upstream).sum()),
        "a program of 10": many(10),
        "a program of 30": many(30),
    }
    calls = {name: jax.jit(function) for name, function in (of_others | of_ours).items()}
    for call in calls.values():
        call(logits)
    with patch.object(_lower_ptx, "_gpu", lambda: None):
        for name, function in of_ours.items():
            by_handlers = calls[f"{name}, by handlers"] = jax.jit(lambda a, function=function: function(a))
            by_handlers(logits)
    calls["activation_topk, not jitted"] = lambda a: activation_topk(a, METHOD)
    found = until_ready({name: partial(call, logits) for name, call in calls.items()})

    def row(name: str, times: Sequence[float], by: str = OURS) -> Row:
        low, us, high = statistics.quantiles(times, n=4)
        call = f"jax.jit until ready: {name}"
        return {"what": "host"} | CELL | {"by": by, "call": call, "us": round(us, 2), "spread_us": round(high - low, 2)}

    def difference(name: str, other: str, divisor: int = 1) -> list[float]:
        return [(a - b) / divisor for a, b in zip(found[name], found[other], strict=True)]

    rows = [row(name, times, by="jax" if name in of_others else OURS) for name, times in found.items()]
    for how in ("", ", by handlers"):
        more = row(f"activation_topk{how}, less an addition", difference(f"activation_topk{how}", "an addition"))
        rows.append(more if how else more | {"bar_us": JAX_MORE})
        each = difference(f"a program of 30{how}", f"a program of 10{how}", 20)
        rows.append(row(f"each further call{how}", each))
    return rows


# -- PyTorch -----------------------------------------------------------------------------------------------------------


def graph_rows() -> list[Row]:
    """The kernel alone, by a graph of CuPy's, and as PyTorch captures a call: into the same memory, and into new."""
    logits = logits_of_cupy()
    out = Routing(cupy.empty((N, TOP_K), cupy.float32), cupy.empty((N, TOP_K), cupy.int32))

    def bare() -> Time:
        return graph_microseconds(lambda i: activation_topk(logits, METHOD, out=out))

    def row(name: str, times: Sequence[Time]) -> Row:
        medians = [us for us, _ in times]
        spread = max(max(spread for _, spread in times), max(medians) - min(medians))
        us = round(statistics.median(medians), 3)
        return {"what": "gpu"} | CELL | {"by": OURS, "call": name, "us": us, "spread_us": round(spread, 3)}

    def by_torch() -> list[Row]:
        import torch

        tensor, same = torch.from_dlpack(logits), Routing(*map(torch.from_dlpack, out))
        alone, captured = [], []
        for _ in range(TURNS):
            alone.append(bare())
            captured.append(graph_microseconds(lambda i: activation_topk(tensor, METHOD, out=same), torch=True))
        fresh = graph_microseconds(lambda i: activation_topk(tensor, METHOD), torch=True)
        kernel, in_graph = row("the kernel alone", alone), row("in a CUDA graph of PyTorch", captured)
        bar = round(kernel["us"] + max(kernel["spread_us"], in_graph["spread_us"]), 3)  # no longer, within the spread
        return [kernel, in_graph | {"bar_us": bar}, row("in a CUDA graph of PyTorch, results apart", [fresh])]

    return attempt("graphs of PyTorch", by_torch) or [row("the kernel alone", [bare()])]


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
