# SPDX-License-Identifier: Apache-2.0
"""Arrays on their way to another process, where each gets memory of exactly its own size."""

from __future__ import annotations

import ctypes
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np


def pack(value: Any) -> Any:
    """The same value with picklable stand-ins for all arrays in it, also within tuples, lists and dictionaries."""
    return _map(value, np.ndarray, PackedArray.of)


def unpack(value: Any) -> Any:
    """The value with the arrays back: shape, strides and misalignment kept, in memory of their own."""
    return _map(value, PackedArray, PackedArray.array)


@dataclass(frozen=True)
class PackedArray:
    content: bytes  # from the array's lowest byte to its highest
    misalignment: int  # of the lowest byte, from a multiple of 16
    first: int  # where element 0 lies
    dtype: Any
    shape: tuple[int, ...]
    strides: tuple[int, ...]
    writeable: bool

    @classmethod
    def of(cls, array: np.ndarray) -> PackedArray:
        low, high = np.lib.array_utils.byte_bounds(array)
        content = ctypes.string_at(low, high - low) if array.size else b""
        start = array.ctypes.data
        return cls(content, low % 16, start - low, array.dtype, array.shape, array.strides, array.flags.writeable)

    def array(self) -> np.ndarray:
        memory = np.empty(self.misalignment + len(self.content), np.uint8)  # by malloc: aligned, and not a byte more
        memory[self.misalignment :] = np.frombuffer(self.content, np.uint8)
        offset = self.misalignment + self.first if self.content else 0
        array: np.ndarray = np.ndarray(self.shape, self.dtype, memory, offset, self.strides)
        array.flags.writeable = self.writeable
        return array


def _map(value: Any, kind: type, change: Callable[[Any], Any]) -> Any:
    if isinstance(value, kind):
        return change(value)
    if isinstance(value, dict):
        return {key: _map(item, kind, change) for key, item in value.items()}
    if isinstance(value, tuple) and hasattr(value, "_fields"):
        return type(value)(*(_map(item, kind, change) for item in value))
    if isinstance(value, tuple | list):
        return type(value)(_map(item, kind, change) for item in value)
    return value
