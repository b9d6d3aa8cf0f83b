# SPDX-License-Identifier: Apache-2.0
"""topk_select: the k largest scores of each row, exact, in a given order."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from cupy_router.ops import _checks as check
from cupy_router.ops import _row_lanes as row_lanes
from cupy_router.ops._cached import Kernel, Work
from cupy_router.ops._declared import Arrays, Minimum, Result, row, row_or_one
from cupy_router.ops._op import Op
from cupy_router.ops._options import Options
from cupy_router.ops._run import run
from cupy_router.ops._topk_select_long import LongTopK
from cupy_router.reference import topk_select as reference
from cupy_router.results import TopK
from cupy_router.tuning import Gpu

ORDERS = ("value", "column", "any")


@dataclass(frozen=True)
class TopKOptions(Options):
    """Options of a call: see :func:`topk_select`."""

    k: int
    order: str = "value"
    return_values: bool = True
    page_size: int = 1


def _returns_values(options: TopKOptions) -> bool:
    return options.return_values


def _score_dtype(options: TopKOptions, dtypes: Mapping[str, str]) -> str:
    return dtypes["scores"]


class TopKSelect(Op):
    """The declaration of :func:`topk_select`."""

    name = "topk_select"
    options = TopKOptions
    inputs = (
        row("scores", "num_rows, num_columns", required=True),
        row("lengths", "num_rows", ("int32",)),
        row("starts", "num_rows", ("int32",)),
        row_or_one("index_map", "num_rows or 1, num_pages", ("int32",)),
    )
    results = (
        Result("values", "num_rows, k", _score_dtype, exists=_returns_values),
        Result("indices", "num_rows, k", "int32"),
    )
    returns = TopK

    def example(self) -> TopKOptions:
        return TopKOptions(3)

    def result_sizes(self, options: TopKOptions, sizes: Mapping[str, Any], minimum: Minimum = min) -> dict[str, Any]:
        return {"k": options.k}

    def check(self, options: TopKOptions, arrays: Arrays) -> None:
        scores, index_map, page_size = arrays.scores, arrays.index_map, options.page_size
        num_rows, num_columns = scores.shape
        windowed = arrays.lengths is not None or arrays.starts is not None
        if num_columns == 0 and not windowed:
            raise ValueError(f"scores must have at least one column unless lengths or starts are given, got {scores}")
        check.integer("k", options.k, 1, 2**31 - 1 if windowed else num_columns)
        if num_columns > 2**31 - 1:
            raise ValueError(f"scores must have at most 2**31 - 1 columns, got {scores}")
        if index_map is None:
            if page_size != 1:
                raise ValueError(f"page_size belongs to an index_map, got {page_size} without one")
        elif index_map.shape[0] not in (1, num_rows) or index_map.shape[1] < -(-num_columns // page_size):
            raise ValueError(
                f"index_map must have {num_rows} rows or 1 and a page for each {page_size} of {num_columns} columns, "
                f"got {index_map}"
            )

    def reference(self, options: TopKOptions, arrays: Arrays, num_valid: int) -> tuple[Any, ...]:
        results = reference.topk_select(
            arrays.scores, options.k, arrays.lengths, arrays.starts, order=options.order,
            index_map=arrays.index_map, page_size=options.page_size,
        )  # fmt: skip
        return results if options.return_values else results[1:]

    def is_single_kernel(self, options: TopKOptions, arrays: Arrays) -> bool:
        return row_lanes.fits(arrays.scores.shape[1], options.k)

    def kernel(self, options: TopKOptions, arrays: Arrays, gpu: Gpu) -> Kernel | Work:
        """Choose the kernel: for short rows, a warp or a part of one for each; otherwise the kernel for long rows."""
        if not self.is_single_kernel(options, arrays):
            return LongTopK(options, arrays, gpu)
        k, scores = options.k, arrays.scores
        num_rows, num_columns = scores.shape
        lengths, starts, index_map = arrays.lengths, arrays.starts, arrays.index_map
        indices_stride = arrays.indices.row_stride
        values_stride = indices_stride if arrays.values is None else arrays.values.row_stride
        macros = {"DTYPE": row_lanes.DTYPE_CODES[scores.dtype]}
        fixed: dict[str, int | float] = {
            "num_rows": num_rows,
            "num_columns": num_columns,
            "k": k,
            "page_size": options.page_size,
            "scores_stride": scores.row_stride,
            "values_stride": values_stride,
            "indices_stride": indices_stride,
            "map_stride": 0 if index_map is None or index_map.shape[0] == 1 else index_map.row_stride,
        }
        lanes, columns = row_lanes.lanes_and_columns(num_columns, k)
        sixteen_bits = row_lanes.SIZES[scores.dtype] == 2
        interleaved = row_lanes.interleaved_lanes(gpu, num_rows, num_columns, k, False, sixteen_bits)
        if interleaved:
            lanes, columns = interleaved, row_lanes.interleaved_columns(num_columns, interleaved)
        whole = lengths is None and starts is None and lanes * columns == num_columns
        by_threshold = 0 < interleaved < row_lanes.MAX_LANES and sixteen_bits and gpu.capability >= (9, 0)
        grid, block = row_lanes.grid_and_block(gpu, num_rows, lanes, bool(interleaved))
        macros |= {
            "TOP_K": k,
            "INTERLEAVED": int(bool(interleaved)),
            "BY_THRESHOLD": int(by_threshold),
            "MIN_BLOCKS": _min_blocks(gpu, lanes, columns) if by_threshold else 0,
            "LANES": lanes,
            "PER_LANE": columns,
            "WHOLE_ROWS": int(whole),
            "ENDS_AT": 1 if whole or lengths is not None or starts is not None else min(num_columns & -num_columns, 8),
            "DENSE": int((scores.row_stride, values_stride, indices_stride) == (num_columns, k, k)),
            "ROW_PER_BLOCK": int(lanes == block == row_lanes.MAX_LANES),
            "HAS_LENGTHS": int(lengths is not None),
            "HAS_STARTS": int(starts is not None),
            "HAS_VALUES": int(options.return_values),
            "HAS_MAP": int(index_map is not None),
            "BY_COLUMN": int(options.order == "column"),
            "ALIGNED": int(
                starts is None and row_lanes.aligned(scores.pointer, scores.row_stride, scores.dtype, columns)
            ),
        }
        takes = ("scores", "lengths", "starts", "index_map", "values", "indices")
        return Kernel("topk_select", "topk_select", macros, grid, block, fixed, takes=takes)


def _min_blocks(gpu: Gpu, lanes: int, columns: int) -> int:
    """Return the fewest blocks per multiprocessor for which rows by a threshold are compiled; 0: as ptxas chooses.

    Told of them, ptxas keeps what only rare rows need out of registers. Newer GPUs as in `row_lanes.min_blocks`.
    """
    if gpu.capability >= gpu.table.rows.spills_from:
        return 1
    return 0 if lanes > 8 else 6 if columns <= 32 else 5


OP = TopKSelect()


def topk_select(
    scores: Any, k: int, *, lengths: Any = None, starts: Any = None, order: str = "value", return_values: bool = True,
    index_map: Any = None, page_size: int = 1, out: Any = None, stream: Any = None,
) -> TopK:  # fmt: skip
    """Return the k largest scores of each row and their columns; of equal scores, the lower columns.

    Exact on every input: -0.0 equals +0.0, subnormals are ordered, NaN ranks below -inf. Row r has the `lengths[r]`
    columns from `starts[r]` on, by default all columns, limited to those that exist. A start outside the row or a
    length <= 0 makes it empty. Indices count from the start of the row.

    Args:
        scores: [num_rows, num_columns] float32, float16 or bfloat16.
        k: at least 1; at most num_columns unless `lengths` or `starts` are given.
        lengths: [num_rows] int32, or None.
        starts: [num_rows] int32, or None.
        order: order of the selected entries in a row. "value": by descending score, equal scores by ascending column.
            "column": by ascending column. "any": the fastest order, which may depend on shapes, alignment and the GPU
            but is the same on every run. All three select the same entries, and empty entries come last.
        return_values: False: `values` is None and takes no memory.
        index_map: [num_rows or 1, at least num_columns / page_size] int32, a table of pages. An index i >= 0 is mapped
            to its position in a paged cache, `index_map[row, i // page_size] * page_size + i % page_size`.
        page_size: columns in a page of `index_map`, at least 1. Mapped indices have to fit int32.
        out: a :class:`TopK` of preallocated arrays (`values` None without values), filled in place and returned.
        stream: an object with `__cuda_stream__`, or an int handle. By default, work is enqueued on the current stream
            of the scores' framework. The host never waits.

    Returns:
        TopK of values [num_rows, k] in the dtype of the scores, bit copies of them (or None), and indices [num_rows, k]
        int32. If a row has fewer than k entries, the rest are -inf and -1. Arrays belong to the scores' framework and
        are on their device.

    Raises:
        TypeError: an argument is no array, or its dtype is not allowed, k or page_size is no int, or return_values is
            no bool.
        ValueError: ranks, shapes, strides, devices, k, order or page_size are wrong.
        RuntimeError: CUDA arrays were given, but CuPy, NVRTC or a driver is missing.

    >>> import numpy as np
    >>> from cupy_router import topk_select
    >>> topk_select(np.array([[1.0, 3.0, 2.0, 3.0]], np.float32), 3)
    TopK(values=array([[3., 3., 2.]], dtype=float32), indices=array([[1, 3, 2]], dtype=int32))
    """
    if type(k) is not int:
        k = check.integer("topk_select: k", k, 1)
    inputs = (scores, lengths, starts, index_map)
    if order == "value" and return_values is True and type(page_size) is int and page_size == 1:
        return run(OP, k, inputs, out, stream)  # type: ignore[no-any-return]
    if order not in ORDERS:
        raise ValueError(f"topk_select: order must be {', '.join(map(repr, ORDERS))}, got {order!r}")
    if type(return_values) is not bool:
        raise TypeError(f"topk_select: return_values must be a bool, got {return_values!r}")
    if type(page_size) is not int or page_size != 1:
        page_size = check.integer("topk_select: page_size", page_size, 1, 2**31 - 1)
    fields = k, order, return_values, page_size
    return run(OP, fields, inputs, out, stream)  # type: ignore[no-any-return]
