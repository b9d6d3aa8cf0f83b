# SPDX-License-Identifier: Apache-2.0
"""topk_select of a few long rows by clusters of many shapes: GPU time of each, checked, beside the other kernels.

python -m benchmarks.sweep_topk_select [--rows 1 8 64] [--data]
"""

from __future__ import annotations

import argparse
import multiprocessing
import statistics
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from contextlib import suppress
from typing import Any
from unittest import mock

import cupy

from benchmarks import floor, harness, timing
from benchmarks.bench_topk_select import MISLEADING
from cupy_router import TopK, compiler, topk_select
from cupy_router.ops import _cached
from cupy_router.ops import _topk_select_cluster as cluster
from cupy_router.ops._topk_select_cluster import ClusterShape
from cupy_router.tuning import gpu_of

SIZES = (  # num_columns, k, dtype
    (32_768, 512, "float32"), (65_536, 1024, "float32"), (131_072, 2048, "float32"),
    (16_384, 512, "bfloat16"), (65_536, 1024, "bfloat16"), (131_072, 2048, "bfloat16"),
)  # fmt: skip
CALLS = (("any", False), ("value", True))  # order and whether values are returned
GPU = gpu_of(("cuda", 0))

Size = tuple[int, int, int, str]


def shapes(rows: int, columns: int, k: int, dtype: str) -> Iterator[ClusterShape]:
    """Yield the chosen shape, then others, whose blocks all run at the same time."""
    chosen = cluster.choose(GPU, rows, columns, k, dtype)
    if chosen is not None:
        yield chosen
    for blocks_of_row in (2, 4, 8):
        for block in (256, 512, 1024):
            for at_once in (1, 2, 4):
                blocks = rows * blocks_of_row
                if blocks <= at_once * GPU.multiprocessors < 2 * blocks or (at_once == 1 and rows <= 8):
                    shape = cluster.shape_with(GPU, blocks_of_row, block, columns, k, dtype, at_once)
                    if shape is not None and shape != chosen and block * at_once <= 1024:
                        yield shape


def _microseconds(call: Callable[[int], Any], rotation: int) -> float:
    """Time a call on the GPU in fewer replays than a benchmark."""
    (times,) = timing.graph_rounds(call, rotation, rounds=1, replays=6)
    return statistics.median(times)


class Case:
    """The scores of one size, and the results wanted of the first of them."""

    def __init__(self, rows: int, columns: int, k: int, dtype: str) -> None:
        self.k = k
        self.scores = harness.inputs((rows, columns), dtype, cold=True)
        self.out = TopK(cupy.empty((rows, k), self.scores[0].dtype), cupy.empty((rows, k), cupy.int32))

    def call(self, i: int, order: str, with_values: bool) -> TopK:
        out = self.out if with_values else TopK(None, self.out.indices)
        scores = self.scores[i % len(self.scores)]
        return topk_select(scores, self.k, order=order, return_values=with_values, out=out)

    def measure(self, shape: ClusterShape | None, data: tuple[str, ...] = ()) -> tuple[list[float], str]:
        """Return the microseconds of each of the calls, then of the first with this data, and what is wrong."""
        times, wrong = [], []
        with mock.patch.object(cluster, "choose", return_value=shape):
            _cached.forget()
            for order, with_values in CALLS:
                times.append(_microseconds(self._call(order, with_values), len(self.scores)))
                wrong += [order] if self._differs(order, self.scores[0]) else []
            normal = self.scores
            for name in data:
                scores = MISLEADING[name](normal[0].astype(cupy.float32)).astype(normal[0].dtype)
                self.scores = harness.cold_inputs(scores.copy, scores.nbytes)
                times.append(_microseconds(self._call(*CALLS[0]), len(self.scores)))
                wrong += [name] if self._differs("any", self.scores[0]) else []
            self.scores = normal
        _cached.forget()
        return times, " ".join(wrong)

    def _call(self, order: str, with_values: bool) -> Callable[[int], Any]:
        return lambda i: self.call(i, order, with_values)

    def _differs(self, order: str, scores: Any) -> bool:
        """Compare with another kernel; in order "any" the columns, since the order is free."""
        got = topk_select(scores, self.k, order=order).indices
        with mock.patch.object(cluster, "choose", return_value=None):
            _cached.forget()
            want = topk_select(scores, self.k, order="column" if order == "any" else order).indices
        _cached.forget()
        return not bool(((cupy.sort(got, axis=1) if order == "any" else got) == want).all())


def _compile_only(job: tuple[Size, ClusterShape]) -> None:
    """Leave the machine code in CuPy's disk cache, from another process."""
    (rows, columns, k, dtype), shape = job
    with mock.patch.object(cluster, "choose", return_value=shape), suppress(Exception):  # told when it is measured
        for order, with_values in CALLS:
            scores = cupy.zeros((rows, columns), dtype)
            topk_select(scores, k, order=order, return_values=with_values)


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--rows", type=int, nargs="+", default=[1, 8, 64])
    parser.add_argument("--data", action="store_true", help="also data that is hard to select from, chosen shapes only")
    options = parser.parse_args()
    begin = time.perf_counter()
    compiler.WATCHING = False
    sizes: list[Size] = [(rows, *size) for size in SIZES for rows in options.rows if rows * size[0] < 10_000_000]
    jobs = [(size, shape) for size in sizes for shape in shapes(*size)]
    with ProcessPoolExecutor(12, mp_context=multiprocessing.get_context("spawn")) as pool:
        list(pool.map(_compile_only, jobs, chunksize=4))
    print(f"{len(jobs)} shapes compiled in {time.perf_counter() - begin:.0f} s", flush=True)
    harness.warm_up()
    for size in sizes:
        rows, columns, k, dtype = size
        case = Case(*size)
        least = floor.read_rows(case.scores, case.out, {})["us"]
        print(f"\n{rows} x {columns} {dtype}, k {k}: {' | '.join(order for order, _ in CALLS)}   (read {least:.2f})")
        for i, shape in enumerate([None, *shapes(*size)]):
            data = tuple(MISLEADING) if options.data and i <= 1 else ()
            try:
                times, wrong = case.measure(shape, data)
                text = " | ".join(f"{t:.2f}" for t in times[:2]) + "".join(
                    f"  {name} {t:.2f}" for name, t in zip(data, times[2:], strict=True)
                )
                print(text, "other kernels" if shape is None else shape, f"WRONG {wrong}" if wrong else "", flush=True)
            except Exception as error:  # one shape that does not run is no reason to lose the others
                print("failed:", shape, error, flush=True)
    print(f"{time.perf_counter() - begin:.0f} s")


if __name__ == "__main__":
    main()
