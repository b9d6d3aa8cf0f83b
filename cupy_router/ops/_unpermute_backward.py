# SPDX-License-Identifier: Apache-2.0
"""The gradient of unpermute: that with respect to y is a permute, those of the factors are dot products of rows."""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np

from cupy_router.ops import _rows
from cupy_router.ops._cached import Kernel
from cupy_router.ops._declared import Arrays, Result, layer, row
from cupy_router.ops._op import Op
from cupy_router.ops._rows import NO_SECOND_DERIVATIVE, GradientOptions
from cupy_router.reference import permute, unpermute
from cupy_router.tuning import Gpu


class UnpermuteGradient(NamedTuple):
    """Gradients of y [capacity, hidden], weights [num_tokens, top_k] float32, residual, residual_scale [num_tokens]."""

    rows: Any
    dots: Any
    scaled: Any
    residual_dots: Any


class UnpermuteBackward(Op):
    """unpermute_backward(x=gradient of the sums, order, positions, weights, y, residual, residual_scale)."""

    name = "unpermute_backward"
    options = GradientOptions
    inputs = (
        row("x", "num_tokens, hidden", required=True),
        layer("order", "capacity", ("int32",), required=True),
        row("positions", "num_tokens, top_k", ("int32",), required=True),
        row("weights", "num_tokens, top_k"),
        layer("y", "capacity, hidden"),
        row("residual", "num_tokens, hidden"),
        row("residual_scale", "num_tokens", ("float32",)),
    )
    results = (
        Result("rows", "capacity, hidden", lambda _, dtypes: dtypes["x"], exists=lambda o: "rows" in o.want),
        Result("dots", "num_tokens, top_k", "float32", exists=lambda o: "dots" in o.want),
        Result(
            "scaled", "num_tokens, hidden", lambda _, dtypes: dtypes["residual"], exists=lambda o: "scaled" in o.want
        ),
        Result("residual_dots", "num_tokens", "float32", exists=lambda o: "residual_dots" in o.want),
    )
    returns = UnpermuteGradient
    rows_independent = False
    vmap = "loop"
    no_gradient = NO_SECOND_DERIVATIVE
    single_kernel = True

    def example(self) -> GradientOptions:
        return GradientOptions(("rows",))

    def check(self, options: GradientOptions, arrays: Arrays) -> None:
        for result, name in (("dots", "y"), ("scaled", "residual"), ("residual_dots", "residual")):
            if result in options.want and getattr(arrays, name) is None:
                raise TypeError(f"{name} must be an array where {result} are wanted, got None")

    def reference(self, options: GradientOptions, arrays: Arrays, num_valid: int) -> tuple[Any, ...]:
        found = {}
        x, residual = arrays.x, arrays.residual
        if "rows" in options.want:
            found["rows"] = permute.permute(x, arrays.order, arrays.positions.shape[1], arrays.weights)
        if "dots" in options.want:
            found["dots"] = permute.row_dots(x, arrays.y, arrays.positions)
        own = np.arange(len(x), dtype=np.int32)[:, None]  # the row of a token in the residual
        if "scaled" in options.want:
            scale = None if arrays.residual_scale is None else arrays.residual_scale[:, None]
            scaled = unpermute.unpermute(x.astype(np.float32), own, scale)
            found["scaled"] = scaled.astype(residual.dtype)
        if "residual_dots" in options.want:
            found["residual_dots"] = permute.row_dots(x, residual, own)[:, 0]
        return tuple(found.values())

    def kernel(self, options: GradientOptions, arrays: Arrays, gpu: Gpu) -> Kernel:
        return _rows.permute_kernel(self, options.want, arrays, gpu)


OP = UnpermuteBackward()
