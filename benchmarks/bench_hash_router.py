# SPDX-License-Identifier: Apache-2.0
"""hash_router: time on the GPU over n for its three sources of weights, and on the host, beside PyTorch and Triton."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import cupy

from benchmarks import floor
from benchmarks.bars import HASH_ROUTER_LOGITS
from benchmarks.harness import Action, attempt, barred, check_same_choice, gpu_row, host_rows, inputs, main
from benchmarks.one_size import FLOATS, OneSize
from benchmarks.rows import OURS, Row
from cupy_router import Routing, RoutingMethod, hash_router, presets

VOCAB_SIZE = 129_280
HIDDEN = {"deepseek-v4-flash": 4096, "deepseek-v4-pro": 7168}
ALL_N = (1, 4, 16, 64, 256, 1024, 4096, 8192, 16384)
PRODUCTS_N = (1, 4, 16, 64, 256, 1024)  # with more tokens the full product is the better way
COMPILED_N = (64, 8192)


class Problem:
    """One size, with its inputs, warm. `source` of the weights: "uniform", "logits" or "products"."""

    def __init__(
        self, method: str | RoutingMethod, source: str, n: int, dtype: str = "float32", hidden: int = 4096
    ) -> None:
        self.method = method = presets()[method] if isinstance(method, str) else method
        num_experts, k = method.num_experts, method.top_k
        self.cell: Row = {"op": "hash_router", "source": source, "E": num_experts, "k": k, "n": n, "dtype": dtype}
        self.cell |= {"cache": "warm"}
        self.table = cupy.random.randint(0, num_experts, (VOCAB_SIZE, k)).astype(cupy.int32)
        self.token_ids = cupy.random.randint(0, VOCAB_SIZE, n).astype(cupy.int32)
        self.out = Routing(cupy.empty((n, k), cupy.float32), cupy.empty((n, k), cupy.int32))
        self.arrays: dict[str, Any] = {}
        if source == "logits":
            self.arrays = {"logits": inputs((n, num_experts), dtype, cold=False)[0]}
        elif source == "products":
            self.cell |= {"H": hidden}
            self.arrays = {"x": inputs((n, hidden), dtype, cold=False)[0]}
            self.arrays["weight"] = inputs((num_experts, hidden), dtype, cold=False)[0]

    def call(self, i: int = 0) -> Routing:
        method = self.method if self.arrays else None
        return hash_router(self.token_ids, self.table, method, **self.arrays, out=self.out)

    def ours(self) -> Row:
        return gpu_row(self.call, self.cell)

    def floor(self) -> Row:
        return floor.read_entries(self.token_ids, self.table, self.arrays["logits"], self.out, self.cell)

    def rivals(self, names: Sequence[str]) -> list[Row]:
        rows = (attempt(f"{name} {self.cell}", partial(self._rival, name)) for name in names)
        return [row for row in rows if row is not None]

    def _rival(self, name: str) -> Row:
        from benchmarks import rivals

        token_ids, table, *arrays = map(rivals.tensor, (self.token_ids, self.table, *self.arrays.values()))
        scale = self.method.scale
        route: Callable[[], Any]
        if name == "Triton":
            from benchmarks import rivals_triton

            out = rivals_triton.outputs(len(token_ids), self.method.top_k, token_ids.device)

            def route() -> Any:
                return rivals_triton.hash_layer(token_ids, table, arrays[0], scale, out)
        else:
            layer: Callable[..., Any] = rivals.hash_layer_products if "x" in self.arrays else rivals.hash_layer
            function = rivals.compiled(layer) if name == "torch.compile" else layer
            wide_table = table.long()

            def route() -> Any:
                return function(token_ids, wide_table, *arrays, scale)

        check_same_choice(self.call().indices, route()[1])
        return gpu_row(lambda i: route(), self.cell, name, torch=True)


def logits_rows(sizes: Sequence[int], *, compiled: bool) -> list[Row]:
    rows = []
    for preset in HIDDEN:
        for n in sizes:
            problem = Problem(preset, "logits", n)
            rows += [barred(problem.ours(), HASH_ROUTER_LOGITS.get(n)), problem.floor()]
            rows += problem.rivals(["Triton", "PyTorch"] + ["torch.compile"] * (compiled and n in COMPILED_N))
    return rows


def sweep_rows() -> list[Row]:
    rows = []
    for preset, hidden in HIDDEN.items():
        for n in HASH_ROUTER_LOGITS:
            rows.append(Problem(preset, "uniform", n).ours())
            rows += [Problem(preset, "logits", n, dtype).ours() for dtype in ("bfloat16", "float16")]
        for n in PRODUCTS_N:
            problem = Problem(preset, "products", n, "bfloat16", hidden)
            rows += [problem.ours(), *problem.rivals(["PyTorch with cuBLAS"])]
    return rows


def call_rows() -> list[Row]:
    """What a call with logits takes on the host, from PyTorch and CuPy."""
    problem = Problem("deepseek-v4-flash", "logits", 64)
    arguments = (problem.token_ids, problem.table, problem.method)
    logits = problem.arrays["logits"]
    calls: dict[tuple[str, str], Action] = {
        (OURS, "cupy"): lambda: hash_router(*arguments, logits=logits),
        (OURS, "cupy, out="): lambda: hash_router(*arguments, logits=logits, out=problem.out),
    }
    attempt("calls from PyTorch", lambda: calls.update(_torch_calls(problem)))
    return host_rows(calls, {"op": "hash_router", "source": "logits", "E": 256, "k": 6, "n": 64})


def _torch_calls(problem: Problem) -> dict[tuple[str, str], Action]:
    from benchmarks import rivals

    token_ids, table, logits = map(rivals.tensor, (problem.token_ids, problem.table, problem.arrays["logits"]))
    method, wide_table = problem.method, table.long()
    out = hash_router(token_ids, table, method, logits=logits)
    return {
        (OURS, "torch"): lambda: hash_router(token_ids, table, method, logits=logits),
        (OURS, "torch, out="): lambda: hash_router(token_ids, table, method, logits=logits, out=out),
        ("PyTorch", "the layer, eager"): lambda: rivals.hash_layer(token_ids, wide_table, logits, method.scale),
    }


def measure(quick: bool) -> list[Row]:
    rows = call_rows() + logits_rows(tuple(HASH_ROUTER_LOGITS) if quick else ALL_N, compiled=not quick)
    return rows + ([] if quick else sweep_rows())


def one_size(n: int, num_experts: int, top_k: int, hidden: int, source: str, dtype: str) -> list[Row]:
    """`hidden` counts for source "products" only; the floor and the rivals are those of the source."""
    method = replace(presets()["deepseek-v4-flash"], num_experts=num_experts, top_k=top_k)
    problem = Problem(method, source, n, dtype, hidden)
    rows = [problem.ours()]
    if source == "logits":
        if dtype == "float32":
            rows.append(problem.floor())
        rows += problem.rivals(("Triton", "PyTorch", "torch.compile"))
    elif source == "products":
        rows += problem.rivals(("PyTorch with cuBLAS",))
    return rows


SOURCES = ("logits", "uniform", "products")
ONE_SIZE = OneSize(
    {"n": 64, "num_experts": 256, "top_k": 6, "hidden": 4096, "source": SOURCES, "dtype": FLOATS},
    one_size,
)

if __name__ == "__main__":
    main("hash_router", measure, ONE_SIZE)
