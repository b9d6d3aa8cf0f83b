# SPDX-License-Identifier: Apache-2.0
"""dense_router: gate product, score, bias, top-k and weights; one launch for few tokens, cuBLAS first for many."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from cupy_router import gemm, scratch
from cupy_router.arrays import Output, View
from cupy_router.launcher import Launch
from cupy_router.method import RoutingMethod, resolve
from cupy_router.ops import _checks as check
from cupy_router.ops import _dense_decode as decode
from cupy_router.ops import _row_lanes as layout
from cupy_router.ops import activation_topk as scoring
from cupy_router.ops._call import Kernel, Op, Work, launch_of, run
from cupy_router.ops._slices import ByProduct, Slices
from cupy_router.reference import dense_router as reference
from cupy_router.results import Routing
from cupy_router.tuning import gpu_of

PATHS = ("decode", "prefill")

_COUNTER_BYTES = 4 * decode.COUNTERS  # in front of the partial sums, in one piece of scratch memory
_OUTPUTS = ("weights", "indices")


def dense_router(
    x: Any,
    weight: Any,
    method: RoutingMethod | str,
    *,
    bias: Any = None,
    logit_bias: Any = None,
    expert_scale: Any = None,
    path: str | None = None,
    num_valid: Any = None,
    out: Any = None,
    stream: Any = None,
) -> Routing:
    """Multiply each token with the gate, score the logits, choose top_k experts by score plus bias, weigh them.

    Logits are accumulated and kept in float32, whatever the dtypes of x and weight; float32 inputs are multiplied as
    they are, without tf32. Results are bitwise repeatable; the rounding of logits may change with the number of tokens.

    Args:
        x: [num_tokens, hidden] float32, float16 or bfloat16.
        weight: [num_experts, hidden] float32, float16 or bfloat16, the gate; its dtype need not be that of x. With the
            method's `shared_in_normalizer` it has num_shared_experts more rows.
        method: a :class:`RoutingMethod`, or the name of a preset such as "deepseek-v4-flash".
        bias: [num_experts] float32, added for the selection alone: to the scores, or to the logits (`bias_on`).
        logit_bias: [num_experts] float32, added to the logits first of all: the bias of a linear layer.
        expert_scale: [num_experts] float32, a factor of the weight of each expert, last of all.
        path: "decode" is one fused launch, for at most 64 tokens, top_k 32 and 1024 experts; "prefill" is cuBLAS and a
            second kernel, for any size; None chooses by size.
        num_valid: rows from this one on are padding and get indices -1 and weights 0: an int in 0..num_tokens, or a
            one-element int32 array on the device of x, clamped, which a CUDA graph may change between replays.
        out: a :class:`Routing` of preallocated arrays that overlap nothing, filled in place and returned.
        stream: work is enqueued on the current stream of the framework of x unless an object with `__cuda_stream__` or
            an int handle is given here. The host never waits.

    Returns:
        Routing of weights and indices [num_tokens, top_k + num_shared_experts], float32 and int32 unless the method
        says otherwise, by descending score + bias; equal values: lower index first; NaN below -inf; shared experts
        last. Arrays are of the framework of x, on its device.

    Raises:
        TypeError: something is no array, or has a dtype that is not allowed.
        ValueError: ranks, shapes, strides, devices or num_valid are wrong, or the path is unknown or made for less.
        RuntimeError: CUDA arrays came but CuPy, NVRTC or a driver is missing, or cuBLAS where nothing else would do.

    >>> import numpy as np
    >>> from cupy_router import RoutingMethod, dense_router
    >>> x, gate = np.array([[1.0, 2.0]], np.float32), np.array([[3, 0], [0, 1], [0, 2]], np.float32)
    >>> dense_router(x, gate, RoutingMethod(3, 2, "identity", renormalize=False))
    Routing(weights=array([[4., 3.]], dtype=float32), indices=array([[2, 0]], dtype=int32))
    """
    if path is not None and path not in PATHS:
        raise ValueError(f"dense_router: path must be None, 'decode' or 'prefill', got {path!r}")
    number, num_valid = check.split_num_valid(num_valid)
    options = resolve(method), path
    inputs = (x, weight, bias, logit_bias, expert_scale, num_valid)
    return run(_OP, options, inputs, out, stream, number)  # type: ignore[no-any-return]  # an op.result


def _check(
    options: tuple[RoutingMethod, str | None],
    x: View,
    weight: View | None,
    bias: View | None,
    logit_bias: View | None,
    expert_scale: View | None,
    num_valid: View | None,
) -> tuple[Output, Output]:
    method, path = options
    check.dtype(x, check.FLOATS)
    check.rank(x, "num_tokens, hidden")
    num_tokens, hidden = x.shape
    if hidden < 1:
        raise ValueError(f"x must have at least one column, got {x}")
    check_gate(method, weight, hidden)
    scoring.check_layer(method, bias, logit_bias, expert_scale)
    check.num_valid(num_valid)
    if path == "decode" and (num_tokens > decode.MAX_TOKENS or not layout.fits_method(method)):
        raise ValueError(
            f"path 'decode' takes at most {decode.MAX_TOKENS} tokens, {decode.MAX_EXPERTS} experts, {decode.MAX_K} "
            f"columns of results and {decode.MAX_K} groups, none of them smaller than what a thread holds, "
            f"got {num_tokens} tokens and {method}"
        )
    return scoring.results(method, num_tokens)


def check_gate(method: RoutingMethod, weight: View | None, hidden: int | None = None) -> None:
    """The gate by itself; `hidden` None: as many columns as the gate has."""
    if weight is None:
        raise TypeError("weight must be an array, got None")
    check.dtype(weight, check.FLOATS)
    check.rank(weight, "num_experts, hidden")
    check.shape(weight, (method.num_logits, weight.shape[1] if hidden is None else hidden), "num_experts, hidden")


# -- Where a call runs -------------------------------------------------------------------------------------------------


def _plan(
    options: tuple[RoutingMethod, str | None],
    out_strides: Sequence[int],
    x: View,
    weight: View,
    bias: View | None,
    logit_bias: View | None,
    expert_scale: View | None,
    num_valid: View | None,
) -> Work:
    method, path = options
    num_tokens = x.shape[0]
    layer = {"bias": bias, "logit_bias": logit_bias, "expert_scale": expert_scale}
    arrays = {"x": x, "weight": weight, **layer, "num_valid": num_valid}
    fused = layout.fits_method(method) and runs_decode(x.device)
    if path is None:
        most = min(gpu_of(x.device).table.decode.max_tokens, decode.MAX_TOKENS)
        path = "decode" if fused and num_tokens <= most else "prefill"
    if path == "decode":
        if not fused:
            raise ValueError("path 'decode' takes a GPU of compute capability 8.0 or later")
        return _Decode(method, out_strides, num_tokens, arrays)
    obstacle = gemm.why_not(x.device)
    if obstacle is None:
        names = ("logits", *layer, "num_valid", *_OUTPUTS)

        def plan(logits: View) -> Launch:
            kernel = scoring.kernel(method, out_strides, logits, **layer, num_valid=num_valid)
            return launch_of(kernel, (*names, "num_valid_value"), x.device)

        return ByProduct(arrays, _OUTPUTS, scoring.row_bytes(method, out_strides), x, weight, names, plan)
    if not fused:
        limits = f"{decode.MAX_EXPERTS} experts, {decode.MAX_K} columns of results, {decode.MAX_K} groups"
        raise RuntimeError(f"more than {limits}, or a compute capability below 8.0, need cuBLAS: {obstacle}")
    return _DecodeSlices(arrays, out_strides, method)


def runs_decode(device: tuple[str, int]) -> bool:
    """Whether the fused kernel's instructions are known there: those of sm_80."""
    return gpu_of(device).capability >= (8, 0)


class _Decode:
    """The fused kernel, with the scratch memory of the stream that it is called on."""

    def __init__(
        self,
        method: RoutingMethod,
        out_strides: Sequence[int],
        num_tokens: int,
        arrays: Mapping[str, View | None],
    ) -> None:
        x, weight = arrays["x"], arrays["weight"]
        assert x is not None
        assert weight is not None
        hidden = x.shape[1]
        both_aligned = all(layout.aligned(view.pointer, view.row_stride, view.dtype, 8) for view in (x, weight))
        strides = (x.row_stride, weight.row_stride, *out_strides)
        launch = decode.launch_for(
            gpu_of(x.device), method, x.dtype, weight.dtype, num_tokens, hidden,
            aligned=both_aligned and hidden % 8 == 0,
            dense=strides == (hidden, hidden, method.num_columns, method.num_columns),
            given=[name for name, view in arrays.items() if view is not None],
        )  # fmt: skip
        fixed = decode.fixed_arguments(method, num_tokens, *strides)
        headers = scoring.headers(method)
        kernel = Kernel(decode.FILE, decode.FUNCTION, launch.macros, launch.grid, launch.block, fixed, headers)
        self._launch = launch_of(kernel, decode.VARYING, x.device)
        self._device, self._scratch_bytes = x.device, _COUNTER_BYTES + 4 * launch.partials
        self.function = self._launch.function

    def __call__(self, stream: int, varying: Sequence[int | float]) -> None:
        counters = scratch.buffer(self._device, stream, "decode", self._scratch_bytes)
        self._launch(stream, (*varying[:-1], counters, counters + _COUNTER_BYTES, varying[-1]))


class _DecodeSlices(Slices):
    """Any number of tokens by the fused kernel: what is done without cuBLAS."""

    def __init__(
        self,
        arrays: dict[str, View | None],
        out_strides: Sequence[int],
        method: RoutingMethod,
    ) -> None:
        super().__init__(arrays, _OUTPUTS, scoring.row_bytes(method, out_strides), decode.MAX_TOKENS)
        sizes = {self.rows, self.num_tokens % self.rows or self.rows}
        self._by_rows = {rows: _Decode(method, out_strides, rows, arrays) for rows in sizes}
        self.function = self._by_rows[self.rows].function

    def enqueue_slice(self, stream: int, arrays: dict[str, int], rows: int, number: int) -> None:
        self._by_rows[rows](stream, [*(arrays[name] for name in (*_OP.inputs, *_OUTPUTS)), number])


def _reference(
    options: tuple[RoutingMethod, str | None],
    number: int,
    x: Any,
    weight: Any,
    bias: Any,
    logit_bias: Any,
    expert_scale: Any,
    num_valid: Any,
) -> tuple[Any, Any]:
    valid = check.valid_rows(number, num_valid, len(x))
    return reference.dense_router(
        x, weight, options[0], bias, logit_bias=logit_bias, expert_scale=expert_scale, num_valid=valid
    )


_OP = Op(
    name="dense_router",
    inputs=decode.INPUTS,
    result=Routing,
    check=_check,
    kernel=_plan,
    reference=_reference,
    takes_number=True,
    smooth=(0, 1, 3, 4),
)
