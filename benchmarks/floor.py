# SPDX-License-Identifier: Apache-2.0
"""The floor: a copy, and kernels of floor.cu, which only read the bytes and write the outputs."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import cupy

from benchmarks.harness import gpu_row
from benchmarks.rows import Row

_TEXT = (Path(__file__).parent / "floor.cu").read_text()
_BLOCK = 128
_SHAPES = (1, 4)  # words in flight per thread; the fastest counts


def read_rows(inputs: list[Any], out: Any, cell: Row) -> Row:
    """The fastest way to read all of the rows and to write `out`, rotating over the inputs."""
    weights, indices = out
    num_words = inputs[0].nbytes // 16  # leaves out a last word that is not whole
    candidates = []
    for words in _SHAPES:
        kernel = cupy.RawKernel(_TEXT, "read_rows", options=(f"-DWORDS={words}",))
        grid = max(1, -(-num_words // (words * _BLOCK)))

        def call(i: int, kernel: Any = kernel, grid: int = grid) -> None:
            array = inputs[i % len(inputs)]
            kernel((grid,), (_BLOCK,), (array, weights, indices, cupy.int64(num_words), cupy.int64(indices.size)))

        candidates.append(gpu_row(call, cell, "floor", rotation=len(inputs)))
    return min(candidates, key=lambda row: row["us"])


def read_entries(token_ids: Any, table: Any, logits: Any, out: Any, cell: Row) -> Row:
    """To read a token's row of the table and the logits it names, all of 4 bytes, and to write `out`."""
    weights, indices = out
    kernel = cupy.RawKernel(_TEXT, "read_entries")
    sizes = cupy.int64(indices.size), cupy.int32(table.shape[1]), cupy.int32(logits.shape[1])
    grid = -(-indices.size // _BLOCK)

    def call(i: int) -> None:
        kernel((grid,), (_BLOCK,), (token_ids, table, logits, weights, indices, *sizes))

    return gpu_row(call, cell, "floor")


def copy(num_bytes: int, cell: Row) -> Row:
    """Measure a copy of half of `num_bytes`, which counts reads and writes together."""
    source = cupy.random.randint(0, 2**31 - 1, (num_bytes // 8,)).astype(cupy.int32)
    target = cupy.empty(source.shape, cupy.int32)
    kind = 3  # from device to device

    def call(i: int) -> None:
        stream = cupy.cuda.get_current_stream().ptr
        cupy.cuda.runtime.memcpyAsync(target.data.ptr, source.data.ptr, source.nbytes, kind, stream)

    return gpu_row(call, cell, "floor")


def repeat_rows(x: Any, repeated: Any, cell: Row) -> Row:
    """To read each row of x and to write it several times, in order. Rows consist of 16-byte words."""
    kernel = cupy.RawKernel(_TEXT, "repeat_rows")
    words, copies = x[0].nbytes // 16, len(repeated) // len(x)
    grid = len(x) * -(-words // 256)

    def call(i: int) -> None:
        kernel((grid,), (_BLOCK,), (x, repeated, cupy.int32(words), cupy.int32(copies)))

    return gpu_row(call, cell, "in order")
