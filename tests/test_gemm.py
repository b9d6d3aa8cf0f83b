# SPDX-License-Identifier: Apache-2.0
"""The gate GEMM: NumPy's, and the arguments of cuBLAS by a fake that computes on CPU memory what BLAS defines."""

from __future__ import annotations

import ctypes
import threading
from typing import Any

import numpy as np
import pytest

from cupy_router import gemm, scratch
from cupy_router.gemm import Matrix
from cupy_router.tuning import DEFAULT
from tests import inputs
from tests.backends import DTYPES, Backend
from tests.test_dense_router import exact

TYPES = {0: "float32", 2: "float16", 14: "bfloat16"}  # cudaDataType_t
WORKSPACE = DEFAULT.table.gemm.workspace_bytes
SIZES = {"float32": 4, "float16": 2, "bfloat16": 2}


def columns(address: int, kind: int, rows: int, count: int, leading: int) -> np.ndarray:
    """A column-major matrix in memory."""
    assert leading >= rows, "cuBLAS refuses a leading dimension below the length of a column"
    size = SIZES[TYPES[kind]]
    memory = (ctypes.c_ubyte * (((count - 1) * leading + rows) * size)).from_address(address)
    return np.ndarray((rows, count), DTYPES[TYPES[kind]], memoryview(memory), strides=(size, leading * size))


class Blas:
    """The one form of cublasGemmEx that is used, and a record of the other calls."""

    def __init__(self) -> None:
        self.calls: list[tuple[Any, ...]] = []

    def cublasSetStream_v2(self, *arguments: int) -> int:  # noqa: N802
        self.calls.append(("stream", *arguments))
        return 0

    def cublasSetWorkspace_v2(self, *arguments: int) -> int:  # noqa: N802
        self.calls.append(("workspace", *arguments))
        return 0

    def cublasGetStatusString(self, status: int) -> bytes:  # noqa: N802
        return f"status {status}".encode()

    def cublasGemmEx(  # noqa: N802
        self, handle: int, trans_a: int, trans_b: int, m: int, n: int, k: int, alpha: int, a: int, a_type: int,
        lda: int, b: int, b_type: int, ldb: int, beta: int, c: int, c_type: int, ldc: int, compute: int, algorithm: int,
    ) -> int:  # fmt: skip
        assert (handle, trans_a, trans_b, algorithm) == (99, 1, 0, -1)
        assert a_type == b_type, "cuBLAS takes one type for both"
        assert compute == (69 if TYPES[a_type] == "float32" else 68)
        one, zero = (ctypes.c_float.from_address(address).value for address in (alpha, beta))
        assert (one, zero) == (1.0, 0.0)
        left, right = columns(a, a_type, k, m, lda).T, columns(b, b_type, k, n, ldb)
        columns(c, c_type, m, n, ldc)[...] = left.astype(np.float32) @ right.astype(np.float32)
        self.calls.append(("gemm", m, n, k))
        return 13 if m == 13 else 0


@pytest.fixture
def blas(monkeypatch: pytest.MonkeyPatch) -> Blas:
    """Replace the library and its handle."""
    found = Blas()
    context = object.__new__(gemm._Context)
    vars(context).update(library=found, handle=99, lock=threading.RLock(), _bound=(-1, -1))
    context._one, context._zero = ctypes.c_float(1.0), ctypes.c_float(0.0)
    context.one, context.zero = ctypes.addressof(context._one), ctypes.addressof(context._zero)
    monkeypatch.setattr(gemm, "_context", lambda index: context)
    return found


def layouts(x: np.ndarray) -> list[np.ndarray]:
    return [x, np.pad(x, ((0, 0), (0, 3)))[:, : x.shape[1]], x[::-1], np.broadcast_to(x[:1], x.shape)]


def multiply(product: Any, x: np.ndarray, weight: np.ndarray, stream: int = 0) -> np.ndarray:
    out = np.full((len(x), len(weight)), np.nan, np.float32)
    prepared = product.prepare(stream, weight.ctypes.data)
    product.multiply(stream, x.ctypes.data, prepared, out.ctypes.data, len(x))
    return out


def matrix(dtype: str, a: np.ndarray) -> Matrix:
    return Matrix(dtype, *a.shape, a.strides[0] // a.itemsize)


@pytest.mark.parametrize("dtype", inputs.FLOATS)
@pytest.mark.parametrize("weight_dtype", inputs.FLOATS)
@pytest.mark.parametrize("form", range(4))
def test_on_numpy(dtype: str, weight_dtype: str, form: int) -> None:
    x, weight = layouts(exact((5, 24), 1, dtype))[form], layouts(exact((7, 24), 2, weight_dtype))[form]
    product = gemm.product(("cpu", 0), matrix(dtype, x), matrix(weight_dtype, weight))
    np.testing.assert_array_equal(multiply(product, x, weight), x.astype(np.float32) @ weight.astype(np.float32).T)


@pytest.mark.backends("simt")  # on a GPU cuBLAS itself is under test
@pytest.mark.parametrize("dtype", inputs.FLOATS)
@pytest.mark.parametrize("weight_dtype", inputs.FLOATS)
@pytest.mark.parametrize("x_form", range(4))
@pytest.mark.parametrize("weight_form", range(4))
def test_arguments_of_cublas(
    backend: Backend, blas: Blas, dtype: str, weight_dtype: str, x_form: int, weight_form: int
) -> None:
    x, weight = layouts(exact((5, 24), 1, dtype))[x_form], layouts(exact((7, 24), 2, weight_dtype))[weight_form]
    product = gemm.CudaProduct(("cpu", 0), matrix(dtype, x), matrix(weight_dtype, weight))
    np.testing.assert_array_equal(multiply(product, x, weight), x.astype(np.float32) @ weight.astype(np.float32).T)
    plain = dtype == weight_dtype and x_form < 2 and weight_form < 2
    as_it_is = plain or (weight_dtype == "float32" and weight_form < 2)
    assert (product.prepare(0, weight.ctypes.data) == weight.ctypes.data) == as_it_is


def test_each_stream_has_its_own_workspace(blas: Blas) -> None:
    """The handle is bound again only for another stream; setting a stream drops the workspace, so it comes first."""
    x, weight = exact((5, 24), 1), exact((7, 24), 2)
    product = gemm.CudaProduct(("cpu", 0), matrix("float32", x), matrix("float32", weight))
    for stream in (3, 3, 4, 3):
        multiply(product, x, weight, stream)
    workspaces = {stream: scratch.buffer(("cpu", 0), stream, "cuBLAS", WORKSPACE) for stream in (3, 4)}
    assert workspaces[3] != workspaces[4]
    bind = {s: [("stream", 99, s), ("workspace", 99, workspaces[s], WORKSPACE)] for s in (3, 4)}
    run = [("gemm", 7, 5, 24)]
    assert blas.calls == [*bind[3], *run, *run, *bind[4], *run, *bind[3], *run]


def test_errors_of_cublas_are_raised(blas: Blas) -> None:
    x, weight = exact((5, 24), 1), exact((13, 24), 2)
    product = gemm.CudaProduct(("cpu", 0), matrix("float32", x), matrix("float32", weight))
    with pytest.raises(RuntimeError, match="cuBLAS failed: status 13"):
        multiply(product, x, weight)


def test_a_missing_cublas_is_an_error_with_advice(monkeypatch: pytest.MonkeyPatch) -> None:
    def missing() -> Any:
        raise ImportError("libcublas.so.12 is\nnowhere")

    monkeypatch.setattr(gemm, "_library", missing)
    gemm.why_no_cublas.cache_clear()
    try:
        assert gemm.why_not(("cpu", 0)) is None
        reason = "cuBLAS is not usable (libcublas.so.12 is nowhere): install cupy-router[cuda12] or cupy-router[cuda13]"
        assert str(gemm.why_not(("cuda", 0))).startswith(reason)
    finally:
        gemm.why_no_cublas.cache_clear()
