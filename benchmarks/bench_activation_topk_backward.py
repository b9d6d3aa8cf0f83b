# SPDX-License-Identifier: Apache-2.0
"""activation_topk_backward: time on the GPU over n, E, dtype and score, beside PyTorch's autograd and a memset."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import cupy

from benchmarks.bars import ACTIVATION_TOPK_BACKWARD, bar_16_bit
from benchmarks.bench_activation_topk import SCALE, method_of
from benchmarks.harness import attempt, barred, gpu_row, inputs, main
from benchmarks.one_size import FLOATS, OneSize
from benchmarks.rows import Row
from cupy_router import RoutingMethod, activation_topk
from cupy_router.ops.activation_topk_backward import LogitsGradient, activation_topk_backward

ALL_N = (1, 16, 64, 256, 1024, 4096, 8192, 16384)
BARRED_N = tuple(ACTIVATION_TOPK_BACKWARD[256])
WHOLE_ROW = RoutingMethod(256, 8, "softmax", renormalize=False)  # every entry of its gradient is one


class Problem:
    """One size, with its inputs."""

    def __init__(self, method: RoutingMethod, n: int, dtype: str = "float32") -> None:
        num_experts, k = method.num_experts, method.top_k
        self.cell: Row = {"op": "activation_topk_backward", "E": num_experts, "k": k, "n": n, "dtype": dtype}
        self.cell |= {"cache": "warm"}
        if method.score == "softmax":
            self.cell |= {"score": "softmax"}
        self.method = method
        (self.logits,) = inputs((n, num_experts), dtype, cold=False)
        self.bias = cupy.random.standard_normal(num_experts, dtype=cupy.float32)
        self.indices = activation_topk(self.logits, method, bias=self.bias).indices
        self.grad_weights = cupy.random.standard_normal((n, k), dtype=cupy.float32)
        self.out = LogitsGradient(cupy.empty((n, num_experts), dtype))

    def call(self, i: int = 0) -> LogitsGradient:
        return activation_topk_backward(self.grad_weights, self.indices, self.logits, self.method, out=self.out)

    def ours(self) -> Row:
        return gpu_row(self.call, self.cell)

    def floor(self) -> Row:
        """To fill the result with zeros."""
        (array,) = self.out
        return gpu_row(lambda i: array.data.memset_async(0, array.nbytes), self.cell, "floor")

    def rivals(self) -> list[Row]:
        row = attempt(f"PyTorch {self.cell}", self._pytorch)
        return [] if row is None else [row]

    def _pytorch(self) -> Row:
        from benchmarks import rivals

        logits, bias, upstream = map(rivals.tensor, (self.logits, self.bias, self.grad_weights))
        gradient: Callable[[], Any] = rivals.router_gradient(logits, bias, self.method.top_k, SCALE, upstream)
        ours, theirs = self.call().grad_logits, cupy.from_dlpack(gradient())
        same = cupy.isclose(ours, theirs, rtol=1e-4, atol=1e-6).all(axis=1).mean()
        if float(same) < 0.99:
            raise ValueError(f"its gradient is ours in only {float(same):.1%} of the rows")
        return gpu_row(lambda i: gradient(), self.cell, "PyTorch", torch=True)


def barred_rows() -> list[Row]:
    rows = []
    for num_experts, bars in ACTIVATION_TOPK_BACKWARD.items():
        for n, bar in bars.items():
            problem = Problem(method_of(num_experts, 6), n)
            rows += [barred(problem.ours(), bar), problem.floor(), *problem.rivals()]
            rows += [Problem(method_of(num_experts, 6), n, dtype).ours() for dtype in ("bfloat16", "float16")]
    bar_16_bit(rows)
    return rows


def sweep_rows() -> list[Row]:
    problems = [Problem(method_of(experts, 6), n) for experts in (256, 384) for n in ALL_N if n not in BARRED_N]
    rows = [row for problem in problems for row in (problem.ours(), problem.floor())]
    return rows + [Problem(WHOLE_ROW, n, dtype).ours() for n in BARRED_N for dtype in ("float32", "bfloat16")]


def measure(quick: bool) -> list[Row]:
    return barred_rows() + ([] if quick else sweep_rows())


def one_size(n: int, num_experts: int, top_k: int, dtype: str) -> list[Row]:
    problem = Problem(method_of(num_experts, top_k), n, dtype)
    return [problem.ours(), problem.floor(), *problem.rivals()]


ONE_SIZE = OneSize({"n": 64, "num_experts": 256, "top_k": 6, "dtype": FLOATS}, one_size)

if __name__ == "__main__":
    main("activation_topk_backward", measure, ONE_SIZE)
