# SPDX-License-Identifier: Apache-2.0
"""Backends of the op tests: the NumPy reference, kernels executed by the CPU, kernels on a GPU."""

from __future__ import annotations

from typing import Any

import ml_dtypes
import numpy as np
import pytest

from cupy_router import compiler
from cupy_router.simt import device

DTYPES: dict[str, Any] = {
    "float32": np.float32,
    "float16": np.float16,
    "bfloat16": ml_dtypes.bfloat16,
    "int32": np.int32,
    "int64": np.int64,
    "uint8": np.uint8,
    "int16": np.int16,
    "uint16": np.uint16,
}


class Backend:
    """NumPy arrays: cupy_router runs its reference on them, which is compared with tests/oracle.py."""

    name = "reference"
    runs_kernels = False
    xp: Any = np

    def close(self) -> None:
        """Undo what the constructor changed outside this object."""

    def upload(self, host: np.ndarray) -> Any:
        return host.copy()

    def numpy(self, array: Any) -> np.ndarray:
        return np.asarray(array)

    def rows(self, n: int, columns: int, exactly: bool = False) -> int:
        """Return how many of n rows this backend runs, or skip: the one place where cases shrink for a slow backend."""
        return n

    def array(self, host: np.ndarray, row_pad: int = 0, offset: int = 0) -> Any:
        """Return the same values on this backend, row_pad elements between rows, offset elements before them.

        The elements between, before and after the rows are poison: they win every selection and spoil every sum.
        """
        if host.ndim != 2:
            flat = _poison(host.dtype, offset + host.size + 8)
            flat[offset : offset + host.size] = host.reshape(-1)
            return self.upload(flat)[offset : offset + host.size].reshape(host.shape)
        rows, columns = host.shape
        size = rows * (columns + row_pad)
        flat = _poison(host.dtype, offset + size + 8)
        flat[offset : offset + size].reshape(rows, columns + row_pad)[:, :columns] = host
        return self.upload(flat)[offset : offset + size].reshape(rows, columns + row_pad)[:, :columns]


class SimtBackend(Backend):
    """NumPy arrays again, but cupy_router executes the kernels on them, one CPU fiber per CUDA thread."""

    name = "simt"
    runs_kernels = True
    max_rows, max_elements, max_columns = 1100, 300_000, 40_000

    def __init__(self) -> None:
        reason = device.why_not()
        if reason is not None:
            pytest.skip(reason)
        compiler.BACKENDS["cpu"] = device.SimtBackend()

    def close(self) -> None:
        del compiler.BACKENDS["cpu"]

    def rows(self, n: int, columns: int, exactly: bool = False) -> int:
        most = min(self.max_rows, max(1, self.max_elements // max(columns, 1)))
        if columns > self.max_columns or (exactly and n > most):
            pytest.skip(f"a CPU-executed kernel takes too long for {n} rows of {columns}")
        return min(n, most)


class GpuBackend(Backend):
    """CuPy arrays; bfloat16 by ml_dtypes, which CuPy 14 supports."""

    name = "gpu"
    runs_kernels = True

    def __init__(self) -> None:
        self.xp = pytest.importorskip("cupy", reason="CuPy is not installed")
        if not self.xp.cuda.is_available():
            pytest.skip("no CUDA device")

    def upload(self, host: np.ndarray) -> Any:
        return (
            self.xp.asarray(host.view(np.uint8)).view(host.dtype)
            if host.size
            else self.xp.empty(host.shape, host.dtype)
        )

    def numpy(self, array: Any) -> np.ndarray:
        dtype = array.dtype
        if array.size == 0:
            return np.empty(array.shape, dtype)
        if dtype.itemsize == 1:  # such as float8, which CuPy's kernels do not know
            array = array.view(np.uint8)
        if not array.flags.c_contiguous:
            array = self.xp.ascontiguousarray(array)
        words = self.xp.ascontiguousarray(array).reshape(-1).view(np.uint8)  # CuPy's copies know no bfloat16
        return np.asarray(self.xp.asnumpy(words)).view(dtype).reshape(array.shape)


BACKENDS = {"reference": Backend, "simt": SimtBackend, "gpu": GpuBackend}


def _poison(dtype: np.dtype, size: int) -> np.ndarray:
    value = np.inf if dtype.kind in "fcV" else dtype.kind == "b" or min(2**31 - 1, np.iinfo(dtype).max)
    return np.full(size, value, dtype)
