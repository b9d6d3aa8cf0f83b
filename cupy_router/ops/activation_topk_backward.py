# SPDX-License-Identifier: Apache-2.0
"""The gradient of the logits from that of the weights, in one kernel: what the frameworks' gradients are made of."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from functools import cache
from typing import Any, NamedTuple

from cupy_router.arrays import Output, View
from cupy_router.method import RoutingMethod, resolve
from cupy_router.ops import _checks as check
from cupy_router.ops import _layout as layout
from cupy_router.ops import activation_topk as scoring
from cupy_router.ops._call import Kernel, Op, run
from cupy_router.reference import activation_topk_backward as reference
from cupy_router.score_function import ScoreFunction

# What frameworks answer where a gradient of gradients is asked for.
NO_SECOND_DERIVATIVE = "cupy_router: the weights of a routing have first derivatives only, so this has no gradient"

_WIDE_BLOCK = 256
_MAX_REPEATED = 8192  # weights of a token where experts may repeat; a float of shared memory each
_LEAST_LANES = 8  # of a row, so that they write whole sectors of memory
# Of a method's macros: what only selects, and the dtype of its indices, since any indices may come.
_NOT_COMPILED = ("HAS_BIAS", "SELECT_ON_LOGITS", "NUM_GROUPS", "TOP_GROUPS", "GROUP_TOP2", "INDEX_INT64")


class LogitsGradient(NamedTuple):
    """grad_logits: [num_tokens, columns of the logits], the gradient by them."""

    grad_logits: Any


class Options(NamedTuple):
    """What a call asks for beside its arrays."""

    method: RoutingMethod
    dtype: str | None  # of the result; None: that of the logits
    repeated: bool  # whether an expert may stand in a row more than once


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
    """The gradient of a loss by the logits, given that by the weights of the experts that were chosen.

    Indices, and a bias that only selects, have no gradient. The rounding of weights to 16 bits counts as no step. An
    expert whose weight is NaN has gradient NaN and leaves the others' alone; weights that are 0 because the sum of the
    scores is have gradient 0.

    Args:
        grad_weights: [num_tokens, top_k + num_shared_experts], of the method's weight_dtype.
        indices: the same shape, int32 or int64, as `activation_topk` or `hash_router` gave them. A row with an index of
            the first top_k that is no expert (-1: padding) gets zeros.
        logits: [num_tokens, num_experts] float32, float16 or bfloat16, or with num_shared_experts more columns, as in
            the forward pass.
        method, logit_bias, expert_scale: as in the forward pass.
        dtype: "float32", or None: that of the logits.
        repeated: rows may have an expert more than once, as those of a table may.
        out: a :class:`LogitsGradient` of a preallocated array, filled in place and returned.
        stream: as for :func:`activation_topk`.

    Returns:
        LogitsGradient of an array of the shape of the logits, every entry written: 0 where a logit has no part in the
        weights. Summed over the tokens it is the gradient by logit_bias.

    Raises:
        TypeError: something is no array, or has a dtype that is not allowed.
        ValueError: ranks, shapes, strides or devices are wrong, or a score of the caller's own has no derivative.
        RuntimeError: CUDA arrays came but CuPy, NVRTC or a driver is missing.

    >>> import numpy as np
    >>> from cupy_router import RoutingMethod, activation_topk
    >>> from cupy_router.ops.activation_topk_backward import activation_topk_backward
    >>> method, logits = RoutingMethod(4, 2, "softmax"), np.array([[0.0, 2.0, 1.0, 2.0]], np.float32)
    >>> weights, indices = activation_topk(logits, method)
    >>> activation_topk_backward(np.array([[1.0, 0.0]], np.float32), indices, logits, method).grad_logits
    array([[ 0.  ,  0.25,  0.  , -0.25]], dtype=float32)
    """
    options = Options(resolve(method), dtype, repeated)
    inputs = (grad_weights, indices, logits, logit_bias, expert_scale)
    return run(_OP, options, inputs, out, stream)  # type: ignore[no-any-return]  # an op.result


def _check(
    options: Options,
    grad_weights: View,
    indices: View | None,
    logits: View | None,
    logit_bias: View | None,
    expert_scale: View | None,
) -> tuple[Output]:
    method, dtype, _ = options
    if indices is None or logits is None:
        raise TypeError("indices and logits must be arrays, got None")
    if isinstance(method.score, ScoreFunction) and method.score.derivative is None:
        raise ValueError(f"{method.score!r} has no gradient: give it a derivative, which is another ScoreFunction")
    if dtype not in ("float32", None):
        raise ValueError(f"dtype must be 'float32' or None, got {dtype!r}")
    check.dtype(logits, check.FLOATS)
    check.rank(logits, "num_tokens, num_experts")
    num_tokens = logits.shape[0]
    check.shape(logits, (num_tokens, method.num_logits), "num_tokens, num_experts")
    check.dtype(grad_weights, (method.weight_dtype,))
    check.dtype(indices, check.INTS)
    for view in (grad_weights, indices):
        check.shape(view, (num_tokens, method.num_columns), "num_tokens, top_k + num_shared_experts")
    scoring.check_layer(method, None, logit_bias, expert_scale)
    return ((logits.shape, dtype or logits.dtype),)


def kernel(
    options: Options,
    out_strides: Sequence[int],
    grad_weights: View,
    indices: View,
    logits: View,
    logit_bias: View | None,
    expert_scale: View | None,
) -> Kernel:
    method, dtype, repeated = options
    layer = {"logit_bias": logit_bias, "expert_scale": expert_scale}
    macros = scoring.method_macros(method, [name for name, view in layer.items() if view is not None])
    macros = {name: value for name, value in macros.items() if name not in _NOT_COMPILED}
    macros |= {
        "DTYPE": layout.DTYPE_CODES[logits.dtype],
        "GRADIENT_DTYPE": layout.DTYPE_CODES[dtype or logits.dtype],
        **({"INDEX_INT64": 1} if indices.dtype == "int64" else {}),
        **({"REPEATED": 1} if repeated else {}),
    }
    num_tokens, num_weighed = logits.shape[0], weighed(method)
    fixed = {
        "num_tokens": num_tokens,
        **scoring.method_arguments(method),
        "grad_weights_stride": grad_weights.row_stride,
        "indices_stride": indices.row_stride,
        "logits_stride": logits.row_stride,
        "grad_logits_stride": out_strides[0],
    }
    headers = scoring.headers(method)
    if isinstance(method.score, ScoreFunction) and method.score.derivative is not None:
        gradient = method.score.derivative.defined_as("score_function_gradient")
        headers["routing/score_function_gradient.cuh"] = gradient
    if not layout.fits(method.num_logits, num_weighed):
        if repeated and num_weighed > _MAX_REPEATED:
            raise ValueError(f"top_k must be at most {_MAX_REPEATED} where experts may repeat, got {method.top_k}")
        function, grid = "activation_topk_backward_wide", min(num_tokens, 2**31 - 1)
        return Kernel(function, function, macros, grid, _WIDE_BLOCK, fixed, headers)
    lanes, _ = layout.lanes_and_columns(method.num_logits, num_weighed)
    needs_rows = method.score == "softmax" and not method.score_after_topk
    if not needs_rows and not layout.few(num_tokens):
        while lanes // 2 >= max(num_weighed, _LEAST_LANES):
            lanes //= 2
    strides = grad_weights.row_stride, indices.row_stride, logits.row_stride, out_strides[0]
    dense = strides == (method.num_columns, method.num_columns, method.num_logits, method.num_logits)
    macros |= {"LANES": lanes, "DENSE": int(dense)}
    if needs_rows:
        unit = 16 // layout.SIZES[dtype or logits.dtype]
        macros["ALIGNED"] = int(layout.aligned(logits.pointer, logits.row_stride, logits.dtype, unit))
    grid, block = layout.grid_and_block(num_tokens, lanes)
    return Kernel("activation_topk_backward", "activation_topk_backward", macros, grid, block, fixed, headers)


def weighed(method: RoutingMethod) -> int:
    """How many columns of the weights a logit stands behind."""
    return method.num_columns if method.shared_in_normalizer else method.top_k


@cache
def without_factors(method: RoutingMethod) -> RoutingMethod:
    """What weighs the chosen experts alike, but for the dtypes and for shared experts that do not matter.

    With it and no expert_scale, `hash_router` gives what the gradient by expert_scale is made of.
    """
    shared = method.num_shared_experts if method.shared_in_normalizer else 0
    return replace(method, num_shared_experts=shared, weight_dtype="float32", index_dtype="int32")


def _reference(
    options: Options, number: int, grad_weights: Any, indices: Any, logits: Any, logit_bias: Any, expert_scale: Any
) -> tuple[Any]:
    method, dtype, _ = options
    return (
        reference.activation_topk_backward(
            grad_weights, indices, logits, method, logit_bias=logit_bias, expert_scale=expert_scale, dtype=dtype
        ),
    )


_OP = Op(
    name="activation_topk_backward",
    inputs=("grad_weights", "indices", "logits", "logit_bias", "expert_scale"),
    result=LogitsGradient,
    check=_check,
    kernel=kernel,
    reference=_reference,
    takes_number=False,
)
