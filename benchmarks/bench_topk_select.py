# SPDX-License-Identifier: Apache-2.0
"""topk_select: time on the GPU over rows, columns, k and dtype, and on the host, beside torch.topk and Triton."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import cupy

from benchmarks import floor
from benchmarks.bars import TOPK_SELECT
from benchmarks.harness import Action, attempt, barred, check_same_choice, gpu_row, host_rows, inputs, main
from benchmarks.rows import OURS, Row
from cupy_router import TopK, topk_select

ALL_N = (64, 256, 1024, 4096, 8192, 16384, 65536)
ALL_E = (8, 16, 32, 48, 60, 64, 72, 96, 128, 144, 160, 192, 256, 320, 384, 512, 576, 768, 896, 1024)
ALL_K = (1, 2, 4, 6, 8, 12, 16, 24, 32)
WIDE = [(1, 32768, 512), (64, 32768, 512), (8, 131072, 2048)]  # n, E, k


class Problem:
    """One size, with its inputs."""

    def __init__(self, num_columns: int, k: int, n: int, dtype: str = "float32", *, cold: bool = True) -> None:
        self.cell: Row = {"op": "topk_select", "E": num_columns, "k": k, "n": n, "dtype": dtype}
        self.cell |= {"cache": "cold" if cold else "warm"}
        self.k = k
        self.scores = inputs((n, num_columns), dtype, cold=cold)
        self.out = TopK(cupy.empty((n, k), self.scores[0].dtype), cupy.empty((n, k), cupy.int32))

    def call(self, i: int = 0) -> TopK:
        return topk_select(self.scores[i % len(self.scores)], self.k, out=self.out)

    def ours(self) -> Row:
        return gpu_row(self.call, self.cell, rotation=len(self.scores))

    def floor(self) -> Row:
        return floor.read_rows(self.scores, self.out, self.cell)

    def rivals(self, names: Sequence[str]) -> list[Row]:
        rows = (attempt(f"{name} {self.cell}", partial(self._rival, name)) for name in names)
        return [row for row in rows if row is not None]

    def _rival(self, name: str) -> Row:
        import torch

        from benchmarks import rivals

        scores, k = [rivals.tensor(array) for array in self.scores], self.k
        select: Callable[..., Any]
        if name == "Triton":
            from benchmarks import rivals_triton

            out = rivals_triton.outputs(len(scores[0]), k, scores[0].device)

            def select(x: Any) -> Any:
                return rivals_triton.topk(x, k, out)
        else:

            def select(x: Any) -> Any:
                return torch.topk(x, k)

        check_same_choice(self.call().indices, select(scores[0])[1])
        count = len(scores)
        return gpu_row(lambda i: select(scores[i % count]), self.cell, name, rotation=count, torch=True)


def barred_rows() -> list[Row]:
    rows = []
    for (num_columns, k), bars in TOPK_SELECT.items():
        for n, bar in bars.items():
            problem = Problem(num_columns, k, n)
            rows += [barred(problem.ours(), bar), problem.floor(), *problem.rivals(("Triton", "torch.topk"))]
    return rows


def sweep_rows() -> list[Row]:
    rows = []
    for (num_columns, k), bars in TOPK_SELECT.items():
        for n in ALL_N:
            if n not in bars:
                problem = Problem(num_columns, k, n)
                rows += [problem.ours(), problem.floor()]
        rows += [Problem(num_columns, k, n, dtype).ours() for dtype in ("bfloat16", "float16") for n in (64, 8192)]
    for n in (64, 8192):
        # Warm: so few bytes cannot be read cold.
        for num_columns in ALL_E:
            problem = Problem(num_columns, 6, n, cold=False)
            rows += [problem.ours(), problem.floor()]
        rows += [Problem(256, k, n, cold=False).ours() for k in ALL_K if k != 6]
    for n, num_columns, k in WIDE:
        problem = Problem(num_columns, k, n)
        rows += [problem.ours(), problem.floor(), *problem.rivals(["torch.topk"])]
    return rows


def call_rows() -> list[Row]:
    """What a call takes on the host, from PyTorch and CuPy."""
    scores = inputs((64, 256), "float32", cold=False)[0]
    out = topk_select(scores, 8)
    calls: dict[tuple[str, str], Action] = {
        (OURS, "cupy"): lambda: topk_select(scores, 8),
        (OURS, "cupy, out="): lambda: topk_select(scores, 8, out=out),
    }
    attempt("calls from PyTorch", lambda: calls.update(_torch_calls()))
    return host_rows(calls, {"op": "topk_select", "E": 256, "k": 8, "n": 64})


def _torch_calls() -> dict[tuple[str, str], Action]:
    import torch

    scores = torch.randn(64, 256, device="cuda")
    out = topk_select(scores, 8)
    return {
        (OURS, "torch"): lambda: topk_select(scores, 8),
        (OURS, "torch, out="): lambda: topk_select(scores, 8, out=out),
        ("PyTorch", "torch.topk"): lambda: torch.topk(scores, 8),
    }


def measure(quick: bool) -> list[Row]:
    return call_rows() + barred_rows() + ([] if quick else sweep_rows())


if __name__ == "__main__":
    main("topk_select", measure)
