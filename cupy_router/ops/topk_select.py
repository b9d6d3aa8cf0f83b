# SPDX-License-Identifier: Apache-2.0
"""topk_select: the k largest scores of each row, sorted, exact."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any, NamedTuple

from cupy_router.arrays import Output, View
from cupy_router.ops import _checks as check
from cupy_router.ops import _row_lanes as layout
from cupy_router.ops._call import Kernel, Op, Work, run
from cupy_router.ops._topk_select_long import INPUTS, LongTopK, Options
from cupy_router.reference import topk_select as reference
from cupy_router.results import TopK
from cupy_router.tuning import gpu_of


class Columns(NamedTuple):
    """The result of a call that returns no values."""

    indices: Any


def topk_select(
    scores: Any, k: int, *, lengths: Any = None, starts: Any = None, sorted: bool = True, return_values: bool = True,
    index_map: Any = None, page_size: int = 1, out: Any = None, stream: Any = None,
) -> TopK:  # fmt: skip
    """The k largest scores of each row and their columns, by descending score; equal scores, lower column first.

    Exact on every input: -0.0 equals +0.0, subnormals are ordered, NaN ranks below -inf. Row r has only the columns
    from `starts[r]` (default 0) for `lengths[r]` (default: to the end), cut to what exists; a start outside the row or
    a length <= 0 makes it empty. Indices count from the row's start.

    Args:
        scores: [num_rows, num_columns] float32, float16 or bfloat16.
        k: at least 1; at most num_columns unless `lengths` or `starts` are given.
        lengths: [num_rows] int32, or None.
        starts: [num_rows] int32, or None.
        sorted: False orders the same entries by ascending column instead, which takes a little longer.
        return_values: False returns `values` None, and spares their memory.
        index_map: what is written in place of an index i >= 0, the place of i in a paged cache: a table of pages
            [num_rows or 1, at least num_columns / page_size] int32, of which it is `index_map[row, i // page_size] *
            page_size + i % page_size`; with `page_size` 1 simply `index_map[row, i]`.
        page_size: columns in a page of `index_map`, at least 1. What the map makes of an index has to fit int32.
        out: a :class:`TopK` of preallocated arrays (`values` None without values), filled in place and returned.
        stream: work is enqueued on the current stream of the scores' framework unless an object with
            `__cuda_stream__` or an int handle is given here. The host never waits.

    Returns:
        TopK of values [num_rows, k] in the dtype of the scores, bit copies of them (or None), and indices [num_rows, k]
        int32; -inf and -1 where a row holds fewer than k. Arrays are of the scores' framework, on their device.

    Raises:
        TypeError: something is no array, or has a dtype that is not allowed, or k or page_size is no int, or sorted or
            return_values is no bool.
        ValueError: ranks, shapes, strides, devices, k or page_size are wrong.
        RuntimeError: CUDA arrays came but CuPy, NVRTC or a driver is missing.

    >>> import numpy as np
    >>> from cupy_router import topk_select
    >>> topk_select(np.array([[1.0, 3.0, 2.0, 3.0]], np.float32), 3)
    TopK(values=array([[3., 3., 2.]], dtype=float32), indices=array([[1, 3, 2]], dtype=int32))
    """
    if type(k) is not int:
        k = check.integer("topk_select: k", k, 1)
    if sorted is True and return_values is True and index_map is None and page_size == 1:
        return run(_OP, k, (scores, lengths, starts), out, stream)  # type: ignore[no-any-return]  # an op.result
    if type(sorted) is not bool or type(return_values) is not bool:
        raise TypeError(f"topk_select: sorted and return_values must be bools, got {sorted!r} and {return_values!r}")
    if page_size != 1:
        page_size = check.integer("topk_select: page_size", page_size, 1, 2**31 - 1)
    options, inputs = Options(k, sorted, return_values, page_size), (scores, lengths, starts, index_map)
    if return_values:
        return run(_OP_OPTIONS, options, inputs, out, stream)  # type: ignore[no-any-return]  # an op.result
    if out is not None:
        if not (isinstance(out, tuple) and len(out) == 2 and out[0] is None):
            raise TypeError("topk_select: out must be a TopK whose values are None where values are not returned")
        run(_OP_COLUMNS, options, inputs, Columns(out[1]), stream)
        return out  # type: ignore[return-value]  # a TopK without values
    return TopK(None, run(_OP_COLUMNS, options, inputs, None, stream).indices)


def _check(k: int, scores: View, lengths: View | None, starts: View | None) -> tuple[Output, Output]:
    check.dtype(scores, check.FLOATS)
    check.rank(scores, "num_rows, num_columns")
    num_rows, num_columns = scores.shape
    check.integer("k", k, 1, num_columns if lengths is None and starts is None else 2**31 - 1)
    if num_columns > 2**31 - 1:
        raise ValueError(f"scores must have at most 2**31 - 1 columns, got {scores}")
    for view in (lengths, starts):
        if view is not None:
            check.dtype(view, ("int32",))
            check.shape(view, (num_rows,), "num_rows")
    return ((num_rows, k), scores.dtype), ((num_rows, k), "int32")


def _check_options(
    options: Options, scores: View, lengths: View | None, starts: View | None, index_map: View | None
) -> tuple[Output, ...]:
    results = _check(options.k, scores, lengths, starts)
    num_rows, num_columns = scores.shape
    if index_map is not None:
        check.dtype(index_map, ("int32",))
        check.rank(index_map, "num_rows or 1, num_pages")
        rows, pages = index_map.shape
        if rows not in (1, num_rows) or pages < -(-num_columns // options.page_size):
            raise ValueError(
                f"index_map must have {num_rows} rows or 1 and a page for each {options.page_size} of {num_columns} "
                f"columns, got {index_map}"
            )
    elif options.page_size != 1:
        raise ValueError(f"page_size belongs to an index_map, got {options.page_size} without one")
    return results if options.return_values else results[1:]


def _kernel(
    k: int, out_strides: Sequence[int], scores: View, lengths: View | None, starts: View | None
) -> Kernel | Work:
    num_rows, num_columns = scores.shape
    if not layout.fits(num_columns, k):
        return LongTopK(Options(k), out_strides, scores, lengths, starts)
    macros = {"DTYPE": layout.DTYPE_CODES[scores.dtype]}
    fixed: dict[str, int | float] = {
        "num_rows": num_rows,
        "num_columns": num_columns,
        "k": k,
        "scores_stride": scores.row_stride,
        "values_stride": out_strides[0],
        "indices_stride": out_strides[1],
    }
    lanes, columns = layout.lanes_and_columns(num_columns, k)
    gpu = gpu_of(scores.device)
    interleaved = layout.interleaved_lanes(gpu, num_rows, num_columns, k, False)
    if interleaved:
        lanes, columns = interleaved, layout.interleaved_columns(num_columns, interleaved)
    whole = lengths is None and starts is None and lanes * columns == num_columns
    macros |= {
        "TOP_K": k,
        "DEALT": int(bool(interleaved)),
        "LANES": lanes,
        "PER_LANE": columns,
        "WHOLE_ROWS": int(whole),
        "ENDS_AT": 1 if whole or lengths is not None or starts is not None else min(num_columns & -num_columns, 8),
        "DENSE": int((scores.row_stride, *out_strides) == (num_columns, k, k)),
        "HAS_LENGTHS": int(lengths is not None),
        "HAS_STARTS": int(starts is not None),
        "ALIGNED": int(starts is None and layout.aligned(scores.pointer, scores.row_stride, scores.dtype, columns)),
    }
    grid, block = layout.grid_and_block(gpu, num_rows, lanes, bool(interleaved))
    return Kernel("topk_select", "topk_select", macros, grid, block, fixed)


def _reference(k: int, number: int, scores: Any, lengths: Any, starts: Any) -> tuple[Any, Any]:
    return reference.topk_select(scores, k, lengths, starts)


def _reference_options(
    options: Options, number: int, scores: Any, lengths: Any, starts: Any, index_map: Any
) -> tuple[Any, ...]:
    results = reference.topk_select(
        scores, options.k, lengths, starts, sorted=options.sorted, index_map=index_map, page_size=options.page_size
    )
    return results if options.return_values else results[1:]


_OP = Op(
    name="topk_select",
    inputs=("scores", "lengths", "starts"),
    result=TopK,
    check=_check,
    kernel=_kernel,
    reference=_reference,
    takes_number=False,
)

# With options, which the kernels for long rows have, for rows of any length.
_OP_OPTIONS = replace(_OP, inputs=INPUTS, check=_check_options, kernel=LongTopK, reference=_reference_options)
_OP_COLUMNS = replace(_OP_OPTIONS, result=Columns)
