# SPDX-License-Identifier: Apache-2.0
"""Lanes and columns of a row, for kernels in which a warp, or a part of one, holds a row in registers.

A lane holds adjacent columns, or, in an interleaved row, every n-th word of n lanes.
"""

from __future__ import annotations

from cupy_router.method import RoutingMethod
from cupy_router.tuning import Gpu

MAX_COLUMNS = 1024
MAX_LANES = 32

WORD = 4  # columns that a lane reads at once, at least
SIZES = {"float32": 4, "float16": 2, "bfloat16": 2}
DTYPE_CODES = {"float32": 0, "float16": 1, "bfloat16": 2}


def fits(num_columns: int, lanes_needed: int) -> bool:
    """Return whether a warp has enough lanes, and enough registers for this many columns."""
    return num_columns <= MAX_COLUMNS and lanes_needed <= MAX_LANES


def fits_method(method: RoutingMethod) -> bool:
    """Return whether a warp can hold a row of logits and choose its experts."""
    needed = lanes_needed(method)
    if not fits(method.num_logits, needed):
        return False
    # The adjacent columns of a lane belong to two groups at most.
    size = method.num_experts // method.num_groups
    return not _grouped(method) or lanes_and_columns(method.num_logits, needed)[1] <= size


def limits(method: RoutingMethod) -> str:
    """Return the limits of `fits_method` in words."""
    of_lane = lanes_and_columns(min(method.num_logits, MAX_COLUMNS), min(lanes_needed(method), MAX_LANES))[1]
    return (
        f"{MAX_COLUMNS} experts, {MAX_LANES} columns of results and {MAX_LANES} groups, "
        f"here each of at least {of_lane} experts"
    )


def lanes_needed(method: RoutingMethod) -> int:
    """Return the fewest lanes that a row needs: one for each column of the results, and one for each group."""
    return max(method.num_columns, method.num_groups if _grouped(method) else 1)


def _grouped(method: RoutingMethod) -> bool:
    return method.top_groups < method.num_groups


def lanes_and_columns(num_columns: int, lanes_needed: int) -> tuple[int, int]:
    """Return the lanes of a row, and the adjacent columns of each lane: a multiple of 4, at most 32."""
    words = max(1, -(-num_columns // WORD))
    lanes = MAX_LANES
    while lanes // 2 >= max(words, lanes_needed):
        lanes //= 2
    return lanes, -(-words // lanes) * WORD


def aligned(pointer: int, row_stride: int, dtype: str, columns: int) -> bool:
    """Return whether every row is aligned to the words, of up to 16 bytes, in which a lane reads its columns."""
    size = min(16, (columns & -columns) * SIZES[dtype])
    return pointer % size == 0 and row_stride * SIZES[dtype] % size == 0


def few(gpu: Gpu, num_rows: int) -> bool:
    """Return whether there are so few rows that latency, not throughput, decides the time."""
    return num_rows <= gpu.scaled(gpu.table.rows.few_rows)


def interleaved_lanes(
    gpu: Gpu, num_rows: int, num_columns: int, needed: int, scored: bool, sixteen_bits: bool = False
) -> int:
    """Return the lanes over which to interleave a row; 0 if a lane should hold adjacent columns.

    For few rows, the longest chain of instructions decides the time, so each row has a warp. For many rows, the total
    number of instructions decides, so rows share a warp.

    Args:
        needed: number of lanes that hold the results.
        scored: columns are scored before they are compared.
        sixteen_bits: columns are compared as they are, two at once.
    """
    rows = gpu.table.rows
    if few(gpu, num_rows):
        very_few = not scored and num_rows <= gpu.scaled(rows.very_few_rows)
        adjacent = rows.adjacent_columns_very_few if very_few else rows.adjacent_columns_few
        if sixteen_bits:
            adjacent = rows.adjacent_columns_16_bits
        return MAX_LANES if num_columns > adjacent and needed < MAX_LANES else 0
    if num_columns <= rows.adjacent_columns_many or needed > MAX_LANES:
        return 0
    lanes = next((lanes for most, lanes in rows.lanes_by_results if needed <= most), MAX_LANES)
    while lanes < MAX_LANES and num_columns > rows.max_columns_per_lane * lanes:
        lanes *= 2
    return lanes


def group_lanes(gpu: Gpu, method: RoutingMethod) -> int:
    """Return the lanes of an interleaved row such that each holds a group or an equal part of one; 0 if impossible."""
    lanes = method.num_groups
    most = gpu.table.rows.max_group_columns_per_lane
    while lanes < max(method.num_columns, method.top_k + 1) or method.num_experts > most * lanes:
        lanes *= 2
    return lanes if MAX_LANES % lanes == 0 and method.num_experts % (WORD * lanes) == 0 else 0


def interleaved_columns(num_columns: int, lanes: int) -> int:
    """Return the number of columns of each lane in an interleaved row, a multiple of a word."""
    return -(-num_columns // (WORD * lanes)) * WORD


def grid_and_block(gpu: Gpu, num_rows: int, lanes: int, interleaved: bool = False) -> tuple[int, int]:
    """Return the number of blocks, and of threads per block, for all lanes of all rows."""
    rows = gpu.table.rows
    warps = -(-num_rows * lanes // 32)
    steps = rows.interleaved_blocks if interleaved else rows.adjacent_blocks
    block = next((block for most, block in steps if warps <= gpu.scaled(most)), rows.largest_block)
    return -(-num_rows * lanes // block), block


def min_blocks(gpu: Gpu, lanes: int, columns: int, num_columns: int, interleaved: bool, more: bool) -> int:
    """Return the fewest blocks per multiprocessor, which ptxas is told if it would spill registers to fit more; else 0.

    Args:
        columns: number of columns of each lane; `num_columns` is that of the row.
        more: a step needs more registers: the method has a logit_softcap, or experts may be given.
    """
    uneven = lanes * columns != num_columns or (lanes < MAX_LANES and columns % 8 != 0)
    return int((interleaved and (more or uneven)) or gpu.capability >= gpu.table.rows.spills_from)
