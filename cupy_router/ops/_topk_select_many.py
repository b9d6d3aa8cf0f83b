# SPDX-License-Identifier: Apache-2.0
"""Macros, grid and block of the kernels for more long rows than multiprocessors.

These are kernels/topk_select_held.cu, where a multiprocessor holds several rows, and kernels/topk_select_many.cu.
"""

from __future__ import annotations

from math import log1p, sqrt
from typing import NamedTuple

from cupy_router.ops import _row_lanes as row_lanes
from cupy_router.ops._cached import Kernel
from cupy_router.tuning import Gpu, Steps

MANY, HELD = "topk_select_many", "topk_select_held"

_OPT_IN = 48 * 1024  # with more shared memory, a kernel has to opt in
_STATIC_BYTES = 6 * 1024
_STEP = 256  # of capacities, so that not every shape is another specialisation
_ROW_STEP = 2048  # of the bytes of held rows, likewise
_KEYS = 8  # of a thread, each the best of a group
_COPIES_FROM = (8, 0)  # the compute capability from which on copies to shared memory are asynchronous


class ManyShape(NamedTuple):
    """Launch shape: see the constants of the same names in the kernel."""

    block: int
    blocks: int
    capacity: int
    vectors: int

    def kernel(self, dtype: str, order: str, num_rows: int, numbers: dict[str, int | float]) -> Kernel:
        """Return the kernel for `num_rows` rows. numbers: its fixed parameters."""
        num_columns = int(numbers["num_columns"])
        macros = {"VECTORS": self.vectors, "FITS": int(num_columns <= self.capacity)}
        shared = entry_bytes(dtype, num_columns, order != "any") * self.capacity + 64
        return _kernel(MANY, self, macros, shared, dtype, order, num_rows, numbers)


class HeldShape(NamedTuple):
    """Launch shape: see the constants of the same names in the kernel."""

    block: int
    blocks: int
    capacity: int
    row_bytes: int

    def kernel(self, dtype: str, order: str, num_rows: int, numbers: dict[str, int | float]) -> Kernel:
        """Return the kernel for `num_rows` rows. numbers: its fixed parameters."""
        shared = self.shared_bytes(dtype, int(numbers["num_columns"]), order != "any")
        return _kernel(HELD, self, {"ROW_BYTES": self.row_bytes}, shared, dtype, order, num_rows, numbers)

    def shared_bytes(self, dtype: str, num_columns: int, sorts: bool) -> int:
        """Return the dynamic shared memory: the row or, in its place, what sorting needs; and the columns of a list."""
        sorting = entry_bytes(dtype, num_columns, sorts) * self.capacity + 64 if sorts else 0
        return max(self.row_bytes + 16, sorting) + 2 * self.capacity


def _kernel(
    name: str, shape: ManyShape | HeldShape, macros: dict[str, int], shared_bytes: int, dtype: str, order: str,
    num_rows: int, numbers: dict[str, int | float],
) -> Kernel:  # fmt: skip
    """Return a kernel with this much dynamic shared memory, of its own macros and those that both have."""
    macros = macros | {
        "DTYPE": row_lanes.DTYPE_CODES[dtype],
        "BLOCK": shape.block,
        "BLOCKS": shape.blocks,
        "CAPACITY": shape.capacity,
        "SORTS": int(order != "any"),
        "SHORT": int(is_short(dtype, int(numbers["num_columns"]))),
    }
    numbers = {"by_column": int(order == "column")} | numbers
    shared = opted_in(shared_bytes, _STATIC_BYTES)
    return Kernel(name, name, macros, num_rows, shape.block, numbers, shared_bytes=shared)


def opted_in(shared: int, static: int) -> int:
    """Return the dynamic shared memory for which the launcher opts in if dynamic and static together need that."""
    return max(shared, _OPT_IN + 16) if shared + static > _OPT_IN else shared


def is_short(dtype: str, num_columns: int) -> bool:
    """Return whether key and column of a score fit in 32 bits."""
    return dtype != "float32" and num_columns <= 1 << 16


def entry_bytes(dtype: str, num_columns: int, sorts: bool) -> int:
    """Return the bytes of dynamic shared memory for each entry of a list, and for sorting it."""
    return (4 if is_short(dtype, num_columns) else 8) + (8 if sorts else 0)


def choose_held(gpu: Gpu, num_rows: int, num_columns: int, k: int, dtype: str, sorts: bool) -> HeldShape | None:
    """Return the launch shape, or None.

    There is none if rows are too few, too short or too long, k is too large, a multiprocessor cannot hold two rows, or
    copies to shared memory would not be asynchronous.
    """
    table = gpu.table.long_rows
    size = row_lanes.SIZES[dtype]
    row_bytes = -(-num_columns * size // _ROW_STEP) * _ROW_STEP
    groups = _KEYS * table.held_block
    most = k * 9 / 8 / groups  # share of the groups whose best reaches the threshold, see held_row.cuh
    most_bytes = table.held_row_bytes[size // 4]
    if gpu.capability < _COPIES_FROM or row_bytes > most_bytes or most > table.held_most_groups:
        return None
    longest = -groups * log1p(-most)  # the list of a row in random order
    capacity = _STEP * -(-int(longest + 4 * sqrt(longest)) // _STEP)
    shape = HeldShape(table.held_block, 1, capacity, row_bytes)
    at_once = gpu.shared_bytes // (shape.shared_bytes(dtype, num_columns, sorts) + _STATIC_BYTES)
    if num_columns <= capacity or num_rows <= gpu.multiprocessors or at_once < 2:
        return None
    return shape._replace(blocks=min(at_once, table.held_most_blocks))


def choose_many(gpu: Gpu, num_rows: int, num_columns: int, k: int, dtype: str, sorts: bool) -> ManyShape | None:
    """Return the launch shape; None if rows are too few or k is too large."""
    table = gpu.table.long_rows
    size = row_lanes.SIZES[dtype]
    if k > table.many_rows_max_winners:
        return None
    few_winners = k <= table.few_winners
    steps: Steps = table.many_rows_many_winners
    if few_winners:
        steps = table.many_short_rows if num_columns * size <= table.short_row_bytes else table.many_rows
    for threads, blocks in steps:
        if num_rows > (blocks - 1) * gpu.multiprocessors:
            room = (gpu.shared_bytes // blocks - _STATIC_BYTES) // (entry_bytes(dtype, num_columns, sorts) + 1)
            sample = table.sample_few_winners if few_winners else table.sample_many_winners
            shape = _with_list(ManyShape(threads, blocks, room // _STEP * _STEP, 1), num_columns, k, size, sample)
            if shape is not None:
                return shape
    return None


def _with_list(largest: ManyShape, num_columns: int, k: int, size: int, sample: int) -> ManyShape | None:
    """Return the launch shape with the capacity and the sample that it needs, or None.

    largest: block, blocks on a multiprocessor, and the most entries that a list may have.
    sample: number of scores; more are sampled if the list would be too long otherwise.
    """
    for vectors in (1, 2, 4, 8):
        scores = largest.block * vectors * 16 // size
        enough = scores >= sample or 16 * scores > num_columns  # twice as many would be more than an eighth of the row
        _, longest = list_lengths(k, num_columns, scores)
        capacity = _STEP * max(1, -(-min(longest, num_columns) // _STEP))
        if enough and capacity <= largest.capacity:
            return largest._replace(capacity=capacity, vectors=vectors)
    return None


def list_lengths(k: int, num_columns: int, sample: int) -> tuple[int, int]:
    """Return the expected number of scores that pass a sampled threshold, and that number plus four deviations.

    It follows from long_rows/sample.cuh, and is the same on every GPU.
    """
    hits = sample * min(k / max(num_columns, 1), 1.0)
    reached = (hits + 5 * sqrt(hits) + 3) * 9 / 8
    share = num_columns / sample
    return int(reached * share), int((reached + 4 * sqrt(reached)) * share)
