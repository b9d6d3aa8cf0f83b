# SPDX-License-Identifier: Apache-2.0
"""JAX arrays: immutable, dense, and computed on XLA's streams.

`__dlpack__(stream=ours)` makes our stream wait for the producer. The capsule that it returns keeps the buffer from
being reused, so it lives until our kernel has finished. Results are CuPy memory. They are passed to JAX by DLPack,
which orders XLA's stream after ours.

jax.jit, jax.vmap and jax.grad pass tracers in place of arrays; no op can run on them. In a call with tracers, arrays
may also be on several devices. Holders are objects with `__jax_array__`, such as the parameters of Flax, which return
an array or a tracer. The interceptor of JAX takes calls with tracers and with holders.
"""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from contextlib import AbstractContextManager
from typing import Any

import jax
import numpy as np

from cupy_router.arrays import NO_DEVICE, Allocator, Framework, Output, View, dense_strides, item_bits
from cupy_router.arrays._dlpack import CUDA, consumer_stream
from cupy_router.arrays._numpy import NAMES, is_float8

ARRAY_TYPES = (jax.Array,)
TRACERS = (jax.core.Tracer,)


class JAX(Framework):
    name = "jax"
    delivers = True

    def current_stream(self, array: Any) -> int | None:
        try:
            kind, index = _device("the first array", array)
        except Exception:  # `view` refuses it by name
            return None
        if kind != "cuda":
            return None
        from cupy_router.compiler import require_cuda

        return int(require_cuda().cuda.get_current_stream(index).ptr)

    def describe(self, array: Any, stream: int, owners: list[object]) -> tuple[int, Hashable] | None:
        try:
            device, exported = _device("an array", array), array
            if device[0] == "cuda":
                if is_float8(array.dtype):
                    exported = jax.lax.bitcast_convert_type(array, np.uint8)
                owners.append(exported.__dlpack__(stream=consumer_stream(stream)))
            pointer = _pointer(exported, device)
        except Exception:
            bits = item_bits(str(array.dtype))
            if not array.is_deleted() and len(array.devices()) == 1 and bits and not bits % 8:
                raise
            return None  # it is refused by name
        return pointer, ("jax", array.dtype, array.shape, device, pointer & 15)

    def view(self, name: str, array: Any, stream: int | None) -> View:
        _check_values(name, array)
        dtype = NAMES.get(array.dtype) or dtype_name(name, array)
        device = _device(name, array)
        return View(
            name=name,
            pointer=_pointer(array, device),
            shape=array.shape,
            strides=dense_strides(array.shape),
            dtype=dtype,
            device=device,
            readonly=True,
            host=np.asarray(array) if device[0] == "cpu" else None,
        )

    def outline(self, name: str, array: Any) -> View:
        _check_values(name, array)
        return outline(name, array)

    def allocator(self, outputs: Sequence[Output], like: Any) -> Allocator:
        from cupy_router.arrays import _cupy

        for _, dtype in outputs:
            _check_width(dtype)
        return _cupy.allocator(outputs, _device("the first array", like)[1])

    def on_stream(self, stream: int, like: Any) -> AbstractContextManager[Any]:
        from cupy_router.arrays import _cupy

        return _cupy.on_stream(stream, _device("the first array", like)[1])

    def deliver(self, array: Any, like: Any) -> Any:
        with array.device:
            if is_float8(array.dtype):
                return jax.lax.bitcast_convert_type(jax.dlpack.from_dlpack(array.view(np.uint8)), array.dtype)
            return jax.dlpack.from_dlpack(array)

    def stack(self, arrays: Sequence[Any]) -> Any:
        return jax.numpy.stack(arrays)

    def from_host(self, values: np.ndarray[Any, Any], like: Any) -> Any:
        """Return a JAX array, committed to the device if `like` is, as JAX does for its results."""
        _check_width(str(values.dtype))
        (device,) = like.devices()
        if getattr(like, "committed", True):
            return jax.device_put(values, device)
        with jax.default_device(device):
            return jax.device_put(values)


class Tracers(JAX):
    traced = True

    def current_stream(self, array: Any) -> int | None:
        return None

    def describe(self, array: Any, stream: int, owners: list[object]) -> tuple[int, Hashable] | None:
        return None

    def view(self, name: str, array: Any, stream: int | None) -> View:
        raise ValueError(f"{name} must be writable, got a read-only {self.outline(name, array)}")

    def outline(self, name: str, array: Any) -> View:
        return outline(name, array)


class Holders(Tracers):
    def outline(self, name: str, array: Any) -> View:
        array = held(name, array)
        return outline(name, array) if isinstance(array, TRACERS) else FRAMEWORK.view(name, array, None)

    def plain(self, name: str, array: Any) -> Any:
        return held(name, array)


def outline(name: str, array: Any) -> View:
    """Return a view without memory of an array or a tracer."""
    dtype = NAMES.get(array.dtype) or dtype_name(name, array)
    return View(name, 0, tuple(array.shape), dense_strides(array.shape), dtype, NO_DEVICE, True, None)


def held(name: str, array: Any) -> Any:
    """Return the array or tracer that a holder returns."""
    method = getattr(array, "__jax_array__", None)
    if method is None:  # a tracer of something else than an array, such as a Ref
        raise TypeError(f"{name} must be an array, got {jax.typeof(array)}: pass its value")
    value = method()
    if isinstance(value, (jax.Array, *TRACERS)):
        return value
    host = np.asarray(value)
    if host.dtype.kind not in "biufcV":  # V: dtypes of ml_dtypes
        raise TypeError(f"{name} must hold an array of numbers, got {type(value).__name__}")
    return constant(host)


def constant(host: np.ndarray[Any, Any]) -> Any:
    """Return an array in CPU memory as a JAX array with its current values."""
    if host.dtype == np.int64 and jax.dtypes.canonicalize_dtype(np.int64) != np.int64:
        # JAX would wrap ids that do not fit int32 around to ids that may be valid. -1 is invalid, as they are.
        host = np.where(host == host.astype(np.int32), host, -1).astype(np.int32)
    return jax.device_put(host)


def dtype_name(name: str, array: Any) -> str:
    if jax.dtypes.issubdtype(array.dtype, jax.dtypes.extended):
        raise TypeError(f"{name} must be an array of numbers, got {array.dtype} {list(array.shape)}")
    return str(array.dtype)


def _check_values(name: str, array: Any) -> None:
    """Refuse arrays whose memory is gone."""
    if array.is_deleted():
        raise ValueError(f"{name} must have values, got a deleted or donated {outline(name, array)}")


def _check_width(dtype: str) -> None:
    """Refuse results of 64 bits where JAX would silently truncate them to 32."""
    if dtype in _WIDE and not jax.config.jax_enable_x64:
        raise ValueError(f"{dtype} results need JAX's option jax_enable_x64, which is off")


_WIDE = ("int64", "uint64", "float64", "complex128")


def _device(name: str, array: Any) -> tuple[str, int]:
    devices = array.devices()
    if len(devices) != 1:
        raise ValueError(f"{name} must lie on one device outside of jax.jit, got a JAX array on {len(devices)} devices")
    kind, index = array.__dlpack_device__()
    return ("cuda", index) if kind == CUDA else (_CPU(next(iter(devices))), 0)


class _CPU(str):
    """The device kind "cpu" where JAX has several CPU devices. It is equal to "cpu" of other frameworks, whose memory
    all of them can use, but not to other CPU devices of JAX."""

    number: int

    def __new__(cls, device: Any) -> _CPU:
        self = super().__new__(cls, "cpu")
        self.number = device.local_hardware_id or 0
        return self

    def __eq__(self, other: object) -> bool:
        return super().__eq__(other) and getattr(other, "number", self.number) == self.number

    __hash__ = str.__hash__

    def __format__(self, spec: str) -> str:
        return f"cpu:{self.number}" if self.number else "cpu"


def _pointer(array: Any, device: tuple[str, int]) -> int:
    """Return the address, after waiting for CPU memory.

    JAX holds the GIL while it waits for a result. On a CPU that result may depend on a Python function that needs the
    GIL, such as a pure_callback or an op inside jax.jit. `block_until_ready` releases the GIL.
    """
    if device[0] == "cpu":
        array.block_until_ready()
    return int(array.unsafe_buffer_pointer())


FRAMEWORK, TRACED, HELD = JAX(), Tracers(), Holders()
