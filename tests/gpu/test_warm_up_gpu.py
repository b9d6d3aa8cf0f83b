# SPDX-License-Identifier: Apache-2.0
"""After a warm-up, no call of its range compiles on a GPU; the planned kernels are the compiled ones."""

from __future__ import annotations

import json
import os
import random
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

import cupy_router
from cupy_router import LayoutSpec, Router
from cupy_router.method import resolve

NUMBERS = [1, 2, 3, 5, 9, 17, 33, 64, 65, 2048, 2049, 8192, *random.Random(0).sample(range(1, 8193), 40)]


@pytest.mark.parametrize("layout", [None, LayoutSpec(alignment=128)], ids=["routing", "layout"])
@pytest.mark.parametrize("preset", ["deepseek-v4-flash", "deepseek-v3", "qwen3-moe"])
@pytest.mark.acceptance("after a warm-up no call in its range compiles")
def test_no_call_compiles_after_a_warm_up(preset: str, layout: LayoutSpec | None, cupy: Any) -> None:
    torch = pytest.importorskip("torch")
    method = resolve(preset)
    weight = torch.randn(method.num_experts, 1024, device="cuda", dtype=torch.bfloat16)
    bias = torch.zeros(method.num_experts, device="cuda")
    router = Router(method, weight=weight, bias=bias)
    given = {} if layout is None else {"layout": layout}
    router.warmup(**given)
    late: list[str] = []
    stop = cupy_router.on_compile(lambda kernel: late.append(f"{kernel.name} {kernel.specialisation}"))
    try:
        for n in NUMBERS:
            router(torch.randn(n, 1024, device="cuda", dtype=torch.bfloat16), **given)
            assert not late, n
    finally:
        stop()
    assert router.warmup(**given) == ()


# Not guarded by __name__, as scripts of users are not. PyTorch comes first, with an NVRTC of its own.
PROGRAM = """
import json, sys, time
import torch
torch.zeros(1, device="cuda")
import cupy_router
heard = []
cupy_router.on_compile(heard.append)
begin = time.perf_counter()
ready = cupy_router.warmup(
    "deepseek-v4-flash", hidden=4096, bias=True, dtypes=("bfloat16", "float32"), workers=int(sys.argv[1])
)
seconds = time.perf_counter() - begin
print(json.dumps([len(ready), sum(one.compiled for one in ready), sum(one.compiled for one in heard), seconds]))
"""


def warm_up(workers: int, folder: Path) -> tuple[int, int, int, float]:
    """Return the number of kernels, of those that were compiled, of those by this process, and seconds."""
    environment = {**os.environ, "CUPY_CACHE_DIR": str(folder)}
    command = [sys.executable, "-c", PROGRAM, str(workers)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=180)
    assert done.returncode == 0, done.stderr[-3000:]
    (line,) = done.stdout.splitlines()
    total, compiled, here, seconds = json.loads(line)
    return total, compiled, here, seconds


def test_several_processes_compile(tmp_path: Path, record_property: Any) -> None:
    pytest.importorskip("torch")
    alone, several = warm_up(1, tmp_path / "1"), warm_up(4, tmp_path / "4")
    again = warm_up(4, tmp_path / "4")
    record_property("warm_up_seconds", {"1 process": alone[3], "4 processes": several[3], "from disk": again[3]})
    assert alone[0] == several[0] == again[0] > 9
    assert alone[1] == alone[2] == several[1] == alone[0]
    assert several[2] < several[1]
    assert again[1:3] == (0, 0)
