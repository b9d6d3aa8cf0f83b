# SPDX-License-Identifier: Apache-2.0
"""activation_topk: score, bias, top-k, renormalisation and scale in one kernel."""

from __future__ import annotations

import math
from collections.abc import Collection, Sequence
from typing import Any

from cupy_router.arrays import ITEM_SIZES, Output, View
from cupy_router.method import RoutingMethod, resolve
from cupy_router.ops import _checks as check
from cupy_router.ops import _layout as layout
from cupy_router.ops._call import Kernel, Op, run
from cupy_router.reference import activation_topk as reference
from cupy_router.results import Routing

SCORE_CODES = {"identity": 0, "sigmoid": 1, "sqrtsoftplus": 2, "softmax": 3}
_OWN_SCORE = 4
_UNIFORM = RoutingMethod(1, 1)
_WIDE_BLOCK = 256
_MAX_WIDE_GROUPS = 8192  # a float of shared memory each


def activation_topk(
    logits: Any,
    method: RoutingMethod | str,
    *,
    bias: Any = None,
    logit_bias: Any = None,
    expert_scale: Any = None,
    num_valid: Any = None,
    out: Any = None,
    stream: Any = None,
) -> Routing:
    """Score the logits of each token, choose its top_k experts by score plus bias, and weigh them by their scores.

    Args:
        logits: [num_tokens, num_experts] float32, float16 or bfloat16; with the method's `shared_in_normalizer`
            [num_tokens, num_experts + num_shared_experts].
        method: a :class:`RoutingMethod`, or the name of a preset such as "deepseek-v4-flash".
        bias: [num_experts] float32, added for the selection alone: to the scores, or to the logits (`bias_on`).
        logit_bias: [num_experts] float32, added to the logits first of all.
        expert_scale: [num_experts] float32, a factor of the weight of each expert, last of all.
        num_valid: rows from this one on are padding and get indices -1 and weights 0: an int in 0..num_tokens, or a
            one-element int32 array on the device of the logits, clamped, which a CUDA graph may change between replays.
        out: a :class:`Routing` of preallocated arrays that overlap nothing, filled in place and returned.
        stream: work is enqueued on the current stream of the logits' framework unless an object with `__cuda_stream__`
            or an int handle is given here. The host never waits.

    Returns:
        Routing of weights and indices [num_tokens, top_k + num_shared_experts], float32 and int32 unless the method
        says otherwise, by descending score + bias; equal values: lower index first; NaN below -inf; shared experts
        last. Arrays are of the logits' framework, on their device.

    Raises:
        TypeError: something is no array, or has a dtype that is not allowed.
        ValueError: ranks, shapes, strides, devices or num_valid are wrong.
        RuntimeError: CUDA arrays came but CuPy, NVRTC or a driver is missing.

    docs/methods.md has the mathematics, and where each step comes from.

    >>> import numpy as np
    >>> from cupy_router import RoutingMethod, activation_topk
    >>> logits = np.array([[0.0, 2.0, 1.0, 2.0]], np.float32)
    >>> weights, indices = activation_topk(logits, RoutingMethod(4, 2, "softmax"))
    >>> indices, weights
    (array([[1, 3]], dtype=int32), array([[0.5, 0.5]], dtype=float32))
    """
    number, num_valid = check.split_num_valid(num_valid)
    inputs = (logits, bias, logit_bias, expert_scale, num_valid)
    return run(_OP, resolve(method), inputs, out, stream, number)  # type: ignore[no-any-return]  # an op.result


def _check(
    method: RoutingMethod,
    logits: View,
    bias: View | None,
    logit_bias: View | None,
    expert_scale: View | None,
    num_valid: View | None,
) -> tuple[Output, Output]:
    check.dtype(logits, check.FLOATS)
    check.rank(logits, "num_tokens, num_experts")
    num_tokens, num_logits = logits.shape
    if num_logits != method.num_logits:
        shared = f" + num_shared_experts = {method.num_logits}" if method.shared_in_normalizer else ""
        raise ValueError(
            f"logits must have num_experts = {method.num_experts}{shared} columns, as the method has, got {logits}"
        )
    check_layer(method, bias, logit_bias, expert_scale)
    check.num_valid(num_valid)
    return results(method, num_tokens)


def check_layer(method: RoutingMethod, bias: View | None, logit_bias: View | None, expert_scale: View | None) -> None:
    """The arrays that a layer has beside its gate."""
    for view in (bias, logit_bias, expert_scale):
        if view is not None:
            check.dtype(view, ("float32",))
            check.shape(view, (method.num_experts,), "num_experts")
    if bias is not None and method.score_after_topk and method.bias_on == "score":
        raise ValueError("bias has no scores to go to where score_after_topk is set, unless bias_on is 'logits'")


def results(method: RoutingMethod, num_tokens: int) -> tuple[Output, Output]:
    shape = (num_tokens, method.num_columns)
    return (shape, method.weight_dtype), (shape, method.index_dtype)


def row_bytes(method: RoutingMethod, out_strides: Sequence[int]) -> list[int]:
    """From row to row of weights and indices."""
    sizes = ITEM_SIZES[method.weight_dtype], ITEM_SIZES[method.index_dtype]
    return [stride * size for stride, size in zip(out_strides, sizes, strict=True)]


def method_macros(method: RoutingMethod, given: Collection[str] = ()) -> dict[str, int]:
    """What the kernels are compiled for: the steps of a method, and which of a layer's arrays are given; a method's
    numbers are arguments."""
    macros = {
        "NUM_EXPERTS": method.num_experts,
        "TOP_K": method.top_k,
        "SCORE": SCORE_CODES[method.score] if isinstance(method.score, str) else _OWN_SCORE,
        "RENORMALIZE": int(method.renormalize),
        "HAS_BIAS": int("bias" in given),
    }
    grouped = method.top_groups < method.num_groups
    options = {
        "HAS_EPS": int(method.renormalize and method.renormalize_eps != 0.0),
        "HAS_MIN": int(method.renormalize and method.renormalize_min is not None),
        "HAS_LOGIT_BIAS": int("logit_bias" in given),
        "HAS_EXPERT_SCALE": int("expert_scale" in given),
        "LOGIT_SCALED": int(method.logit_scale != 1.0),
        "LOGIT_CAPPED": int(method.logit_softcap is not None),
        "SELECT_ON_LOGITS": int(method.selects_on_logits),
        "SCORE_AFTER_TOPK": int(method.score_after_topk),
        "NUM_GROUPS": method.num_groups if grouped else 0,
        "TOP_GROUPS": method.top_groups if grouped else 0,
        "GROUP_TOP2": int(grouped and method.group_score == "top2"),
        "NUM_SHARED": method.num_shared_experts,
        "SHARED_LOGITS": int(method.shared_in_normalizer),
        "RESULT_DTYPE": layout.DTYPE_CODES[method.weight_dtype],
        "INDEX_INT64": int(method.index_dtype == "int64"),
    }
    return macros | {name: value for name, value in options.items() if value}  # the kernels default them to 0


def method_arguments(method: RoutingMethod | None) -> dict[str, float]:
    """The numbers of a method, in the order in which every kernel takes them last; None: of uniform weights."""
    if method is None:
        method = _UNIFORM
    return {
        "renormalize_eps": method.renormalize_eps,
        "renormalize_min": -math.inf if method.renormalize_min is None else method.renormalize_min,
        "scale": method.scale,
        "logit_scale": method.logit_scale,
        "logit_softcap": method.logit_softcap or 0.0,
        "shared_weight": method.shared_weight,
    }


def headers(method: RoutingMethod | None) -> dict[str, str]:
    """The header that a score of the caller's own replaces."""
    if method is None or isinstance(method.score, str):
        return {}
    return {"routing/score_function.cuh": method.score.header}


def kernel(
    method: RoutingMethod,
    out_strides: Sequence[int],
    logits: View,
    bias: View | None,
    logit_bias: View | None,
    expert_scale: View | None,
    num_valid: View | None,
) -> Kernel:
    num_tokens, num_experts = logits.shape[0], method.num_experts
    layer = {"bias": bias, "logit_bias": logit_bias, "expert_scale": expert_scale}
    macros = method_macros(method, [name for name, view in layer.items() if view is not None])
    dense = (logits.row_stride, *out_strides) == (method.num_logits, method.num_columns, method.num_columns)
    macros |= {"DTYPE": layout.DTYPE_CODES[logits.dtype], "HAS_NUM_VALID": int(num_valid is not None)}
    fixed = {
        "num_tokens": num_tokens,
        **method_arguments(method),
        "logits_stride": logits.row_stride,
        "weights_stride": out_strides[0],
        "indices_stride": out_strides[1],
    }
    if not layout.fits_method(method):
        if method.top_groups < method.num_groups > _MAX_WIDE_GROUPS:
            raise ValueError(f"num_groups must be at most {_MAX_WIDE_GROUPS} on a GPU, got {method.num_groups}")
        function, grid = "activation_topk_wide", min(num_tokens, 2**31 - 1)
        return Kernel(function, function, macros, grid, _WIDE_BLOCK, fixed, headers(method))
    lanes, columns = layout.lanes_and_columns(num_experts, layout.lanes_needed(method))
    dealt = dealt_lanes(method, num_tokens)
    if dealt:
        lanes, columns = dealt, layout.dealt_columns(num_experts, dealt)
    biases = [view for view in (bias, logit_bias) if view is not None]
    macros |= {
        "INTERLEAVED": int(bool(dealt)),
        "DENSE": int(dense),
        "LANES": lanes,
        "PER_LANE": columns,
        "ALIGNED": int(layout.aligned(logits.pointer, logits.row_stride, logits.dtype, columns)),
        "BIAS_ALIGNED": int(
            bool(biases) and all(layout.aligned(view.pointer, num_experts, view.dtype, columns) for view in biases)
        ),
    }
    grid, block = layout.grid_and_block(num_tokens, lanes, bool(dealt))
    return Kernel("activation_topk", "activation_topk", macros, grid, block, fixed, headers(method))


def dealt_lanes(method: RoutingMethod, num_tokens: int) -> int:
    """Lanes that choose from a row by cut keys; else 0. The sum of a softmax has to be the same for any number of
    rows."""
    softmax = method.score == "softmax" and not method.score_after_topk
    if method.top_groups < method.num_groups:
        return layout.group_lanes(method) if softmax or not layout.few(num_tokens) else 0
    return 0 if softmax else layout.dealt_lanes(num_tokens, method.num_experts, method.num_columns, True)


def _reference(
    method: RoutingMethod, number: int, logits: Any, bias: Any, logit_bias: Any, expert_scale: Any, num_valid: Any
) -> tuple[Any, Any]:
    valid = check.valid_rows(number, num_valid, len(logits))
    return reference.activation_topk(
        logits, method, bias, logit_bias=logit_bias, expert_scale=expert_scale, num_valid=valid
    )


_OP = Op(
    name="activation_topk",
    inputs=("logits", "bias", "logit_bias", "expert_scale", "num_valid"),
    result=Routing,
    check=_check,
    kernel=kernel,
    reference=_reference,
    takes_number=True,
    smooth=(0, 2, 3),
)
