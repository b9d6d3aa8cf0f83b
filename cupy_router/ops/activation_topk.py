# SPDX-License-Identifier: Apache-2.0
"""activation_topk: score, bias, top-k, renormalisation and scale in one kernel."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

from cupy_router.arrays import View
from cupy_router.method import RoutingMethod, resolve
from cupy_router.ops import _checks as check
from cupy_router.ops import _layout as layout
from cupy_router.ops._call import Kernel, Op, Output, run
from cupy_router.reference import activation_topk as reference
from cupy_router.results import Routing

SCORE_CODES = {"identity": 0, "sigmoid": 1, "sqrtsoftplus": 2, "softmax": 3}
_WIDE_BLOCK = 256


def activation_topk(
    logits: Any,
    method: RoutingMethod | str,
    *,
    bias: Any = None,
    num_valid: Any = None,
    out: Any = None,
    stream: Any = None,
) -> Routing:
    """Score the logits of each token, choose its top_k experts by score plus bias, and weigh them by their scores.

    Args:
        logits: [num_tokens, num_experts] float32, float16 or bfloat16.
        method: a :class:`RoutingMethod`, or the name of a preset such as "deepseek-v4-flash".
        bias: [num_experts] float32, added to the scores for the selection alone.
        num_valid: rows from this one on are padding and get indices -1 and weights 0: an int in 0..num_tokens, or a
            one-element int32 array on the device of the logits, clamped, which a CUDA graph may change between replays.
        out: a :class:`Routing` of preallocated arrays, filled in place and returned. stream: work is enqueued on the
        current stream of the logits' framework unless an object with `__cuda_stream__` or
            an int handle is given here. The host never waits.

    Returns:
        Routing of weights [num_tokens, top_k] float32 and indices [num_tokens, top_k] int32, by descending score +
        bias; equal values: lower index first; NaN below -inf. Arrays are of the logits' framework, on their device.

    Raises:
        TypeError: something is no array, or has a dtype that is not allowed.
        ValueError: ranks, shapes, strides, devices or num_valid are wrong.
        RuntimeError: CUDA arrays came but CuPy, NVRTC or a driver is missing.

    The scores are those of routing_maths: sqrt(log(1 + exp(x))) as in DeepSeek-V4, sigmoid, softmax, or the logit
    itself.

    >>> import numpy as np
    >>> from cupy_router import RoutingMethod, activation_topk
    >>> logits = np.array([[0.0, 2.0, 1.0, 2.0]], np.float32)
    >>> weights, indices = activation_topk(logits, RoutingMethod(4, 2, "softmax"))
    >>> indices, weights
    (array([[1, 3]], dtype=int32), array([[0.5, 0.5]], dtype=float32))
    """
    number, num_valid = check.split_num_valid(num_valid)
    return run(_OP, resolve(method), (logits, bias, num_valid), out, stream, number)  # type: ignore[no-any-return]


def _check(method: RoutingMethod, logits: View, bias: View | None, num_valid: View | None) -> tuple[Output, Output]:
    check.dtype(logits, check.FLOATS)
    check.rank(logits, "num_tokens, num_experts")
    num_tokens, num_experts = logits.shape
    if num_experts != method.num_experts:
        raise ValueError(
            f"logits must have num_experts = {method.num_experts} columns, as the method has, got {logits}"
        )
    if bias is not None:
        check.dtype(bias, ("float32",))
        check.shape(bias, (num_experts,), "num_experts")
    check.num_valid(num_valid)
    shape = (num_tokens, method.top_k)
    return (shape, method.weight_dtype), (shape, method.index_dtype)


def method_macros(method: RoutingMethod) -> dict[str, int]:
    """What the kernels are compiled for, of a method; its numbers are arguments."""
    return {
        "NUM_EXPERTS": method.num_experts,
        "TOP_K": method.top_k,
        "SCORE": SCORE_CODES[method.score],
        "RENORMALIZE": int(method.renormalize),
    }


def method_arguments(method: RoutingMethod) -> dict[str, float]:
    """The numbers of a method, in the order in which every kernel takes them last."""
    return {
        "renormalize_eps": method.renormalize_eps,
        "renormalize_min": -math.inf if method.renormalize_min is None else method.renormalize_min,
        "scale": method.scale,
    }


def kernel(
    method: RoutingMethod, out_strides: Sequence[int], logits: View, bias: View | None, num_valid: View | None
) -> Kernel:
    num_tokens, num_experts = logits.shape
    macros = method_macros(method) | {"DTYPE": layout.DTYPE_CODES[logits.dtype], "HAS_BIAS": int(bias is not None)}
    fixed = {
        "num_tokens": num_tokens,
        "logits_stride": logits.row_stride,
        "weights_stride": out_strides[0],
        "indices_stride": out_strides[1],
        **method_arguments(method),
    }
    if not layout.fits(num_experts, method.top_k):
        return Kernel(
            "activation_topk",
            "activation_topk_wide",
            macros | {"WIDE": 1},
            min(num_tokens, 2**31 - 1),
            _WIDE_BLOCK,
            fixed,
        )
    lanes, columns = layout.lanes_and_columns(num_experts, method.top_k)
    macros |= {
        "FEW_ROWS": int(layout.few(num_tokens)),
        "MANY_ROWS": int(layout.many(num_tokens)),
        "LANES": lanes,
        "PER_LANE": columns,
        "ALIGNED": int(layout.aligned(logits.pointer, logits.row_stride, logits.dtype, columns)),
        "BIAS_ALIGNED": int(bias is not None and layout.aligned(bias.pointer, num_experts, bias.dtype, columns)),
    }
    return Kernel("activation_topk", "activation_topk", macros, *layout.grid_and_block(num_tokens, lanes), fixed)


def _reference(method: RoutingMethod, number: int, logits: Any, bias: Any, num_valid: Any) -> tuple[Any, Any]:
    return reference.activation_topk(logits, method, bias, check.valid_rows(number, num_valid, len(logits)))


_OP = Op(
    name="activation_topk",
    inputs=("logits", "bias", "num_valid"),
    result=Routing,
    check=_check,
    kernel=kernel,
    reference=_reference,
    takes_number=True,
)
