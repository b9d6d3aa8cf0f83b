# SPDX-License-Identifier: Apache-2.0
"""First calls inside of a graph capture: kernels are compiled there, or loaded from the cache folder."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

# Each call is the first with its kernels, and so are cuBLAS and scratch memory. An eager call says what is right.
PROGRAM = """
import sys
import torch
import cupy_router
from cupy_router import LayoutSpec, RoutingMethod, activation_topk, dense_router, expert_layout, topk_select

mode, method = sys.argv[1], RoutingMethod(128, 4, "sigmoid")
generator = torch.Generator("cuda").manual_seed(0)
random = lambda *shape: torch.randn(*shape, device="cuda", generator=generator)
logits, x, weight, row = random(300, 128), random(3000, 512), random(128, 512), random(1, 100_000)
ids = torch.randint(128, (5000, 4), device="cuda", generator=generator, dtype=torch.int32)
calls = {
    "activation_topk": lambda: activation_topk(logits, method),
    "decode": lambda: dense_router(x[:3], weight, method),
    "prefill": lambda: dense_router(x, weight, method),
    "routed layout": lambda: dense_router(x[:40], weight, method, layout=LayoutSpec()),
    "expert_layout": lambda: expert_layout(ids, 128),
    "topk_select": lambda: topk_select(row, 2000),
}
torch.cuda.synchronize()
ready = []
cupy_router.on_compile(ready.append)


def arrays(found):
    for one in found:
        if isinstance(one, torch.Tensor):
            yield one
        elif isinstance(one, tuple):
            yield from arrays(one)


for name, call in calls.items():
    graph, before = torch.cuda.CUDAGraph(), len(ready)
    with torch.cuda.graph(graph, capture_error_mode=mode):
        captured = call()
    assert len(ready) > before, name
    for _ in range(2):
        for one in arrays(captured):
            one.zero_()
        graph.replay()
        torch.cuda.synchronize()
        pairs = list(zip(arrays(captured), arrays(call()), strict=True))
        assert pairs and all(torch.equal(found, wanted) for found, wanted in pairs), name
    print(name, sum(one.compiled for one in ready[before:]), len(ready) - before)
print("compiled" if any(one.compiled for one in ready) else "loaded")
"""


@pytest.mark.parametrize("mode", ["global", "thread_local", "relaxed"])
def test_first_calls_inside_of_a_capture(mode: str, tmp_path: Path) -> None:
    pytest.importorskip("torch")
    environment = {**os.environ, "CUPY_CACHE_DIR": str(tmp_path)}
    for how in ("compiled", "loaded"):
        program = [sys.executable, "-c", PROGRAM, mode]
        done = subprocess.run(program, capture_output=True, text=True, env=environment, timeout=180)
        assert done.returncode == 0, done.stderr[-3000:]
        assert done.stdout.splitlines()[-1] == how, done.stdout
