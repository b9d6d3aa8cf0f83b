# SPDX-License-Identifier: Apache-2.0
"""unpermute: the outputs of the experts, summed for each token with its weights."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

from cupy_router.arrays import View
from cupy_router.ops import _rows
from cupy_router.ops._cached import Kernel
from cupy_router.ops._declared import Arrays, Result, layer, row
from cupy_router.ops._layout import as_layout
from cupy_router.ops._op import Op
from cupy_router.ops._rows import LayoutInts, check_layout
from cupy_router.ops._run import run
from cupy_router.reference import unpermute as reference
from cupy_router.results import ExpertLayout
from cupy_router.tuning import Gpu

_SMOOTH = ("y", "weights", "residual", "residual_scale")

NEEDS_ORDER = "layout must have order for a gradient with respect to y, got None: name it in want= of expert_layout"


class Sums(NamedTuple):
    """The result of the op, which the caller gets as an array."""

    sums: Any


class Unpermute(Op):
    """The declaration of :func:`unpermute`."""

    name = "unpermute"
    options = LayoutInts
    inputs = (
        row("y", "capacity, hidden", required=True),
        layer("positions", "num_tokens, top_k", ("int32",), required=True, path="layout.positions"),
        layer("order", "capacity", ("int32",), path="layout.order"),  # for the gradient only
        layer("weights", "num_tokens, top_k"),
        layer("residual", "num_tokens, hidden"),
        layer("residual_scale", "num_tokens", ("float32",)),
    )
    results = (Result("sums", "num_tokens, hidden", lambda options, dtypes: dtypes["y"], differentiable=_SMOOTH),)
    returns = Sums
    bare = True
    rows_independent = False
    vmap = "loop"
    gradient = "rows"
    single_kernel = True

    def example(self) -> LayoutInts:
        return LayoutInts()

    def check_inputs(self, options: LayoutInts, views: Sequence[View | None]) -> None:
        self.check_traced(options, views, "")
        super().check_inputs(options, views)

    def check_traced(self, options: LayoutInts, arrays: Sequence[Any], label: str) -> None:
        y, positions, order, *_ = arrays
        check_layout(label, options, order, positions)
        rows = options.capacity
        if rows is None and order is not None and len(order.shape) == 1:
            rows = order.shape[0]
        if y is not None and rows is not None and len(y.shape) == 2 and y.shape[0] != rows:
            raise ValueError(f"{label}y must have the {rows} rows of the layout, got shape {[*y.shape]}")

    def check(self, options: LayoutInts, arrays: Arrays) -> None:
        if arrays.residual_scale is not None and arrays.residual is None:
            raise ValueError("residual_scale needs a residual, got none")

    def reference(self, options: LayoutInts, arrays: Arrays, num_valid: int) -> tuple[Any]:
        given = arrays.y, arrays.positions, arrays.weights, arrays.residual, arrays.residual_scale
        return (reference.unpermute(*given),)

    def kernel(self, options: LayoutInts, arrays: Arrays, gpu: Gpu) -> Kernel:
        return _rows.unpermute_kernel(self, ("sums",), arrays, gpu)


OP = Unpermute()


def unpermute(
    y: Any,
    layout: ExpertLayout,
    weights: Any = None,
    *,
    residual: Any = None,
    residual_scale: Any = None,
    out: Any = None,
    stream: Any = None,
) -> Any:
    """Sum the rows of each token's pairs, weighted, and add a residual: the way back from the experts.

    Sums are float32, in the order of slots, and rounded once. A pair with position -1 is left out. Rows without a pair
    are never read, so they may hold anything.

    Args:
        y: [layout.capacity, hidden] float32, float16 or bfloat16.
        layout: the :class:`ExpertLayout` of the rows, with `positions`, an array on the device of y. The gradient with
            respect to y also needs `order`.
        weights: [num_tokens, layout.top_k] float32, float16 or bfloat16; None: 1 for each pair.
        residual: [num_tokens, hidden] float32, float16 or bfloat16, added last.
        residual_scale: [num_tokens] float32, a factor of each token's residual: the sum of the weights of zero experts,
            which return the token itself.
        out: an array for the result that overlaps nothing, filled in place and returned.
        stream: an object with `__cuda_stream__`, or an int handle. By default, work is enqueued on the current stream
            of the framework of y. The host never waits.

    Returns:
        [num_tokens, hidden] in the dtype of y, an array of its framework, on its device. A token without a pair gives
        its residual, or 0. It is differentiable with respect to y, weights, residual and residual_scale, once; sums are
        float32 in a fixed order.

    Raises:
        TypeError: an argument is no array or no layout, or its dtype is not allowed.
        ValueError: ranks, shapes, strides or devices are wrong, or the layout lacks an array.
        RuntimeError: CUDA arrays were given, but CuPy, NVRTC or a driver is missing.

    >>> import numpy as np
    >>> from cupy_router import expert_layout, unpermute
    >>> layout = expert_layout(np.array([[2, 0], [2, 1]], np.int32), 3)
    >>> y = np.array([[1.0], [2.0], [3.0], [4.0]], np.float32)
    >>> unpermute(y, layout, np.array([[0.5, 0.5], [1.0, 0.0]], np.float32))
    array([[2.],
           [4.]], dtype=float32)
    """
    layout = as_layout("unpermute", layout)
    inputs = (y, layout.positions, layout.order, weights, residual, residual_scale)
    ints = layout.num_tokens, layout.top_k, layout.capacity
    return run(OP, ints, inputs, out, stream)
