# SPDX-License-Identifier: Apache-2.0
"""Lower a call to a kernel that XLA launches itself, as part of its program, without a handler in Python.

XLA has a custom call for kernels as PTX (openxla/xla, pull request 26236). It is as fast as kernels of XLA, and command
buffers can contain it, while a handler in Python needs time and the GIL. A kernel that adds 1 tests once per process
whether it works. If not, calls go through the handlers of `_ffi_targets`.
"""

from __future__ import annotations

import os
import time
from concurrent.futures import ThreadPoolExecutor
from functools import cache, lru_cache
from typing import Any

import jax
import numpy as np

from cupy_router import compiler, kernel_log
from cupy_router.compiler import CompileError, Signature
from cupy_router.jax import _call_text, _ptx
from cupy_router.jax._ffi_targets import Buffer, gpus, views_of
from cupy_router.ops import _cached
from cupy_router.ops.registry import OPS
from cupy_router.tuning import gpu_of

TARGET = "__gpu$xla.gpu.ptx"
HANDLERS = "CUPY_ROUTER_JAX_HANDLERS"  # environment: if set, all calls go through handlers

_MAX_SHARED_BYTES = 48 * 1024  # XLA does not opt in to more


def attributes(name: str, text: str, inputs: tuple[Buffer, ...], results: tuple[Buffer, ...]) -> dict[str, Any] | None:
    """Return the attributes of the custom call for this call of an op; None if XLA cannot launch it itself."""
    gpu, op = _gpu(), OPS[name]
    call = _call_text.decode(op, text)
    num_rows = inputs[0][0][0]
    if gpu is None:
        return None
    device, architecture = gpu
    given = [op.names[position] for position in call.given]
    views = views_of(op, call, inputs, device)
    arrays = _cached.arrays_of(op, call.options, views, (), results)
    if num_rows == 0 and not _cached.works_without_rows(op, call.options, arrays):
        return None
    if not op.is_single_kernel(call.options, arrays):
        return None
    if compiler.WATCHING and compiler.changed():
        _cached.forget()
    kernel = op.kernel(call.options, arrays, gpu_of(device))
    if not isinstance(kernel, _cached.Kernel) or kernel.shared_bytes > _MAX_SHARED_BYTES:
        return None
    macros, headers = tuple(sorted(kernel.macros.items())), tuple(sorted(kernel.headers.items()))
    source = compiler.expand(kernel.file, macros, headers)
    signature = compiler.signature(kernel.file, kernel.function)
    buffers = (*given, *(declared.name for declared in op.existing(call.options)))
    nulls = dict.fromkeys((*op.names, *op.result_names, *kernel.nulls), 0)
    constants = {**nulls, _cached.NUMBER: call.number, **kernel.fixed}
    about = kernel.file, kernel.function, macros, headers, device
    try:
        ptx = _compiled(about, source, architecture, signature, buffers, tuple(constants.items()))
    except CompileError:  # the handler will raise it again
        return None
    return _launched(kernel.function, ptx, kernel.grid, kernel.block, kernel.shared_bytes)


@lru_cache(maxsize=1024)
def _compiled(
    about: tuple[str, str, compiler.Macros, compiler.Headers, tuple[str, int]],
    source: str,
    architecture: str,
    signature: Signature,
    buffers: tuple[str, ...],
    constants: tuple[tuple[str, int | float], ...],
) -> str:
    """Compile a kernel to PTX, and announce it; `about` is the beginning of a `KernelReady`."""
    begin = time.perf_counter()
    ptx = _ptx.kernel(source, architecture, signature, buffers, constants)
    milliseconds = (time.perf_counter() - begin) * 1000
    kernel_log.announce(kernel_log.KernelReady(*about, True, milliseconds, source, compiler.options(source)))
    return ptx


def _launched(function: str, ptx: str, grid: int, block: int, shared_bytes: int) -> dict[str, Any]:
    sizes = {"grid_x": grid, "block_x": block, "shared_mem_bytes": shared_bytes}
    sizes |= {f"{of}_{axis}": 1 for of in ("grid", "block") for axis in "yz"}
    numbers = {name: np.int32(size) for name, size in sizes.items()}
    return {"name": function, "kernel_type": "ptx", "kernel_data": ptx, **numbers}


# -- Test whether it works ---------------------------------------------------------------------------------------------

_SOURCE = 'extern "C" __global__ void add_one(const int* input, int one, int* output) { *output = *input + one; }'
_SIGNATURE = Signature("add_one", ("input", "one", "output"), "PiP")


@cache
def _gpu() -> tuple[tuple[str, int], str] | None:
    """Return one device and the architecture of all GPUs of JAX; None if XLA cannot launch our kernels on them."""
    if os.environ.get(HANDLERS) or compiler.why_no_cuda() is not None:
        return None
    devices = gpus()
    architectures = {f"compute_{device.compute_capability}".replace(".", "") for device in devices}
    if len(architectures) != 1:
        return None
    (architecture,) = architectures
    with ThreadPoolExecutor(1) as thread:  # a thread that is not tracing
        works = thread.submit(_adds_one, architecture, devices[0]).result()
    return (("cuda", devices[0].local_hardware_id), architecture) if works else None


def _adds_one(architecture: str, device: Any) -> bool:
    like = jax.ShapeDtypeStruct((), np.int32)
    try:
        ptx = _ptx.kernel(_SOURCE, architecture, _SIGNATURE, ("input", "output"), (("one", 1),))
        call = jax.jit(lambda number: jax.ffi.ffi_call(TARGET, like)(number, **_launched("add_one", ptx, 1, 1, 0)))
        return int(jax.device_get(call(jax.device_put(np.int32(41), device)))) == 42  # explicit: there may be a guard
    except Exception:  # such as an XLA without the custom call, or a driver older than NVRTC
        return False
