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


def many(num_rows: int) -> bool:
    """Whether rows are so many that only what there is to do decides, however long the slowest of them takes."""
    return num_rows > 16384


def grid_and_block(num_rows: int, lanes: int) -> tuple[int, int]:
    """Few rows spread over the multiprocessors a warp at a time; many share blocks, which start slower than warps
    run."""
    warps = -(-num_rows * lanes // 32)
    block = 32 if warps <= 128 else 64 if warps <= 16384 else 256
    return min(-(-num_rows * lanes // block), 2**31 - 1), block
