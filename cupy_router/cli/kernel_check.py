# SPDX-License-Identifier: Apache-2.0
"""Compile one kernel, launch it on each GPU and compare its results with the reference."""

from __future__ import annotations

import os
from typing import Any

import numpy as np
from numpy.typing import NDArray

import cupy_router
from cupy_router import compiler, kernel_cache, kernel_log, nvrtc

from . import checks
from .result import Result, sentence

OP = "activation_topk"
TOLERANCE = 1e-5  # relative; float32 with fast special functions has a much smaller error


def kernel() -> Result:
    reason = compiler.why_no_cuda()
    if reason is None:
        return on_devices(checks.load_cupy())
    compiled = compiled_without_device()
    if compiled.state == "fault":
        return compiled
    if not checks.has_card():
        return Result("kernel", "note", f"{compiled.found}; not launched, as there is no GPU")
    found = f"{compiled.found}; not launched: {reason.removesuffix('.')}"
    return Result("kernel", "fault", found, "Correct the faults above first.")


def compiled_without_device() -> Result:
    """Compile the kernel with NVRTC alone, which needs no driver."""
    if checks.nvrtc().state != "ok":
        return Result("kernel", "note", "not compiled, as there is no usable NVRTC")
    errors = nvrtc.errors(compiler.expand(OP), f"{OP}.cu")
    if errors is not None:
        return Result("kernel", "fault", f"{OP} does not compile: {errors.splitlines()[0]}", remedy_for_kernels())
    return Result("kernel", "note", f"{OP} compiles")


def problem() -> tuple[NDArray[np.float32], cupy_router.RoutingMethod]:
    """Return logits [64, 128] whose scores differ by more than rounding, and a method."""
    generator = np.random.default_rng(0)
    logits = generator.permuted(np.tile(np.linspace(-4, 4, 128, dtype=np.float32), (64, 1)), axis=1)
    return logits, cupy_router.RoutingMethod(128, 8, "sigmoid")


def on_devices(cupy: Any) -> Result:
    logits, method = problem()
    expected = cupy_router.activation_topk(logits, method)
    ready: list[kernel_log.KernelReady] = []
    kernel_log.listeners.append(ready.append)
    count = cupy.cuda.runtime.getDeviceCount()
    try:
        for i in range(count):
            with cupy.cuda.Device(i):
                routed = cupy_router.activation_topk(cupy.asarray(logits), method)
                indices, weights = cupy.asnumpy(routed.indices), cupy.asnumpy(routed.weights)
            differ = int(np.count_nonzero(indices != expected.indices))
            if differ:
                found = f"cuda:{i}: {differ} of {indices.size} experts of {OP} differ from the reference"
                return Result("kernel", "fault", found, remedy_for_results())
            if not np.allclose(weights, expected.weights, rtol=TOLERANCE, atol=0):
                found = f"cuda:{i}: weights of {OP} differ from the reference by more than {TOLERANCE:.0e}"
                return Result("kernel", "fault", found, remedy_for_results())
    except Exception as error:
        remedy = "Free memory on the GPU: nvidia-smi lists the processes that use it."
        found = f"{OP} fails: {sentence(error)}"
        return Result("kernel", "fault", found, remedy if "memory" in found.lower() else remedy_for_kernels())
    finally:
        kernel_log.listeners.remove(ready.append)
    how = "compiled" if any(one.compiled for one in ready) else "loaded"
    time = f" in {sum(one.milliseconds for one in ready):.0f} ms" if ready else ""
    where = "cuda:0" if count == 1 else f"cuda:0 to cuda:{count - 1}"
    return Result("kernel", "ok", f"{OP} {how}{time}, launched on {where}, equal to the reference")


def remedy_for_kernels() -> str:
    if os.environ.get("CUPY_ROUTER_KERNELS"):
        return "Correct the kernel, or unset CUPY_ROUTER_KERNELS."
    return "Install cupy-router again; if that does not help, report this with the output of cupy-router info --json."


def remedy_for_results() -> str:
    if os.environ.get("CUPY_ROUTER_KERNELS"):
        return "Correct the kernel, or unset CUPY_ROUTER_KERNELS."
    return f"Remove {kernel_cache.folder()}, which may be damaged; if that does not help, report this."
