# SPDX-License-Identifier: Apache-2.0
"""Results that CuPy makes, without a GPU: arrays are made of memory that nobody reads."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

cupy = pytest.importorskip("cupy", reason="CuPy is not installed")


@pytest.mark.parametrize("others", [(), (((2,), "int32"),)], ids=["alone", "in a block"])
@pytest.mark.parametrize("dtype", ["float8_e5m2", "float8_e4m3fn", "bfloat16"])
def test_dtypes_of_which_cupy_makes_no_arrays(monkeypatch: pytest.MonkeyPatch, dtype: str, others: Any) -> None:
    from cupy_router.arrays import _cupy
    from cupy_router.arrays._numpy import dtype_of

    memory = cupy.cuda.MemoryPointer(cupy.cuda.UnownedMemory(4096, 1024, None, 0), 0)
    made, ndarray = [], cupy.ndarray

    def make(shape: Any, dtype: Any, pointer: Any = memory) -> Any:
        if np.dtype(dtype).itemsize == 1 and np.dtype(dtype).kind not in "biu":
            raise ValueError(f"Unsupported dtype {dtype}")  # as CuPy 14 raises on a GPU
        made.append(dtype)
        return ndarray(shape, dtype, pointer)

    monkeypatch.setattr(cupy, "ndarray", make)
    monkeypatch.setattr(cupy.cuda, "alloc", lambda num_bytes: memory)
    monkeypatch.setattr(cupy.cuda.runtime, "getDevice", lambda: 0)
    pointers: list[int] = []
    arrays = _cupy.allocator((((4, 6), dtype), *others), 0)(pointers)
    assert [array.dtype for array in arrays] == [dtype_of(name) for name in (dtype, *(name for _, name in others))]
    assert [array.shape for array in arrays] == [(4, 6), *(shape for shape, _ in others)]
    assert [array.data.ptr for array in arrays] == pointers == [4096, 4352][: len(arrays)]
    assert len(made) == len(arrays)
