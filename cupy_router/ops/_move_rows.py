# SPDX-License-Identifier: Apache-2.0
"""The kernels of permute and unpermute, and of their gradients, and their launch shapes."""

from __future__ import annotations

from typing import Any

from cupy_router.ops._cached import Kernel
from cupy_router.ops._declared import Arrays
from cupy_router.tuning import Gpu


def permute_kernel(options: Any, arrays: Arrays, gpu: Gpu) -> Kernel:
    """Return the kernel that computes these results."""
    raise NotImplementedError


def unpermute_kernel(options: Any, arrays: Arrays, gpu: Gpu) -> Kernel:
    """Return the kernel that computes these results."""
    raise NotImplementedError
