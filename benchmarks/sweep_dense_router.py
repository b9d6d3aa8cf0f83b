# SPDX-License-Identifier: Apache-2.0
"""dense_router's fused kernels in many tilings: GPU time of each, checked against the reference; to choose among them.

Up to 64 tokens that is the kernel of the decode path, beyond them the one of batch-invariant calls on Hopper, beside
cuBLAS with a second launch.

python -m benchmarks.sweep_dense_router [--tokens 1 4 16 64] [--variants 20]
python -m benchmarks.sweep_dense_router --tokens 128 256 512 1024 2048 4096 8192
"""

from __future__ import annotations

import argparse
import itertools
import multiprocessing
import time
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from contextlib import suppress
from dataclasses import replace
from itertools import zip_longest
from typing import Any

import cupy
import ml_dtypes
import numpy as np

from benchmarks import harness
from cupy_router import Routing, RoutingMethod, compiler, dense_router, presets
from cupy_router.launcher import Launch
from cupy_router.ops import _dense_clusters as clusters
from cupy_router.ops import _dense_decode as decode
from cupy_router.ops._dense_tiling import Tiling
from cupy_router.reference import dense_router as reference
from cupy_router.tensor_map import Maps, Matrix, encode
from cupy_router.tuning import gpu_of

SHAPES = {"deepseek-v4-flash": 4096, "deepseek-v4-pro": 7168}
DTYPE = "bfloat16"
GPU = gpu_of(("cuda", 0))


# Bytes a nanosecond, from L2 to a multiprocessor while all read and while it alone does; nanoseconds of what routes.
_READ_BY_ALL, _READ_ALONE = 51.0, 113.0
_ROUTING, _ROUTING_TOKEN, _LOOKING = 800.0, 60.0, 400.0


def nanoseconds(tiling: Tiling, num_tokens: int, num_experts: int, hidden: int, itemsize: int) -> float:
    """A rough model of what differs between tilings: reading the factors, reading the partial sums, routing."""
    groups, tiles = tiling.groups(num_tokens), tiling.tiles(num_experts)
    tokens = min(tiling.tokens, num_tokens)
    block = -(-hidden // (32 * tiling.parts)) * 32 * itemsize * (tiling.experts_per_block + tokens)
    read = block * -(-groups * tiles * tiling.parts // GPU.multiprocessors) / _READ_BY_ALL
    routed = min(tiling.share or tokens, tokens)
    partials = tiling.parts * tiles * tiling.experts_per_block * routed * 4 / _READ_ALONE
    return read + partials + _ROUTING + _ROUTING_TOKEN * routed + (_LOOKING if tiling.share else 0.0)


def tilings(num_tokens: int, num_experts: int, hidden: int, most: int) -> list[Tiling]:
    """The chosen tiling, those of 8 and 16 tokens, which need fewer kernels for all numbers, FMA for few tokens, and by
    estimate the best with up to two blocks a multiprocessor. For more than 16 tokens also the cluster for few, and for
    more than 64 all whose clusters run at once."""
    if num_tokens > decode.MAX_TOKENS:
        return [tiling for tiling, at_once in _clusters(num_experts, hidden) if num_tokens <= at_once]
    chosen = decode.choose(GPU, num_tokens, num_experts, hidden, DTYPE, DTYPE)
    found = [chosen]
    if num_tokens > 16:
        found.append(clusters.of_few(GPU, num_experts, hidden, 1)[0])
    for tokens in (8, 16):
        if num_tokens < tokens:
            found.append(decode.choose(GPU, tokens, num_experts, hidden, DTYPE, DTYPE))
    if num_tokens <= 4:
        for warps, experts_per_warp in ((8, 2), (4, 4), (8, 1)):
            experts = warps * experts_per_warp
            for blocks in (GPU.multiprocessors, 2 * GPU.multiprocessors):
                parts = max(1, blocks // -(-num_experts // experts))
                found.append(Tiling(num_tokens, parts, experts, experts_per_warp, warps, tensor_cores=False))
    candidates = set(_candidates(num_tokens, num_experts)) - set(found)
    ranked = sorted(candidates, key=lambda t: nanoseconds(t, num_tokens, num_experts, hidden, 2))
    kinds: dict[tuple[int, int, int], list[Tiling]] = {}
    for tiling in ranked:  # the best of each kind first, then the second best
        kinds.setdefault((tiling.tokens, tiling.experts_per_block, tiling.share), []).append(tiling)
    found += [tiling for row in zip_longest(*kinds.values()) for tiling in row if tiling is not None]
    return found[:most]


def _candidates(num_tokens: int, num_experts: int) -> Iterator[Tiling]:
    for tokens in {num_tokens, min(num_tokens, 8), min(num_tokens, 16), min(num_tokens, 32)}:
        groups = -(-num_tokens // tokens)
        shares = (0,) if tokens > 16 and groups > 1 else (0, 1, 2) if groups == 1 and tokens > 1 else (0,)
        for experts in (16, 32, 64):
            tiles = -(-num_experts // experts)
            for share in shares:
                for blocks in (GPU.multiprocessors // 2, GPU.multiprocessors, 2 * GPU.multiprocessors):
                    parts = blocks // (groups * tiles)
                    for warps in (4, 8, 16):
                        for experts_per_warp in (16, 32):
                            along = experts // experts_per_warp
                            if not 1 <= parts <= 32 or along == 0 or warps % along:
                                continue
                            tiling = Tiling(tokens, parts, experts, experts_per_warp, warps, share)
                            if tiling.shared_bytes(num_experts) <= 46 * 1024 and (share or tokens <= 16):
                                yield tiling


def _clusters(num_experts: int, hidden: int) -> list[tuple[Tiling, int]]:
    """Tilings of the kernel for many tokens, and the most tokens for which all clusters run at once."""
    shapes = itertools.product((32, 64, 72, 128), (64, 128, 192, 256), (1, 2), (8, 4, 2, 1))
    table = replace(GPU.table.decode, clusters=tuple(shapes))
    found = dict(clusters.tilings(GPU, table, num_experts, hidden, 1))
    return [pair for pair in found.items() if pair[0].token_rows // pair[0].token_warpgroups in (32, 64, 72, 128)]


def compiled(method: RoutingMethod, num_tokens: int, hidden: int, tiling: Tiling) -> Any:
    """The plan and its function; also run by other processes, which leave the machine code in CuPy's disk cache."""
    plan = decode.launch_for(
        GPU, method, DTYPE, DTYPE, num_tokens, hidden, aligned=True, dense=True, given=["bias"], tiling=tiling,
        batch_invariant=tiling.stages > 0,
    )  # fmt: skip
    return plan, compiler.compile(plan.file, plan.file, plan.macros, ("cuda", 0))


def _compile_only(job: tuple[RoutingMethod, int, int, Tiling]) -> None:
    with suppress(Exception):  # told when it is measured
        compiled(*job)


def to_host(array: Any) -> np.ndarray:
    """A copy of a bfloat16 array, by way of its bits."""
    bits: np.ndarray = cupy.asnumpy(array.view(cupy.uint16))
    return bits.view(ml_dtypes.bfloat16)


class Case:
    """The arrays of one shape, and the check of what a tiling gives for them."""

    def __init__(self, method: RoutingMethod, num_tokens: int, hidden: int) -> None:
        self.method, self.num_tokens, self.hidden = method, num_tokens, hidden
        shape = (method.num_experts, hidden)

        def make() -> Any:
            return (cupy.random.standard_normal(shape, dtype=cupy.float32) / hidden**0.5).astype(DTYPE)

        self.x = cupy.random.standard_normal((num_tokens, hidden), dtype=cupy.float32).astype(DTYPE)
        self.weights = harness.cold_inputs(make, 2 * method.num_experts * hidden)
        self.bias = cupy.random.standard_normal(method.num_experts, dtype=cupy.float32)
        self.out = tuple(cupy.zeros((num_tokens, method.top_k), dtype) for dtype in (cupy.float32, cupy.int32))
        self.counters = cupy.zeros(decode.GROUP_COUNTERS, cupy.uint32)
        x, weight = to_host(self.x), to_host(self.weights[0])
        self.want = reference.dense_router(x, weight, method, self.bias.get())

    def measure(self, tiling: Tiling) -> dict[str, Any]:
        plan, function = compiled(self.method, self.num_tokens, self.hidden, tiling)
        self.counters.fill(0)  # whatever the variant before did
        k = self.method.top_k
        fixed = decode.fixed_arguments(self.method, self.num_tokens, self.hidden, self.hidden, k, k)
        maps = decode.MAPS if any(plan.tile_rows) else ()
        launch = Launch(function, plan.grid, plan.block, (*decode.VARYING, *maps), fixed, plan.shared_bytes)
        map_of = [
            Maps(encode, Matrix(rows, self.hidden, 2 * self.hidden, of_tile))
            for rows, of_tile in zip((self.num_tokens, self.method.num_experts), plan.tile_rows, strict=True)
        ]
        arrays = {"x": self.x, "bias": self.bias, "weights": self.out[0], "indices": self.out[1]}
        arrays |= {"counters": self.counters, "partials": cupy.empty(plan.partials, cupy.float32)}

        def call(i: int, weights: Any) -> None:
            given = arrays | {"weight": weights[i % len(weights)]}
            pointers = [given[name].data.ptr if name in given else 0 for name in decode.VARYING[:-1]]
            tiles = [of(given[name].data.ptr) for of, name in zip(map_of, ("x", "weight"), strict=True) if maps]
            launch(cupy.cuda.get_current_stream().ptr, [*pointers, -1, *tiles])

        warm, spread = harness.graph_microseconds(lambda i: call(i, self.weights[:1]))
        cold, _ = harness.graph_microseconds(lambda i: call(i, self.weights), calls=max(50, len(self.weights)))
        return {"us": warm, "cold": cold, "spread": spread, "blocks": plan.grid, "ok": self._check(call)}

    def by_cublas(self) -> float:
        """Microseconds of cuBLAS with a second launch."""
        out = Routing(*self.out)

        def call(_: int) -> None:
            dense_router(self.x, self.weights[0], self.method, bias=self.bias, path="prefill", out=out)

        return harness.graph_microseconds(call)[0]

    def _check(self, call: Any) -> str:
        for array in self.out:
            array.fill(0)
        call(0, self.weights[:1])
        weights, indices = (array.get() for array in self.out)
        for _ in range(200):
            call(0, self.weights[:1])
        again = [array.get() for array in self.out]
        repeatable = (again[0] == weights).all() and (again[1] == indices).all() and not self.counters.any()
        wrong = int((indices != self.want[1]).any(-1).sum())
        same = indices == self.want[1]
        error = np.max(np.abs(weights - self.want[0])[same] / self.want[0][same], initial=0)
        return f"{'' if repeatable else 'NOT REPEATABLE '}{wrong} rows differ, weights {error:.0e}"


def product(tiling: Tiling) -> str:
    """How a tiling multiplies."""
    if not tiling.stages:
        return "mma" if tiling.tensor_cores else "fma"
    along = f"{tiling.cluster_parts} parts of hidden, {tiling.cluster_tiles} tiles of experts in a cluster"
    return f"wgmma, {tiling.token_warpgroups} along tokens, {along}, {tiling.stages} stages of {tiling.stage_columns}"


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--tokens", type=int, nargs="+", default=[1, 4, 16, 64])
    parser.add_argument("--variants", type=int, default=20)
    options = parser.parse_args()
    begin = time.perf_counter()
    jobs = [
        (presets()[preset], n, hidden, tiling)
        for preset, hidden in SHAPES.items()
        for n in options.tokens
        for tiling in tilings(n, presets()[preset].num_experts, hidden, options.variants)
    ]
    with ProcessPoolExecutor(12, mp_context=multiprocessing.get_context("spawn")) as pool:
        list(pool.map(_compile_only, jobs, chunksize=2))
    print(f"{len(jobs)} variants compiled in {time.perf_counter() - begin:.0f} s", flush=True)
    case: Case | None = None
    rows: list[tuple[float, str]] = []
    for i, (method, n, hidden, tiling) in enumerate(jobs):
        if case is None or (case.method, case.num_tokens, case.hidden) != (method, n, hidden):
            case = Case(method, n, hidden)
            rows = []
            print(f"\nE {method.num_experts}  H {hidden}  n {n}   (> marks the tiling that is used)")
            if n > decode.MAX_TOKENS:
                print(f"cuBLAS and a second launch: {case.by_cublas():.2f}")
            print("    warm   cold spread blocks   est tokens  parts experts/block /warp warps share  product")
        t, mark = tiling, ">" if not rows else " "
        try:
            m = case.measure(tiling)
            estimate = nanoseconds(t, n, method.num_experts, hidden, 2) / 1000
            text = (
                f"{mark} {m['us']:6.2f} {m['cold']:6.2f} {m['spread']:6.2f} {m['blocks']:6} {estimate:5.2f}"
                f" {t.tokens:6} {t.parts:6} {t.experts_per_block:13} {t.experts_per_warp:5} {t.warps:5} {t.share:5}"
                f"  {product(t)}  {m['ok']}"
            )
            rows.append((m["us"], text))
        except Exception as error:  # one variant that does not run is no reason to lose the others
            rows.append((1e9, f"{mark} failed: {tiling}: {error}"))
        if i + 1 == len(jobs) or jobs[i + 1][:3] != (method, n, hidden):
            print("\n".join(text for _, text in sorted(rows)), flush=True)
    print(f"{time.perf_counter() - begin:.0f} s")


if __name__ == "__main__":
    main()
