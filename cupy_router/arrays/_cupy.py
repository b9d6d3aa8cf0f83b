# SPDX-License-Identifier: Apache-2.0
"""CuPy arrays: always CUDA memory."""

from __future__ import annotations

import math
from collections.abc import Hashable, Sequence
from contextlib import AbstractContextManager
from typing import Any

import cupy
import numpy as np

from cupy_router.arrays import MAX_SHARED_BYTES, Allocator, Framework, Output, View, places_in_block
from cupy_router.arrays._numpy import NAMES, dtype_of, is_float8

ARRAY_TYPES = (cupy.ndarray,)


def why_not(kind: type) -> str | None:
    """Return what an array has to be in place of one of this class; None if the class is accepted."""
    if any(base.__module__.startswith("cupyx.distributed") for base in kind.__mro__):
        return f"an array on one device, got a {kind.__name__}, whose own memory is empty: pass the array of one device"
    return None


class RawStream:
    """A stream handle with the protocol that `cupy.cuda.Stream.from_external` takes."""

    def __init__(self, handle: int) -> None:
        self.handle = handle

    def __cuda_stream__(self) -> tuple[int, int]:
        return 0, self.handle


class CuPy(Framework):
    name = "cupy"

    def current_stream(self, array: Any) -> int | None:
        return int(cupy.cuda.get_current_stream(array.data.device_id).ptr)

    def describe(self, array: Any, stream: int, owners: list[object]) -> tuple[int, Hashable]:
        data = array.data
        pointer = data.ptr
        return pointer, (array.dtype, array.shape, array.strides, data.device_id, pointer & 15)

    def view(self, name: str, array: Any, stream: int | None) -> View:
        if any(step % array.itemsize for step in array.strides):
            raise ValueError(f"{name} has strides of {array.strides} bytes, which are no multiples of its item size")
        return View(
            name=name,
            pointer=array.data.ptr,
            shape=array.shape,
            strides=tuple(step // array.itemsize for step in array.strides),
            dtype=NAMES.get(array.dtype, str(array.dtype)),
            device=("cuda", array.data.device_id),
            readonly=False,
            host=None,
        )

    def stack(self, arrays: Sequence[Any]) -> Any:
        return cupy.stack(arrays)

    def allocator(self, outputs: Sequence[Output], like: Any) -> Allocator:
        return allocator(outputs, like.data.device_id)

    def on_stream(self, stream: int, like: Any) -> AbstractContextManager[Any]:
        return on_stream(stream, like.data.device_id)


def allocator(outputs: Sequence[Output], index: int) -> Allocator:
    """Return an allocator that takes memory from CuPy's pool on a device, for CuPy's current stream."""
    get_device, alloc, ndarray = cupy.cuda.runtime.getDevice, cupy.cuda.alloc, cupy.ndarray
    layouts = [(shape, dtype_of(dtype)) for shape, dtype in outputs]
    wanted = [dtype for _, dtype in layouts]
    # CuPy 14 views memory as float8, but refuses to make an array of it.
    layouts = [(shape, np.dtype(np.uint8) if is_float8(dtype) else dtype) for shape, dtype in layouts]
    offsets, total = places_in_block([math.prod(shape) * dtype.itemsize for shape, dtype in layouts])
    places = [(*layout, offset) for layout, offset in zip(layouts, offsets, strict=True)]

    def in_one_block(pointers: list[int]) -> tuple[Any, ...]:
        memory = alloc(total)
        address = memory.ptr
        arrays = []
        for shape, dtype, offset in places:
            pointers.append(address + offset)
            arrays.append(ndarray(shape, dtype, memory + offset if offset else memory))
        return tuple(arrays)

    def in_own_blocks(pointers: list[int]) -> tuple[Any, ...]:
        arrays = tuple(ndarray(shape, dtype) for shape, dtype in layouts)
        pointers.extend(array.data.ptr for array in arrays)
        return arrays

    make = in_one_block if len(outputs) > 1 and total <= MAX_SHARED_BYTES else in_own_blocks
    if any(map(is_float8, wanted)):
        of_bytes = make

        def make(pointers: list[int]) -> tuple[Any, ...]:
            return tuple(array.view(dtype) for array, dtype in zip(of_bytes(pointers), wanted, strict=True))

    def allocate(pointers: list[int]) -> tuple[Any, ...]:
        if get_device() == index:
            return make(pointers)
        with cupy.cuda.Device(index):
            return make(pointers)

    return allocate


class on_stream(AbstractContextManager[None]):
    """Context that sets CuPy's device and current stream."""

    def __init__(self, stream: int, index: int) -> None:
        self.device = cupy.cuda.Device(index)
        self.handle = stream

    def __enter__(self) -> None:
        self.device.__enter__()
        self.stream = cupy.cuda.Stream.from_external(RawStream(self.handle))
        self.stream.__enter__()

    def __exit__(self, *error: Any) -> None:
        self.stream.__exit__(*error)
        self.device.__exit__(*error)


FRAMEWORK = CuPy()
