# SPDX-License-Identifier: Apache-2.0
"""Many threads, each with several streams, call all ops on mixed shapes for a while; results and memory are watched.

    python -m tests.gpu.soak [--output FILE.json] [--threads 8] [--streams 4] [--calls 2000]

Every result is compared on the GPU, on its own stream, with the first result of the same case, bit by bit; that one is
compared with the reference. Device memory in use is read after a tenth of the calls, when all pools are warm, and at the end.
"""

from __future__ import annotations

import argparse
import json
import sys
import threading
import time
from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any

import numpy as np

import cupy_router
from tests.backends import Backend, GpuBackend
from tests.fuzz.case import Case, arguments, check
from tests.gpu.variants import cases

MEMORY_SLACK = (
    4 << 20
)  # bytes by which a pool may still grow once warm: a block more for one stream, never one for each call


class Host:
    """A device that is no GPU: everything is done at once. For the tests of this script."""

    def __init__(self, backend: Backend | None = None) -> None:
        self.backend = backend or Backend()

    def stream(self) -> Any:
        return None

    def on(self, stream: Any) -> AbstractContextManager[Any]:
        return nullcontext()

    def counter(self) -> Any:
        return np.zeros(1, np.int64)

    def count_differences(self, got: Any, want: Any, counter: Any) -> None:
        counter += int((got.view(np.uint8) != want.view(np.uint8)).sum())

    def synchronize(self) -> None:
        """Nothing is under way."""

    def used_bytes(self) -> int:
        return 0


class Gpu(Host):
    """CuPy's current device."""

    def __init__(self) -> None:
        super().__init__(GpuBackend())
        self.cupy = self.backend.xp
        self.kernel = self.cupy.RawKernel(
            """extern "C" __global__ void differences(const unsigned char *a, const unsigned char *b, long long n,
                                                      unsigned long long *count) {
                for (long long i = blockIdx.x * 256LL + threadIdx.x; i < n; i += gridDim.x * 256LL) {
                    if (a[i] != b[i]) atomicAdd(count, 1ULL);
                }
            }""",
            "differences",
        )

    def stream(self) -> Any:
        return self.cupy.cuda.Stream(non_blocking=True)

    def on(self, stream: Any) -> AbstractContextManager[Any]:
        context: AbstractContextManager[Any] = stream
        return context

    def counter(self) -> Any:
        return self.cupy.zeros(1, self.cupy.uint64)

    def count_differences(self, got: Any, want: Any, counter: Any) -> None:
        blocks = min(64, -(-got.nbytes // 256))
        self.kernel((blocks,), (256,), (got, want, np.int64(got.nbytes), counter))

    def synchronize(self) -> None:
        self.cupy.cuda.Device().synchronize()

    def used_bytes(self) -> int:
        free, total = self.cupy.cuda.runtime.memGetInfo()
        return int(total - free)


class Soak:
    """The calls of all threads on one device."""

    def __init__(self, device: Host, chosen: Sequence[Case], threads: int, streams: int, calls: int) -> None:
        self.device = device
        self.threads, self.streams, self.calls = threads, streams, calls
        self.ops = [getattr(cupy_router, case.op) for case in chosen]
        self.given = [arguments(case, device.backend) for case in chosen]
        self.first = [op(**given) for op, given in zip(self.ops, self.given, strict=True)]
        device.synchronize()
        for case, result in zip(chosen, self.first, strict=True):
            check(case, (device.backend.numpy(result[0]), device.backend.numpy(result[1])))
        self.warm = threading.Barrier(threads + 1)
        self.go_on = threading.Barrier(threads + 1)
        self.failures: list[str] = []
        self.differences = 0
        self._lock = threading.Lock()

    def run(self) -> dict[str, Any]:
        """The figures. Threads stop at their first error, which is among them."""
        begin = time.monotonic()
        workers = [threading.Thread(target=self._guarded, args=(number,)) for number in range(self.threads)]
        for worker in workers:
            worker.start()
        self.warm.wait()
        self.device.synchronize()
        before = self.device.used_bytes()
        self.go_on.wait()
        for worker in workers:
            worker.join()
        self.device.synchronize()
        growth = self.device.used_bytes() - before
        return {
            "threads": self.threads, "streams": self.streams, "calls_per_stream": self.calls, "cases": len(self.ops),
            "calls": self.threads * self.streams * self.calls, "different_bytes": self.differences,
            "memory_growth": growth, "failures": self.failures, "seconds": round(time.monotonic() - begin, 1),
            "ok": not self.differences and not self.failures and growth <= MEMORY_SLACK,
        }  # fmt: skip

    def _guarded(self, number: int) -> None:
        try:
            self._work(number)
        except Exception as error:
            self.failures.append(f"thread {number}: {type(error).__name__}: {error}")
            for barrier in (self.warm, self.go_on):
                if barrier.n_waiting or not barrier.broken:
                    barrier.abort()

    def _work(self, number: int) -> None:
        device = self.device
        streams = [device.stream() for _ in range(self.streams)]
        counters = [device.counter() for _ in streams]
        device.synchronize()
        warm_at = max(1, self.calls // 10)
        for turn in range(self.calls):
            if turn == warm_at - 1 or self.calls == 0:
                self.warm.wait()
                self.go_on.wait()
            for place, stream in enumerate(streams):
                self._call((number * 31 + place * 7 + turn) % len(self.ops), turn, stream, counters[place])
        device.synchronize()
        with self._lock:
            self.differences += sum(int(device.backend.numpy(counter)[0]) for counter in counters)

    def _call(self, at: int, turn: int, stream: Any, counter: Any) -> None:
        """On the current stream, or on one that is passed while another is current."""
        op, given = self.ops[at], self.given[at]
        if turn % 2 or stream is None:
            with self.device.on(stream):
                result = op(**given)
        else:
            result = op(**given, stream=stream)
        with self.device.on(stream):
            for got, want in zip(result, self.first[at], strict=True):
                self.device.count_differences(got, want, counter)
