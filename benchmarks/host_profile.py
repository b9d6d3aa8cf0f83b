# SPDX-License-Identifier: Apache-2.0
"""Where each microsecond of an eager call from PyTorch goes: `python -m benchmarks.host_profile`."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from benchmarks import harness
from cupy_router import RoutingMethod, activation_topk, compiler
from cupy_router.arrays import framework_of
from cupy_router.ops import _call


def rows() -> list[dict[str, Any]]:
    method = RoutingMethod(256, 6)
    logits, bias = torch.randn(64, 256, device="cuda"), torch.randn(256, device="cuda")
    out = activation_topk(logits, method, bias=bias)
    activation_topk(logits, method, bias=bias, out=out)
    framework = framework_of("logits", logits)
    key, plan = list(_call._plans.items())[-1]
    assert plan.launch is not None
    launch = plan.launch
    stream = framework.current_stream(logits) or 0
    pointers = [logits.data_ptr(), bias.data_ptr(), 0, out.weights.data_ptr(), out.indices.data_ptr(), -1]
    backend = launch.function.backend
    parts: dict[str, Callable[[], Any]] = {
        "activation_topk": lambda: activation_topk(logits, method, bias=bias),
        "activation_topk, out=": lambda: activation_topk(logits, method, bias=bias, out=out),
        "torch.relu": lambda: torch.relu(logits),
        "torch.empty": lambda: torch.empty((64, 6), dtype=torch.float32, device=logits.device),
        "Tensor.new_empty": lambda: logits.new_empty((64, 6)),
        "torch.empty_like": lambda: torch.empty_like(out.weights),
        "an output allocated": lambda: framework.empty((64, 6), "float32", logits),
        "a tensor described": lambda: framework.describe(logits, stream, []),
        "current stream": lambda: framework.current_stream(logits),
        "plan looked up": lambda: _call._plans.get(key),
        "arguments packed, kernel launched": lambda: launch(stream, pointers),
        "device checked": lambda: backend.use(0),
        "kernel files looked at (a checkout only)": lambda: compiler.WATCHING and compiler.changed(),
    }
    times = {name: harness.host_microseconds(call, torch.cuda.synchronize, batches=100) for name, call in parts.items()}
    return [{"what": "host", "part": name, "us": round(time, 2)} for name, time in times.items()]


if __name__ == "__main__":
    harness.save("host_profile", rows())
