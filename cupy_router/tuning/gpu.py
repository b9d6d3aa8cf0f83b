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

    name: str
    capability: tuple[int, int]  # compute capability: major, minor
    multiprocessors: int
    shared_bytes: int  # shared memory of a block that opts in
    l2_bytes: int

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


# An H100 SXM or H200. Kernels on CPU memory, which only tests run, are planned for it.
DEFAULT = Gpu("NVIDIA H100", (9, 0), multiprocessors=132, shared_bytes=227 * 1024, l2_bytes=50 * 1024 * 1024)

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
    return Gpu.from_properties(compiler.require_cuda().cuda.runtime.getDeviceProperties(index))


@contextmanager
def assume(gpu: Gpu) -> Iterator[None]:
    """Plan for this GPU on every device and in every thread. For tests; cached launches stay as they are."""
    global _assumed
    before, _assumed = _assumed, gpu
    try:
        yield
    finally:
        _assumed = before
