# SPDX-License-Identifier: Apache-2.0
"""topk_select: GPU time over rows, columns and k, cold, beside torch.topk."""

from __future__ import annotations

from typing import Any

import cupy

from benchmarks import harness
from cupy_router import TopK, topk_select

SHAPES = [(1, 256, 8), (64, 256, 8), (8192, 256, 8), (65536, 256, 8), (1, 384, 6), (64, 384, 6), (8192, 384, 6)]
WIDE_SHAPES = [(1, 32768, 512), (64, 32768, 512), (8, 131072, 2048)]


def gpu_rows() -> list[dict[str, Any]]:
    import torch

    rows = []
    for num_rows, num_columns, k in SHAPES + WIDE_SHAPES:

        def make(shape: tuple[int, int] = (num_rows, num_columns)) -> Any:
            return cupy.random.standard_normal(shape, dtype=cupy.float32)

        inputs = harness.cold_inputs(make, num_rows * num_columns * 4, most=2048)
        out = TopK(cupy.empty((num_rows, k), cupy.float32), cupy.empty((num_rows, k), cupy.int32))

        def ours(i: int, inputs: Any = inputs, k: int = k, out: Any = out) -> Any:
            return topk_select(inputs[i % len(inputs)], k, out=out)

        tensors = [torch.from_dlpack(array) for array in inputs]

        def theirs(i: int, tensors: Any = tensors, k: int = k) -> Any:
            return torch.topk(tensors[i % len(tensors)], k)

        for name, timed in (
            ("cupy_router", harness.graph_microseconds(ours, calls=max(50, len(inputs)), replays=20)),
            ("torch.topk", harness.torch_graph_microseconds(theirs)),
        ):
            rows.append(
                {"what": "gpu", "by": name, "rows": num_rows, "columns": num_columns, "k": k, "dtype": "float32"}
                | {"cache": "cold", "us": round(timed[0], 3), "spread_us": round(timed[1], 3)}
            )
    return rows


if __name__ == "__main__":
    harness.save("topk_select", gpu_rows())
