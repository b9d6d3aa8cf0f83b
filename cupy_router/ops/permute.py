# SPDX-License-Identifier: Apache-2.0
"""permute: the hidden states of tokens, copied to the rows of their pairs in order of experts."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

from cupy_router.arrays import View
from cupy_router.ops import _rows
from cupy_router.ops._cached import Kernel
from cupy_router.ops._declared import ANY, FLOATS, Arrays, Result, layer, row
from cupy_router.ops._layout import as_layout
from cupy_router.ops._op import Op
from cupy_router.ops._rows import LayoutInts, check_layout
from cupy_router.ops._run import run
from cupy_router.reference import permute as reference
from cupy_router.results import ExpertLayout
from cupy_router.tuning import Gpu


class Rows(NamedTuple):
    """The result of the op, which the caller gets as an array."""

    rows: Any


class Permute(Op):
    """The declaration of :func:`permute`."""

    name = "permute"
    options = LayoutInts
    inputs = (
        row("x", "num_tokens, hidden", ANY, required=True),
        layer("order", "capacity", ("int32",), required=True, path="layout.order"),
        row("positions", "num_tokens, top_k", ("int32",), required=True, path="layout.positions"),
        row("weights", "num_tokens, top_k"),
    )
    results = (
        Result("rows", "capacity, hidden", lambda options, dtypes: dtypes["x"], differentiable=("x", "weights")),
    )
    returns = Rows
    bare = True
    rows_independent = False
    vmap = "loop"
    gradient = "rows"
    single_kernel = True

    def example(self) -> LayoutInts:
        return LayoutInts()

    def check_inputs(self, options: LayoutInts, views: Sequence[View | None]) -> None:
        self.check_traced(options, views, "")
        x, _, positions, _ = views
        if x and positions and len(x.shape) == len(positions.shape) == 2 and x.shape[0] != positions.shape[0]:
            raise ValueError(f"x must have a row for each of the {positions.shape[0]} tokens of the layout, got {x}")
        super().check_inputs(options, views)

    def check_traced(self, options: LayoutInts, arrays: Sequence[Any], label: str) -> None:
        _, order, positions, _ = arrays
        check_layout(label, options, order, positions)

    def check(self, options: LayoutInts, arrays: Arrays) -> None:
        if arrays.weights is not None and arrays.x.dtype not in FLOATS:
            raise TypeError(f"x must be {' or '.join(FLOATS)} where weights are given, got {arrays.x}")

    def reference(self, options: LayoutInts, arrays: Arrays, num_valid: int) -> tuple[Any]:
        return (reference.permute(arrays.x, arrays.order, arrays.positions.shape[1], arrays.weights),)

    def kernel(self, options: LayoutInts, arrays: Arrays, gpu: Gpu) -> Kernel:
        return _rows.permute_kernel(self, ("rows",), arrays, gpu, options.clears)


OP = Permute()


def permute(x: Any, layout: ExpertLayout, *, weights: Any = None, out: Any = None, stream: Any = None) -> Any:
    """Copy the row of each token to the rows of its pairs, in the order of an expert layout.

    Args:
        x: [num_tokens, hidden] of any dtype, which is moved as bytes; with weights float32, float16 or bfloat16.
        layout: an :class:`ExpertLayout` with `positions` and `order`, in arrays on the device of x. A row whose entry
            of `order` is no pair is 0 in the result.
        weights: [num_tokens, layout.top_k] float32, float16 or bfloat16. Each copy is multiplied by the weight of its
            pair in float32, and rounded once.
        out: an array for the result that overlaps nothing, filled in place and returned.
        stream: an object with `__cuda_stream__`, or an int handle. By default, work is enqueued on the current stream
            of the framework of x. The host never waits.

    Returns:
        [layout.capacity, hidden] in the dtype of x, an array of its framework, on its device. All rows are written. It
        is differentiable with respect to x and weights, once; sums are float32 in a fixed order.

    Raises:
        TypeError: an argument is no array or no layout, or its dtype is not allowed.
        ValueError: ranks, shapes, strides or devices are wrong, or the layout lacks an array.
        RuntimeError: CUDA arrays were given, but CuPy, NVRTC or a driver is missing.

    >>> import numpy as np
    >>> from cupy_router import expert_layout, permute
    >>> layout = expert_layout(np.array([[2, 0], [2, 1]], np.int32), 3)
    >>> permute(np.array([[1.0], [5.0]], np.float32), layout)
    array([[1.],
           [5.],
           [1.],
           [5.]], dtype=float32)
    """
    layout = as_layout("permute", layout, needs_order=True)
    inputs = (x, layout.order, layout.positions, weights)
    ints = layout.num_tokens, layout.top_k, layout.capacity
    return run(OP, ints, inputs, out, stream)
