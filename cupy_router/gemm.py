# SPDX-License-Identifier: Apache-2.0
"""The gate GEMM by cuBLAS; knows nothing of routing.

The cuBLAS that CuPy finds is called through ctypes, for two reasons. CuPy does not wrap `cublasSetWorkspace`, without
which captures allocate and streams share a workspace. And it refuses to call cuBLAS while a stream is captured. For CPU
memory NumPy multiplies.
"""

from __future__ import annotations

import ctypes
import importlib
import threading
from functools import cache, cached_property
from typing import Any, NamedTuple, Protocol

import ml_dtypes
import numpy as np

from cupy_router import compiler, kernel_cache, scratch
from cupy_router.launcher import Launch
from cupy_router.tuning import gpu_of

_CODES = {"float32": 0, "float16": 1, "bfloat16": 2}  # of kernels/device/types.cuh
_CUDA_TYPES = {"float32": 0, "float16": 2, "bfloat16": 14}  # CUDA_R_32F, CUDA_R_16F, CUDA_R_16BF
_SIZES = {"float32": 4, "float16": 2, "bfloat16": 2}
_NO_TRANSPOSE, _TRANSPOSE = 0, 1
_COMPUTE_32F, _COMPUTE_32F_PEDANTIC = 68, 69  # pedantic: float32 products as they are, no tf32
_DEFAULT_ALGORITHM = -1
_MATH_MODE = 16  # CUBLAS_MATH_DISALLOW_REDUCED_PRECISION_REDUCTION: partial sums stay in float32


class Matrix(NamedTuple):
    """Up to `num_rows` rows of `num_columns` adjacent elements, `stride` elements apart."""

    dtype: str
    num_rows: int
    num_columns: int
    stride: int


class Product(Protocol):
    """out[r, c] = sum over h of x[r, h] * weight[c, h], accumulated and kept in float32."""

    row_bytes: int  # scratch memory for each row of x

    @property
    def lock(self) -> Any:
        """Held while a product and what reads it are enqueued: threads on one stream share its buffers."""

    def prepare(self, stream: int, weight: int) -> int:
        """Return the address of the weight, converted if necessary, for :meth:`multiply`."""

    def multiply(self, stream: int, x: int, weight: int, out: int, num_rows: int) -> None:
        """Enqueue the product of `num_rows` rows of x."""


def product(device: tuple[str, int], x: Matrix, weight: Matrix, out_stride: int | None = None) -> Product:
    """Return the product of matrices like x and a weight; on CUDA only where :func:`why_not` returns None.

    out_stride: elements from one row of `out` to the next; None: it is dense.
    """
    kind = CudaProduct if device[0] == "cuda" else HostProduct
    return kind(device, x, weight, out_stride)


def why_not(device: tuple[str, int]) -> str | None:
    """Return why there is no product on this device, with the remedy; None if there is one."""
    return None if device[0] == "cpu" else why_no_cublas()


@cache
def why_no_cublas() -> str | None:
    try:
        _library()
    except Exception as error:  # an import can raise anything
        reason = " ".join(str(error).split())
        return f"cuBLAS is not usable ({reason}): install cupy-router[cuda12] or cupy-router[cuda13], which bring it."
    return None


def cublas_version() -> str:
    """Return the release of the library, such as "12.9.1"."""
    numbers = [ctypes.c_int() for _ in range(3)]
    for kind, number in enumerate(numbers):  # major, minor, patch
        _library().cublasGetProperty(kind, ctypes.byref(number))
    return ".".join(str(number.value) for number in numbers)


# -- CUDA --------------------------------------------------------------------------------------------------------------


class CudaProduct:
    def __init__(self, device: tuple[str, int], x: Matrix, weight: Matrix, out_stride: int | None = None) -> None:
        self._device, self._num_outputs, self._hidden = device, weight.num_rows, x.num_columns
        self._out_stride = weight.num_rows if out_stride is None else out_stride
        # cuBLAS needs one dtype for both operands, and rows that do not overlap.
        mixed = x.dtype != weight.dtype
        self._x_packer = _packer(device, x) if _needs_packing(x, mixed) else None
        self._weight_packer = _packer(device, weight) if _needs_packing(weight, mixed) else None
        # If one operand is converted to float32, so is the other.
        if self._x_packer or self._weight_packer:
            self._x_packer = self._x_packer or (_packer(device, x) if x.dtype != "float32" else None)
            self._weight_packer = self._weight_packer or (
                _packer(device, weight) if weight.dtype != "float32" else None
            )
        dtype = "float32" if self._x_packer or self._weight_packer else x.dtype
        self._x_stride = x.num_columns if self._x_packer else x.stride
        self._weight_stride = x.num_columns if self._weight_packer else weight.stride
        self._type = _CUDA_TYPES[dtype]
        self._compute = _COMPUTE_32F_PEDANTIC if dtype == "float32" else _COMPUTE_32F
        self.row_bytes = 4 * x.num_columns if self._x_packer else 0
        self._workspace_bytes = gpu_of(device).table.gemm.workspace_bytes

    @cached_property
    def _context(self) -> _Context:
        return _context(self._device[1])

    @cached_property
    def lock(self) -> Any:
        return self._context.lock

    def prepare(self, stream: int, weight: int) -> int:
        if self._weight_packer is None:
            return weight
        return self._pack(self._weight_packer, stream, weight, "the gate as float32", self._num_outputs)

    def multiply(self, stream: int, x: int, weight: int, out: int, num_rows: int) -> None:
        if self._x_packer is not None:
            x = self._pack(self._x_packer, stream, x, "x as float32", num_rows)
        context = self._context
        context.bind(self._device, stream, self._workspace_bytes)
        # cuBLAS counts columns first: out^T [outputs, rows] = weight [outputs, hidden] x^T [hidden, rows].
        context.check(
            context.library.cublasGemmEx(
                context.handle, _TRANSPOSE, _NO_TRANSPOSE, self._num_outputs, num_rows, self._hidden,
                context.one, weight, self._type, self._weight_stride, x, self._type, self._x_stride,
                context.zero, out, _CUDA_TYPES["float32"], self._out_stride, self._compute, _DEFAULT_ALGORITHM,
            )
        )  # fmt: skip

    def _pack(self, packer: Launch, stream: int, source: int, use: str, num_rows: int) -> int:
        target = scratch.buffer(self._device, stream, use, 4 * num_rows * self._hidden)
        packer(stream, (source, target, num_rows))
        return target


def _needs_packing(matrix: Matrix, mixed: bool) -> bool:
    steps = matrix.num_columns <= matrix.stride < 2**31
    return not steps or (mixed and matrix.dtype != "float32")


def _packer(device: tuple[str, int], matrix: Matrix) -> Launch:
    function = compiler.compile("to_float32", "to_float32", {"DTYPE": _CODES[matrix.dtype]}, device)
    fixed = {"num_columns": matrix.num_columns, "source_stride": matrix.stride}
    blocks = min(matrix.num_rows, gpu_of(device).table.gemm.max_pack_blocks)
    return Launch(function, blocks, 256, ("source", "target", "num_rows"), fixed)


class _Context:
    """A cuBLAS handle on one device, bound to one stream and that stream's workspace at a time."""

    def __init__(self, index: int) -> None:
        self.library = _library()
        self.lock = threading.RLock()
        self._one, self._zero = ctypes.c_float(1.0), ctypes.c_float(0.0)
        self.one, self.zero = ctypes.addressof(self._one), ctypes.addressof(self._zero)
        self._bound = (-1, -1)
        handle = ctypes.c_void_p()
        with compiler.require_cuda().cuda.Device(index), scratch.relaxed():
            self.check(self.library.cublasCreate_v2(ctypes.byref(handle)))
            self.handle = handle.value
            self.check(self.library.cublasSetMathMode(self.handle, _MATH_MODE))

    def bind(self, device: tuple[str, int], stream: int, workspace_bytes: int) -> None:
        workspace = scratch.buffer(device, stream, "cuBLAS", workspace_bytes)
        if self._bound != (stream, workspace):
            self.check(self.library.cublasSetStream_v2(self.handle, stream))  # also resets the workspace
            self.check(self.library.cublasSetWorkspace_v2(self.handle, workspace, workspace_bytes))
            self._bound = (stream, workspace)

    def check(self, status: int) -> None:
        if status:
            self._bound = (-1, -1)
            raise RuntimeError(f"cuBLAS failed: {self.library.cublasGetStatusString(status).decode()}")


_contexts: dict[int, _Context] = {}
_contexts_lock = threading.Lock()


def _context(index: int) -> _Context:
    with _contexts_lock:
        found = _contexts.get(index)
        if found is None:
            found = _contexts[index] = _Context(index)
    return found


@cache
def _library() -> ctypes.CDLL:
    """Return the library that CuPy uses. Importing CuPy's wrapper finds and loads it."""
    kernel_cache.prepare()
    import cupy

    _ = importlib.import_module("cupy_backends.cuda.libs").cublas
    library = ctypes.CDLL(f"libcublas.so.{cupy.cuda.runtime.runtimeGetVersion() // 1000}")
    pointer, number = ctypes.c_void_p, ctypes.c_int
    library.cublasCreate_v2.argtypes = [pointer]
    library.cublasSetMathMode.argtypes = [pointer, number]
    library.cublasSetStream_v2.argtypes = [pointer, pointer]
    library.cublasSetWorkspace_v2.argtypes = [pointer, pointer, ctypes.c_size_t]
    library.cublasGetStatusString.restype = ctypes.c_char_p
    library.cublasGemmEx.argtypes = [
        pointer, number, number, number, number, number,  # handle, transposes, sizes
        pointer, pointer, number, number, pointer, number, number,  # alpha; A and B, each with type and stride
        pointer, pointer, number, number, number, number,  # beta; C likewise; type of the sums, algorithm
    ]  # fmt: skip
    return library


# -- CPU ---------------------------------------------------------------------------------------------------------------

_HOST_TYPES = {"float32": np.float32, "float16": np.float16, "bfloat16": ml_dtypes.bfloat16}
_host_lock = threading.RLock()


class HostProduct:
    """The product by NumPy, for tests that execute kernels on the CPU."""

    lock = _host_lock
    row_bytes = 0

    def __init__(self, device: tuple[str, int], x: Matrix, weight: Matrix, out_stride: int | None = None) -> None:
        self._x, self._weight = x, weight
        self._out_stride = weight.num_rows if out_stride is None else out_stride

    def prepare(self, stream: int, weight: int) -> int:
        return weight

    def multiply(self, stream: int, x: int, weight: int, out: int, num_rows: int) -> None:
        num_outputs = self._weight.num_rows
        gate = _rows(weight, self._weight, num_outputs).astype(np.float32)
        target = _rows(out, Matrix("float32", num_rows, num_outputs, self._out_stride), num_rows)
        with np.errstate(all="ignore"):
            np.matmul(_rows(x, self._x, num_rows).astype(np.float32), gate.T, out=target)


def _rows(address: int, matrix: Matrix, num_rows: int) -> np.ndarray[Any, Any]:
    """Return CPU memory as an array; with a negative stride, the last row has the lowest address."""
    size = _SIZES[matrix.dtype]
    last = (num_rows - 1) * matrix.stride
    first = min(last, 0)
    memory = (ctypes.c_ubyte * ((abs(last) + matrix.num_columns) * size)).from_address(address + first * size)
    strides = (matrix.stride * size, size)
    return np.ndarray(
        (num_rows, matrix.num_columns), _HOST_TYPES[matrix.dtype], memoryview(memory), -first * size, strides
    )
