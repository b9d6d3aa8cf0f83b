# SPDX-License-Identifier: Apache-2.0
"""permute, unpermute and their gradients: time on the GPU beside a copy of the same bytes and PyTorch, and on the host.

The results do not fit into L2 from about 1000 tokens on, whether warm or not.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any

import cupy
import numpy as np

from benchmarks import floor
from benchmarks.bars import MOVE_64, MOVE_RATIOS
from benchmarks.harness import Action, attempt, barred, gpu_row, host_rows, inputs, main
from benchmarks.one_size import FLOATS, OneSize
from benchmarks.rows import OURS, Row
from cupy_router import ExpertLayout, permute, unpermute
from cupy_router.ops import _permute_backward, _unpermute_backward
from cupy_router.ops._rows import GradientOptions
from cupy_router.ops._run import run
from cupy_router.reference.expert_layout import expert_layout

HIDDEN, NUM_EXPERTS, TOP_K = (4096, 7168), 256, 6
BAR_N = (64, 1024, 8192)
ALL_N = (1, 16, 64, 256, 1024, 4096, 8192)
OPS = ("permute", "unpermute", "permute_backward", "unpermute_backward")
ITEM_SIZES = {"float32": 4, "float16": 2, "bfloat16": 2}


class Problem:
    """One size, with its arrays. Each token has different experts, drawn evenly."""

    def __init__(
        self,
        n: int,
        hidden: int,
        k: int = TOP_K,
        alignment: int = 1,
        dtype: str = "bfloat16",
        num_experts: int = NUM_EXPERTS,
    ) -> None:
        self.cell: Row = {"E": num_experts, "k": k, "n": n, "H": hidden, "alignment": alignment, "dtype": dtype}
        self.cell |= {"cache": "warm"}
        indices = np.random.default_rng(7).random((n, num_experts), np.float32).argpartition(k - 1, axis=1)[:, :k]
        found = expert_layout(indices.astype(np.int32), num_experts, alignment=alignment)
        order, positions = cupy.asarray(found["order"]), cupy.asarray(found["positions"])
        capacity = len(found["order"])
        self.layout = ExpertLayout(
            order=order, positions=positions, num_tokens=n, top_k=k, alignment=alignment, capacity=capacity
        )
        self.x, self.y = inputs((n, hidden), dtype, cold=False)[0], inputs((capacity, hidden), dtype, cold=False)[0]
        self.weights = inputs((n, k), "float32", cold=False)[0]
        self.rows, self.sums = cupy.empty(self.y.shape, self.y.dtype), cupy.empty(self.x.shape, self.x.dtype)
        self.dots = cupy.empty((n, k), cupy.float32)
        row_bytes = hidden * ITEM_SIZES[dtype]
        moved = {  # rows that are read and written
            "permute": n + capacity,
            "unpermute": n * k + n,
            "permute_backward": n * k + n + n,
            "unpermute_backward": n + n * k + capacity,
        }
        self.bytes = {op: count * row_bytes for op, count in moved.items()}

    def call(self, op: str, weighted: bool = True, i: int = 0) -> Any:
        layout, weights = self.layout, self.weights if weighted else None
        if op == "permute":
            return permute(self.x, layout, weights=weights, out=self.rows)
        if op == "unpermute":
            return unpermute(self.y, layout, weights, out=self.sums)
        backward = {
            "permute_backward": (
                _permute_backward.OP,
                GradientOptions(("sums", "dots")),
                (self.y, layout.positions, weights, self.x),
                _permute_backward.PermuteGradient(self.sums, self.dots),
            ),
            "unpermute_backward": (
                _unpermute_backward.OP,
                GradientOptions(("rows", "dots")),
                (self.x, layout.order, layout.positions, weights, self.y, None, None),
                _unpermute_backward.UnpermuteGradient(self.rows, self.dots, None, None),
            ),
        }
        declared, options, given, into = backward[op]
        return run(declared, options, given, into, None)

    def ours(self, op: str, *, weighted: bool = True) -> Row:
        cell = {"op": op} | self.cell | ({} if weighted else {"data": "no weights"})
        return gpu_row(lambda i: self.call(op, weighted), cell)

    def copy(self, op: str) -> Row:
        return floor.copy(self.bytes[op], {"op": op} | self.cell)

    def in_order(self) -> Row:
        """permute without the order: rows that are read once and written k times."""
        return floor.repeat_rows(self.x, self.rows[: len(self.x) * self.layout.top_k], {"op": "permute"} | self.cell)

    def rival(self, op: str) -> list[Row]:
        row = attempt(f"PyTorch {op} {self.cell}", partial(self._rival, op))
        return [] if row is None else [row]

    def _rival(self, op: str) -> Row:
        from benchmarks import rivals

        x, y, weights, order, positions = map(
            rivals.tensor, (self.x, self.y, self.weights, self.layout.order, self.layout.positions)
        )
        tokens, places = order.long() // self.layout.top_k, positions.long()
        function = {
            "permute": partial(rivals.permute, x, tokens),
            "unpermute": partial(rivals.unpermute, y, places, weights),
        }[op]
        ours, theirs = rivals.tensor(self.call(op, weighted=op == "unpermute")).float(), function().float()
        if (ours - theirs).abs().max() > 0.02 * theirs.abs().max():
            raise ValueError("differs from cupy_router")
        return gpu_row(lambda i: function(), {"op": op} | self.cell, "PyTorch", torch=True)


def bar(op: str, problem: Problem, copy: Row) -> float | None:
    """Return the required time, given that of the copy."""
    n, hidden = problem.cell["n"], problem.cell["H"]
    if n == 64 and op in MOVE_64:
        return MOVE_64[op].get(hidden)
    ratio = MOVE_RATIOS[op].get(n)
    return None if ratio is None else round(ratio * copy["us"], 3)


def bar_rows(sizes: Sequence[int], *, rivals: bool) -> list[Row]:
    rows = []
    for hidden in HIDDEN:
        for n in sizes:
            problem = Problem(n, hidden)
            for op in OPS:
                copy = problem.copy(op)
                rows += [barred(problem.ours(op), bar(op, problem, copy)), copy]
            rows += [problem.ours("permute", weighted=False), problem.in_order()]
            if rivals:
                rows += [*problem.rival("permute"), *problem.rival("unpermute")]
    return rows


def sweep_rows() -> list[Row]:
    """Over hidden, k, alignment and dtype, each with a copy of the same bytes."""
    problems: list[dict[str, Any]] = [{"hidden": hidden} for hidden in (64, 1000, 2048, 2880, 5120, 8192, 16384)]
    problems += [{"k": k} for k in (1, 2, 8, 9, 16, 32)]
    problems += [{"alignment": 16}, *({"n": n, "alignment": 128} for n in (64, 1024, 8192))]
    problems += [{"dtype": "float32"}, {"dtype": "float16"}]
    rows = []
    for sizes in problems:
        problem = Problem(**{"n": 1024, "hidden": 4096} | sizes)
        for op in OPS:
            rows += [problem.ours(op), problem.copy(op)]
    return rows


def call_rows() -> list[Row]:
    """Measure the host time of calls from PyTorch and CuPy."""
    problem = Problem(64, 4096)
    calls: dict[tuple[str, str], Action] = {
        (OURS, "permute from cupy, out="): lambda: problem.call("permute"),
        (OURS, "unpermute from cupy, out="): lambda: problem.call("unpermute"),
    }
    attempt("calls from PyTorch", lambda: calls.update(_torch_calls(problem)))
    return host_rows(calls, {"op": "permute", "k": TOP_K, "n": 64, "H": 4096})


def _torch_calls(problem: Problem) -> dict[tuple[str, str], Action]:
    import torch

    from benchmarks import rivals

    x, y, weights, rows, sums = map(rivals.tensor, (problem.x, problem.y, problem.weights, problem.rows, problem.sums))
    arrays = {name: rivals.tensor(getattr(problem.layout, name)) for name in ("order", "positions")}
    layout = problem.layout._replace(**arrays)
    return {
        (OURS, "permute from torch"): lambda: permute(x, layout),
        (OURS, "permute from torch, out="): lambda: permute(x, layout, out=rows),
        (OURS, "unpermute from torch"): lambda: unpermute(y, layout, weights),
        (OURS, "unpermute from torch, out="): lambda: unpermute(y, layout, weights, out=sums),
        ("PyTorch", "torch.relu"): lambda: torch.relu(x),
    }


def measure(quick: bool) -> list[Row]:
    rows = call_rows() + bar_rows(BAR_N if quick else ALL_N, rivals=not quick)
    return rows + ([] if quick else sweep_rows())


def one_size(op: str, n: int, hidden: int, top_k: int, alignment: int, num_experts: int, dtype: str) -> list[Row]:
    problem = Problem(n, hidden, top_k, alignment, dtype, num_experts)
    rows = [problem.ours(op), problem.copy(op)]
    if op == "permute" and problem.x[0].nbytes % 16 == 0 and problem.layout.capacity >= n * top_k:
        rows.append(problem.in_order())
    if op == "unpermute" or (op == "permute" and alignment == 1):
        rows += problem.rival(op)
    return rows


ONE_SIZE = OneSize(
    {
        "op": OPS,
        "n": 64,
        "hidden": 4096,
        "top_k": TOP_K,
        "alignment": 1,
        "num_experts": NUM_EXPERTS,
        "dtype": ("bfloat16", *(dtype for dtype in FLOATS if dtype != "bfloat16")),
    },
    one_size,
)

if __name__ == "__main__":
    main("permute", measure, ONE_SIZE)
