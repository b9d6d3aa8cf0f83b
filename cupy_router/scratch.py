# SPDX-License-Identifier: Apache-2.0
"""Scratch memory for kernels: one buffer per device, stream and use. Knows nothing of routing.

Calls on one stream run one after the other, so they share a buffer. A captured graph can be replayed on any stream, so
each capture gets separate buffers. A new buffer is zeroed. No buffer is ever freed, because a graph may still use it.
"""

from __future__ import annotations

import ctypes
import threading
from typing import Any

import numpy as np

from cupy_router.compiler import require_cuda
from cupy_router.relaxed import driver
from cupy_router.relaxed import relaxed as relaxed

_SMALLEST = 64 * 1024
_UNCAPTURED = (0, 1)  # handles of the legacy default stream, which cannot be captured
_CAPTURING = 1  # CU_STREAM_CAPTURE_STATUS_ACTIVE

_Key = tuple[tuple[str, int], int, int, str]
_buffers: dict[_Key, tuple[int, int]] = {}  # -> address and size
_owners: list[Any] = []
_lock = threading.Lock()


def buffer(device: tuple[str, int], stream: int, use: str, num_bytes: int) -> int:
    """Return the address of at least `num_bytes` for this `use` on this stream, zero before the first use.

    A larger request gets a new zeroed buffer. Work that is enqueued or captured keeps the old one.
    """
    key = (device, stream, capture_of(stream) if device[0] == "cuda" else 0, use)
    found = _buffers.get(key)
    if found is None or found[1] < num_bytes:
        found = _grow(key, num_bytes)
    return found[0]


def capture_of(stream: int) -> int:
    """Return the id of the graph capture that a CUDA stream takes part in, 0 if none."""
    if stream in _UNCAPTURED or not require_cuda().cuda.runtime.streamIsCapturing(stream):
        return 0
    status, number = ctypes.c_int(), ctypes.c_uint64()
    error = driver().cuStreamGetCaptureInfo_v2(
        ctypes.c_void_p(stream), ctypes.byref(status), ctypes.byref(number), None, None, None
    )
    if error or status.value != _CAPTURING:
        raise RuntimeError(f"stream {stream:#x} is in a graph capture that was invalidated (driver error {error})")
    return number.value


def _grow(key: _Key, num_bytes: int) -> tuple[int, int]:
    (kind, index), _, _, use = key
    size = max(_SMALLEST, 1 << (num_bytes - 1).bit_length())
    with _lock:
        found = _buffers.get(key)
        if found is None or found[1] < num_bytes:
            address = _allocate_cuda(index, size, use) if kind == "cuda" else _allocate_host(size)
            found = _buffers[key] = (address, size)
    return found


def _allocate_host(size: int) -> int:
    array = np.zeros(size + 256, np.uint8)
    _owners.append(array)
    address: int = array.ctypes.data
    return -(-address // 256) * 256


def _allocate_cuda(index: int, size: int, use: str) -> int:
    """Allocate without a pool, since pools belong to frameworks and their graphs. The host waits for the memset."""
    cupy = require_cuda()
    runtime = cupy.cuda.runtime
    with cupy.cuda.Device(index), relaxed():
        try:
            address = int(runtime.malloc(size))
        except runtime.CUDARuntimeError as error:
            raise RuntimeError(f"no {size} bytes of memory for {use} are free on cuda:{index}: {error}") from error
        stream = runtime.streamCreateWithFlags(runtime.streamNonBlocking)
        try:
            runtime.memsetAsync(address, 0, size, stream)
            runtime.streamSynchronize(stream)
        finally:
            runtime.streamDestroy(stream)
    return address
