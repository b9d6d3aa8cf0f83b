# SPDX-License-Identifier: Apache-2.0
"""expert_layout: time on the GPU over n, E, k, alignment and skew, beside a sort by PyTorch and an empty kernel."""

from __future__ import annotations

from functools import partial
from typing import Any

import cupy
import numpy as np

from benchmarks import floor
from benchmarks.bars import EXPERT_LAYOUT, LAYOUT_PADDED_RATIO, LAYOUT_SKEW_RATIO, LAYOUT_WIDTH_RATIO
from benchmarks.harness import attempt, barred, gpu_row, main
from benchmarks.one_size import OneSize
from benchmarks.rows import Row
from cupy_router import ExpertLayout, expert_layout
from cupy_router.ops._layout import DEFAULT_WANT

ALL_N = (1, 4, 16, 32, 64, 128, 256, 512, 1024, 2048, 4096, 8192, 16384, 32768, 65536, 131072)
ALL_E = (8, 60, 64, 128, 160, 256, 257, 384, 512, 1000, 1024, 4096, 40_000)
ALL_K = (1, 2, 4, 6, 8, 10, 16, 22)
ALIGNMENTS = (1, 7, 16, 64, 128, 160, 224)
SKEWS = ("uniform", "zipf", "one expert")
PADDED_WANT = (*DEFAULT_WANT, "block_experts", "row_experts")


def ids_of(n: int, num_experts: int, k: int, skew: str) -> Any:
    """Return the experts of n tokens: distinct and uniform, or by Zipf's law, or all the same."""
    rng = np.random.default_rng(n + k)
    if skew == "one expert":
        ids = np.full((n, k), num_experts // 2)
    elif skew == "zipf":
        share = 1 / np.arange(1, num_experts + 1)
        ids = rng.choice(num_experts, (n, k), p=share / share.sum())
    else:
        step = rng.integers(1, max(2, num_experts // k), (n, 1))
        ids = (rng.integers(0, num_experts, (n, 1)) + step * np.arange(k)) % num_experts
    return cupy.asarray(ids.astype(np.int32))


class Problem:
    """One size, with its inputs."""

    def __init__(
        self, n: int, num_experts: int = 256, k: int = 8, alignment: int = 1, skew: str = "uniform"
    ) -> None:  # fmt: skip
        self.cell: Row = {"op": "expert_layout", "E": num_experts, "k": k, "n": n, "alignment": alignment}
        self.cell |= {"cache": "warm"} | ({} if skew == "uniform" else {"data": skew})
        self.indices, self.num_experts, self.alignment = ids_of(n, num_experts, k, skew), num_experts, alignment
        self.want = DEFAULT_WANT if alignment == 1 else PADDED_WANT
        self.out: Any = None
        self.out = self.call()

    def call(self, i: int = 0) -> ExpertLayout:
        return expert_layout(
            self.indices, self.num_experts, alignment=self.alignment, want=self.want, out=self.out
        )  # fmt: skip

    def ours(self) -> Row:
        return gpu_row(self.call, self.cell)

    def floors(self) -> list[Row]:
        """To read the indices and write order and positions; an empty kernel."""
        positions = self.out.positions
        copy = floor.read_rows([self.indices], (cupy.empty(positions.size, cupy.float32), positions), self.cell)
        kernel = cupy.RawKernel('extern "C" __global__ void empty() {}', "empty")
        return [copy, gpu_row(lambda i: kernel((1,), (256,), ()), self.cell, "empty kernel")]

    def rivals(self) -> list[Row]:
        row = attempt(f"PyTorch {self.cell}", self._pytorch)
        return [] if row is None else [row]

    def _pytorch(self) -> Row:
        from benchmarks import rivals

        indices = rivals.tensor(self.indices)
        lay_out = partial(rivals.expert_layout, indices, self.num_experts)
        ours = self.call()
        for name, theirs in zip(DEFAULT_WANT, lay_out(), strict=True):
            if not (getattr(ours, name) == cupy.from_dlpack(theirs.int())).all():
                raise ValueError(f"its {name} are not ours")
        return gpu_row(lambda i: lay_out(), self.cell, "PyTorch", torch=True)


def barred_rows() -> list[Row]:
    """Return the sizes that have a bar."""
    rows = []
    for n, bar in EXPERT_LAYOUT.items():
        for k in (6, 8):
            problem = Problem(n, k=k)
            plain = barred(problem.ours(), bar)
            rows += [plain, *problem.floors(), *problem.rivals()]
            rows += [barred(Problem(n, E, k).ours(), round(bar * LAYOUT_WIDTH_RATIO, 3)) for E in (128, 384)]
            padded = Problem(n, k=k, alignment=128)
            num_bytes = sum(array.nbytes for array in padded.out[:7] if array is not None)
            rows.append(barred(padded.ours(), round(bar * LAYOUT_PADDED_RATIO + num_bytes / 3e6, 3)))
        skewed = (Problem(n, skew=skew).ours() for skew in SKEWS[1:])
        rows += [barred(row, round(plain["us"] * LAYOUT_SKEW_RATIO, 3)) for row in skewed]
    return rows


def sweep_rows() -> list[Row]:
    """Return sweeps, in which steps between neighbours would show."""
    problems = [Problem(n, E) for E in (128, 256, 384) for n in ALL_N if E != 256 or n not in EXPERT_LAYOUT]
    problems += [Problem(n, E) for n in (64, 1024, 8192) for E in ALL_E if E not in (128, 256, 384)]
    problems += [Problem(n, 256, k) for n in (64, 1024, 8192) for k in ALL_K if k not in (6, 8)]
    problems += [Problem(n, alignment=a) for n in (64, 1024, 8192) for a in ALIGNMENTS if a not in (1, 128)]
    return [problem.ours() for problem in problems]


def measure(quick: bool) -> list[Row]:
    return barred_rows() + ([] if quick else sweep_rows())


def one_size(n: int, num_experts: int, top_k: int, alignment: int, skew: str) -> list[Row]:
    problem = Problem(n, num_experts, top_k, alignment, skew)
    return [problem.ours(), *problem.floors(), *(problem.rivals() if alignment == 1 else [])]


ONE_SIZE = OneSize({"n": 64, "num_experts": 256, "top_k": 8, "alignment": 1, "skew": SKEWS}, one_size)

if __name__ == "__main__":
    main("expert_layout", measure, ONE_SIZE)
