# SPDX-License-Identifier: Apache-2.0
"""topk_select: the k largest scores of each row, sorted, exact."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from cupy_router.arrays import View
from cupy_router.ops import _checks as check
from cupy_router.ops import _layout as layout
from cupy_router.ops._call import Kernel, Op, Output, run
from cupy_router.reference import topk_select as reference
from cupy_router.results import TopK

_WIDE_BLOCK = 512


def topk_select(
    scores: Any, k: int, *, lengths: Any = None, starts: Any = None, out: Any = None, stream: Any = None
) -> TopK:
    """The k largest scores of each row and their columns, by descending score; equal scores, lower column first.

    Exact on every input: -0.0 equals +0.0, subnormals are ordered, NaN ranks below -inf. Row r has only the columns
    from `starts[r]` (default 0) for `lengths[r]` (default: to the end), cut to what exists; a start outside the row or
    a length <= 0 makes it empty. Indices count from the row's start.

    Args:
        scores: [num_rows, num_columns] float32, float16 or bfloat16. k: at least 1; at most num_columns unless
        `lengths` or `starts` are given. lengths: [num_rows] int32, or None. starts: [num_rows] int32, or None. out: a
        :class:`TopK` of preallocated arrays, filled in place and returned. stream: work is enqueued on the current
        stream of the scores' framework unless an object with `__cuda_stream__` or
            an int handle is given here. The host never waits.

    Returns:
        TopK of values [num_rows, k], bit copies of the scores, and indices [num_rows, k] int32; -inf and -1 where a row
        holds fewer than k. Arrays are of the scores' framework, on their device.

    Raises:
        TypeError: something is no array, or has a dtype that is not allowed, or k is no int.
        ValueError: ranks, shapes, strides, devices or k are wrong.
        RuntimeError: CUDA arrays came but CuPy, NVRTC or a driver is missing.

    >>> import numpy as np
    >>> from cupy_router import topk_select
    >>> topk_select(np.array([[1.0, 3.0, 2.0, 3.0]], np.float32), 3)
    TopK(values=array([[3., 3., 2.]], dtype=float32), indices=array([[1, 3, 2]], dtype=int32))
    """
    if type(k) is not int:
        k = check.integer("topk_select: k", k, 1)
    return run(_OP, k, (scores, lengths, starts), out, stream)  # type: ignore[no-any-return]


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


def _kernel(k: int, out_strides: Sequence[int], scores: View, lengths: View | None, starts: View | None) -> Kernel:
    num_rows, num_columns = scores.shape
    macros = {"DTYPE": layout.DTYPE_CODES[scores.dtype]}
    fixed: dict[str, int | float] = {
        "num_rows": num_rows,
        "num_columns": num_columns,
        "k": k,
        "scores_stride": scores.row_stride,
        "values_stride": out_strides[0],
        "indices_stride": out_strides[1],
    }
    if not layout.fits(num_columns, k):
        return Kernel(
            "topk_select", "topk_select_wide", macros | {"WIDE": 1}, min(num_rows, 2**31 - 1), _WIDE_BLOCK, fixed
        )
    lanes, columns = layout.lanes_and_columns(num_columns, k)
    dealt = layout.dealt_lanes(num_rows, num_columns, k + (scores.dtype == "float32"))
    if dealt:
        lanes, columns = dealt, layout.dealt_columns(num_columns, dealt)
    whole = lengths is None and starts is None and lanes * columns == num_columns
    macros |= {
        "TOP_K": k,
        "FEW_ROWS": int(not dealt and layout.few(num_rows)),
        "DEALT": int(bool(dealt)),
        "LANES": lanes,
        "PER_LANE": columns,
        "WHOLE_ROWS": int(whole),
        "ALIGNED": int(starts is None and layout.aligned(scores.pointer, scores.row_stride, scores.dtype, columns)),
    }
    return Kernel("topk_select", "topk_select", macros, *layout.grid_and_block(num_rows, lanes, bool(dealt)), fixed)


def _reference(k: int, number: int, scores: Any, lengths: Any, starts: Any) -> tuple[Any, Any]:
    return reference.topk_select(scores, k, lengths, starts)


_OP = Op(
    name="topk_select",
    inputs=("scores", "lengths", "starts"),
    result=TopK,
    check=_check,
    kernel=_kernel,
    reference=_reference,
    takes_number=False,
)
