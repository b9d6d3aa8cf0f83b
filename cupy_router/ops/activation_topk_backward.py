# SPDX-License-Identifier: Apache-2.0
"""The gradient with respect to the logits from that of the weights, in one kernel, for autograd of the frameworks."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import Any, NamedTuple

from cupy_router.method import RoutingMethod, resolve
from cupy_router.ops import _row_lanes as row_lanes
from cupy_router.ops._cached import Kernel
from cupy_router.ops._declared import IDS, Arrays, Result, row
from cupy_router.ops._method import (
    EXPERT_SCALE,
    LOGIT_BIAS,
    headers,
    id_macros,
    method_arguments,
    method_macros,
    method_sizes,
    needs_whole_rows,
)
from cupy_router.ops._op import Op
from cupy_router.ops._options import Options
from cupy_router.ops._run import run
from cupy_router.reference import activation_topk_backward as reference
from cupy_router.score_function import ScoreFunction
from cupy_router.tuning import Gpu

# Error of the frameworks for second derivatives.
NO_SECOND_DERIVATIVE = "cupy_router: the weights of a routing have first derivatives only, so this has no gradient"

_WIDE_BLOCK = 256
_MAX_REPEATED = 8192  # weights of a token if experts may repeat; a float of shared memory each
# Macros of a method that its gradient does not use: steps that only select, and the dtype of its indices, because the
# given indices have their own.
_NOT_COMPILED = (
    "HAS_BIAS", "SELECT_ON_LOGITS", "NUM_GROUPS", "TOP_GROUPS", "GROUP_TOP2", "INDEX_BYTES", "INDEX_UNSIGNED",
)  # fmt: skip


class LogitsGradient(NamedTuple):
    """grad_logits: [num_tokens, columns of the logits], the gradient with respect to them."""

    grad_logits: Any


@dataclass(frozen=True)
class BackwardOptions(Options):
    """The method of the forward pass, and options of the gradient.

    dtype: dtype of the result; None: that of the logits.
    repeated: True if a row may have an expert more than once.
    """

    method: RoutingMethod
    dtype: str | None
    repeated: bool


def _gradient_dtype(options: BackwardOptions, dtypes: Mapping[str, str]) -> str:
    return options.dtype or dtypes["logits"]


class ActivationTopKBackward(Op):
    """The declaration of :func:`activation_topk_backward`."""

    name = "activation_topk_backward"
    options = BackwardOptions
    inputs = (
        row("grad_weights", "num_tokens, top_k (+ shared)", required=True),
        row("indices", "num_tokens, top_k (+ shared)", IDS, required=True),
        row("logits", "num_tokens, num_experts (+ shared)", required=True),
        LOGIT_BIAS,
        EXPERT_SCALE,
    )
    results = (Result("grad_logits", "num_tokens, num_experts (+ shared)", _gradient_dtype),)
    returns = LogitsGradient
    no_gradient = NO_SECOND_DERIVATIVE
    single_kernel = True

    def example(self) -> BackwardOptions:
        return BackwardOptions(RoutingMethod(8, 2), None, True)

    def sizes(self, options: BackwardOptions) -> dict[str, int]:
        return method_sizes(options.method)

    def check(self, options: BackwardOptions, arrays: Arrays) -> None:
        method, grad_weights = options.method, arrays.grad_weights
        check_derivative(method)
        if grad_weights.dtype != method.weight_dtype:
            raise TypeError(f"grad_weights must be {method.weight_dtype}, as the weights are, got {grad_weights}")

    def reference(self, options: BackwardOptions, arrays: Arrays, num_valid: int) -> tuple[Any]:
        layer = arrays.named("logit_bias", "expert_scale")
        given = arrays.grad_weights, arrays.indices, arrays.logits, options.method
        return (reference.activation_topk_backward(*given, **layer, dtype=options.dtype),)

    def kernel(self, options: BackwardOptions, arrays: Arrays, gpu: Gpu) -> Kernel:
        method, repeated = options.method, options.repeated
        grad_weights, indices, logits = arrays.grad_weights, arrays.indices, arrays.logits
        gradient = arrays.grad_logits
        macros = method_macros(method, arrays.given("logit_bias", "expert_scale"))
        macros = {name: value for name, value in macros.items() if name not in _NOT_COMPILED}
        macros |= {
            "DTYPE": row_lanes.DTYPE_CODES[logits.dtype],
            "GRADIENT_DTYPE": row_lanes.DTYPE_CODES[gradient.dtype],
            **id_macros("INDEX", indices.dtype),
            **({"REPEATED": 1} if repeated else {}),
        }
        num_tokens, num_scored = logits.shape[0], num_scored_columns(method)
        fixed = {
            "num_tokens": num_tokens,
            **method_arguments(method),
            "grad_weights_stride": grad_weights.row_stride,
            "indices_stride": indices.row_stride,
            "logits_stride": logits.row_stride,
            "grad_logits_stride": gradient.row_stride,
        }
        replaced = headers(method)
        if isinstance(method.score, ScoreFunction) and method.score.derivative is not None:
            gradient_of_score = method.score.derivative.defined_as("score_function_gradient")
            replaced["routing/score_function_gradient.cuh"] = gradient_of_score
        if not row_lanes.fits(method.num_logits, num_scored):
            if repeated and num_scored > _MAX_REPEATED:
                raise ValueError(f"top_k must be at most {_MAX_REPEATED} where experts may repeat, got {method.top_k}")
            function, grid = "activation_topk_backward_wide", min(num_tokens, 2**31 - 1)
            return Kernel(function, function, macros, grid, _WIDE_BLOCK, fixed, replaced)
        lanes, _ = row_lanes.lanes_and_columns(method.num_logits, num_scored)
        needs_rows = needs_whole_rows(method)
        if not needs_rows and not row_lanes.few(gpu, num_tokens):
            while lanes // 2 >= max(num_scored, gpu.table.backward.min_lanes):
                lanes //= 2
        strides = grad_weights.row_stride, indices.row_stride, logits.row_stride, gradient.row_stride
        dense = strides == (method.num_columns, method.num_columns, method.num_logits, method.num_logits)
        macros |= {"LANES": lanes, "DENSE": int(dense)}
        if needs_rows:
            unit = 16 // row_lanes.SIZES[gradient.dtype]
            macros["ALIGNED"] = int(row_lanes.aligned(logits.pointer, logits.row_stride, logits.dtype, unit))
        grid, block = row_lanes.grid_and_block(gpu, num_tokens, lanes)
        return Kernel("activation_topk_backward", "activation_topk_backward", macros, grid, block, fixed, replaced)


OP = ActivationTopKBackward()


def activation_topk_backward(
    grad_weights: Any,
    indices: Any,
    logits: Any,
    method: RoutingMethod | str,
    *,
    logit_bias: Any = None,
    expert_scale: Any = None,
    dtype: str | None = None,
    repeated: bool = False,
    out: Any = None,
    stream: Any = None,
) -> LogitsGradient:
    """Return the gradient of a loss with respect to the logits, given the gradient with respect to the weights.

    Indices, and a bias that only selects, have no gradient. The rounding of weights to 16 bits is ignored. An expert
    whose weight is NaN has gradient NaN and does not change the gradients of the others. Weights that are 0 because the
    sum of the scores is 0 have gradient 0.

    Args:
        grad_weights: [num_tokens, top_k + num_shared_experts], of the method's weight_dtype.
        indices: the same shape, of any dtype that a method's indices may have, from `activation_topk` or `hash_router`.
            If one of the first top_k indices of a row is no expert (-1: padding), the row of the result is 0.
        logits: [num_tokens, num_experts] float32, float16 or bfloat16, or with num_shared_experts more columns, as in
            the forward pass.
        method, logit_bias, expert_scale: as in the forward pass.
        dtype: "float32", or None: the dtype of the logits.
        repeated: rows may have an expert more than once, as rows of a table may.
        out: a :class:`LogitsGradient` of a preallocated array, filled in place and returned.
        stream: as for :func:`activation_topk`.

    Returns:
        LogitsGradient of an array with the shape of the logits. Every entry is written, 0 if the weights do not depend
        on the logit. Its sum over the tokens is the gradient with respect to logit_bias.

    Raises:
        TypeError: an argument is no array, or its dtype is not allowed.
        ValueError: ranks, shapes, strides or devices are wrong, or a custom score has no derivative.
        RuntimeError: CUDA arrays were given, but CuPy, NVRTC or a driver is missing.

    >>> import numpy as np
    >>> from cupy_router import RoutingMethod, activation_topk
    >>> from cupy_router.ops.activation_topk_backward import activation_topk_backward
    >>> method, logits = RoutingMethod(4, 2, "softmax"), np.array([[0.0, 2.0, 1.0, 2.0]], np.float32)
    >>> weights, indices = activation_topk(logits, method)
    >>> activation_topk_backward(np.array([[1.0, 0.0]], np.float32), indices, logits, method).grad_logits
    array([[ 0.  ,  0.25,  0.  , -0.25]], dtype=float32)
    """
    if dtype not in ("float32", None):
        raise ValueError(f"activation_topk_backward: dtype must be 'float32' or None, got {dtype!r}")
    fields = resolve(method), dtype, bool(repeated)
    inputs = (grad_weights, indices, logits, logit_bias, expert_scale)
    return run(OP, fields, inputs, out, stream)  # type: ignore[no-any-return]


def check_derivative(method: RoutingMethod) -> None:
    """Refuse a custom score without a derivative."""
    if isinstance(method.score, ScoreFunction) and method.score.derivative is None:
        raise ValueError(f"{method.score!r} has no gradient: give it a derivative, which is another ScoreFunction")


def num_scored_columns(method: RoutingMethod) -> int:
    """Return the number of weight columns that are computed from logits."""
    return method.num_columns if method.shared_in_normalizer else method.top_k


@lru_cache(maxsize=1024)
def without_factors(method: RoutingMethod) -> RoutingMethod:
    """Return the method with float32 weights, int32 indices, and no shared experts unless they are in the normaliser.

    With it and without expert_scale, `hash_router` returns the unscaled weights, which the gradient with respect to
    expert_scale needs.
    """
    shared = method.num_shared_experts if method.shared_in_normalizer else 0
    return replace(method, num_shared_experts=shared, weight_dtype="float32", index_dtype="int32")
