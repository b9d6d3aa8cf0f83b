# SPDX-License-Identifier: Apache-2.0
"""Macros, grid and block of kernels/topk_select_cluster.cu for a shape on a GPU."""

from __future__ import annotations

from collections.abc import Mapping
from math import prod
from typing import NamedTuple

from cupy_router.ops import _row_lanes as row_lanes
from cupy_router.ops._cached import Kernel
from cupy_router.ops._topk_select_many import opted_in
from cupy_router.tuning import Gpu

CLUSTER = "topk_select_cluster"
FROM = (9, 0)  # compute capability
ORDERS = ("any", "column", "value")  # by the number that the kernel has for each

_FIXED = ("num_columns", "k", "page_size", "scores_stride", "values_stride", "indices_stride", "map_stride")
_VECTOR, _ENTRY_BYTES = 16, 8
_CROWD = 256  # as in the kernel
_MAX_HELD = {4: 8, 2: 4}  # vectors of a thread by the size of a score: a bit for each score in a word
_STATIC_BYTES, _SENT_BYTES = 8 * 1024, 2080  # of a block; what another one sends it
_MAX_COLUMNS = 1 << 26  # vectors and columns are numbered by ints


class ClusterShape(NamedTuple):
    """Launch shape: see the constants of the same names in the kernel."""

    cluster: int
    block: int
    blocks: int
    held: int
    capacity: int
    sorted: int

    @property
    def static_bytes(self) -> int:
        """Return no less than the static shared memory of a block."""
        return _STATIC_BYTES + _SENT_BYTES * self.cluster

    def shared_bytes(self, order: str) -> int:
        """Return the dynamic shared memory of a block."""
        lists = self.cluster * self.capacity
        sort = 0 if order == "any" else _ENTRY_BYTES * self.sorted + 64
        return _ENTRY_BYTES * (lists + self.sorted + _CROWD) + sort


def choose(gpu: Gpu, num_rows: int, num_columns: int, k: int, dtype: str) -> ClusterShape | None:
    """Return the launch shape; None if another kernel is faster or has to serve."""
    table = gpu.table.long_rows_cluster
    row_bytes = num_columns * row_lanes.SIZES[dtype]
    if gpu.capability < FROM or row_bytes < table.min_row_bytes or k > table.max_winners:
        return None
    shapes = table.shapes
    if num_rows == 1 and row_bytes >= table.min_row_bytes_one_row:
        shapes = (*(shape for shape in table.shapes_one_row if 3 * k <= prod(shape)), *shapes)
    for cluster, block in shapes:
        if num_rows * cluster <= gpu.multiprocessors:
            shape = shape_with(gpu, cluster, block, num_columns, k, dtype)
            if shape is not None:
                return shape
    return None


def shape_with(
    gpu: Gpu, cluster: int, block: int, num_columns: int, k: int, dtype: str, blocks: int = 1
) -> ClusterShape | None:
    """Return the shape with such clusters and blocks, `blocks` on a multiprocessor.

    None if there are too few threads for the scores or for k, or too little shared memory.
    """
    size = row_lanes.SIZES[dtype]
    threads = cluster * block
    held = _power_of_two(-(-num_columns * size // (_VECTOR * threads)))
    # Powers of two as far as there is room, so that few specialisations serve all k. A list has room for all winners,
    # should one block have them all, and for ties in the last line.
    shape = ClusterShape(cluster, block, blocks, held, min(_power_of_two(k + 512), 2560), _power_of_two(max(k, 256)))
    fits = shape.static_bytes + shape.shared_bytes("value") <= gpu.shared_bytes // blocks
    return shape if fits and held <= _MAX_HELD[size] and 3 * k <= 2 * threads and num_columns <= _MAX_COLUMNS else None


def _power_of_two(count: int) -> int:
    """Return the smallest power of two that is not less."""
    return 1 << (count - 1).bit_length()


def kernel(
    shape: ClusterShape, order: str, num_rows: int, macros: Mapping[str, int], fixed: Mapping[str, int | float]
) -> Kernel:
    """Return the launch for these rows; `macros` and `fixed` are those that all kernels for long rows share."""
    own = {
        "CLUSTER": shape.cluster,
        "BLOCK": shape.block,
        "BLOCKS": shape.blocks,
        "HELD": shape.held,
        "CAPACITY": shape.capacity,
        "SORTED": shape.sorted,
        "ORDER": ORDERS.index(order),
    }
    numbers = {name: fixed[name] for name in _FIXED}
    grid, shared_bytes = num_rows * shape.cluster, opted_in(shape.shared_bytes(order), shape.static_bytes)
    return Kernel(CLUSTER, CLUSTER, {**macros, **own}, grid, shape.block, numbers, shared_bytes=shared_bytes)
