# SPDX-License-Identifier: Apache-2.0
"""activation_topk of every preset beside plain sqrt(softplus) of its size: time on the GPU."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import cupy

from benchmarks.bars import GROUPED_RATIO, METHOD_RATIO
from benchmarks.bench_activation_topk import empty
from benchmarks.harness import barred, gpu_row, inputs, main
from benchmarks.one_size import OneSize
from benchmarks.rows import Row
from cupy_router import RoutingMethod, activation_topk, presets

N = (64, 8192)
BIASED = ("deepseek-v3", "deepseek-v4", "ernie", "glm", "kimi", "minimax")  # families whose bias selects
LOGIT_BIASED = ("gpt-oss",)


def arrays(name: str, num_experts: int) -> dict[str, Any]:
    """What a layer of this family has beside its gate."""
    given = {"bias": BIASED, "logit_bias": LOGIT_BIASED}
    return {
        argument: cupy.random.standard_normal(num_experts, dtype=cupy.float32)
        for argument, families in given.items()
        if name.startswith(families)
    }


def preset_rows(name: str, method: RoutingMethod, sizes: Sequence[int] = N) -> Iterator[Row]:
    """Each with a bar of so many times the plain method's time in this run; then the plain method."""
    plain = RoutingMethod(method.num_experts, method.top_k, renormalize_eps=1e-20, scale=2.5)
    bias = cupy.random.standard_normal(method.num_experts, dtype=cupy.float32)
    layer = arrays(name, method.num_experts)
    for n in sizes:
        (logits,) = inputs((n, method.num_experts), "float32", cold=False)
        out = empty(n, method.top_k)
        cell: Row = {"op": "activation_topk", "E": method.num_experts, "k": method.top_k, "n": n, "preset": name}

        def of_preset(_: int, logits: Any = logits, out: Any = out) -> Any:
            return activation_topk(logits, method, **layer, out=out)

        def of_plain(_: int, logits: Any = logits, out: Any = out) -> Any:
            return activation_topk(logits, plain, bias=bias, out=out)

        base = gpu_row(of_plain, cell | {"method": "plain sqrtsoftplus"})
        ratio = GROUPED_RATIO if method.num_groups > 1 else METHOD_RATIO
        yield barred(gpu_row(of_preset, cell), round(base["us"] * ratio, 3))
        yield base


def measure(quick: bool) -> list[Row]:
    return [row for name, method in presets().items() for row in preset_rows(name, method)]


def one_size(n: int, preset: str) -> list[Row]:
    return list(preset_rows(preset, presets()[preset], (n,)))


ONE_SIZE = OneSize({"n": 64, "preset": tuple(presets())}, one_size)

if __name__ == "__main__":
    main("methods", measure, ONE_SIZE)
