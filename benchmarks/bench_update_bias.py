# SPDX-License-Identifier: Apache-2.0
"""update_bias: time on the GPU over n experts, in place, beside PyTorch in a few ops and a copy of the bias."""

from __future__ import annotations

from typing import Any

import cupy

from benchmarks.harness import attempt, gpu_row, main
from benchmarks.one_size import OneSize
from benchmarks.rows import Row
from cupy_router import update_bias

ALL_N = (64, 256, 384, 1024, 4096)
RATE = 1e-3
COUNTS = ("int32", "int64")


class Problem:
    """One size, with its inputs, warm."""

    def __init__(self, num_experts: int, counts: str, center: bool) -> None:
        self.cell: Row = {"op": "update_bias", "n": num_experts, "counts": counts, "cache": "warm"}
        self.cell |= {"center": center}
        self.center = center
        self.bias = cupy.zeros(num_experts, cupy.float32)
        self.load = cupy.random.randint(0, 2048, num_experts).astype(counts)

    def call(self, i: int = 0) -> Any:
        return update_bias(self.bias, self.load, rate=RATE, center=self.center, out=self.bias)

    def ours(self) -> Row:
        return gpu_row(self.call, self.cell)

    def floor(self) -> Row:
        """To copy as many bytes."""
        target, size = cupy.empty_like(self.bias), self.bias.nbytes
        return gpu_row(lambda i: target.data.copy_from_device_async(self.bias.data, size), self.cell, "floor")

    def rivals(self) -> list[Row]:
        row = attempt(f"PyTorch {self.cell}", self._pytorch)
        return [] if row is None else [row]

    def _pytorch(self) -> Row:
        from benchmarks import rivals

        bias, load = rivals.tensor(self.bias), rivals.tensor(self.load)

        def update(i: int) -> None:
            counts = load.float()
            bias.add_((counts.mean() - counts).sign_(), alpha=RATE)
            if self.center:
                bias.sub_(bias.mean())

        return gpu_row(update, self.cell, "PyTorch", torch=True)


def measure(quick: bool) -> list[Row]:
    sizes = (256,) if quick else ALL_N
    problems = [Problem(num_experts, "int32", center) for num_experts in sizes for center in (False, True)]
    problems.append(Problem(256, "int64", False))
    return [row for problem in problems for row in (problem.ours(), problem.floor(), *problem.rivals())]


def one_size(n: int, counts: str, center: str) -> list[Row]:
    problem = Problem(n, counts, center == "yes")
    return [problem.ours(), problem.floor(), *problem.rivals()]


ONE_SIZE = OneSize({"n": 256, "counts": COUNTS, "center": ("no", "yes")}, one_size)

if __name__ == "__main__":
    main("update_bias", measure, ONE_SIZE)
