# SPDX-License-Identifier: Apache-2.0
"""One small call of every variant of the kernels of layouts and rows."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np

from cupy_router import RoutingMethod
from tests import inputs, oracle_layout
from tests.fuzz.case import Case
from tests.layout_inputs import DISTRIBUTIONS, any_map, as_ids, uniform, zipf

FLOATS = ("float32", "float16", "bfloat16")
DENSE, STRIDED, MISALIGNED = (0, 0), (8, 0), (1, 1)  # elements between rows, elements in front
MEMORY = (DENSE, STRIDED, MISALIGNED)
ALL = list(oracle_layout.NAMES)


def layout_cases() -> list[Case]:
    return [*_expert_layout(), *_rows(), *_gradients(), *_routers()]


def _expert_layout() -> Iterator[Case]:
    """From one token to so many that several blocks count; experts in a warp's, a block's and several blocks' reach."""

    def case(ids: np.ndarray, experts: int, memory: tuple[int, int], arrays: Any = (), /, **options: Any) -> Case:
        options = {"num_experts": experts, "want": ALL} | options
        return Case(
            "expert_layout", {"indices": ids, **dict(arrays)}, None, options, {"indices": memory}, memory[0] - 1
        )

    sizes = [(n, k) for n in (1, 5, 16, 33, 64, 200, 700, 1500) for k in (1, 6, 8)]
    for i, (n, k) in enumerate(sizes):
        experts = (8, 60, 256, 384, 1000, 2000)[i % 6]
        ids = as_ids(uniform(n, k, experts), ("int32", "int64", "uint16", "int16", "uint8")[i % 5])
        yield case(ids, experts, MEMORY[i % 3], alignment=(1, 16, 1, 128)[i % 4])
    for i, kind in enumerate(DISTRIBUTIONS):
        for n in (40, 600):
            yield case(DISTRIBUTIONS[kind](n, 6, 60), 60, MEMORY[i % 3], alignment=i + 1)
    for n in (0, 1, 40, 900):
        ids = zipf(n, 8, 128).astype(np.int32)
        for dtype in (np.int32, np.int64):
            yield case(ids, 128, DENSE, {"load": np.full(128, 5, dtype)}, want=["counts"])
        yield case(ids, 128, DENSE, {"num_valid": np.array([n // 2], np.int32)}, alignment=16)
        yield case(ids, 128, STRIDED, num_valid=n // 3, capacity=0)
        yield case(ids, 128, STRIDED, capacity=64, alignment=16, pad=8 * n)
        yield case(ids, 128, DENSE, {"expert_map": any_map(128, 50)}, num_local=50)
        yield case(ids, 128, DENSE, experts=[100, 28], want=["order", "counts"])
        yield case(ids, 128, DENSE, experts=[128, 0])
        for name in ALL:
            yield case(ids, 128, MISALIGNED, want=[name], alignment=8)
    yield case(uniform(64, 6, 40_000).astype(np.uint16), 40_000, DENSE)
    for name in ALL:  # more experts than one launch takes
        yield case(uniform(40, 4, 2000).astype(np.int32), 2000, MISALIGNED, want=[name], alignment=8)
    yield case(uniform(2100, 8, 64).astype(np.int32), 64, STRIDED, alignment=4)  # more than a cluster of blocks takes


def _layout(n: int, k: int, kind: str = "-1 sprinkled") -> dict[str, np.ndarray]:
    made = oracle_layout.expert_layout(DISTRIBUTIONS[kind](n, k, 20), 20, alignment=4)
    return {name: made[name] for name in ("order", "positions")}


def _memory(arrays: dict[str, np.ndarray], memory: tuple[int, int]) -> dict[str, tuple[int, int]]:
    return {name: memory for name, array in arrays.items() if array.ndim == 2}


def _rows() -> Iterator[Case]:
    def case(op: str, arrays: dict[str, np.ndarray], memory: tuple[int, int]) -> Case:
        return Case(op, arrays, None, {}, _memory(arrays, memory), memory[0] - 1)

    for i, hidden in enumerate((1, 7, 64, 1000, 4096, 7168)):
        for j, dtype in enumerate(FLOATS):
            n, k = ((3, 6), (20, 2), (1, 22))[(i + j) % 3]
            memory, made = MEMORY[(i + j + n) % 3], _layout(n, k)
            weights = inputs.normal((n, k), FLOATS[(i + j) % 3], seed=1)
            x = {"x": inputs.normal((n, hidden), dtype), **made}
            yield case("permute", x, memory)
            yield case("permute", {**x, "weights": weights}, memory)
            y = {"y": inputs.normal((len(made["order"]), hidden), dtype), "positions": made["positions"]}
            residual = {"residual": inputs.normal((n, hidden), FLOATS[(j + 1) % 3], seed=2)}
            scale = {"residual_scale": inputs.normal((n,), seed=3)}
            yield case("unpermute", y, memory)
            yield case("unpermute", {**y, "weights": weights, **residual}, memory)
            yield case("unpermute", {**y, **residual, **scale}, memory)
    for dtype in ("uint8", "int16", "int64"):
        x = {"x": inputs.rng(5).integers(0, 100, (9, 40)).astype(dtype), **_layout(9, 3)}
        yield case("permute", x, MISALIGNED)


def _gradients() -> Iterator[Case]:
    for i, hidden in enumerate((1, 7, 64, 1000, 4096)):
        for j, dtype in enumerate(FLOATS):
            n, k = ((3, 6), (20, 2), (80, 8))[(i + 2 * j) % 3]
            made, memory = _layout(n, k), MEMORY[(i + n) % 3]
            rows = inputs.normal((len(made["order"]), hidden), dtype)
            x, residual = (inputs.normal((n, hidden), dtype, seed=seed) for seed in (4, 5))
            both = {"positions": made["positions"], "weights": inputs.normal((n, k), seed=6)}
            given = {"y": rows, **both, "x": x}
            for want in (["sums"], ["sums", "dots"], ["dots"]):
                yield Case("permute_backward", given, None, {"want": want}, _memory(given, memory))
            given = {"x": x, "order": made["order"], **both, "y": rows, "residual": residual}
            given["residual_scale"] = inputs.normal((n,), seed=7)
            for want in (["rows", "dots"], ["rows", "dots", "scaled", "residual_dots"], ["scaled"]):
                yield Case("unpermute_backward", given, None, {"want": want}, _memory(given, memory))


def _routers() -> Iterator[Case]:
    """Layouts in the router's own launch, where it makes them, and in others."""
    for n in (1, 5, 16, 33, 64, 100, 700):
        for experts, k, alignment in ((256, 6, 1), (384, 8, 16), (60, 4, 1), (2000, 6, 1)):
            method = RoutingMethod(experts, k, "softmax")
            layout = {"alignment": alignment, "want": ALL if n % 2 else list(oracle_layout.DEFAULT_WANT)}
            arrays = {"logits": inputs.distinct(n, experts, "float32")}
            yield Case("activation_topk", arrays, method, {"layout": layout, "num_valid": n - n // 4}, {}, n % 2 - 1)
        ids, table = np.arange(n) % 9, uniform(9, 6, 60).astype(np.int32)
        hashed = {"token_ids": ids.astype(np.int32), "table": table, "logits": inputs.distinct(n, 60, "float32")}
        yield Case("hash_router", hashed, RoutingMethod(60, 6, "softmax"), {"layout": {"alignment": 8}})
        x = {"x": inputs.rng(6, n).integers(-4, 5, (n, 64)).astype(np.float32)}
        x["weight"] = inputs.rng(7).integers(-4, 5, (72, 64)).astype(np.float32)
        yield Case("dense_router", x, RoutingMethod(72, 6, "identity"), {"layout": {"capacity": 3 * n}})
