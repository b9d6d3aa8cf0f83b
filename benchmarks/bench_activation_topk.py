# SPDX-License-Identifier: Apache-2.0
"""activation_topk: GPU time over n, E and dtype, and host time per call from PyTorch and CuPy."""

from __future__ import annotations

from typing import Any

import cupy

from benchmarks import harness
from cupy_router import Routing, RoutingMethod, activation_topk


def gpu_rows() -> list[dict[str, Any]]:
    rows = []
    for num_experts in (256, 384):
        method = RoutingMethod(num_experts, 6, "sqrtsoftplus", renormalize_eps=1e-20, scale=2.5)
        bias = cupy.random.standard_normal(num_experts, dtype=cupy.float32)
        for dtype in ("float32", "bfloat16"):
            for num_tokens in (1, 16, 64, 1024, 8192, 65536):
                size = num_tokens * num_experts * (4 if dtype == "float32" else 2)
                cold = num_tokens == 65536

                def make(shape: tuple[int, int] = (num_tokens, num_experts), dtype: str = dtype) -> Any:
                    return cupy.random.standard_normal(shape, dtype=cupy.float32).astype(dtype)

                inputs = harness.cold_inputs(make, size) if cold else [make()]
                out = Routing(cupy.empty((num_tokens, 6), cupy.float32), cupy.empty((num_tokens, 6), cupy.int32))

                def call(i: int, inputs: Any = inputs, method: Any = method, bias: Any = bias, out: Any = out) -> Any:
                    return activation_topk(inputs[i % len(inputs)], method, bias=bias, out=out)

                time, spread = harness.graph_microseconds(call)
                rows.append(
                    {"what": "gpu", "E": num_experts, "k": 6, "n": num_tokens, "dtype": dtype}
                    | {"cache": "cold" if cold else "warm", "us": round(time, 3), "spread_us": round(spread, 3)}
                )
    return rows


def host_rows() -> list[dict[str, Any]]:
    import torch

    method = RoutingMethod(256, 6, "sqrtsoftplus")
    rows = []
    logits, bias = torch.randn(64, 256, device="cuda"), torch.randn(256, device="cuda")
    out = activation_topk(logits, method, bias=bias)
    synchronize = torch.cuda.synchronize
    calls = {
        "torch": lambda: activation_topk(logits, method, bias=bias),
        "torch, out=": lambda: activation_topk(logits, method, bias=bias, out=out),
        "torch.relu": lambda: torch.relu(logits),
        "torch.empty": lambda: torch.empty((64, 6), dtype=torch.float32, device=logits.device),
    }
    cupy_logits, cupy_bias = cupy.asarray(logits), cupy.asarray(bias)
    cupy_out = activation_topk(cupy_logits, method, bias=cupy_bias)
    calls["cupy"] = lambda: activation_topk(cupy_logits, method, bias=cupy_bias)
    calls["cupy, out="] = lambda: activation_topk(cupy_logits, method, bias=cupy_bias, out=cupy_out)
    for name, call in calls.items():
        time = harness.host_microseconds(call, synchronize)
        rows.append({"what": "host", "call": name, "E": 256, "n": 64, "us": round(time, 2)})
    return rows


if __name__ == "__main__":
    harness.save("activation_topk", gpu_rows() + host_rows())
