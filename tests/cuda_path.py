# SPDX-License-Identifier: Apache-2.0
"""Calls of CPU tensors on the path of CUDA tensors, to kernels that do nothing."""

from __future__ import annotations

from typing import Any

import pytest

from cupy_router.arrays import _torch as tensors
from cupy_router.ops import _cached
from cupy_router.ops._op import Op

Launches = list[dict[str, int]]


def record_launches(monkeypatch: pytest.MonkeyPatch) -> Launches:
    """Return a list to which each launch during a test appends its arguments by name."""
    found: Launches = []

    class Nothing:
        class function:
            device = 0

        def __init__(self, op: Op, options: Any) -> None:
            self.names = (*op.parameters(options), *["number"] * op.takes_number)

        def __call__(self, stream: int, varying: Any) -> None:
            found.append(dict(zip(self.names, varying, strict=True)))

    monkeypatch.setattr(tensors.PyTorch, "current_stream", lambda framework, array: 7)
    monkeypatch.setattr(_cached, "work_of", lambda op, options, *given: Nothing(op, options))
    monkeypatch.setattr(_cached, "calls", {})
    return found
