# SPDX-License-Identifier: Apache-2.0
"""The kernels of expert_layout and their launch shapes."""

from __future__ import annotations

from collections.abc import Sequence
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

BLOCK, SHARES = "expert_layout", "expert_layout_shares"
MAX_BLOCK_EXPERTS = 1024  # of a layout by one block; the counts of each warp lie in static shared memory
MAX_TILE = 512  # experts whose pairs a block places
_ADDED_EXPERTS = 64  # that a block of expert_layout_shares_add_up adds up over all shares

Macros = dict[str, int]
Fixed = dict[str, int]


def is_single(options: Any, arrays: Arrays, gpu: Gpu) -> bool:
    """Return whether one block, or several that count the same pairs, lay them out in one launch."""
    num_tokens, top_k = arrays.indices.shape
    return bool(num_tokens * top_k <= gpu.table.layout.block_pairs and 0 < options.num_counted <= MAX_BLOCK_EXPERTS)


def work(op: Op, options: Any, arrays: Arrays, gpu: Gpu) -> Kernel | Work:
    """Return the kernels of a call."""
    num_tokens, top_k = arrays.indices.shape
    num_pairs, num_local = num_tokens * top_k, options.num_counted
    capacity = layout_sizes(options, num_local, num_tokens, top_k)["capacity"]
    macros, fixed = _macros(op, options, arrays), _fixed(options, arrays, capacity)
    tuned = gpu.table.layout
    if is_single(options, arrays, gpu):
        threads = next((threads for pairs, threads in tuned.block_threads if num_pairs <= pairs), tuned.largest_block)
        rounds = -(-num_pairs // threads) or 1
        macros |= {"THREADS": threads, "MAX_PAIRS": threads * rounds}
        blocks = min(gpu.multiprocessors, 1 + max(0, capacity - num_pairs) // tuned.padding_rows)
        return Kernel(BLOCK, BLOCK, macros, blocks, threads, {**fixed})
    return _Shares(op, options, arrays, gpu, macros, fixed)


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


class _Shares:
    """Three kernels, which count, add up and place, with scratch memory of the stream on which they are called."""

    function: compiler.Function

    def __init__(self, op: Op, options: Any, arrays: Arrays, gpu: Gpu, macros: Macros, fixed: Fixed) -> None:
        tuned, num_local = gpu.table.layout, options.num_counted
        self._device, self._num_inputs = arrays.indices.device, len(op.names)
        tile = max(1, min(num_local, MAX_TILE))
        shares, tiles = -(-fixed["num_pairs"] // tuned.share_pairs) or 1, -(-num_local // tile) or 1
        words = tiles * 4 * -(-tile // 8)  # of two experts; a tile has whole words of 16 bytes
        groups = -(-2 * words // _ADDED_EXPERTS)
        macros |= {"THREADS": tuned.share_threads, "MAX_PAIRS": tuned.share_pairs, "TILE": tile}
        grid, block = shares * tiles, tuned.share_threads
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
        return launch_with(varying, Kernel(SHARES, f"{SHARES}_{step}", macros, grid, block, dict(fixed)), self._device)

    def __call__(self, stream: int, varying: Sequence[int | float]) -> None:
        start = scratch.buffer(self._device, stream, "expert_layout", self._scratch_bytes)
        table, *sums = (start + offset for offset in self._starts)
        *arrays, number = varying
        self._count(stream, (*arrays[: self._num_inputs], table, number))
        self._add_up(stream, (table, *sums))
        self._place(stream, (*arrays, *sums, number))


def _whole_lines(num_bytes: int) -> int:
    return -(-num_bytes // 128) * 128
