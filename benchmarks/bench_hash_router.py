# SPDX-License-Identifier: Apache-2.0
"""hash_router: GPU time over n for its three sources of weights, warm."""

from __future__ import annotations

from typing import Any

import cupy

from benchmarks import harness
from cupy_router import Routing, hash_router, presets

VOCAB_SIZE = 129_280
HIDDEN = {"deepseek-v4-flash": 4096, "deepseek-v4-pro": 7168}


def gpu_rows() -> list[dict[str, Any]]:
    rows = []
    for preset, hidden in HIDDEN.items():
        method = presets()[preset]
        num_experts, k = method.num_experts, method.top_k
        table = cupy.random.randint(0, num_experts, (VOCAB_SIZE, k)).astype(cupy.int32)
        weight = cupy.random.standard_normal((num_experts, hidden), dtype=cupy.float32).astype("bfloat16")
        for n in (1, 16, 64, 1024, 8192):
            token_ids = cupy.random.randint(0, VOCAB_SIZE, n).astype(cupy.int32)
            logits = cupy.random.standard_normal((n, num_experts), dtype=cupy.float32)
            x = cupy.random.standard_normal((n, hidden), dtype=cupy.float32).astype("bfloat16")
            out = Routing(cupy.empty((n, k), cupy.float32), cupy.empty((n, k), cupy.int32))
            sources: dict[str, dict[str, Any]] = {
                "uniform": {},
                "logits": {"method": method, "logits": logits},
                "products": {"method": method, "x": x, "weight": weight},
            }
            for source, arguments in sources.items():
                if source == "products" and n > 1024:
                    continue  # the full product is the better way there

                def call(i: int, t: Any = token_ids, table: Any = table, more: Any = arguments, out: Any = out) -> Any:
                    return hash_router(t, table, **more, out=out)

                time, spread = harness.graph_microseconds(call)
                rows.append(
                    {"what": "gpu", "source": source, "E": num_experts, "H": hidden, "k": k, "n": n}
                    | {"cache": "warm", "us": round(time, 3), "spread_us": round(spread, 3)}
                )
    return rows


if __name__ == "__main__":
    harness.save("hash_router", gpu_rows())
