# SPDX-License-Identifier: Apache-2.0
"""The record of a GPU that every planner takes."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import cache
from typing import Any

from cupy_router import compiler
from cupy_router.tuning.lookup import nearest
from cupy_router.tuning.schema import Table


@dataclass(frozen=True)
class Gpu:
    """The properties of a GPU that decide which launch is fastest, or possible."""

    name: str  # for people
    capability: tuple[int, int]  # compute capability: major, minor
    multiprocessors: int
    shared_bytes: int  # shared memory of a block that opts in
    l2_bytes: int
    nvrtc: tuple[int, int] = (13, 0)  # version of the compiler

    @classmethod
    def from_properties(cls, properties: Mapping[str, Any]) -> Gpu:
        """Return the record for what CuPy's `getDeviceProperties` returned."""
        return cls(
            name=properties["name"].decode(),
            capability=(properties["major"], properties["minor"]),
            multiprocessors=properties["multiProcessorCount"],
            shared_bytes=properties["sharedMemPerBlockOptin"],
            l2_bytes=properties["l2CacheSize"],
        )

    @property
    def table(self) -> Table:
        """Thresholds for this architecture, or for the nearest one that was measured."""
        return nearest(self.capability)

    def scaled(self, count: int) -> int:
        """Scale a number of rows or warps from the multiprocessors of the measured GPU to those of this one."""
        return max(1, count * self.multiprocessors // self.table.multiprocessors)


# The GPU that was measured for sm_90. Kernels on CPU memory, which only tests run, are planned for it.
DEFAULT = Gpu(nearest((9, 0)).gpu, (9, 0), nearest((9, 0)).multiprocessors, shared_bytes=227 << 10, l2_bytes=50 << 20)

_assumed: Gpu | None = None


def gpu_of(device: tuple[str, int]) -> Gpu:
    """Return the GPU to plan for, for a device such as ("cuda", 0).

    CuPy describes each CUDA device once. Any other backend stands in for a GPU in tests: this is `DEFAULT` with the
    backend's shared memory. RuntimeError if the device is a CUDA device and CuPy, NVRTC or a driver is missing.
    """
    if _assumed is not None:
        return _assumed
    backend = compiler.backend(device[0])
    if backend is None:
        return DEFAULT
    if isinstance(backend, compiler.CudaBackend):
        return _described(device[1])
    return replace(DEFAULT, shared_bytes=backend.shared_limit(device[1]))


@cache
def _described(index: int) -> Gpu:
    """Ask for single attributes: `getDeviceProperties` takes milliseconds, which a first call need not wait for."""
    cuda = compiler.require_cuda().cuda
    capability = cuda.Device(index).compute_capability  # such as "90" or "100"

    def attribute(name: str) -> int:
        return int(cuda.runtime.deviceGetAttribute(getattr(cuda.runtime, f"cudaDevAttr{name}"), index))

    return Gpu(
        name=f"cuda:{index}",
        capability=(int(capability[:-1]), int(capability[-1])),
        multiprocessors=attribute("MultiProcessorCount"),
        shared_bytes=attribute("MaxSharedMemoryPerBlockOptin"),
        l2_bytes=attribute("L2CacheSize"),
        nvrtc=cuda.nvrtc.getVersion(),
    )


@contextmanager
def assume(gpu: Gpu) -> Iterator[None]:
    """Plan for this GPU on every device and in every thread. For tests; cached launches stay as they are."""
    global _assumed
    before, _assumed = _assumed, gpu
    try:
        yield
    finally:
        _assumed = before
