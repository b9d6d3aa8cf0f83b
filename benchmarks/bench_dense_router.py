# SPDX-License-Identifier: Apache-2.0
"""dense_router, bfloat16: decode warm and cold, prefill beside cuBLAS alone, hash layers from x and weight: GPU time"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import cupy

from benchmarks import harness
from cupy_router import Routing, RoutingMethod, dense_router, gemm, hash_router, presets

HIDDEN = {"deepseek-v4-flash": 4096, "deepseek-v4-pro": 7168}
VOCAB_SIZE = 129_280
DECODE_TOKENS, HASH_TOKENS, PREFILL_TOKENS = (1, 4, 16, 64), (1, 16, 64), 8192


def normal(*shape: int, scale: float = 1.0) -> Any:
    return (cupy.random.standard_normal(shape, dtype=cupy.float32) * scale).astype("bfloat16")


def results(num_tokens: int, method: RoutingMethod) -> Routing:
    shape = (num_tokens, method.top_k)
    return Routing(cupy.empty(shape, cupy.float32), cupy.empty(shape, cupy.int32))


def timed(call: Callable[[int], Any], calls: int = 50, **row: Any) -> dict[str, Any]:
    time, spread = harness.graph_microseconds(call, calls)
    return row | {"us": round(time, 3), "spread_us": round(spread, 3)}


def decode_rows(method: RoutingMethod, hidden: int) -> Iterator[dict[str, Any]]:
    experts = method.num_experts
    gates = harness.cold_inputs(lambda: normal(experts, hidden, scale=hidden**-0.5), 2 * experts * hidden)
    bias = cupy.random.standard_normal(experts, dtype=cupy.float32)
    for n in DECODE_TOKENS:
        x, out = normal(n, hidden), results(n, method)
        for cache, weights in (("warm", gates[:1]), ("cold", gates)):

            def call(i: int, x: Any = x, weights: Any = weights, out: Any = out) -> Any:
                return dense_router(x, weights[i % len(weights)], method, bias=bias, path="decode", out=out)

            calls = max(50, len(weights))  # every gate is read once in a replay
            yield timed(call, calls, what="decode", E=experts, H=hidden, k=method.top_k, n=n, cache=cache)


def prefill_rows(method: RoutingMethod, hidden: int) -> Iterator[dict[str, Any]]:
    experts, n = method.num_experts, PREFILL_TOKENS
    x, weight, bias = normal(n, hidden), normal(experts, hidden), cupy.zeros(experts, cupy.float32)
    logits, out = cupy.empty((n, experts), cupy.float32), results(n, method)
    rows = gemm.Matrix("bfloat16", hidden, hidden)
    product = gemm.product(("cuda", 0), rows, rows, experts)

    def cublas(i: int) -> None:
        stream = cupy.cuda.get_current_stream().ptr
        product.multiply(stream, x.data.ptr, weight.data.ptr, logits.data.ptr, n)

    shape = {"E": experts, "H": hidden, "k": method.top_k, "n": n, "cache": "warm"}
    yield timed(cublas, 10, what="cuBLAS alone", **shape)
    yield timed(
        lambda i: dense_router(x, weight, method, bias=bias, path="prefill", out=out), 10, what="prefill", **shape
    )


def hash_rows(method: RoutingMethod, hidden: int) -> Iterator[dict[str, Any]]:
    experts, k = method.num_experts, method.top_k
    table = cupy.random.randint(0, experts, (VOCAB_SIZE, k)).astype(cupy.int32)
    weight = normal(experts, hidden)
    for n in HASH_TOKENS:
        token_ids = cupy.random.randint(0, VOCAB_SIZE, n).astype(cupy.int32)
        x, out = normal(n, hidden), results(n, method)

        def call(i: int, x: Any = x, token_ids: Any = token_ids, out: Any = out) -> Any:
            return hash_router(token_ids, table, method, x=x, weight=weight, out=out)

        yield timed(call, what="hash layer", E=experts, H=hidden, k=k, n=n, cache="warm")


if __name__ == "__main__":
    shapes = [(presets()[preset], hidden) for preset, hidden in HIDDEN.items()]
    parts = (decode_rows, hash_rows, prefill_rows)
    harness.save("dense_router", [row for shape in shapes for part in parts for row in part(*shape)])
