# SPDX-License-Identifier: Apache-2.0
"""Given experts: activation_topk and dense_router with recorded indices, and without; the gradient of dense_router.

dense_router and its gradient compute only the dot products that are needed, or those of all experts: here both, from
which follow the thresholds `given_experts` of tuning.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from typing import Any
from unittest import mock

import cupy
import numpy as np

from benchmarks import bars
from benchmarks.harness import attempt, barred, gpu_row, in_turns, inputs, main
from benchmarks.one_size import FLOATS, OneSize
from benchmarks.rows import Row
from cupy_router import Routing, RoutingMethod, activation_topk, dense_router, hash_router, tuning
from cupy_router.ops import _cached
from cupy_router.tuning import DEFAULT

ALL_N = (1, 4, 16, 64, 256, 1024, 4096, 8192, 16384)
GATE_N = (1, 16, 64, 128, 256, 512, 8192)
WAYS_N = (1, 16, 64, 128, 256, 512, 1024)  # where few products are compared with those of all experts
SHAPES = ((256, 4096), (384, 7168))  # experts, hidden
HIDDEN, MANY = 4096, 8192
SHARES = (0.0, 0.5, 1.0)  # of rows that are -1, where these are routed


class Problem:
    """One size of activation_topk, or with `hidden` of dense_router."""

    def __init__(self, n: int, num_experts: int = 256, k: int = 8, dtype: str = "float32", hidden: int = 0) -> None:
        self.method = RoutingMethod(num_experts, k, "sqrtsoftplus", renormalize_eps=1e-20, scale=2.5)
        self.cell: Row = {"op": "dense_router" if hidden else "activation_topk", "E": num_experts, "k": k, "n": n}
        self.cell |= {"dtype": dtype, "cache": "warm"} | ({"H": hidden} if hidden else {})
        self.bias = cupy.random.standard_normal(num_experts, dtype=cupy.float32)
        # Recorded experts do not depend on these logits: any k different ones.
        self.ids = np.random.default_rng(n).random((n, num_experts)).argsort(axis=1)[:, :k].astype(np.int16)
        self.recorded = cupy.asarray(self.ids)
        self.out = Routing(cupy.empty((n, k), cupy.float32), cupy.empty((n, k), cupy.int32))
        if hidden:
            x, weight = (inputs((rows, hidden), dtype, cold=False)[0] for rows in (n, num_experts))
            self.route: Any = partial(dense_router, x, weight, self.method, bias=self.bias, out=self.out)
        else:
            (self.logits,) = inputs((n, num_experts), dtype, cold=False)
            self.route = partial(activation_topk, self.logits, self.method, bias=self.bias, out=self.out)

    def selected(self) -> Row:
        return gpu_row(lambda i: self.route(), self.cell | {"indices": "none"})

    def empty(self) -> Row:
        return gpu_row(lambda i: self.route(indices=self.recorded, unset="empty"), self.cell | {"indices": "empty"})

    def routed(self, share: float) -> Row:
        """Return the time where this share of the rows is -1 and routed."""
        ids = self.ids.copy()
        ids[np.random.default_rng(0).random(len(ids)) < share] = -1
        recorded = cupy.asarray(ids)
        return gpu_row(lambda i: self.route(indices=recorded), self.cell | {"indices": f"route {share:.0%}"})

    def looked_up(self) -> Row:
        """Return the time of hash_router with the same logits, whose table has a row for each token."""
        rows, table = cupy.asarray(np.arange(len(self.ids), dtype=np.int32)), cupy.asarray(self.ids.astype(np.int32))
        call = partial(hash_router, rows, table, self.method, logits=self.logits, out=self.out)
        return gpu_row(lambda i: call(), self.cell | {"indices": "by hash_router"})


def logits_rows(problem: Problem) -> Iterator[Row]:
    selected, looked_up = problem.selected(), problem.looked_up()
    yield from (selected, looked_up)
    yield barred(problem.empty(), round(looked_up["us"] + bars.GIVEN_MORE, 3))
    for share in SHARES:
        yield barred(problem.routed(share), round(selected["us"] + bars.GIVEN_OR_ROUTED_MORE, 3))


def gate_rows(problem: Problem) -> Iterator[Row]:
    n = problem.cell["n"]
    measures = [problem.selected, problem.empty, *(partial(problem.routed, share) for share in SHARES)]
    selected, empty, *routed = in_turns(*measures) if n == MANY else [measure() for measure in measures]
    yield selected
    yield barred(empty, round(bars.GIVEN_PREFILL_RATIO * selected["us"], 3) if n == MANY else bars.GIVEN_DECODE.get(n))
    for row in routed:
        yield barred(row, round(selected["us"] + bars.GIVEN_OR_ROUTED_MORE, 3))


WAYS = {"needed products": 1 << 40, "all products": 0}  # up to here only the needed ones


@contextmanager
def by(way: str) -> Iterator[Row]:
    """Compute products in this way, whatever is faster."""
    table, most = DEFAULT.table, WAYS[way]
    limits: dict[str, Any] = dict.fromkeys(("max_gates_read", "max_elements_read", "max_gates_read_backward"), most)
    given = replace(table.given_experts, **limits)
    with mock.patch.object(tuning.gpu, "nearest", return_value=replace(table, given_experts=given)):
        _cached.forget()
        yield {"way": way}
    _cached.forget()


def ways_rows(n: int, num_experts: int, hidden: int) -> Iterator[Row]:
    problem = Problem(n, num_experts, dtype="bfloat16", hidden=hidden)
    for way in WAYS:
        with by(way) as cell:
            yield problem.empty() | cell


class Gradient:
    """A backward pass of dense_router by PyTorch."""

    def __init__(self, n: int, num_experts: int, hidden: int) -> None:
        import torch

        self.method = RoutingMethod(num_experts, 8, "sqrtsoftplus", renormalize_eps=1e-20, scale=2.5)
        self.cell: Row = {"op": "dense_router gradient", "E": num_experts, "k": 8, "n": n, "H": hidden}
        self.cell |= {"dtype": "bfloat16", "cache": "warm"}
        self.x, self.weight = (
            torch.randn(rows, hidden, device="cuda").bfloat16().requires_grad_() for rows in (n, num_experts)
        )
        ids = torch.rand(n, num_experts, device="cuda").argsort(dim=1)[:, :8].to(torch.int16)
        self.given = {"none": {}, "empty": {"indices": ids, "unset": "empty"}}
        self.upstream, self.grad_logits = (torch.randn(n, columns, device="cuda") for columns in (8, num_experts))

    def row(self, indices: str) -> Row:
        import torch

        routed: dict[Any, Any] = {}  # by stream: the gradient is computed on the one of the forward pass

        def back(i: int) -> Any:
            stream = torch.cuda.current_stream()
            if stream not in routed:
                routed[stream] = dense_router(self.x, self.weight, self.method, **self.given[indices]).weights
            return torch.autograd.grad(routed[stream], [self.x, self.weight], self.upstream, retain_graph=True)

        return gpu_row(back, self.cell | {"indices": indices}, torch=True)

    def in_float32(self) -> Row:
        """Return the time of the two GEMMs that it was."""
        import torch

        def products(i: int) -> Any:
            with torch.no_grad():
                grad_x = (self.grad_logits @ self.weight.float()).bfloat16()
                return grad_x, (self.grad_logits.t() @ self.x.float()).bfloat16()

        return gpu_row(products, self.cell, "two float32 GEMMs", torch=True)


def gradient_rows(n: int, num_experts: int, hidden: int) -> list[Row]:
    problem, rows = Gradient(n, num_experts, hidden), []
    for way in WAYS:
        with by(way) as cell:
            rows.append(problem.row("empty") | cell)
    return rows


def many_gradient_rows() -> list[Row]:
    problem = Gradient(MANY, 256, HIDDEN)
    selected, given, products = problem.row("none"), problem.row("empty"), problem.in_float32()
    return [selected, barred(given, round(bars.GIVEN_GRADIENT_RATIO * products["us"], 3)), products]


def measure(quick: bool) -> list[Row]:
    rows = [row for n in ((1, 64, 1024, 8192) if quick else ALL_N) for row in logits_rows(Problem(n))]
    counts = (1, 64, MANY) if quick else GATE_N
    rows += [row for n in counts for row in gate_rows(Problem(n, dtype="bfloat16", hidden=HIDDEN))]
    for shape in SHAPES:
        rows += [row for n in WAYS_N for row in ways_rows(n, *shape)]
        for n in (*WAYS_N, MANY):
            rows += attempt("gradients by PyTorch", partial(gradient_rows, n, *shape)) or []
    return rows + (attempt("gradients by PyTorch", many_gradient_rows) or [])


def one_size(n: int, num_experts: int, top_k: int, dtype: str, hidden: int) -> list[Row]:
    problem = Problem(n, num_experts, top_k, dtype, hidden)
    return list(gate_rows(problem) if hidden else logits_rows(problem))


ONE_SIZE = OneSize({"n": 64, "num_experts": 256, "top_k": 8, "dtype": FLOATS, "hidden": 0}, one_size)

if __name__ == "__main__":
    main("given_experts", measure, ONE_SIZE)
