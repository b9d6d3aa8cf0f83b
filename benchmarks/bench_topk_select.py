# SPDX-License-Identifier: Apache-2.0
"""topk_select: time on the GPU over rows, columns, k and dtype, and on the host, beside torch.topk and Triton.

Long rows, as sparse attention has them, also with data that is hard to select from, and in bfloat16.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import cupy

from benchmarks import floor
from benchmarks.bars import (
    ADVERSARIAL_RATIO,
    ANY_ORDER_ADVERSARIAL,
    ANY_ORDER_ADVERSARIAL_BFLOAT16,
    ANY_ORDER_ADVERSARIAL_RATIO,
    ANY_ORDER_MORE,
    ANY_ORDER_RATIO,
    LONG_BFLOAT16,
    LONG_BFLOAT16_RATIO,
    TOPK_SELECT,
    TOPK_SELECT_16_BITS,
    TOPK_SELECT_BFLOAT16,
    TOPK_SELECT_FEW,
    TOPK_SELECT_HELD,
    TOPK_SELECT_LENGTHS,
    TOPK_SELECT_LONG,
    TOPK_SELECT_ORDERS,
    TOPK_SELECT_PAGED,
)
from benchmarks.harness import (
    Action,
    attempt,
    barred,
    check_same_choice,
    cold_inputs,
    gpu_row,
    host_rows,
    inputs,
    main,
)
from benchmarks.one_size import FLOATS, OneSize
from benchmarks.rows import OURS, Row
from cupy_router import TopK, topk_select
from cupy_router.ops.topk_select import ORDERS

ALL_N = (64, 256, 1024, 4096, 8192, 16384, 65536)
ALL_E = (8, 16, 32, 48, 60, 64, 72, 96, 128, 144, 160, 192, 256, 320, 384, 512, 576, 768, 896, 1024)
ALL_K = (1, 2, 4, 6, 8, 12, 16, 24, 32)


class Problem:
    """One size, with its inputs."""

    def __init__(
        self, num_columns: int, k: int, n: int, dtype: str = "float32", *, cold: bool = True, data: str | None = None,
        order: str = "value", values: bool = True, lengths: bool = False, page_size: int = 0,
    ) -> None:  # fmt: skip
        self.cell: Row = {"op": "topk_select", "E": num_columns, "k": k, "n": n, "dtype": dtype}
        self.cell |= {"cache": "cold" if cold else "warm"}
        self.k = k
        self.options: dict[str, Any] = {"order": order, "return_values": values}
        if (order, values) != ("value", True):
            self.cell |= {"order": order, "values": values}
        if lengths:
            self.cell["lengths"] = "uniform"
            self.options["lengths"] = 1 + cupy.random.randint(0, num_columns, (n,)).astype(cupy.int32)
        if page_size:
            self.cell["page_size"] = page_size
            pages = cupy.arange(n * -(-num_columns // page_size), dtype=cupy.int32).reshape(n, -1)
            self.options |= {"index_map": pages, "page_size": page_size}
        if data is None:
            self.scores = inputs((n, num_columns), dtype, cold=cold)
        else:
            self.cell["data"] = data
            scores = DATA[data](inputs((n, num_columns), "float32", cold=False)[0]).astype(dtype)
            self.scores = cold_inputs(scores.copy, scores.nbytes) if cold else [scores]
        self.out = TopK(cupy.empty((n, k), self.scores[0].dtype) if values else None, cupy.empty((n, k), cupy.int32))

    def call(self, i: int = 0) -> TopK:
        return topk_select(self.scores[i % len(self.scores)], self.k, out=self.out, **self.options)

    def ours(self) -> Row:
        return gpu_row(self.call, self.cell, rotation=len(self.scores))

    def floor(self) -> Row:
        values, indices = self.out
        return floor.read_rows(self.scores, (indices if values is None else values, indices), self.cell)

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

        values, indices = select(scores[0])[:2]
        if self.cell["E"] <= ALL_E[-1] and self.cell["dtype"] == "float32":
            check_same_choice(self.call().indices, indices)
        else:  # among many scores some are equal, so only the selected scores must be the same
            found = scores[0].gather(1, rivals.tensor(self.call().indices).long())
            if not bool((found.sort(descending=True).values == values).all()):
                raise ValueError("finds other values")
        count = len(scores)
        return gpu_row(lambda i: select(scores[i % count]), self.cell, name, rotation=count, torch=True)


def _one_bin(scores: Any) -> Any:
    columns = scores[:, ::2].shape[1]
    scores[:, ::2] = 1 + cupy.arange(columns, dtype=cupy.float32) * cupy.float32(2.0**-23)
    return scores


def _shared_bits(scores: Any) -> Any:
    """A permutation of neighbouring floats."""
    columns = scores.shape[1]
    steps = cupy.arange(columns, dtype=cupy.int64) * 2654435761 % columns
    scores[:] = (steps + 0x3F800000).astype(cupy.int32).view(cupy.float32)
    return scores


HARD: dict[str, Callable[[Any], Any]] = {  # made of normal scores
    "equal": lambda scores: cupy.full_like(scores, 1.5),
    "quantised, half zeros": lambda scores: cupy.round(cupy.maximum(scores, 0) * 8) / 8,
    "shared high bits": _shared_bits,
    "one giant bin": _one_bin,
}


# Order over columns; few scores that are large; few values or equal neighbours.
MISLEADING: dict[str, Callable[[Any], Any]] = {
    "slowly ascending": lambda scores: scores * 1e-6 + cupy.arange(scores.shape[1], dtype=cupy.float32) * 6.4e-6,
    "random walk": lambda scores: cupy.cumsum(scores, axis=1),
    "large in the last 5 %": lambda scores: scores + _from(scores, 0.95),
    "large at the start": lambda scores: scores + 10 - _from(scores, 0.05),
    "large at the end": lambda scores: scores + _from(scores, 0.98),
    "periodic": lambda scores: scores * 0 + cupy.sin(cupy.arange(scores.shape[1], dtype=cupy.float32) / 160),
    "neighbours equal": lambda scores: cupy.repeat(scores[:, ::8], 8, axis=1),
    "half zeros": lambda scores: cupy.maximum(scores, 0),
    "zeros at the k-th": lambda scores: cupy.maximum(scores - 2.2, 0),
    "equal": HARD["equal"],
    "quantised, half zeros": HARD["quantised, half zeros"],
}
DATA = HARD | MISLEADING


def _from(scores: Any, part: float) -> Any:
    """10 from this part of the columns on, otherwise 0."""
    columns = scores.shape[1]
    return cupy.where(cupy.arange(columns) >= part * columns, 10, 0).astype(cupy.float32)


def barred_rows() -> list[Row]:
    rows = []
    for (num_columns, k), bars in TOPK_SELECT.items():
        for n, bar in bars.items():
            problem = Problem(num_columns, k, n)
            rows += [barred(problem.ours(), bar), problem.floor(), *problem.rivals(("Triton", "torch.topk"))]
    for (num_columns, k), bars in TOPK_SELECT_16_BITS.items():
        for n, bar in bars.items():
            problem = Problem(num_columns, k, n, "bfloat16", order="any", values=False)
            rows += [barred(problem.ours(), bar), problem.floor(), *problem.rivals(["torch.topk"])]
            rows.append(Problem(num_columns, k, n, "bfloat16", order="column", values=False).ours())
    return rows


def long_rows() -> list[Row]:
    rows = []
    for shape, bar in TOPK_SELECT_LONG.items():
        n, num_columns, k = shape
        problem = Problem(num_columns, k, n)
        ours = problem.ours()
        rows += [barred(ours, bar), problem.floor(), *problem.rivals(["torch.topk"])]
        del problem  # its scores, before there are others
        most = round(ADVERSARIAL_RATIO * ours["us"], 3)
        rows += [barred(Problem(num_columns, k, n, data=data).ours(), most) for data in HARD]
        if shape in LONG_BFLOAT16:
            most = round(LONG_BFLOAT16_RATIO * ours["us"], 3)
            rows.append(barred(Problem(num_columns, k, n, "bfloat16").ours(), most))
    return rows


def many_rows() -> list[Row]:
    """Long rows by order, with lengths, in bfloat16, and through an index_map."""
    rows = []
    for lengths, shapes in ((False, TOPK_SELECT_ORDERS), (True, TOPK_SELECT_LENGTHS)):
        for (n, num_columns, k), (any_bar, value_bar) in shapes.items():
            problem = Problem(num_columns, k, n, order="any", values=False, lengths=lengths)
            rows += [barred(problem.ours(), any_bar), problem.floor()]
            if not lengths:
                rows += problem.rivals(["torch.topk"])
            del problem  # its scores, before there are others
            others = [Problem(num_columns, k, n, order=order, lengths=lengths).ours() for order in ("value", "column")]
            most = min(other["us"] for other in others)
            any_order = Problem(num_columns, k, n, order="any", lengths=lengths).ours()
            rows += [barred(others[0], value_bar), others[1]]
            rows.append(barred(any_order, round(max(ANY_ORDER_RATIO * most, most + ANY_ORDER_MORE), 3)))
    for page_size, bars in ((0, TOPK_SELECT_BFLOAT16), (8, TOPK_SELECT_PAGED)):
        for (n, num_columns, k), bar in bars.items():
            problem = Problem(num_columns, k, n, "bfloat16", order="any", values=False, page_size=page_size)
            rows += [barred(problem.ours(), bar), problem.floor()]
    return rows


def misleading_rows() -> list[Row]:
    """Data that is hard to select from in any order, as multiples of normal data."""
    rows = []
    for dtype, shapes in (("float32", ANY_ORDER_ADVERSARIAL), ("bfloat16", ANY_ORDER_ADVERSARIAL_BFLOAT16)):
        for n, num_columns, k in shapes:
            normal = Problem(num_columns, k, n, dtype, order="any", values=False).ours()
            most = round(ANY_ORDER_ADVERSARIAL_RATIO * normal["us"], 3)
            for data in MISLEADING:
                problem = Problem(num_columns, k, n, dtype, data=data, order="any", values=False)
                rows.append(barred(problem.ours(), most))
    return rows


def held_rows() -> list[Row]:
    """Rows that fit in shared memory several times."""
    rows = []
    for n, num_columns, k, dtype in TOPK_SELECT_HELD:
        problem = Problem(num_columns, k, n, dtype, order="any", values=False)
        rows += [problem.ours(), problem.floor(), Problem(num_columns, k, n, dtype).ours()]
    return rows


def few_long_rows() -> list[Row]:
    """A few long rows in any order, indices only; and that this order, with values, is no slower than by value."""
    rows = []
    for dtype, bars in TOPK_SELECT_FEW.items():
        for (n, num_columns, k), bar in bars.items():
            problem = Problem(num_columns, k, n, dtype, order="any", values=False)
            rows += [barred(problem.ours(), bar), problem.floor()]
            del problem
            by_value = Problem(num_columns, k, n, dtype).ours()
            most = max(ANY_ORDER_RATIO * by_value["us"], by_value["us"] + ANY_ORDER_MORE)
            any_order = Problem(num_columns, k, n, dtype, order="any").ours()
            rows += [by_value, barred(any_order, round(most, 3))]
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
    long = long_rows() + many_rows() + few_long_rows() + misleading_rows() + held_rows()
    return call_rows() + barred_rows() + long + ([] if quick else sweep_rows())


def one_size(
    rows: int, columns: int, k: int, dtype: str, cache: str, data: str, order: str, page_size: int
) -> list[Row]:
    """With values but for order "any", as the bars are."""
    hard = None if data == "normal" else data
    options: dict[str, Any] = {"order": order, "values": order != "any", "page_size": page_size}
    problem = Problem(columns, k, rows, dtype, cold=cache == "cold", data=hard, **options)
    return [problem.ours(), problem.floor(), *problem.rivals(("Triton", "torch.topk") if page_size == 0 else ())]


ONE_SIZE = OneSize(
    {
        "rows": 64, "columns": 256, "k": 8, "dtype": FLOATS, "cache": ("warm", "cold"), "data": ("normal", *DATA),
        "order": ORDERS, "page_size": 0,
    },
    one_size,
)  # fmt: skip

if __name__ == "__main__":
    main("topk_select", measure, ONE_SIZE)
