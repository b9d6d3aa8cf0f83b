# SPDX-License-Identifier: Apache-2.0
"""Several biases: every router with two of them, of which each token has one, beside the same call with one."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from typing import Any

import cupy
import numpy as np

from benchmarks import bars
from benchmarks.harness import barred, gpu_row, inputs, main
from benchmarks.one_size import FLOATS, OneSize
from benchmarks.rows import Row
from cupy_router import Routing, RoutingMethod, activation_topk, dense_router, hash_router

ALL_N = (1, 4, 16, 64, 256, 1024, 4096, 8192, 16384)
QUICK_N = (1, 64, 1024, 8192)
HIDDEN, VOCAB_SIZE = 4096, 129_280


class Problem:
    """One size. `source` is "logits", or "x" with a gate; `by_table`: of a hash layer."""

    def __init__(
        self, source: str, n: int, num_experts: int = 256, k: int = 6, dtype: str = "float32", *, by_table: bool = False
    ) -> None:
        self.method = RoutingMethod(num_experts, k, "sqrtsoftplus", renormalize_eps=1e-20, scale=1.5)
        self.by_table, self.num_tokens = by_table, n
        names = {("logits", False): "activation_topk", ("x", False): "dense_router"}
        self.cell: Row = {
            "op": names.get((source, by_table), "hash_router"),
            "source": source,
            "E": num_experts,
            "k": k,
        }
        self.cell |= {"n": n, "dtype": dtype, "cache": "warm"}
        self.bias = cupy.random.standard_normal((2, num_experts), dtype=cupy.float32)
        out = Routing(cupy.empty((n, k), cupy.float32), cupy.empty((n, k), cupy.int32))
        arrays: dict[str, Any] = {}
        if source == "logits":
            (arrays["logits"],) = inputs((n, num_experts), dtype, cold=False)
        else:
            self.cell |= {"H": HIDDEN}
            arrays = {
                name: inputs((rows, HIDDEN), dtype, cold=False)[0] for name, rows in (("x", n), ("weight", num_experts))
            }
        if by_table:
            table = cupy.random.randint(0, num_experts, (VOCAB_SIZE, k)).astype(cupy.int32)
            token_ids = cupy.random.randint(0, VOCAB_SIZE, n).astype(cupy.int32)
            self.route: Any = partial(hash_router, token_ids, table, self.method, **arrays, out=out)
        elif source == "logits":
            self.route = partial(activation_topk, arrays["logits"], self.method, out=out)
        else:
            self.route = partial(dense_router, arrays["x"], arrays["weight"], self.method, out=out)

    def with_one(self) -> Row:
        """Return the time with one bias, or of a hash layer without any."""
        more = {} if self.by_table else {"bias": self.bias[0]}
        return gpu_row(lambda i: self.route(**more), self.cell | {"biases": "none" if self.by_table else "1"})

    def with_two(self, share: float) -> Row:
        """Return the time where this share of the tokens has the second bias."""
        which = cupy.asarray((np.random.default_rng(0).random(self.num_tokens) < share).astype(np.int32))
        call = partial(self.route, bias=self.bias, bias_index=which)
        return gpu_row(lambda i: call(), self.cell | {"biases": f"2, {share:.0%}"})


def rows_of(problem: Problem) -> Iterator[Row]:
    one, n = problem.with_one(), problem.num_tokens
    yield one
    bar = one["us"] + bars.SECOND_BIAS_MORE if n <= bars.SECOND_BIAS_FEW else bars.SECOND_BIAS_RATIO * one["us"]
    for share in (0.0, 0.5) if problem.by_table else (0.5,):
        row = problem.with_two(share)
        yield row if problem.by_table else barred(row, round(bar, 3))


def measure(quick: bool) -> list[Row]:
    sizes = QUICK_N if quick else ALL_N
    kinds = [("logits", "float32"), ("x", "bfloat16")]
    problems = (
        Problem(source, n, dtype=dtype, by_table=by) for by in (False, True) for source, dtype in kinds for n in sizes
    )
    return [row for problem in problems for row in rows_of(problem)]


def one_size(n: int, num_experts: int, top_k: int, dtype: str, op: str) -> list[Row]:
    source = "x" if op == "dense_router" else "logits"
    return list(rows_of(Problem(source, n, num_experts, top_k, dtype, by_table=op == "hash_router")))


OPS = ("activation_topk", "dense_router", "hash_router")
ONE_SIZE = OneSize({"n": 64, "num_experts": 256, "top_k": 6, "dtype": FLOATS, "op": OPS}, one_size)

if __name__ == "__main__":
    main("several_biases", measure, ONE_SIZE)
