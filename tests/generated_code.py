# SPDX-License-Identifier: Apache-2.0
"""Inductor's code for a call: the op once, with nothing before or after it."""

from __future__ import annotations

import re
from typing import Any

from cupy_router import activation_topk, dense_router
from tests import inputs
from tests.jax_calls import METHOD

_KERNEL = re.compile(
    r"\bdef (triton_|cpp_)|^(triton|cpp)_\w+ = async_compile|\.run\(|\bcopy_\(|\.clone\(|\.contiguous\("
)


def assert_nothing_but_ops(code: str, ops: dict[str, int]) -> None:
    """Assert that generated code calls these ops this often, launches no other kernel and copies nothing."""
    for op, count in ops.items():
        assert code.count(f"torch.ops.cupy_router.{op}.default(") == count, code
    found = [line for line in code.splitlines() if _KERNEL.search(line)]
    assert not found, found


def strided_call(torch: Any, device: str) -> tuple[Any, Any]:
    """Return a function of two ops on strided rows, and its argument."""
    wide = torch.from_numpy(inputs.normal((9, 100), seed=260)).to(device)
    gate = torch.from_numpy(inputs.normal((32, 64), seed=261)).to(device)

    def call(wide: Any) -> Any:
        return (*activation_topk(wide[:, 3:35], METHOD), *dense_router(wide[::2, 36:], gate, METHOD))

    return call, wide
