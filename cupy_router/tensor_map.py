# SPDX-License-Identifier: Apache-2.0
"""Tensor maps: where a matrix of 16-bit elements lies in global memory, for the hardware that copies its tiles (TMA).

See kernels/device/tensor_map.cuh. Knows nothing of routing.
"""

from __future__ import annotations

import ctypes
import struct
from collections.abc import Callable
from typing import NamedTuple

from cupy_router.relaxed import driver

BYTES = 128
TILE_COLUMNS = 64
_UINT16, _SWIZZLE_128, _L2_256 = 1, 3, 3  # of CUtensorMapDataType, CUtensorMapSwizzle, CUtensorMapL2promotion


class Matrix(NamedTuple):
    """The shape of a matrix and of its tiles. `row_bytes` is the distance in bytes from one row to the next."""

    rows: int
    columns: int
    row_bytes: int
    tile_rows: int


Encode = Callable[[int, Matrix], bytes]  # of the address of the first element


def encode(address: int, matrix: Matrix) -> bytes:
    """Return the map for a GPU. The driver refuses an address or rows that are not at multiples of 16 bytes."""
    buffer = ctypes.create_string_buffer(BYTES + 63)
    begin = -ctypes.addressof(buffer) % 64
    status = driver().cuTensorMapEncodeTiled(
        ctypes.c_void_p(ctypes.addressof(buffer) + begin),
        _UINT16,
        2,
        ctypes.c_void_p(address),
        (ctypes.c_uint64 * 2)(matrix.columns, matrix.rows),
        (ctypes.c_uint64 * 1)(matrix.row_bytes),
        (ctypes.c_uint32 * 2)(TILE_COLUMNS, matrix.tile_rows),
        (ctypes.c_uint32 * 2)(1, 1),
        0,
        _SWIZZLE_128,
        _L2_256,
        0,
    )
    if status != 0:
        raise ValueError(f"the driver makes no tensor map at {address:#x} for {matrix}: error {status}")
    return buffer.raw[begin : begin + BYTES]


def for_cpu(address: int, matrix: Matrix) -> bytes:
    """Return the map for kernels that are executed on the CPU."""
    values = address, matrix.columns, matrix.rows, matrix.row_bytes, matrix.tile_rows
    return struct.pack("=5Q", *values).ljust(BYTES, b"\0")


class Maps:
    """The maps of matrices that differ only in their address; those used last are kept."""

    _MOST = 64

    def __init__(self, encode: Encode, matrix: Matrix) -> None:
        self._encode, self._matrix = encode, matrix
        self._kept: dict[int, bytes] = {}

    def __call__(self, address: int) -> bytes:
        found = self._kept.get(address)
        if found is None:
            if len(self._kept) >= self._MOST:
                self._kept.clear()
            found = self._kept[address] = self._encode(address, self._matrix)
        return found
