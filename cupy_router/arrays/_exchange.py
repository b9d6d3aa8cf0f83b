# SPDX-License-Identifier: Apache-2.0
"""Types with DLPack's C exchange API, which gives a tensor view and the current stream in two C calls.

The API is a struct of function pointers in a capsule on the type (dlpack.h 1.2 and later, `DLPackExchangeAPI`), called
through ctypes. It does not synchronise, so work is enqueued on the stream that the producer reports as current.
"""

from __future__ import annotations

import ctypes
from typing import Any

from cupy_router.arrays import _dlpack


class _API(ctypes.Structure):
    _fields_ = [
        ("major", ctypes.c_uint32),
        ("minor", ctypes.c_uint32),
        ("previous", ctypes.c_void_p),
        ("allocate", ctypes.c_void_p),
        ("from_object", ctypes.c_void_p),
        ("to_object", ctypes.c_void_p),
        ("tensor_from_object", ctypes.PYFUNCTYPE(ctypes.c_int, ctypes.py_object, ctypes.POINTER(_dlpack.Tensor))),
        (
            "current_stream",
            ctypes.PYFUNCTYPE(ctypes.c_int, ctypes.c_int, ctypes.c_int, ctypes.POINTER(ctypes.c_void_p)),
        ),
    ]


class Exchange(_dlpack.DLPack):
    """Exchange API of one type, for reading arrays and the stream. All else is as for other DLPack types."""

    def __init__(self, kind: type) -> None:
        capsule = kind.__dlpack_c_exchange_api__  # type: ignore[attr-defined]  # looked for by the caller
        self.api = _API.from_address(_dlpack.get_pointer(capsule, b"dlpack_exchange_api"))

    def current_stream(self, array: Any) -> int | None:
        tensor = _dlpack.Tensor()
        self.api.tensor_from_object(array, ctypes.byref(tensor))
        if tensor.device_type != _dlpack.CUDA:
            return None
        stream = ctypes.c_void_p()
        self.api.current_stream(tensor.device_type, tensor.device_id, ctypes.byref(stream))
        return stream.value or 0

    def export(self, array: Any, stream: int | None) -> tuple[object, _dlpack.Tensor, bool]:
        tensor = _dlpack.Tensor()
        self.api.tensor_from_object(array, ctypes.byref(tensor))
        return array, tensor, False
