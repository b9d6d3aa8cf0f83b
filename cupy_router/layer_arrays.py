# SPDX-License-Identifier: Apache-2.0
"""The arrays of a layer: views of them, and their conversion from a checkpoint."""

from __future__ import annotations

from typing import Any

import numpy as np

from cupy_router.arrays import framework_of, view_of
from cupy_router.ops import _checks as check
from cupy_router.ops._declared import FLOATS


def described(name: str, array: Any) -> str:
    """Return dtype, shape and device of an array as they are now, or the type of what has none or is gone."""
    try:
        return str(view_of(name, array))
    except Exception:  # leaves of a pytree may be any objects
        return type(array).__name__


def as_float32(key: str, array: Any, num_experts: int) -> Any:
    """Convert to [num_experts] float32. Some checkpoints have bfloat16, some the shape [1, num_experts]."""
    view = view_of(key, array)
    check.dtype(view, FLOATS)
    if view.dtype == "float32" and view.shape != (1, num_experts):
        return array
    array = framework_of(key, array).plain(key, array)
    if isinstance(array, np.ndarray):
        array = np.asarray(array)  # np.matrix would stay two-dimensional
    if view.shape == (1, num_experts):
        array = array.reshape(num_experts)
    if view.dtype == "float32":
        return array
    return array.astype(np.float32) if hasattr(array, "astype") else array.float()  # PyTorch has no astype


def stacked(num_experts: int, *biases: tuple[str, Any]) -> Any:
    """Return biases, given with their keys, as the rows of one array."""
    framework = framework_of(*biases[0])
    for key, array in biases:
        check.axes(view_of(key, array), ("num_experts",), {"num_experts": num_experts})
        if framework_of(key, array) is not framework:
            raise TypeError(f"{key} must be an array of the kind of {biases[0][0]}, got {type(array).__name__}")
    return framework.stack([framework.plain(key, array) for key, array in biases])


def to_gpu(index: int) -> Any:
    """Return a function that copies an array to a GPU."""
    from cupy_router.compiler import require_cuda

    cupy = require_cuda()

    def move(array: np.ndarray[Any, Any]) -> Any:
        with cupy.cuda.Device(index):
            moved = cupy.asarray(np.ascontiguousarray(array).view(np.uint8)).view(array.dtype)
            cupy.cuda.get_current_stream().synchronize()  # other streams may read it next
        return moved

    return move
