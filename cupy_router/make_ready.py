# SPDX-License-Identifier: Apache-2.0
"""Compile kernels, or load them from the cache folder, before the calls that need them."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from cupy_router import compiler, kernel_build, kernel_log
from cupy_router.kernel_log import KernelReady
from cupy_router.kernel_plan import Wanted

Progress = Callable[[int, int], object]


def make_ready(wanted: Sequence[Wanted], device: tuple[str, int], report: Progress) -> tuple[KernelReady, ...]:
    """Make kernels ready, several at once, and return those that were not. Listeners hear of them here, in order."""
    ready: list[KernelReady] = []
    stop = kernel_log.on_compile(ready.append)
    try:
        report(0, len(wanted))
        backend = compiler.backend(device[0])
        assert backend is not None, "callers ask for a backend before they ask for kernels"
        texts = (
            (compiler.expand(one.kernel, one.macros, one.headers), one.function)
            for one in wanted
            if not compiler.is_ready(one, device)
        )
        with kernel_build.in_threads(backend, texts, device[1]) as build:
            for done, (kernel, function, macros, headers) in enumerate(wanted, 1):
                compiler.compile(kernel, function, dict(macros), device, dict(headers), build)
                report(done, len(wanted))
    finally:
        stop()
    keys = set(wanted)
    return tuple(one for one in ready if Wanted(one.kernel, one.function, one.macros, one.headers) in keys)
