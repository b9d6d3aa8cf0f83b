# SPDX-License-Identifier: Apache-2.0
"""activation_topk: time on the GPU over n, E, k, dtype and data, and on the host, beside what users have today."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import cupy

from benchmarks import floor
from benchmarks.bars import ACTIVATION_TOPK, HOST, bar_16_bit
from benchmarks.harness import Action, attempt, barred, check_same_choice, gpu_row, host_rows, inputs, main
from benchmarks.one_size import FLOATS, OneSize
from benchmarks.rows import OURS, Row
from cupy_router import Routing, RoutingMethod, activation_topk

SCALE = 2.5
COLD_FROM = 65536  # rows that do not fit into L2
BARRED_N = tuple(ACTIVATION_TOPK[256])
ALL_N = (1, 4, 16, 64, 256, 1024, 4096, 8192, 16384, 65536)
ALL_E = (8, 16, 32, 48, 60, 64, 72, 96, 128, 144, 160, 192, 256, 320, 384, 512, 576, 768, 896, 1024)
ALL_K = (1, 2, 4, 6, 8, 12, 16, 24, 32)
REPLICAS = "replicas"  # random logits, and indices of physical experts
COMPILED_N = (64, 8192)  # torch.compile takes seconds for each


def method_of(num_experts: int, k: int) -> RoutingMethod:
    return RoutingMethod(num_experts, k, "sqrtsoftplus", renormalize_eps=1e-20, scale=SCALE)


def replicas_of(num_experts: int) -> dict[str, Any]:
    """Return a map with a second replica of one expert in eight, of up to four that have room."""
    replicas = cupy.full((num_experts, 4), -1, cupy.int32)
    replicas[:, 0] = cupy.arange(num_experts)
    replicas[::8, 1] = num_experts + cupy.arange(len(replicas[::8]))
    counts = (replicas >= 0).sum(axis=1).astype(cupy.int32)
    return {"replicas": replicas, "replica_counts": counts, "num_physical": num_experts + len(replicas[::8])}


def empty(num_tokens: int, k: int) -> Routing:
    return Routing(cupy.empty((num_tokens, k), cupy.float32), cupy.empty((num_tokens, k), cupy.int32))


class Problem:
    """One size, with its inputs."""

    def __init__(self, num_experts: int, k: int, n: int, dtype: str = "float32", data: str = "normal") -> None:
        cold = n >= COLD_FROM
        self.cell: Row = {"op": "activation_topk", "E": num_experts, "k": k, "n": n, "dtype": dtype}
        self.cell |= {"cache": "cold" if cold else "warm"}
        self.k, self.method = k, method_of(num_experts, k)
        self.logits = inputs((n, num_experts), dtype, cold=cold)
        self.bias = cupy.random.standard_normal(num_experts, dtype=cupy.float32)
        self.out = empty(n, k)
        self.more: dict[str, Any] = {}
        if data != "normal":
            self.cell |= {"data": data}
        if data == REPLICAS:
            self.more = replicas_of(num_experts)
        elif data != "normal":
            self.logits, self.bias = DATA[data](self.logits, self.bias)

    def call(self, i: int = 0) -> Routing:
        logits = self.logits[i % len(self.logits)]
        return activation_topk(logits, self.method, bias=self.bias, out=self.out, **self.more)

    def ours(self) -> Row:
        return gpu_row(self.call, self.cell, rotation=len(self.logits))

    def floor(self) -> Row:
        return floor.read_rows(self.logits, self.out, self.cell)

    def rivals(self, names: Sequence[str]) -> list[Row]:
        rows = (attempt(f"{name} {self.cell}", partial(self._rival, name)) for name in names)
        return [row for row in rows if row is not None]

    def _rival(self, name: str) -> Row:
        from benchmarks import rivals

        logits, bias, k = [rivals.tensor(array) for array in self.logits], rivals.tensor(self.bias), self.k
        route: Callable[..., Any]
        if name == "Triton":
            from benchmarks import rivals_triton

            out = rivals_triton.outputs(len(logits[0]), k, bias.device)

            def route(x: Any) -> Any:
                return rivals_triton.router(x, bias, k, SCALE, out)
        else:
            function = rivals.compiled(rivals.router) if name == "torch.compile" else rivals.router

            def route(x: Any) -> Any:
                return function(x, bias, k, SCALE)

        check_same_choice(self.call().indices, route(logits[0])[1])
        count = len(logits)
        return gpu_row(lambda i: route(logits[i % count]), self.cell, name, rotation=count, torch=True)


# What could cost more than random logits: winners side by side, nothing but ties, a bias as trained models have it.
DATA: dict[str, Callable[[list[Any], Any], tuple[list[Any], Any]]] = {
    "ascending": lambda logits, bias: ([cupy.sort(array, axis=1) for array in logits], cupy.zeros_like(bias)),
    "equal": lambda logits, bias: ([cupy.zeros_like(array) for array in logits], cupy.zeros_like(bias)),
    "bias 8.08": lambda logits, bias: (logits, 8.08 + bias * cupy.float32(0.01)),
}


def barred_rows(*, compiled: bool) -> list[Row]:
    rows = []
    for num_experts, bars in ACTIVATION_TOPK.items():
        for n, bar in bars.items():
            problem = Problem(num_experts, 6, n)
            rows += [barred(problem.ours(), bar), problem.floor()]
            names = ["Triton", "PyTorch"]
            rows += problem.rivals(names + ["torch.compile"] * (compiled and num_experts == 256 and n in COMPILED_N))
            rows += [Problem(num_experts, 6, n, dtype).ours() for dtype in ("bfloat16", "float16")]
    bar_16_bit(rows)
    return rows


def sweep_rows() -> list[Row]:
    problems = [Problem(num_experts, 6, n) for num_experts in (256, 384) for n in ALL_N if n not in BARRED_N]
    rows = [row for problem in problems for row in (problem.ours(), problem.floor())]
    for n in (64, 8192):
        for num_experts in ALL_E:
            if num_experts not in ACTIVATION_TOPK:
                problem = Problem(num_experts, 6, n)
                rows += [problem.ours(), problem.floor()]
        rows += [Problem(256, k, n).ours() for k in ALL_K if k != 6]
        rows += [Problem(256, 6, n, data=data).ours() for data in DATA]
    return rows


def call_rows() -> list[Row]:
    """What a call takes on the host, from PyTorch and CuPy, beside calls that users know."""
    cell = {"op": "activation_topk", "E": 256, "k": 6, "n": 64}
    method = method_of(256, 6)
    logits, bias, out = inputs((64, 256), "float32", cold=False)[0], cupy.zeros(256, cupy.float32), empty(64, 6)
    calls: dict[tuple[str, str], Action] = {
        (OURS, "cupy"): lambda: activation_topk(logits, method, bias=bias),
        (OURS, "cupy, out="): lambda: activation_topk(logits, method, bias=bias, out=out),
    }
    attempt("calls from PyTorch", lambda: calls.update(_torch_calls(method)))
    attempt("calls of Triton", lambda: calls.update(_triton_calls()))
    return [barred(row, HOST.get(row["call"])) for row in host_rows(calls, cell)]


def _torch_calls(method: RoutingMethod) -> dict[tuple[str, str], Action]:
    import torch

    from benchmarks import rivals

    logits, bias = torch.randn(64, 256, device="cuda"), torch.zeros(256, device="cuda")
    out = activation_topk(logits, method, bias=bias)
    return {
        (OURS, "torch"): lambda: activation_topk(logits, method, bias=bias),
        (OURS, "torch, out="): lambda: activation_topk(logits, method, bias=bias, out=out),
        ("PyTorch", "torch.relu"): lambda: torch.relu(logits),
        ("PyTorch", "torch.topk"): lambda: torch.topk(logits, 6),
        ("PyTorch", "the router, eager"): lambda: rivals.router(logits, bias, 6, SCALE),
    }


def _triton_calls() -> dict[tuple[str, str], Action]:
    import torch

    from benchmarks import rivals_triton

    logits, bias = torch.randn(64, 256, device="cuda"), torch.zeros(256, device="cuda")
    out = rivals_triton.outputs(64, 6, logits.device)
    calls: dict[tuple[str, str], Action] = {
        ("Triton", "a trivial kernel"): lambda: rivals_triton.trivial(bias),
        ("Triton", "the router, out="): lambda: rivals_triton.router(logits, bias, 6, SCALE, out),
    }
    for call in calls.values():
        call()  # fails here, not among the timings, if it cannot run
    return calls


def measure(quick: bool) -> list[Row]:
    replaced = [Problem(256, 6, n, data=REPLICAS).ours() for n in (1, 64, 1024, 8192)]
    return call_rows() + barred_rows(compiled=not quick) + replaced + ([] if quick else sweep_rows())


def one_size(n: int, num_experts: int, top_k: int, dtype: str, data: str) -> list[Row]:
    problem = Problem(num_experts, top_k, n, dtype, data)
    return [problem.ours(), problem.floor(), *problem.rivals(("Triton", "PyTorch", "torch.compile"))]


ONE_SIZE = OneSize(
    {"n": 64, "num_experts": 256, "top_k": 6, "dtype": FLOATS, "data": ("normal", *DATA, REPLICAS)},
    one_size,
)

if __name__ == "__main__":
    main("activation_topk", measure, ONE_SIZE)
