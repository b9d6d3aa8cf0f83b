# SPDX-License-Identifier: Apache-2.0
"""Routers with a layout in the same call, and without: what the layout adds, in one launch or in two."""

from __future__ import annotations

from functools import partial
from typing import Any
from unittest import mock

import cupy
import numpy as np

from benchmarks.bars import FUSED_LAYOUT, LAYOUT_PADDED_RATIO, LAYOUT_WIDTH_RATIO
from benchmarks.harness import barred, gpu_row, inputs, main
from benchmarks.one_size import OneSize
from benchmarks.rows import Row
from cupy_router import LayoutSpec, RoutingMethod, activation_topk, dense_router, hash_router
from cupy_router.ops import _cached
from cupy_router.ops._routed import RoutedOp

ALL_N = (1, 2, 4, 8, 9, 16, 24, 32, 48, 64, 65, 96, 128, 129, 192, 256, 512)
HIDDEN, VOCAB_SIZE = 4096, 1000
PADDED_WANT = ("counts", "offsets", "order", "positions", "block_experts", "row_experts")
OPS = ("activation_topk", "hash_router", "dense_router")
IN_TWO = "cupy_router in two launches"


class Problem:
    """One size of one router, with its inputs."""

    def __init__(self, op: str, n: int, num_experts: int = 256, k: int = 8, alignment: int = 1) -> None:
        self.cell: Row = {"op": op, "E": num_experts, "k": k, "n": n, "cache": "warm"}
        self.alignment = alignment
        method = RoutingMethod(num_experts, k, "sqrtsoftplus", renormalize_eps=1e-20, scale=2.5)
        bias = cupy.random.standard_normal(num_experts, dtype=cupy.float32)
        self.route: Any
        if op == "dense_router":
            x, weight = (inputs((rows, HIDDEN), "float16", cold=False)[0] for rows in (n, num_experts))
            self.route = partial(dense_router, x, weight, method, bias=bias, path="decode" if n <= 64 else None)
        else:
            logits = inputs((n, num_experts), "float32", cold=False)[0]
            self.route = partial(activation_topk, logits, method, bias=bias)
            if op == "hash_router":
                rng = np.random.default_rng(n)
                table = (rng.integers(0, num_experts, (VOCAB_SIZE, 1)) + 5 * np.arange(k)) % num_experts
                ids = cupy.asarray(rng.integers(0, VOCAB_SIZE, n).astype(np.int32))
                self.route = partial(hash_router, ids, cupy.asarray(table.astype(np.int32)), method, logits=logits)

    def plain(self) -> Row:
        """Return the time without layout."""
        out = self.route()
        return gpu_row(lambda i: self.route(out=out), self.cell | {"layout": "none"})

    def with_layout(self) -> Row:
        spec = LayoutSpec(self.alignment) if self.alignment == 1 else LayoutSpec(self.alignment, want=PADDED_WANT)
        out = self.route(layout=spec)
        layout = f"alignment {self.alignment}"
        return gpu_row(lambda i: self.route(layout=spec, out=out), self.cell | {"layout": layout})

    def in_two(self) -> Row:
        """Return the time in two launches, whatever is chosen."""
        kinds = [kind for kind in RoutedOp.__subclasses__() if "fused" in vars(kind)]
        patches = [mock.patch.object(kind, "fused", return_value=None) for kind in kinds]
        _cached.forget()
        for patch in patches:
            patch.start()
        try:
            return self.with_layout() | {"by": IN_TWO}
        finally:
            for patch in patches:
                patch.stop()
            _cached.forget()

    def padding_bytes(self) -> int:
        """Return the bytes of the results whose rows are padded."""
        layout = self.route(layout=LayoutSpec(self.alignment, want=PADDED_WANT)).layout
        return sum(array.nbytes for array in layout[:7] if array is not None)


def pair(problem: Problem, bar: float | None) -> list[Row]:
    """Return the rows without and with layout; the bar is for what the layout adds."""
    plain = problem.plain()
    return [plain, barred(problem.with_layout(), None if bar is None else round(plain["us"] + bar, 3))]


def barred_rows() -> list[Row]:
    rows = []
    for n, bar in FUSED_LAYOUT.items():
        for k in (6, 8):
            rows += pair(Problem("activation_topk", n, k=k), bar)
        rows.append(Problem("activation_topk", n).in_two())
        padded = Problem("activation_topk", n, alignment=128)
        rows += pair(padded, bar * LAYOUT_PADDED_RATIO + padded.padding_bytes() / 3e6)[1:]
        for num_experts in (128, 384):
            rows += pair(Problem("activation_topk", n, num_experts), bar * LAYOUT_WIDTH_RATIO)
    for op in OPS[1:]:
        for n in (1, 4, 16, 64):
            problem = Problem(op, n)
            rows += [*pair(problem, None), problem.in_two()]
    return rows


def sweep_rows() -> list[Row]:
    """Return sweeps over n, from which the thresholds of `FusedLayout` come."""
    rows = []
    for alignment in (1, 128):
        for n in ALL_N:
            problem = Problem("activation_topk", n, alignment=alignment)
            rows += [*pair(problem, None), problem.in_two()]
    for op in OPS[1:]:
        for n in ALL_N:
            if n not in (1, 4, 16, 64):
                problem = Problem(op, n)
                rows += [*pair(problem, None), problem.in_two()]
    return rows


def measure(quick: bool) -> list[Row]:
    return barred_rows() + ([] if quick else sweep_rows())


def one_size(op: str, n: int, num_experts: int, top_k: int, alignment: int) -> list[Row]:
    problem = Problem(op, n, num_experts, top_k, alignment)
    return [*pair(problem, None), problem.in_two()]


ONE_SIZE = OneSize({"op": OPS, "n": 64, "num_experts": 256, "top_k": 8, "alignment": 1}, one_size)

if __name__ == "__main__":
    main("fused_layout", measure, ONE_SIZE)
