# SPDX-License-Identifier: Apache-2.0
"""How rows are laid over threads by the kernels in which a warp, or a part of one, holds a row in registers."""

from __future__ import annotations

from cupy_router.method import RoutingMethod

MAX_COLUMNS = 1024
MAX_LANES = 32

WORD = 4  # columns that a lane reads at once, at the least
SIZES = {"float32": 4, "float16": 2, "bfloat16": 2}
DTYPE_CODES = {"float32": 0, "float16": 1, "bfloat16": 2}


def fits(num_columns: int, lanes_needed: int) -> bool:
    """Whether a warp can hold a row of this many columns, and its lanes what is needed of them."""
    return num_columns <= MAX_COLUMNS and lanes_needed <= MAX_LANES


def fits_method(method: RoutingMethod) -> bool:
    """Whether a warp can hold a row of logits and choose from it."""
    needed = lanes_needed(method)
    if not fits(method.num_logits, needed):
        return False
    # A lane's neighbours are of two groups at most.
    size = method.num_experts // method.num_groups
    return not _grouped(method) or lanes_and_columns(method.num_logits, needed)[1] <= size


def lanes_needed(method: RoutingMethod) -> int:
    """A lane holds a column of the results, and a lane the value of a group."""
    return max(method.num_columns, method.num_groups if _grouped(method) else 1)


def _grouped(method: RoutingMethod) -> bool:
    return method.top_groups < method.num_groups


def lanes_and_columns(num_columns: int, lanes_needed: int) -> tuple[int, int]:
    """Lanes that share a row, and adjacent columns that each of them holds: a multiple of 4, at most 32."""
    words = max(1, -(-num_columns // WORD))
    lanes = MAX_LANES
    while lanes // 2 >= max(words, lanes_needed):
        lanes //= 2
    return lanes, -(-words // lanes) * WORD


def aligned(pointer: int, row_stride: int, dtype: str, columns: int) -> bool:
    """Whether every row starts at a multiple of the words in which `columns` adjacent columns are read, 16 bytes at
    most."""
    size = min(16, (columns & -columns) * SIZES[dtype])
    return pointer % size == 0 and row_stride * SIZES[dtype] % size == 0


def few(num_rows: int) -> bool:
    """Whether rows are so few that the slowest of them decides, rather than all that there is to do."""
    return num_rows <= 2048


def dealt_lanes(num_rows: int, num_columns: int, needed: int, scored: bool) -> int:
    """Lanes that a row is dealt to, word by word, where that is faster than a warp of lanes with neighbouring columns
    each; else 0. Few rows wait for the longest chain of instructions, many for the sum of all: these share warps.
    `needed`: of lanes, one for each result. `scored`: there is more to do for each column than to compare it."""
    if num_rows <= 2048:
        fewest = 128 if scored or num_rows > 256 else 224
        return MAX_LANES if num_columns > fewest and needed < MAX_LANES else 0
    if num_columns <= 32 or needed > MAX_LANES:
        return 0
    lanes = 8 if needed <= 8 else 16 if needed < 16 else MAX_LANES
    while lanes < MAX_LANES and num_columns > 48 * lanes:
        lanes *= 2
    return lanes


def group_lanes(method: RoutingMethod) -> int:
    """Lanes of which a group of experts, or a whole part of one, goes to each; 0 if that cannot be."""
    lanes = method.num_groups
    while lanes < max(method.num_columns, method.top_k + 1) or method.num_experts > 24 * lanes:
        lanes *= 2
    return lanes if MAX_LANES % lanes == 0 and method.num_experts % (WORD * lanes) == 0 else 0


def dealt_columns(num_columns: int, lanes: int) -> int:
    """Columns that each of so many lanes is dealt, in whole words."""
    return -(-num_columns // (WORD * lanes)) * WORD


def grid_and_block(num_rows: int, lanes: int, dealt: bool = False) -> tuple[int, int]:
    """Few rows spread over the multiprocessors a warp at a time; many share blocks, which start slower than warps
    run. Every row has its lanes."""
    warps = -(-num_rows * lanes // 32)
    block = 32 if warps <= 128 else 128 if dealt and warps <= 2048 else 64 if warps <= 16384 else 256
    return -(-num_rows * lanes // block), block
