# SPDX-License-Identifier: Apache-2.0
"""How rows are laid over threads by the kernels in which a warp, or a part of one, holds a row in registers."""

from __future__ import annotations

MAX_COLUMNS = 1024
MAX_K = 32

WORD_BYTES = 16
SIZES = {"float32": 4, "float16": 2, "bfloat16": 2}
DTYPE_CODES = {"float32": 0, "float16": 1, "bfloat16": 2}


def fits(num_columns: int, k: int) -> bool:
    """Whether a warp can hold a row of this many columns and select k of them."""
    return num_columns <= MAX_COLUMNS and k <= MAX_K


def lanes_and_columns(num_columns: int, k: int, dtype: str) -> tuple[int, int]:
    """Lanes that share a row, and adjacent columns that each of them holds: whole 16-byte words, 32 columns at the most."""
    word = WORD_BYTES // SIZES[dtype]
    words = -(-num_columns // word)
    lanes = 32
    while lanes // 2 >= max(words, k):
        lanes //= 2
    return lanes, -(-words // lanes) * word


def aligned(pointer: int, row_stride: int, dtype: str) -> bool:
    """Whether every row starts at a multiple of 16 bytes."""
    return pointer % WORD_BYTES == 0 and row_stride * SIZES[dtype] % WORD_BYTES == 0


def grid_and_block(num_rows: int, lanes: int) -> tuple[int, int]:
    """Few rows spread over the multiprocessors a warp at a time; many share blocks of four warps."""
    warps = -(-num_rows * lanes // 32)
    block = 32 if warps <= 1024 else 128
    return min(-(-num_rows * lanes // block), 2**31 - 1), block
