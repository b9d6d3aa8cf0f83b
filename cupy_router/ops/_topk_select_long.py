# SPDX-License-Identifier: Apache-2.0
"""How kernels/topk_select_long.cu is compiled and launched for a shape: chosen from shapes alone. And where k is too
large for it, kernels/topk_select_large.cu."""

from __future__ import annotations

from collections.abc import Sequence
from math import sqrt
from typing import Any, NamedTuple

from cupy_router import compiler, scratch
from cupy_router.launcher import MAX_GRID
from cupy_router.ops import _layout as layout
from cupy_router.ops._cached import Kernel, launch_with
from cupy_router.ops._op import Arrays

LONG, LARGE = "topk_select_long", "topk_select_large"
INPUTS = ("scores", "lengths", "starts", "index_map")
OUTPUTS = ("values", "indices")
_SCRATCH = ("counters", "piece_counts", "lists")

_LARGE_BLOCK = 1024

_MULTIPROCESSORS = 132  # of an H100
_COUNTER_BYTES = 1024  # as many as any plan needs, so that what lies behind them may be of any plan
_MAX_PIECES, _PIECE_BYTES = 32, 16 * 1024
_SPLIT_BYTES = 96 * 1024  # what one block has to be spared, or handing over takes longer
_ENTRY_BYTES, _STATIC_BYTES = 12, 6 * 1024
_MAX_CAPACITY = 16384


class Plan(NamedTuple):
    """See the macros of the same names in the kernel; `pieces` of a row."""

    block: int
    blocks: int
    capacity: int
    vectors: int
    pieces: int

    @property
    def shared_bytes(self) -> int:
        return _ENTRY_BYTES * self.capacity + 64


def choose(num_rows: int, num_columns: int, k: int, dtype: str, shared_bytes: int) -> Plan | None:
    """For a GPU whose blocks may have so much shared memory. None: no list is long enough. The numbers are measured on
    an H100."""
    size = layout.SIZES[dtype]
    row_bytes = num_columns * size
    pieces = max(1, min(_MULTIPROCESSORS // num_rows, _MAX_PIECES, row_bytes // _PIECE_BYTES))
    if row_bytes - row_bytes // pieces < _SPLIT_BYTES:
        pieces = 1
    if pieces > 1:
        shapes = [(512 if k <= 512 else 768, 1)]
    elif num_rows > _MULTIPROCESSORS and k <= 512:
        shapes = [(384, 3), (512, 2)]
    else:
        shapes = [(1024, 1)]
    plan = None
    for block, blocks in shapes:
        plan = _with_room(Plan(block, blocks, 0, 0, pieces), num_columns, k, size, shared_bytes)
        if plan is not None and (plan.vectors, plan.capacity) == (1, 4 * block):
            break
    return plan


def _with_room(plan: Plan, num_columns: int, k: int, size: int, shared_bytes: int) -> Plan | None:
    """With the smallest list for what the smallest samples let through; 4 entries a thread are sorted fastest."""
    step = 4 * plan.block
    most = min(_MAX_CAPACITY, (shared_bytes - _STATIC_BYTES) // _ENTRY_BYTES) // step * step
    best = None
    for vectors in (1, 2, 4, 8):
        expected, longest = (
            min(length, num_columns) for length in list_lengths(k, num_columns, plan.block * vectors * 16 // size)
        )
        capacity = step * max(1, -(-longest // step))
        if expected <= most and (best is None or capacity < best.capacity):
            best = plan._replace(capacity=min(capacity, most), vectors=vectors)
        if capacity <= (step if vectors == 1 else 2 * step):
            break
    return best


def list_lengths(k: int, num_columns: int, sample: int) -> tuple[int, int]:
    """How many scores a sampled threshold lets through at the most, and four deviations more."""
    hits = sample * min(k / max(num_columns, 1), 1.0)
    reached = (hits + 5 * sqrt(hits) + 3) * 9 / 8
    share = num_columns / sample
    return int(reached * share), int((reached + 4 * sqrt(reached)) * share)


class LongTopK:
    """A launch for any call, with the scratch memory of the stream that it is called on."""

    def __init__(self, options: Any, arrays: Arrays) -> None:
        scores, index_map = arrays.scores, arrays.index_map
        num_rows, num_columns = scores.shape
        indices_stride = arrays.indices.row_stride
        fixed: dict[str, int | float] = {
            "num_columns": num_columns,
            "k": options.k,
            "sorted": int(options.order != "column"),
            "page_size": options.page_size,
            "scores_stride": scores.row_stride,
            "values_stride": indices_stride if arrays.values is None else arrays.values.row_stride,
            "indices_stride": indices_stride,
            "map_stride": 0 if index_map is None or index_map.shape[0] == 1 else index_map.row_stride,
        }
        macros = {"DTYPE": layout.DTYPE_CODES[scores.dtype]}
        backend = compiler.backend(scores.device[0])
        assert backend is not None, "ops ask for a backend before they ask for a kernel"
        plan = choose(num_rows, num_columns, options.k, scores.dtype, backend.shared_limit(scores.device[1]))
        self._device, self._pieces, self._scratch_bytes = scores.device, 0, 0
        self._launches = []
        if plan is None:
            kernel = Kernel(LARGE, LARGE, macros, min(num_rows, MAX_GRID), _LARGE_BLOCK, {"num_rows": num_rows} | fixed)
            self._launches.append(launch_with((*INPUTS, *OUTPUTS), kernel, scores.device))
        else:
            room = 0
            if plan.pieces > 1:
                self._pieces = num_rows * plan.pieces
                room = min(-(-num_columns // plan.pieces) + 64, plan.capacity + options.k)
                self._scratch_bytes = _COUNTER_BYTES + 8 * self._pieces * (1 + room)
            macros |= {
                "BLOCK": plan.block,
                "BLOCKS": plan.blocks,
                "CAPACITY": plan.capacity,
                "VECTORS": plan.vectors,
                "SPLIT": int(plan.pieces > 1),
                "FITS": int(plan.pieces == 1 and num_columns <= plan.capacity),
            }
            ahead = _MULTIPROCESSORS * plan.blocks  # as many as run at once
            for first in range(0, num_rows, MAX_GRID):
                grid = min(num_rows - first, MAX_GRID) * plan.pieces
                numbers = {
                    "pieces": plan.pieces,
                    "list_capacity": room,
                    "rows_ahead": ahead,
                    "first_row": first,
                } | fixed
                kernel = Kernel(LONG, LONG, macros, grid, plan.block, numbers, shared_bytes=plan.shared_bytes)
                self._launches.append(launch_with((*INPUTS, *OUTPUTS, *_SCRATCH), kernel, scores.device))
        self._takes_scratch = plan is not None
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
