# SPDX-License-Identifier: Apache-2.0
"""Tensor maps hold the sizes given, and the driver refuses what the hardware cannot copy."""

from __future__ import annotations

import ctypes
from typing import Any

import pytest

from cupy_router import tensor_map
from cupy_router.tensor_map import Maps, Matrix

MATRIX = Matrix(rows=100, columns=4096, row_bytes=8448, tile_rows=72)


class Driver:
    """A driver that reads its arguments, writes bytes that say so, and returns a status."""

    def __init__(self, status: int) -> None:
        self.status = status
        self.told: tuple[Any, ...] = ()

    def cuTensorMapEncodeTiled(self, target: Any, *told: Any) -> int:  # noqa: N802  # the driver's name
        assert target.value % 64 == 0, "the driver refuses other addresses"
        ctypes.memset(target.value, 0xA5, tensor_map.BYTES)
        self.told = tuple(list(value) if isinstance(value, ctypes.Array) else value for value in told)
        return self.status


def test_the_driver_is_told_sizes_and_strides(monkeypatch: pytest.MonkeyPatch) -> None:
    driver = Driver(0)
    monkeypatch.setattr(tensor_map, "driver", lambda: driver)
    assert tensor_map.encode(0x7000, MATRIX) == b"\xa5" * 128
    kind, rank, address, sizes, strides, tile, steps, *_ = driver.told
    assert (kind, rank, address.value) == (1, 2, 0x7000)  # 16-bit elements
    assert (sizes, strides, tile, steps) == ([4096, 100], [8448], [64, 72], [1, 1])


def test_a_refusal_of_the_driver_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tensor_map, "driver", lambda: Driver(1))
    with pytest.raises(ValueError, match=r"^the driver makes no tensor map at 0x7000 for Matrix\(rows=100.*: error 1$"):
        tensor_map.encode(0x7000, MATRIX)


def test_maps_are_kept_by_address_and_are_not_too_many() -> None:
    made: list[int] = []

    def encode(address: int, matrix: Matrix) -> bytes:
        assert matrix == MATRIX
        made.append(address)
        return address.to_bytes(128, "little")

    maps = Maps(encode, MATRIX)
    for _ in range(3):
        assert [int.from_bytes(maps(address), "little") for address in (16, 32)] == [16, 32]
    assert made == [16, 32]
    for address in range(0, 16 * 1000, 16):
        assert int.from_bytes(maps(address), "little") == address
    assert len(maps._kept) <= Maps._MOST
