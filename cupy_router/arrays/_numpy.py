# SPDX-License-Identifier: Apache-2.0
"""NumPy arrays: always CPU memory. Subclasses count as the array that they are."""

from __future__ import annotations

import ctypes
import math
from collections.abc import Hashable, Sequence
from typing import Any

import ml_dtypes
import numpy as np

from cupy_router.arrays import ITEM_SIZES, Framework, View

ARRAY_TYPES = (np.ndarray,)

DTYPES = {name: np.dtype(ml_dtypes.bfloat16 if name == "bfloat16" else name) for name in ITEM_SIZES}
NAMES = {dtype: name for name, dtype in DTYPES.items()}


def dtype_of(name: str) -> np.dtype[Any]:
    """Return the NumPy dtype of a name, also of a dtype that only ops which move bytes accept."""
    return DTYPES[name] if name in DTYPES else np.dtype(getattr(ml_dtypes, name, name))


def is_float8(dtype: Any) -> bool:
    """Return whether this is a dtype of one byte that DLPack of older versions does not have."""
    return bool(dtype.itemsize == 1 and dtype.kind in "fV")


def why_not(kind: type) -> str | None:
    """Return what an array has to be in place of one of this class; None if the class is accepted."""
    if issubclass(kind, np.ma.MaskedArray):
        return f"an array without a mask, got a {kind.__name__}: pass its .filled(value), or .data to ignore the mask"
    return None


class NumPy(Framework):
    name = "numpy"

    def current_stream(self, array: Any) -> int | None:
        return None

    def describe(self, array: Any, stream: int, owners: list[object]) -> tuple[int, Hashable]:
        return array.ctypes.data, ("cpu", array.dtype, array.shape, array.strides)

    def view(self, name: str, array: Any, stream: int | None) -> View:
        array = np.asarray(array)  # a subclass may have indexing of its own, such as np.matrix
        if any(step % array.itemsize for step in array.strides) if array.itemsize else False:
            raise ValueError(f"{name} has strides of {array.strides} bytes, which are no multiples of its item size")
        return View(
            name=name,
            pointer=array.ctypes.data,
            shape=array.shape,
            strides=tuple(step // (array.itemsize or 1) for step in array.strides),
            dtype=NAMES.get(array.dtype, str(array.dtype)),
            device=("cpu", 0),
            readonly=not array.flags.writeable,
            host=array,
        )

    def stack(self, arrays: Sequence[Any]) -> Any:
        return np.stack(arrays)

    def from_host(self, values: np.ndarray[Any, Any], like: Any) -> Any:
        return values


def host_memory(pointer: int, like: View) -> np.ndarray[Any, Any]:
    """Return dense CPU memory, owned by the caller, as an array with the shape and dtype of a view."""
    dtype = dtype_of(like.dtype)
    num_bytes = math.prod(like.shape) * dtype.itemsize
    if num_bytes == 0:  # the address may be null
        return np.empty(like.shape, dtype)
    memory = (ctypes.c_ubyte * num_bytes).from_address(pointer)
    return np.ndarray(like.shape, dtype, memoryview(memory))


FRAMEWORK = NumPy()
