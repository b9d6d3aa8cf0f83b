# SPDX-License-Identifier: Apache-2.0
"""Read arrays of any framework, make results in the caller's framework, and find its current stream.

A :class:`Framework` is looked up by the type of an array. CUDA arrays of known frameworks are read through plain
attributes, which is fastest. Everything else is read through DLPack. This package only imports frameworks that the
caller has already imported.
"""

from __future__ import annotations

import importlib
import re
import sys
import threading
from collections import deque
from collections.abc import Callable, Hashable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any

import numpy as np

from cupy_router import _hooks

ITEM_SIZES = {
    "float32": 4, "float16": 2, "bfloat16": 2, "uint8": 1, "int16": 2, "uint16": 2, "int32": 4, "int64": 8,
}  # fmt: skip


def item_bits(dtype: str) -> int:
    """Return the number of bits of a dtype of numbers, by its name; 0 if it is no such name."""
    found = _NUMBERS.fullmatch(dtype)
    return 0 if found is None else int(found[1] or 8)


_NUMBERS = re.compile(r"bool|(?:u?int|b?float|complex)(\d+)(?:_e\d+m\d+\w*)?")

Output = tuple[tuple[int, ...], str]  # shape and dtype of a result
Allocator = Callable[[list[int]], tuple[Any, ...]]  # allocates the results of a call, appends their addresses

NO_DEVICE = ("jax", 0)  # the device of a tracer, which has a shape and a dtype but no memory


@dataclass(frozen=True)
class View:
    """One array argument as ops see it. Strides count elements. `host` is CPU memory as a NumPy array."""

    name: str
    pointer: int
    shape: tuple[int, ...]
    strides: tuple[int, ...]
    dtype: str
    device: tuple[str, int]
    readonly: bool
    host: np.ndarray[Any, Any] | None

    @property
    def row_stride(self) -> int:
        """Elements from one row to the next; the number of columns where there is at most one row."""
        return self.strides[0] if self.shape[0] > 1 else self.shape[-1]

    def __str__(self) -> str:
        kind, index = self.device
        return f"{self.dtype} {list(self.shape)} on {kind}" + (f":{index}" if kind == "cuda" else "")


def dense_strides(shape: Sequence[int]) -> tuple[int, ...]:
    """Return the strides of dense memory, in elements."""
    strides = [1] * len(shape)
    for axis in range(len(shape) - 2, -1, -1):
        strides[axis] = strides[axis + 1] * shape[axis + 1]
    return tuple(strides)


class Framework:
    """Reads and makes arrays of one framework. `stream` is a CUDA stream as an int, None for CPU memory."""

    name: str
    delivers = False  # True: results need `deliver` before they are returned to the caller
    traced = False  # True: arrays are tracers, which only have `outline`

    def current_stream(self, array: Any) -> int | None:
        """Return the stream that the framework currently uses on the device of the array."""
        raise NotImplementedError

    def describe(self, array: Any, stream: int, owners: list[object]) -> tuple[int, Hashable] | None:
        """Return the address, and everything else that a cached call depends on. On the hot path: about 1 us.

        None if the array has no plain memory; then `view` raises the reason. Objects that have to live until the kernel
        has finished, and that stream order does not keep alive, are appended to `owners`.
        """
        raise NotImplementedError

    def describe_all(
        self, arrays: Sequence[Any], stream: int, owners: list[object], pointers: list[int], facts: list[Hashable]
    ) -> bool:
        """Append what :meth:`describe` returns for each array of a call; most, but not all, are of this framework.

        None has the address 0, an int is a fact without one. False if an array has no plain memory, or a type that has
        not been seen yet.
        """
        for array in arrays:
            kind = FRAMEWORKS.get(type(array))
            if kind is not None:
                described = kind.describe(array, stream, owners)
                if described is None:
                    return False
                pointers.append(described[0])
                facts.append(described[1])
            elif array is None:
                pointers.append(0)
                facts.append(None)
            elif isinstance(array, (int, np.integer)) and not isinstance(array, bool):
                facts.append(int(array))
            else:
                return False
        return True

    def view(self, name: str, array: Any, stream: int | None) -> View:
        """Return all properties of the array, for checks and for the reference."""
        raise NotImplementedError

    def outline(self, name: str, array: Any) -> View:
        """Return a view without memory, on `NO_DEVICE`, for checks while a graph is traced."""
        raise NotImplementedError

    def plain(self, name: str, array: Any) -> Any:
        """Return the array itself, or the one that it holds if it only stands for an array."""
        return array

    def stack(self, arrays: Sequence[Any]) -> Any:
        """Return arrays of one shape as the rows of one array."""
        raise TypeError(f"arrays of {type(arrays[0]).__name__} cannot be stacked: pass them as one array")

    def allocator(self, outputs: Sequence[Output], like: Any) -> Allocator:
        """Return a function that allocates uninitialised arrays on the device of `like`. They may share memory."""
        raise NotImplementedError

    def allocator_apart(self, outputs: Sequence[Output], like: Any) -> Allocator:
        """Return an allocator for graphs, which take arrays that share memory for aliases."""
        return self.allocator(outputs, like)

    def on_stream(self, stream: int, like: Any) -> AbstractContextManager[Any]:
        """Return a context in which allocators allocate for `stream`, and `deliver` orders other streams after it."""
        raise NotImplementedError

    def deliver(self, array: Any, like: Any) -> Any:
        """Return an array of :meth:`allocator`, whose kernel is enqueued, in the form that the caller gets."""
        return array

    def write_guard(self, names: Mapping[int, str], arrays: Sequence[Any]) -> Callable[[Sequence[Any]], None] | None:
        """Return what calls do before they write into arrays of this framework, at these places among all their arrays.

        Later calls have other arrays with the same properties.

        It notifies the framework, or raises ValueError with the name of an array that must not be written. None:
        nothing is to do. On the hot path of calls with `out`.
        """
        return None

    def from_host(self, values: np.ndarray[Any, Any], like: Any) -> Any:
        """Return a NumPy result of the reference as an array of this framework in CPU memory."""
        raise NotImplementedError


FRAMEWORKS: dict[type, Framework] = {}

MAX_SHARED_BYTES = 1 << 20  # results of a call up to this size share one block of memory, which saves host time
_ALIGNMENT = 256


def places_in_block(sizes: Sequence[int]) -> tuple[list[int], int]:
    """Return the offset of each array in one block of memory, from their bytes, and the size of the block."""
    offsets, total = [], 0
    for num_bytes in sizes:
        offsets.append(total)
        total += -(-num_bytes // _ALIGNMENT) * _ALIGNMENT
    return offsets, total


# Module of each framework, by the top-level package that defines the type of the array or one of its bases.
_MODULES = {"torch": "_torch", "cupy": "_cupy", "jax": "_jax", "jaxlib": "_jax", "numpy": "_numpy"}


def framework_of(name: str, array: Any) -> Framework:
    """Return the framework of an array argument; TypeError if it is no array."""
    kind = type(array)
    found = FRAMEWORKS.get(kind)
    if found is None:
        found = FRAMEWORKS[kind] = _find(name, kind)
    return found


def view_of(name: str, array: Any) -> View:
    """Return the view of an array argument on its framework's current stream, the outline of a tracer."""
    framework = framework_of(name, array)
    if framework.traced:
        return framework.outline(name, array)
    return framework.view(name, array, framework.current_stream(array))


def _find(name: str, kind: type) -> Framework:
    for base in kind.__mro__:
        stem = _MODULES.get(base.__module__.partition(".")[0])
        if stem is not None and base is not object:
            module = importlib.import_module(f"cupy_router.arrays.{stem}")
            # Tracers first: before JAX 0.9 they are arrays as well, and wrappers are tensors.
            for types, attribute in ((getattr(module, "TRACERS", ()), "TRACED"), (module.ARRAY_TYPES, "FRAMEWORK")):
                if issubclass(kind, types):
                    reason = getattr(module, "why_not", lambda kind: None)(kind)
                    if reason is not None:
                        raise TypeError(f"{name} must be {reason}")
                    return _announced(getattr(module, attribute))
    if hasattr(kind, "__jax_array__") and "jax" in sys.modules:
        from cupy_router.arrays import _jax

        return _announced(_jax.HELD)
    if hasattr(kind, "__dlpack__") and hasattr(kind, "__dlpack_device__"):
        from cupy_router.arrays import _dlpack, _exchange

        return _exchange.Exchange(kind) if hasattr(kind, "__dlpack_c_exchange_api__") else _dlpack.FRAMEWORK
    raise TypeError(
        f"{name} must be an array of CuPy, PyTorch, JAX, NumPy or another DLPack framework, got {kind.__name__}"
    )


def _announced(framework: Framework) -> Framework:
    for callback in _hooks.on_first_array:
        callback(framework.name)
    return framework


def stream_handle(stream: Any) -> int:
    """Return the int handle of a CUDA stream: given as an int, or as any object with `__cuda_stream__`."""
    if isinstance(stream, (int, np.integer)) and not isinstance(stream, bool):
        if stream < 0:
            raise ValueError(f"stream must be a handle >= 0, got {stream}")
        return int(stream)
    protocol = getattr(stream, "__cuda_stream__", None)
    if protocol is None:
        raise TypeError(f"stream must be an int handle or an object with __cuda_stream__, got {type(stream).__name__}")
    return int(protocol()[1])


in_flight: deque[tuple[Any, list[object]]] = deque()
_in_flight_lock = threading.Lock()


def keep_until_done(owners: list[object], stream: int, device: int) -> None:
    """Keep the inputs of an enqueued kernel alive until it has finished, and release those of finished kernels.

    This is for memory that its framework could reuse too early, because the framework does not know the kernel's
    stream. An event marks the end of the kernel. Later calls query it and never wait for it. Under graph capture
    nothing is kept or released: whoever captures owns the graph's memory, and events cannot be queried.
    """
    import cupy

    if cupy.cuda.runtime.streamIsCapturing(stream):
        return
    with _in_flight_lock:
        while in_flight and in_flight[0][0].done:
            in_flight.popleft()
        if owners:
            with cupy.cuda.Device(device):
                event = cupy.cuda.Event(disable_timing=True)
                cupy.cuda.runtime.eventRecord(event.ptr, stream)
            in_flight.append((event, owners))
