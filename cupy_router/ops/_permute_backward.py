# SPDX-License-Identifier: Apache-2.0
"""The gradient of permute: that with respect to x is an unpermute, that of the weights a dot product of rows."""

from __future__ import annotations

from typing import Any, NamedTuple

from cupy_router.ops import _rows
from cupy_router.ops._cached import Kernel
from cupy_router.ops._declared import Arrays, Result, layer, row
from cupy_router.ops._op import Op
from cupy_router.ops._rows import NO_SECOND_DERIVATIVE, GradientOptions
from cupy_router.reference import permute, unpermute
from cupy_router.tuning import Gpu


class PermuteGradient(NamedTuple):
    """sums: [num_tokens, hidden] gradient of x; dots: [num_tokens, top_k] float32 gradient of the weights."""

    sums: Any
    dots: Any


class PermuteBackward(Op):
    """permute_backward(y=gradient of the rows, positions, weights, x)."""

    name = "permute_backward"
    options = GradientOptions
    inputs = (
        row("y", "capacity, hidden", required=True),
        layer("positions", "num_tokens, top_k", ("int32",), required=True),
        layer("weights", "num_tokens, top_k"),
        layer("x", "num_tokens, hidden"),
    )
    results = (
        Result("sums", "num_tokens, hidden", lambda _, dtypes: dtypes["y"], exists=lambda o: "sums" in o.want),
        Result("dots", "num_tokens, top_k", "float32", exists=lambda o: "dots" in o.want),
    )
    returns = PermuteGradient
    rows_independent = False
    vmap = "loop"
    no_gradient = NO_SECOND_DERIVATIVE
    single_kernel = True

    def example(self) -> GradientOptions:
        return GradientOptions(("sums",))

    def check(self, options: GradientOptions, arrays: Arrays) -> None:
        if "dots" in options.want and arrays.x is None:
            raise TypeError("x must be an array where dots are wanted, got None")

    def reference(self, options: GradientOptions, arrays: Arrays, num_valid: int) -> tuple[Any, ...]:
        found = []
        if "sums" in options.want:
            found.append(unpermute.unpermute(arrays.y, arrays.positions, arrays.weights))
        if "dots" in options.want:
            found.append(permute.row_dots(arrays.x, arrays.y, arrays.positions))
        return tuple(found)

    def kernel(self, options: GradientOptions, arrays: Arrays, gpu: Gpu) -> Kernel:
        return _rows.unpermute_kernel(self, options.want, arrays, gpu)


OP = PermuteBackward()
