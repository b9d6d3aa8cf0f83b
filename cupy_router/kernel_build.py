# SPDX-License-Identifier: Apache-2.0
"""Devices that build and launch kernels, and builds in several threads at once. Knows nothing of routing."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, NamedTuple, Protocol

if TYPE_CHECKING:
    from concurrent.futures import Future

    from cupy_router.tensor_map import Matrix

MOST_THREADS = 8


class Backend(Protocol):
    """A kind of device that compiles and launches: CUDA by CuPy, or kernels executed on the CPU in the tests."""

    switches: bool  # there are several devices; False: it is enough to call `use` once in a thread

    @property
    def compiled(self) -> bool:
        """Whether the last `build` of this thread compiled; False if it found the machine code in a cache."""

    def build(self, source: str, function: str, device: int) -> int:
        """Compile the text and return a handle of the function; CompileError with file and line if that fails.

        Several threads may do so at once.
        """

    def shared_limit(self, device: int) -> int:
        """Return the bytes of shared memory that a block may have on the device if it opts in."""

    def allow_shared(self, handle: int, device: int, num_bytes: int) -> None:
        """Opt in to more than 48 KB of dynamic shared memory; ValueError if the device has less."""

    def tensor_map(self, address: int, matrix: Matrix) -> bytes:
        """Return the map of a matrix at an address."""

    def use(self, device: int) -> int | None:
        """Make the device current in this thread, and return the device to restore, or None."""

    def launch(  # as cuLaunchKernel
        self,
        handle: int,
        gx: int,
        gy: int,
        gz: int,
        bx: int,
        by: int,
        bz: int,
        shared_bytes: int,
        stream: int,
        kernel_params: int,
        extra: int,
        /,
    ) -> None:
        """Enqueue; `kernel_params` is the address of an array of pointers, one to each argument."""


class Built(NamedTuple):
    """A kernel that can be launched on one device."""

    handle: int
    compiled: bool  # False: its machine code came from a cache
    milliseconds: float


Build = Callable[[Backend, str, str, int], Built]  # backend, expanded text, function, number of the device


def build(backend: Backend, source: str, function: str, device: int) -> Built:
    """Build a kernel in this thread."""
    begin = time.perf_counter()
    handle = backend.build(source, function, device)
    return Built(handle, backend.compiled, (time.perf_counter() - begin) * 1000)


@contextmanager
def in_threads(backend: Backend, texts: Iterable[tuple[str, str]], device: int) -> Iterator[Build]:
    """Build kernels, each an expanded text and its function, and yield a :func:`build` that waits for these.

    What fails in a thread is built once more where it is asked for, which raises its error there.
    """
    from concurrent.futures import ThreadPoolExecutor  # 4 ms, which a first call need not wait for

    started: dict[tuple[str, str], Future[Built]] = {}
    with ThreadPoolExecutor(num_threads(), "cupy_router build") as pool:

        def ready(backend: Backend, source: str, function: str, device: int) -> Built:
            future = started.get((source, function))
            if future is None or future.exception() is not None:
                return build(backend, source, function, device)
            return future.result()

        try:
            for text in texts:
                started[text] = pool.submit(build, backend, *text, device)
            yield ready
        finally:
            pool.shutdown(cancel_futures=True)


def num_threads() -> int:
    """Return how many kernels to build at once: one for each CPU of this process, at most 8."""
    has_affinity = hasattr(os, "sched_getaffinity")
    return min(MOST_THREADS, len(os.sched_getaffinity(0)) if has_affinity else os.cpu_count() or 1)
