# SPDX-License-Identifier: Apache-2.0
"""Arrays of any other library with DLPack, read from their capsule with ctypes.

Results belong to the caller's library if that follows the array API standard. Otherwise they are CuPy arrays, or NumPy
arrays for CPU memory.

The C layout follows dlpack.h 1.x: https://dmlc.github.io/dlpack/latest/c_api.html
"""

from __future__ import annotations

import ctypes
from collections.abc import Hashable, Sequence
from contextlib import AbstractContextManager
from typing import Any

import numpy as np

from cupy_router.arrays import Allocator, Framework, Output, View, dense_strides, item_bits
from cupy_router.arrays._numpy import dtype_of

CPU, CUDA = 1, 2
_READ_ONLY = 1
_CODES = {0: "int", 1: "uint", 2: "float", 4: "bfloat", 5: "complex"}  # followed by the number of bits
_NAMES = {
    6: "bool", 7: "float8_e3m4", 8: "float8_e4m3", 9: "float8_e4m3b11fnuz", 10: "float8_e4m3fn",
    11: "float8_e4m3fnuz", 12: "float8_e5m2", 13: "float8_e5m2fnuz", 14: "float8_e8m0fnu", 15: "float6_e2m3fn",
    16: "float6_e3m2fn", 17: "float4_e2m1fn",
}  # fmt: skip


class Tensor(ctypes.Structure):
    _fields_ = [
        ("data", ctypes.c_void_p),
        ("device_type", ctypes.c_int32),
        ("device_id", ctypes.c_int32),
        ("ndim", ctypes.c_int32),
        ("code", ctypes.c_uint8),
        ("bits", ctypes.c_uint8),
        ("lanes", ctypes.c_uint16),
        ("shape", ctypes.POINTER(ctypes.c_int64)),
        ("strides", ctypes.POINTER(ctypes.c_int64)),
        ("byte_offset", ctypes.c_uint64),
    ]


class _Versioned(ctypes.Structure):
    _fields_ = [
        ("major", ctypes.c_uint32),
        ("minor", ctypes.c_uint32),
        ("manager", ctypes.c_void_p),
        ("deleter", ctypes.c_void_p),
        ("flags", ctypes.c_uint64),
        ("tensor", Tensor),
    ]


get_pointer = ctypes.pythonapi.PyCapsule_GetPointer
get_pointer.restype = ctypes.c_void_p
get_pointer.argtypes = [ctypes.py_object, ctypes.c_char_p]
_is_valid = ctypes.pythonapi.PyCapsule_IsValid
_is_valid.restype = ctypes.c_int
_is_valid.argtypes = [ctypes.py_object, ctypes.c_char_p]


def consumer_stream(stream: int) -> int:
    """Return a stream handle for `__dlpack__`: the legacy default stream is 1, since 0 would be ambiguous."""
    return stream or 1


def _shape(tensor: Tensor) -> tuple[tuple[int, ...], tuple[int, ...]]:
    shape = tuple(tensor.shape[axis] for axis in range(tensor.ndim))
    if tensor.strides:
        return shape, tuple(tensor.strides[axis] for axis in range(tensor.ndim))
    return shape, dense_strides(shape)


def _dtype(tensor: Tensor) -> str:
    name = _NAMES.get(tensor.code) or f"{_CODES.get(tensor.code, 'unknown')}{tensor.bits}"
    return name if tensor.lanes == 1 else f"{name}x{tensor.lanes}"


def _address(tensor: Tensor) -> int:
    return int(tensor.data or 0) + int(tensor.byte_offset)


class DLPack(Framework):
    name = "dlpack"
    delivers = True

    def export(self, array: Any, stream: int | None) -> tuple[object, Tensor, bool]:
        """Return the owner of the memory, its tensor, and whether it is read-only; `stream` waits for the producer."""
        on_cuda = array.__dlpack_device__()[0] == CUDA
        wanted = {"stream": consumer_stream(stream)} if on_cuda and stream is not None else {}
        try:
            capsule = array.__dlpack__(max_version=(1, 1), **wanted)
        except (TypeError, ValueError, NotImplementedError):  # a producer from before DLPack 1.0 takes no max_version
            capsule = array.__dlpack__(**wanted)
        if _is_valid(capsule, b"dltensor_versioned"):
            versioned = _Versioned.from_address(get_pointer(capsule, b"dltensor_versioned"))
            return capsule, versioned.tensor, bool(versioned.flags & _READ_ONLY)
        return capsule, Tensor.from_address(get_pointer(capsule, b"dltensor")), False

    def current_stream(self, array: Any) -> int | None:
        kind, index = array.__dlpack_device__()
        if kind != CUDA:
            return None
        from cupy_router.compiler import require_cuda

        return int(require_cuda().cuda.get_current_stream(index).ptr)

    def describe(self, array: Any, stream: int, owners: list[object]) -> tuple[int, Hashable] | None:
        try:
            capsule, tensor, readonly = self.export(array, stream)
        except (BufferError, RuntimeError, TypeError, ValueError):
            return None
        owners += (capsule, array)
        kind = (tensor.code, tensor.bits, tensor.lanes, tensor.device_type, tensor.device_id, readonly)
        pointer = _address(tensor)
        return pointer, (kind, *_shape(tensor), pointer & 15)

    def view(self, name: str, array: Any, stream: int | None) -> View:
        try:
            capsule, tensor, readonly = self.export(array, stream)
        except (BufferError, RuntimeError, TypeError, ValueError) as error:
            raise ValueError(f"{name} ({type(array).__name__}) cannot be exported by DLPack: {error}") from error
        if tensor.device_type not in (CPU, CUDA):
            raise ValueError(f"{name} must lie in CPU or CUDA memory, got DLPack device type {tensor.device_type}")
        shape, strides = _shape(tensor)
        dtype = _dtype(tensor)
        device = ("cuda", int(tensor.device_id)) if tensor.device_type == CUDA else ("cpu", 0)
        host = None
        if device[0] == "cpu" and item_bits(dtype) == tensor.bits:
            host = _host(_address(tensor), shape, strides, dtype, (capsule, array))
        return View(name, _address(tensor), shape, strides, dtype, device, readonly, host)

    def allocator(self, outputs: Sequence[Output], like: Any) -> Allocator:
        from cupy_router.arrays import _cupy

        return _cupy.allocator(outputs, like.__dlpack_device__()[1])

    def on_stream(self, stream: int, like: Any) -> AbstractContextManager[Any]:
        from cupy_router.arrays import _cupy

        return _cupy.on_stream(stream, like.__dlpack_device__()[1])

    def deliver(self, array: Any, like: Any) -> Any:
        """Convert an array to the library of `like`, if that follows the array API standard."""
        namespace = getattr(like, "__array_namespace__", None)
        return array if namespace is None else namespace().from_dlpack(array)

    def from_host(self, values: np.ndarray[Any, Any], like: Any) -> Any:
        return self.deliver(values, like)


class _Memory(np.ndarray[Any, Any]):
    """CPU memory of another framework, with the capsule that keeps it alive."""

    capsule: object


def _host(
    pointer: int, shape: tuple[int, ...], strides: tuple[int, ...], name: str, owner: object
) -> np.ndarray[Any, Any] | None:
    try:
        dtype = dtype_of(name)
    except TypeError:  # NumPy has none of this name
        return None
    size = dtype.itemsize
    if 0 in shape:
        return np.empty(shape, dtype)
    ends = [(length - 1) * step for length, step in zip(shape, strides, strict=True)]
    first, last = sum(min(end, 0) for end in ends), sum(max(end, 0) for end in ends)
    memory = (ctypes.c_ubyte * ((last - first + 1) * size)).from_address(pointer + first * size)
    array = _Memory(shape, dtype, memoryview(memory), -first * size, tuple(step * size for step in strides))
    array.capsule = owner
    return np.asarray(array)  # a plain array, so that no result is of this class; its base keeps the memory


FRAMEWORK = DLPack()
