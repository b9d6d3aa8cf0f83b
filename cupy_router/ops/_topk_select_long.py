# SPDX-License-Identifier: Apache-2.0
"""Which kernel selects from long rows, and macros, grid and block of kernels/topk_select_long.cu.

For a few rows, it is kernels/topk_select_cluster.cu; for more rows than multiprocessors, kernels/topk_select_held.cu
or kernels/topk_select_many.cu; if k is too large for a list in shared memory, kernels/topk_select_large.cu.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

from cupy_router import compiler, scratch
from cupy_router.launcher import MAX_GRID
from cupy_router.ops import _row_lanes as row_lanes
from cupy_router.ops import _topk_select_cluster as cluster
from cupy_router.ops._cached import Kernel, launch_with
from cupy_router.ops._declared import Arrays
from cupy_router.ops._topk_select_cluster import ClusterShape
from cupy_router.ops._topk_select_many import HeldShape, ManyShape, choose_held, choose_many, list_lengths
from cupy_router.tuning import Gpu, Steps

LONG, LARGE = "topk_select_long", "topk_select_large"
INPUTS = ("scores", "lengths", "starts", "index_map")
OUTPUTS = ("values", "indices")
_SCRATCH = ("counters", "piece_counts", "lists")

_LARGE_BLOCK = 1024

_COUNTER_BYTES = 1024  # the most that a launch needs, so that the lists of every launch start at the same offset
_ENTRY_BYTES, _STATIC_BYTES = 12, 6 * 1024
_MAX_CAPACITY = 16384


class LaunchShape(NamedTuple):
    """Launch shape: see the constants of the same names in the kernel. Each row has `pieces`, a block for each."""

    block: int
    blocks: int
    capacity: int
    vectors: int
    pieces: int

    @property
    def shared_bytes(self) -> int:
        return _ENTRY_BYTES * self.capacity + 64


def choose(
    gpu: Gpu, num_rows: int, num_columns: int, k: int, dtype: str, sorts: bool = True
) -> LaunchShape | HeldShape | ManyShape | ClusterShape | None:
    """Return the launch shape; None if k is too large for a list in shared memory. `sorts`: not for order "any"."""
    by_clusters = cluster.choose(gpu, num_rows, num_columns, k, dtype)
    if by_clusters is not None:
        return by_clusters
    held = choose_held(gpu, num_rows, num_columns, k, dtype, sorts)
    many = held or choose_many(gpu, num_rows, num_columns, k, dtype, sorts)
    if many is not None:
        return many
    table = gpu.table.long_rows
    size = row_lanes.SIZES[dtype]
    row_bytes = num_columns * size
    pieces = max(1, min(gpu.multiprocessors // num_rows, table.max_pieces, row_bytes // table.min_piece_bytes))
    if row_bytes - row_bytes // pieces < table.min_saved_bytes or 4 * num_rows > _COUNTER_BYTES:
        pieces = 1
    few_winners = k <= table.few_winners
    if pieces > 1:
        blocks: Steps = ((table.split_block_few if few_winners else table.split_block_many, 1),)
    else:
        blocks = table.shapes
    shape = None
    for threads, blocks_at_once in blocks:
        empty = LaunchShape(threads, blocks_at_once, 0, 0, pieces)
        shape = _with_list(empty, num_columns, k, size, gpu.shared_bytes)
        if shape is not None and (shape.vectors, shape.capacity) == (1, 4 * threads):
            break
    return shape


def _with_list(shape: LaunchShape, num_columns: int, k: int, size: int, shared_bytes: int) -> LaunchShape | None:
    """Return the shape with the shortest list for the scores above a sampled threshold, and the smallest such sample.

    Lists of 4 entries per thread are sorted fastest.
    """
    step = 4 * shape.block
    most = min(_MAX_CAPACITY, (shared_bytes - _STATIC_BYTES) // _ENTRY_BYTES) // step * step
    best = None
    for vectors in (1, 2, 4, 8):
        expected, longest = (
            min(length, num_columns) for length in list_lengths(k, num_columns, shape.block * vectors * 16 // size)
        )
        capacity = step * max(1, -(-longest // step))
        if expected <= most and (best is None or capacity < best.capacity):
            best = shape._replace(capacity=min(capacity, most), vectors=vectors)
        if capacity <= (step if vectors == 1 else 2 * step):
            break
    return best


class LongTopK:
    """A launch that uses scratch memory of the stream on which it is called."""

    def __init__(self, options: Any, arrays: Arrays, gpu: Gpu) -> None:
        scores, index_map = arrays.scores, arrays.index_map
        num_rows, num_columns = scores.shape
        indices_stride = arrays.indices.row_stride
        fixed: dict[str, int | float] = {
            "num_columns": num_columns,
            "k": options.k,
            "page_size": options.page_size,
            "scores_stride": scores.row_stride,
            "values_stride": indices_stride if arrays.values is None else arrays.values.row_stride,
            "indices_stride": indices_stride,
            "map_stride": 0 if index_map is None or index_map.shape[0] == 1 else index_map.row_stride,
        }
        macros = {"DTYPE": row_lanes.DTYPE_CODES[scores.dtype]}
        shape = choose(gpu, num_rows, num_columns, options.k, scores.dtype, options.order != "any")
        self._device, self._pieces, self._scratch_bytes = scores.device, 0, 0
        self._launches = []
        if isinstance(shape, ClusterShape):
            kernel = cluster.kernel(shape, options.order, num_rows, macros, fixed)
            self._launches.append(launch_with((*INPUTS, *OUTPUTS), kernel, scores.device))
        elif shape is None:
            numbers = {"num_rows": num_rows, "sorted": int(options.order == "value")} | fixed
            kernel = Kernel(LARGE, LARGE, macros, min(num_rows, MAX_GRID), _LARGE_BLOCK, numbers)
            self._launches.append(launch_with((*INPUTS, *OUTPUTS), kernel, scores.device))
        elif isinstance(shape, HeldShape | ManyShape):
            for first in range(0, num_rows, MAX_GRID):
                numbers = {"rows_ahead": gpu.multiprocessors * shape.blocks, "first_row": first} | fixed
                rows = min(num_rows - first, MAX_GRID)
                kernel = shape.kernel(scores.dtype, options.order, rows, numbers)
                self._launches.append(launch_with((*INPUTS, *OUTPUTS), kernel, scores.device))
        else:
            list_capacity = 0
            if shape.pieces > 1:
                self._pieces = num_rows * shape.pieces
                list_capacity = min(-(-num_columns // shape.pieces) + 64, shape.capacity + options.k)
                self._scratch_bytes = _COUNTER_BYTES + 8 * self._pieces * (1 + list_capacity)
            macros |= {
                "BLOCK": shape.block,
                "BLOCKS": shape.blocks,
                "CAPACITY": shape.capacity,
                "VECTORS": shape.vectors,
                "SPLIT": int(shape.pieces > 1),
                "FITS": int(shape.pieces == 1 and num_columns <= shape.capacity),
            }
            ahead = gpu.multiprocessors * shape.blocks  # rows that are in flight at once
            for first in range(0, num_rows, MAX_GRID):
                grid = min(num_rows - first, MAX_GRID) * shape.pieces
                numbers = {
                    "pieces": shape.pieces,
                    "list_capacity": list_capacity,
                    "rows_ahead": ahead,
                    "first_row": first,
                    "sorted": int(options.order != "column"),
                } | fixed
                kernel = Kernel(LONG, LONG, macros, grid, shape.block, numbers, shared_bytes=shape.shared_bytes)
                self._launches.append(launch_with((*INPUTS, *OUTPUTS, *_SCRATCH), kernel, scores.device))
        self._takes_scratch = isinstance(shape, LaunchShape)
        self.function: compiler.Function = self._launches[0].function

    def __call__(self, stream: int, varying: Sequence[int | float]) -> None:
        pointers = [*varying]
        if self._scratch_bytes:
            memory = scratch.buffer(self._device, stream, LONG, self._scratch_bytes)
            counts = memory + _COUNTER_BYTES
            pointers += (memory, counts, counts + 8 * self._pieces)
        elif self._takes_scratch:
            pointers += (0, 0, 0)
        for launch in self._launches:
            launch(stream, pointers)
