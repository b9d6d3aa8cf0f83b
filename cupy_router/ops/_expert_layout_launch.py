# SPDX-License-Identifier: Apache-2.0
"""The kernels of expert_layout and their launch shapes."""

from __future__ import annotations

from typing import Any

from cupy_router.ops._cached import Kernel, Work
from cupy_router.ops._declared import Arrays
from cupy_router.ops._op import Op
from cupy_router.tuning import Gpu


def work(op: Op, options: Any, arrays: Arrays, gpu: Gpu) -> Kernel | Work:
    """Return the kernels of a call."""
    raise NotImplementedError
