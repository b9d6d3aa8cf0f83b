# SPDX-License-Identifier: Apache-2.0
"""After a warm-up, no call of its range compiles on a GPU; the planned kernels are the compiled ones."""

from __future__ import annotations

import random
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
