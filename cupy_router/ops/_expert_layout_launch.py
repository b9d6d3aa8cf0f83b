# SPDX-License-Identifier: Apache-2.0
"""The kernels of expert_layout and their launch shapes."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import Any

from cupy_router import compiler, scratch
from cupy_router.arrays import ITEM_SIZES
from cupy_router.launcher import Launch
from cupy_router.ops._cached import NUMBER, Kernel, Work, launch_with
from cupy_router.ops._declared import Arrays
from cupy_router.ops._layout import layout_sizes
from cupy_router.ops._op import Op
from cupy_router.tuning import Gpu

MAX_EXPERTS = 1024  # in one tile, unless the pairs are laid out in three launches
MAX_TILE = 512  # experts, in three launches
CLUSTER = 8  # blocks
_ADDED_EXPERTS = 64  # that a block of expert_layout_shares_add_up adds up over all shares
_COUNTERS = 1024  # words of scratch memory for a counter and a flag of each share
_SHARED_BYTES = 47 * 1024  # static, of a block

Macros = dict[str, int]
Fixed = dict[str, int]


@dataclass(frozen=True)
class Plan:
    """How pairs are laid out.

    path: "few": every warp compares all pairs; "block": one block; "cluster": one cluster of blocks; "grid": one launch
        of blocks that wait for each other; "shares": three launches.
    threads: of a block.
    pairs: of a block, at most.
    tile: experts of a block, in three launches.
    """

    path: str
    threads: int
    pairs: int
    tile: int = 0

    def shares(self, num_pairs: int) -> int:
        """Return the number of shares that the pairs are divided into."""
        return max(1, -(-num_pairs // self.pairs))


def choose(gpu: Gpu, num_pairs: int, num_local: int, alignment: int) -> Plan:
    """Return the plan for a number of pairs and of experts in question."""
    tuned = gpu.table.layout
    if 0 < num_local <= MAX_EXPERTS:
        if num_pairs <= tuned.few_pairs:
            return Plan("few", tuned.few_threads, max(1, num_pairs))
        if num_pairs <= tuned.block_pairs:
            threads = next((t for pairs, t in tuned.block_threads if num_pairs <= pairs), tuned.largest_block)
            threads = max(threads, min(tuned.largest_block, 32 * -(-num_local // 64)))  # two experts each
            return Plan("block", threads, threads * max(1, -(-num_pairs // threads)))
        if gpu.capability >= (9, 0) and num_pairs <= CLUSTER * tuned.cluster_share_pairs:
            threads, pairs = tuned.share_threads, tuned.share_threads
            while pairs * CLUSTER < num_pairs:
                pairs *= 2
            if _shared_bytes(threads, pairs, num_local, alignment) <= _SHARED_BYTES:
                return Plan("cluster", threads, pairs)
        for most_shares, pairs, threads in tuned.grid:
            for fewer in (threads, 256):
                shares = min(gpu.scaled(most_shares), gpu.multiprocessors, fewer, _COUNTERS - 1)
                fits = _shared_bytes(fewer, pairs, num_local, alignment) <= _SHARED_BYTES
                if fits and num_pairs <= shares * pairs:
                    return Plan("grid", fewer, pairs)
    tile = max(1, min(num_local, MAX_TILE))
    pairs, threads = next(
        step for step in tuned.steps if _shared_bytes(step[1], step[0], tile, alignment) <= _SHARED_BYTES
    )
    return Plan("shares", threads, pairs, tile)


def _shared_bytes(threads: int, pairs: int, num_local: int, alignment: int) -> int:
    """Return the shared memory of a block of a cluster or a grid: see the structs of kernels/layout."""
    warps, row = threads // 32, -(-num_local // 8) * 8
    masks = 4 * warps * (row + 4) if warps * row <= 6144 else 16 * warps
    sums = 32 * max(1, 4 * threads // row) * row // 4
    padding = 8 * num_local if alignment > 1 else 8
    return max(masks, sums) + 2 * warps * (row + 8) + 4 * pairs + 4 * row + padding + 2 * row


def is_single(options: Any, arrays: Arrays, gpu: Gpu) -> bool:
    """Return whether one launch without scratch memory lays the pairs out."""
    num_tokens, top_k = arrays.indices.shape
    return choose(gpu, num_tokens * top_k, options.num_counted, options.alignment).path in ("few", "block", "cluster")


def work(op: Op, options: Any, arrays: Arrays, gpu: Gpu) -> Kernel | Work:
    """Return the kernels of a call."""
    num_tokens, top_k = arrays.indices.shape
    num_pairs = num_tokens * top_k
    plan = choose(gpu, num_pairs, options.num_counted, options.alignment)
    capacity = layout_sizes(options, options.num_counted, num_tokens, top_k)["capacity"]
    macros = _macros(op, options, arrays) | {"THREADS": plan.threads, "MAX_PAIRS": plan.pairs}
    fixed = _fixed(options, arrays, capacity)
    if plan.path == "few":
        blocks = -(-options.num_counted // plan.threads)
        return Kernel("expert_layout_few", "expert_layout_few", macros, blocks, plan.threads, {**fixed})
    if plan.path == "block":
        padding = max(0, capacity - num_pairs) * (1 if arrays.order is None or arrays.row_experts is None else 2)
        blocks = min(gpu.multiprocessors, 1 + padding // gpu.table.layout.padding_rows)
        return Kernel("expert_layout", "expert_layout", macros, blocks, plan.threads, {**fixed})
    if plan.path == "cluster":
        return Kernel("expert_layout_cluster", "expert_layout_cluster", macros, CLUSTER, plan.threads, {**fixed})
    if plan.path == "grid":
        return _Grid(op, plan, arrays, macros, fixed)
    return _Shares(op, plan, options.num_counted, arrays, macros, fixed)


def _macros(op: Op, options: Any, arrays: Arrays) -> Macros:
    """Return the constants that all kernels share."""
    indices, positions, load = arrays.indices, arrays.positions, arrays.load
    top_k = indices.shape[1]
    wanted = {f"LAYOUT_{name.upper()}": int(getattr(arrays, name) is not None) for name in op.result_names}
    return {
        "ID_BYTES": ITEM_SIZES[indices.dtype],
        "ID_UNSIGNED": int(indices.dtype.startswith("u")),
        "NUM_EXPERTS": options.num_experts,
        "LOCAL_EXPERTS": options.num_counted,
        "TOP_K": max(top_k, 1),
        "HAS_MAP": int(arrays.expert_map is not None),
        "DENSE_INDICES": int(indices.row_stride == top_k),
        "HAS_NUM_VALID": int(arrays.num_valid is not None),
        "LAYOUT_DENSE": int(positions is None or positions.row_stride == top_k),
        "LAYOUT_ALIGNMENT": options.alignment,
        "LAYOUT_LOAD_BYTES": 0 if load is None else ITEM_SIZES[load.dtype],
    } | wanted


def _fixed(options: Any, arrays: Arrays, capacity: int) -> Fixed:
    """Return the parameters after `num_valid_value`."""
    (num_tokens, top_k), positions = arrays.indices.shape, arrays.positions
    return {
        "num_pairs": num_tokens * top_k,
        "first_expert": 0 if options.experts is None else options.experts[0],
        "capacity": capacity,
        "pad": options.pad,
        "indices_stride": arrays.indices.row_stride,
        "positions_stride": top_k if positions is None else positions.row_stride,
    }


class _Grid:
    """One launch of blocks that wait for each other, with scratch memory of the stream on which it is called."""

    def __init__(self, op: Op, plan: Plan, arrays: Arrays, macros: Macros, fixed: Fixed) -> None:
        self._device, shares = arrays.indices.device, plan.shares(fixed["num_pairs"])
        kernel = Kernel("expert_layout_grid", "expert_layout_grid", macros, shares, plan.threads, {**fixed})
        self._launch = launch_with((*op.names, *op.result_names, "counters", "table", NUMBER), kernel, self._device)
        self._scratch_bytes = 4 * _COUNTERS + 16 * -(-macros["LOCAL_EXPERTS"] // 8) * shares
        self.function = self._launch.function

    def __call__(self, stream: int, varying: Sequence[int | float]) -> None:
        counters = scratch.buffer(self._device, stream, "expert_layout grid", self._scratch_bytes)
        self._launch(stream, (*varying[:-1], counters, counters + 4 * _COUNTERS, varying[-1]))


class _Shares:
    """Three kernels, which count, add up and place, with scratch memory of the stream on which they are called."""

    function: compiler.Function

    def __init__(
        self, op: Op, plan: Plan, num_local: int, arrays: Arrays, macros: Macros, fixed: Fixed
    ) -> None:  # fmt: skip
        self._device, self._num_inputs = arrays.indices.device, len(op.names)
        shares, tiles = plan.shares(fixed["num_pairs"]), max(1, -(-num_local // plan.tile))
        words = tiles * 4 * -(-plan.tile // 8)  # of two experts; a tile has whole words of 16 bytes
        groups = -(-2 * words // _ADDED_EXPERTS)
        macros |= {"TILE": plan.tile}
        grid, block = shares * tiles, plan.threads
        counted = {name: fixed[name] for name in ("num_pairs", "first_expert", "indices_stride")}
        sums = ("before", "all", "group_blocks")
        self._count = self._launch("count", macros, grid, block, (*op.names, "table", NUMBER), counted)
        self._add_up = self._launch("add_up", macros, groups, 256, ("table", *sums), {"num_shares": shares})
        outputs = (*op.names, *op.result_names, *sums, NUMBER)
        self._place = self._launch("place", macros, grid, block, outputs, fixed)
        self.function = self._place.function
        table_bytes = 4 * words * shares
        self._starts = [0, *accumulate(_whole_lines(size) for size in (table_bytes, 2 * table_bytes, 8 * words))]
        self._scratch_bytes = self._starts[-1] + 4 * groups

    def _launch(
        self, step: str, macros: Macros, grid: int, block: int, varying: tuple[str, ...], fixed: Fixed
    ) -> Launch:  # fmt: skip
        file = "expert_layout_shares"
        return launch_with(varying, Kernel(file, f"{file}_{step}", macros, grid, block, {**fixed}), self._device)

    def __call__(self, stream: int, varying: Sequence[int | float]) -> None:
        start = scratch.buffer(self._device, stream, "expert_layout shares", self._scratch_bytes)
        table, *sums = (start + offset for offset in self._starts)
        *arrays, number = varying
        self._count(stream, (*arrays[: self._num_inputs], table, number))
        self._add_up(stream, (table, *sums))
        self._place(stream, (*arrays, *sums, number))


def _whole_lines(num_bytes: int) -> int:
    return -(-num_bytes // 128) * 128
