# SPDX-License-Identifier: Apache-2.0
"""dense_router, bfloat16: decode warm and cold, prefill beside cuBLAS alone, with logits in two dtypes, hash layers
from x and weight; all counts of tokens beside PyTorch and the floor: GPU time"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial
from typing import Any

import cupy

from benchmarks import bars, floor, harness
from benchmarks.one_size import OneSize
from benchmarks.rows import OURS, Row
from cupy_router import Routing, RoutingMethod, RoutingWithLogits, dense_router, gemm, hash_router, presets

HIDDEN = {"deepseek-v4-flash": 4096, "deepseek-v4-pro": 7168}
LOGITS_PRESET, LOGITS_HIDDEN = "qwen3-moe", 2048
VOCAB_SIZE = 129_280
DECODE_TOKENS, HASH_TOKENS, PREFILL_TOKENS = (1, 4, 16, 64), (1, 16, 64), 8192
ALL_TOKENS = (1, 2, 4, 8, 16, 32, 64, 128, 512, 2048, 8192, 32768)
COMPILED_TOKENS = (16, 8192)


def normal(*shape: int, scale: float = 1.0, dtype: str = "bfloat16") -> Any:
    return (cupy.random.standard_normal(shape, dtype=cupy.float32) * scale).astype(dtype)


def results(num_tokens: int, method: RoutingMethod) -> Routing:
    shape = (num_tokens, method.top_k)
    return Routing(cupy.empty(shape, cupy.float32), cupy.empty(shape, cupy.int32))


class Problem:
    """A batch-invariant call of one size, with its inputs, for the counters of Nsight Compute."""

    def __init__(self, num_experts: int, hidden: int, n: int) -> None:
        method = RoutingMethod(num_experts, 8, score="sigmoid", renormalize=True)
        x, weight = normal(n, hidden), normal(num_experts, hidden, scale=hidden**-0.5)
        bias, out = cupy.random.standard_normal(num_experts, dtype=cupy.float32), results(n, method)
        self.call = partial(dense_router, x, weight, method, bias=bias, batch_invariant=True, out=out)


def timed(call: Callable[[int], Any], path: str, rotation: int = 1, by: str = OURS, **cell: Any) -> Row:
    return harness.gpu_row(call, {"op": "dense_router", "path": path} | cell, by, rotation=rotation)


def decode_rows(method: RoutingMethod, hidden: int) -> Iterator[Row]:
    experts = method.num_experts
    gates = harness.cold_inputs(lambda: normal(experts, hidden, scale=hidden**-0.5), 2 * experts * hidden)
    bias = cupy.random.standard_normal(experts, dtype=cupy.float32)
    for n in DECODE_TOKENS:
        x, out = normal(n, hidden), results(n, method)
        warm = 0.0
        for cache, weights in (("warm", gates[:1]), ("cold", gates)):

            def call(i: int, x: Any = x, weights: Any = weights, out: Any = out) -> Any:
                return dense_router(x, weights[i % len(weights)], method, bias=bias, path="decode", out=out)

            row = timed(call, "decode", len(weights), E=experts, H=hidden, k=method.top_k, n=n, cache=cache)
            if cache == "warm":
                warm, bar = row["us"], bars.DENSE_DECODE[experts][n]
            else:
                bar = round(warm + bars.COLD_MORE[experts], 3)
            yield harness.barred(row, bar)
        same = cupy.broadcast_to(x[:1], x.shape)  # what reading x from L2 again and again costs

        def stripped(i: int, x: Any = same, out: Any = out) -> Any:
            return dense_router(x, gates[0], method, bias=bias, path="decode", out=out)

        yield timed(stripped, "decode", by="one row of x", E=experts, H=hidden, k=method.top_k, n=n, cache="warm")


def prefill_rows(method: RoutingMethod, hidden: int) -> Iterator[Row]:
    experts, n = method.num_experts, PREFILL_TOKENS
    x, weight = normal(n, hidden), normal(experts, hidden, scale=hidden**-0.5)
    bias = cupy.random.standard_normal(experts, dtype=cupy.float32)
    logits, out = cupy.empty((n, experts), cupy.float32), results(n, method)
    x_matrix, weight_matrix = (gemm.Matrix("bfloat16", rows, hidden, hidden) for rows in (n, experts))
    product = gemm.product(("cuda", 0), x_matrix, weight_matrix)

    def cublas(i: int) -> None:
        stream = cupy.cuda.get_current_stream().ptr
        product.multiply(stream, x.data.ptr, weight.data.ptr, logits.data.ptr, n)

    shape: dict[str, Any] = {"E": experts, "H": hidden, "k": method.top_k, "n": n, "cache": "warm"}

    def routed(i: int) -> None:
        dense_router(x, weight, method, bias=bias, path="prefill", out=out)

    alone, whole = harness.in_turns(
        lambda: timed(cublas, "prefill", by="cuBLAS alone", **shape), lambda: timed(routed, "prefill", **shape)
    )
    yield alone
    yield harness.barred(whole, round(bars.PREFILL_RATIO * alone["us"], 3))


def logits_rows() -> Iterator[Row]:
    """A router whose logits are wanted too, beside the same without."""
    method, hidden = presets()[LOGITS_PRESET], LOGITS_HIDDEN
    experts = method.num_experts
    weight = normal(experts, hidden, scale=hidden**-0.5)
    for n, bar in bars.MODEL_ROUTER.items():
        x, out = normal(n, hidden), results(n, method)
        shape: dict[str, Any] = {"E": experts, "H": hidden, "k": method.top_k, "n": n, "cache": "warm"}

        def call(i: int, x: Any = x, out: Any = out) -> Any:
            return dense_router(x, weight, method, out=out)

        yield timed(call, "any", logits="none", **shape)
        for dtype in ("float32", "bfloat16"):
            into = RoutingWithLogits(*out, cupy.empty((n, experts), dtype))

            def with_logits(i: int, x: Any = x, into: Any = into, dtype: str = dtype) -> Any:
                return dense_router(x, weight, method, return_logits=True, logits_dtype=dtype, out=into)

            yield harness.barred(timed(with_logits, "any", logits=dtype, **shape), bar)


def hash_rows(method: RoutingMethod, hidden: int) -> Iterator[Row]:
    experts, k = method.num_experts, method.top_k
    table = cupy.random.randint(0, experts, (VOCAB_SIZE, k)).astype(cupy.int32)
    weight = normal(experts, hidden)
    for n in HASH_TOKENS:
        token_ids = cupy.random.randint(0, VOCAB_SIZE, n).astype(cupy.int32)
        x, out = normal(n, hidden), results(n, method)

        def call(i: int, x: Any = x, token_ids: Any = token_ids, out: Any = out) -> Any:
            return hash_router(token_ids, table, method, x=x, weight=weight, out=out)

        row = timed(call, "hash layer", E=experts, H=hidden, k=k, n=n, cache="warm")
        yield harness.barred(row, bars.HASH_LAYER[experts][n])


def invariant_rows(method: RoutingMethod, hidden: int) -> Iterator[Row]:
    """Batch-invariant calls beside the default."""
    experts = method.num_experts
    weight = normal(experts, hidden, scale=hidden**-0.5)
    bias = cupy.random.standard_normal(experts, dtype=cupy.float32)
    for n, bar in bars.BATCH_INVARIANT[experts].items():
        x, out = normal(n, hidden), results(n, method)

        def call(i: int, x: Any = x, out: Any = out, batch_invariant: bool = True) -> Any:
            return dense_router(x, weight, method, bias=bias, batch_invariant=batch_invariant, out=out)

        cell: Row = {"E": experts, "H": hidden, "k": method.top_k, "n": n, "cache": "warm"}
        ours, default = harness.in_turns(
            partial(timed, call, "batch invariant", **cell),
            partial(timed, partial(call, batch_invariant=False), "batch invariant", by="default", **cell),
        )
        yield harness.barred(ours, bar)
        yield default


def sweep_rows(method: RoutingMethod, hidden: int) -> Iterator[Row]:
    for n in ALL_TOKENS:
        yield from size_rows(method, hidden, n, compiled=n in COMPILED_TOKENS)


def size_rows(method: RoutingMethod, hidden: int, n: int, dtype: str = "bfloat16", *, compiled: bool) -> Iterator[Row]:
    """Any number of tokens, the path chosen by size, beside the two launches, the floor and PyTorch."""
    experts = method.num_experts
    weight, x = normal(experts, hidden, scale=hidden**-0.5, dtype=dtype), normal(n, hidden, dtype=dtype)
    bias, out = cupy.random.standard_normal(experts, dtype=cupy.float32), results(n, method)
    cell: Row = {"E": experts, "H": hidden, "k": method.top_k, "n": n, "dtype": dtype, "cache": "warm"}

    def call(path: str | None) -> Callable[[int], Any]:
        return lambda i: dense_router(x, weight, method, bias=bias, path=path, out=out)

    yield timed(call(None), "any", **cell)
    if n <= max(DECODE_TOKENS):
        yield timed(call("prefill"), "any", by="two launches", **cell)
    whole = {"op": "dense_router", "path": "any"} | cell
    yield floor.read_rows([normal(experts + n, hidden, dtype=dtype)], out, whole)
    for name in ("PyTorch with cuBLAS", *["torch.compile"] * compiled):
        row = harness.attempt(f"{name} {cell}", partial(rival, name, method, x, weight, bias, out, cell))
        yield from [] if row is None else [row]


def rival(name: str, method: RoutingMethod, x: Any, weight: Any, bias: Any, out: Routing, cell: Row) -> Row:
    from benchmarks import rivals

    arrays = [rivals.tensor(array) for array in (x, weight, bias)]
    layer = rivals.compiled(rivals.gate_and_router) if name == "torch.compile" else rivals.gate_and_router

    def route() -> Any:
        return layer(*arrays, method.top_k, method.scale)

    dense_router(x, weight, method, bias=bias, out=out)
    harness.check_same_choice(out.indices, route()[1])
    return harness.gpu_row(lambda i: route(), {"op": "dense_router", "path": "any"} | cell, name, torch=True)


def measure(quick: bool) -> list[Row]:
    shapes = [(presets()[preset], hidden) for preset, hidden in HIDDEN.items()]
    parts = (decode_rows, hash_rows, prefill_rows, invariant_rows) + (() if quick else (sweep_rows,))
    return [row for shape in shapes for part in parts for row in part(*shape)] + list(logits_rows())


def one_size(n: int, num_experts: int, top_k: int, hidden: int, dtype: str) -> list[Row]:
    method = replace(presets()["deepseek-v4-flash"], num_experts=num_experts, top_k=top_k)
    return list(size_rows(method, hidden, n, dtype, compiled=True))


ONE_SIZE = OneSize(
    {"n": 64, "num_experts": 256, "top_k": 6, "hidden": 4096, "dtype": ("bfloat16", "float16", "float32")},
    one_size,
)

if __name__ == "__main__":
    harness.main("dense_router", measure, ONE_SIZE)
