# SPDX-License-Identifier: Apache-2.0
"""Many threads, each with several streams, call all ops on mixed shapes for a while; results and memory are watched.

    python -m tests.gpu.soak [--output FILE.json] [--threads 8] [--streams 4] [--calls 2000]

Every result is compared on the GPU, on its own stream, with the first result of the same case, bit by bit; that one is
compared with the reference. Device memory in use is read when all pools are warm, after a tenth of the calls, and at
the end.
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

from cupy_router import presets
from cupy_router.reference.expert_layout import expert_layout as reference
from tests import inputs
from tests.backends import Backend, GpuBackend
from tests.fuzz.case import Case, arguments, check, function
from tests.gpu.variants import cases
from tests.layout_inputs import uniform

MEMORY_SLACK = (
    4 << 20
)  # bytes by which a pool may still grow once warm: a block more for one stream, never one for each call


class Host:
    """A device in place of a GPU that runs everything at once, for tests of this script."""

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
        """Nothing is in flight."""

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
        blocks = min(64, -(-got.nbytes // 256)) or 1
        self.kernel((blocks,), (256,), (got, want, np.int64(got.nbytes), counter))

    def synchronize(self) -> None:
        self.cupy.cuda.Device().synchronize()

    def used_bytes(self) -> int:
        free, total = self.cupy.cuda.runtime.memGetInfo()
        return int(total - free)


class Soak:
    """The calls of all threads on one device. `streams` lists the streams of each thread, each with its counter."""

    def __init__(self, device: Host, chosen: Sequence[Case], threads: int, streams: int, calls: int) -> None:
        self.device, self.calls = device, calls
        self.ops = [function(case.op, "layout" in case.options) for case in chosen]
        self.given = [arguments(case, device.backend) for case in chosen]
        self.first = [op(**given) for op, given in zip(self.ops, self.given, strict=True)]
        device.synchronize()
        for case, result in zip(chosen, self.first, strict=True):
            check(case, tuple(device.backend.numpy(array) for array in result))
        self.streams = [[(device.stream(), device.counter()) for _ in range(streams)] for _ in range(threads)]
        device.synchronize()
        self.failures: list[str] = []

    def run(self) -> dict[str, Any]:
        """Return the figures. A thread stops at its first error, which is among them."""
        begin = time.monotonic()
        warm = min(self.calls, max(len(self.ops), self.calls // 10))  # every stream has then seen every case
        self._phase(range(warm))
        used = self.device.used_bytes()
        self._phase(range(warm, self.calls))
        growth = self.device.used_bytes() - used
        counters = [counter for lanes in self.streams for _, counter in lanes]
        different = sum(int(self.device.backend.numpy(counter)[0]) for counter in counters)
        return {
            "threads": len(self.streams),
            "streams": len(self.streams[0]),
            "calls_per_stream": self.calls,
            "calls": len(counters) * self.calls,
            "cases": len(self.ops),
            "different_bytes": different,
            "memory_growth": growth,
            "failures": self.failures,
            "seconds": round(time.monotonic() - begin, 1),
            "ok": different == 0 and not self.failures and growth <= MEMORY_SLACK,
        }

    def _phase(self, turns: range) -> None:
        """Run these turns in all threads, until the device is done."""
        workers = [threading.Thread(target=self._work, args=(number, turns)) for number in range(len(self.streams))]
        for worker in workers:
            worker.start()
        for worker in workers:
            worker.join()
        self.device.synchronize()

    def _work(self, number: int, turns: range) -> None:
        try:
            for turn in turns:
                for place, (stream, counter) in enumerate(self.streams[number]):
                    self._call((number * 31 + place * 7 + turn) % len(self.ops), turn, stream, counter)
        except Exception as error:
            self.failures.append(f"thread {number}: {type(error).__name__}: {error}")

    def _call(self, at: int, turn: int, stream: Any, counter: Any) -> None:
        """Call on the current stream, or on a given one while another is current."""
        op, given = self.ops[at], self.given[at]
        if turn % 2:
            result = op(**given, stream=stream)
        else:
            with self.device.on(stream):
                result = op(**given)
        with self.device.on(stream):
            for got, want in zip(result, self.first[at], strict=True):
                self.device.count_differences(got, want, counter)


def mixed_cases() -> list[Case]:
    """Return some of the variants, and calls of sizes in use."""
    large = []
    for rows, columns, k in ((1, 256, 8), (1024, 384, 6), (10_000, 64, 6), (8, 32768, 512)):
        large.append(Case("topk_select", {"scores": inputs.normal((rows, columns), seed=1)}, None, {"k": k}))
    for rows, method in (
        (1, "deepseek-v4-flash"),
        (64, "deepseek-v4-pro"),
        (8192, "deepseek-v4-flash"),
        (9000, "deepseek-v4-pro"),
    ):
        chosen = presets()[method]
        logits = inputs.normal((rows, chosen.num_experts), "bfloat16", seed=2)
        bias = inputs.normal((chosen.num_experts,), seed=3, scale=0.1)
        large.append(Case("activation_topk", {"logits": logits, "bias": bias}, chosen))
        draw = inputs.rng(4, rows)
        table = draw.integers(0, chosen.num_experts, (1000, chosen.top_k)).astype(np.int32)
        ids = draw.integers(0, 1000, rows).astype(np.int32)
        large.append(Case("hash_router", {"token_ids": ids, "table": table, "logits": logits}, chosen))
    # Kernels for many rows are called with many rows here: the choice cannot be made for one thread alone.
    # Nor is a load copied on the stream of each call.
    quiet = (case for case in cases()[::4] if not (case.as_of_rows or case.plan or "load" in case.arrays))
    return [*quiet, *large, *layouts_in_use()]


def layouts_in_use() -> list[Case]:
    """Return layouts and rows of sizes in use, by one block and by many."""
    found = []
    for n, k, experts, alignment in ((1, 8, 256, 1), (64, 8, 256, 16), (1024, 6, 384, 128), (8192, 8, 256, 1)):
        ids, options = uniform(n, k, experts).astype(np.int32), {"num_experts": experts, "alignment": alignment}
        found.append(Case("expert_layout", {"indices": ids}, None, options))
        made = reference(ids, experts, alignment=alignment)
        rows = {"order": made["order"], "positions": made["positions"]}
        hidden = 4096 if n < 100 else 264
        found.append(Case("permute", {"x": inputs.normal((n, hidden), "bfloat16", seed=5), **rows}))
        y = inputs.normal((len(made["order"]), hidden), "bfloat16", seed=6)
        weights = inputs.normal((n, k), seed=7)
        if n < 2000:  # the sums of more take long by loops
            found.append(Case("unpermute", {"y": y, "positions": made["positions"], "weights": weights}))
    return found


def main(given: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.gpu.soak")
    parser.add_argument("--output", type=Path, help="write the figures as JSON")
    parser.add_argument("--threads", type=int, default=8)
    parser.add_argument("--streams", type=int, default=4, help="of each thread")
    parser.add_argument("--calls", type=int, default=2000, help="on each stream")
    chosen = parser.parse_args(given)
    figures = Soak(Gpu(), mixed_cases(), chosen.threads, chosen.streams, chosen.calls).run()
    print("  ".join(f"{key}={value}" for key, value in figures.items()))
    if chosen.output:
        from benchmarks.harness import environment  # which needs CuPy

        chosen.output.parent.mkdir(parents=True, exist_ok=True)
        chosen.output.write_text(json.dumps({"environment": environment()} | figures, indent=1) + "\n")
    return 0 if figures["ok"] else 1


if __name__ == "__main__":
    sys.exit(main())
