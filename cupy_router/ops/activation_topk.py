# SPDX-License-Identifier: Apache-2.0
"""activation_topk: scores, bias, top-k, renormalisation and scale in one kernel."""

from __future__ import annotations

from typing import Any

from cupy_router.method import RoutingMethod, resolve
from cupy_router.ops import _checks as check
from cupy_router.ops import _fused_layout as fused_layout
from cupy_router.ops import _row_lanes as row_lanes
from cupy_router.ops._cached import Kernel, Work
from cupy_router.ops._chunks import launch_with_logits
from cupy_router.ops._declared import NUM_VALID, Arrays, row
from cupy_router.ops._given import (
    GIVEN,
    ROUTE,
    TOKEN_IDS,
    as_unset,
    check_given,
    given_kernel,
    given_macros,
    selects,
    without_logits,
)
from cupy_router.ops._layout import LayoutSpec, as_spec
from cupy_router.ops._method import (
    BIAS,
    BIAS_INDEX,
    EXPERT_SCALE,
    LOGIT_BIAS,
    MethodOptions,
    bias_macros,
    check_bias,
    check_bias_index,
    headers,
    method_arguments,
    method_macros,
    method_sizes,
    needs_whole_rows,
)
from cupy_router.ops._replicas import (
    REPLICA_COUNTS,
    REPLICAS,
    as_physical,
    check_replicas,
    replaced_on_host,
    replica_arguments,
    replica_macros,
)
from cupy_router.ops._routed import RoutedOp, routing_results
from cupy_router.ops._run import run
from cupy_router.reference import activation_topk as reference
from cupy_router.tuning import Gpu

_WIDE_BLOCK = 256
_MAX_WIDE_GROUPS = 8192  # a float of shared memory each


class ActivationTopK(RoutedOp):
    """The declaration of :func:`activation_topk`."""

    name = "activation_topk"
    options = MethodOptions
    inputs = (
        row("logits", "num_tokens, num_experts (+ shared)", required=True),
        BIAS,
        BIAS_INDEX,
        LOGIT_BIAS,
        EXPERT_SCALE,
        GIVEN,
        REPLICAS,
        REPLICA_COUNTS,
        NUM_VALID,
    )
    results = routing_results("logits", "logit_bias", "expert_scale")
    single_kernel = True

    def example(self) -> MethodOptions:
        return MethodOptions(RoutingMethod(8, 2))

    def sizes(self, options: MethodOptions) -> dict[str, int]:
        return method_sizes(options.method)

    def check(self, options: MethodOptions, arrays: Arrays) -> None:
        super().check(options, arrays)
        check_bias(options.method, arrays.bias)
        check_bias_index(arrays.bias, arrays.bias_index)
        check_given(options, arrays)
        check_replicas(options, arrays, arrays.logits.shape[0])

    def route_reference(self, options: MethodOptions, arrays: Arrays, num_valid: int) -> tuple[Any, Any]:
        more = arrays.named("bias_index", "logit_bias", "expert_scale", "given_experts") | {"unset": options.unset}
        routed = reference.activation_topk(arrays.logits, options.method, arrays.bias, **more, num_valid=num_valid)
        return replaced_on_host(options, arrays, routed)

    def route(self, options: MethodOptions, arrays: Arrays, gpu: Gpu) -> Kernel:
        return without_logits(self._chosen(options, arrays, gpu))

    def with_logits(self, options: MethodOptions, arrays: Arrays, gpu: Gpu) -> Work:
        """Return the launch on the logits of a gate GEMM that also returns them."""
        return launch_with_logits(self, self._chosen(options, arrays, gpu), arrays)

    def _chosen(self, options: MethodOptions, arrays: Arrays, gpu: Gpu) -> Kernel:
        """Choose the kernel for the shape, strides and alignment of the logits, without parameters for logits_out."""
        if not selects(options, arrays.given_experts):
            return given_kernel(options, arrays, gpu)
        return self.selecting(options, arrays, gpu)

    def selecting(self, options: MethodOptions, arrays: Arrays, gpu: Gpu) -> Kernel:
        """Choose the kernel that selects experts unless they are given."""
        method, logits = options.method, arrays.logits
        num_tokens, num_experts = logits.shape[0], method.num_experts
        macros = method_macros(method, arrays.given("bias", "logit_bias", "expert_scale"))
        strides = logits.row_stride, arrays.weights.row_stride, arrays.indices.row_stride
        dense = strides == (method.num_logits, method.num_columns, method.num_columns)
        macros |= bias_macros(arrays)
        macros |= {"DTYPE": row_lanes.DTYPE_CODES[logits.dtype], "HAS_NUM_VALID": int(arrays.num_valid is not None)}
        macros |= given_macros(options, arrays) | replica_macros(options, arrays)
        fixed = {
            TOKEN_IDS: 0,
            **replica_arguments(options),
            "num_tokens": num_tokens,
            **method_arguments(method),
            "logits_stride": strides[0],
            "weights_stride": strides[1],
            "indices_stride": strides[2],
            "given_stride": 0 if arrays.given_experts is None else arrays.given_experts.row_stride,
        }
        if not row_lanes.fits_method(method):
            if method.top_groups < method.num_groups > _MAX_WIDE_GROUPS:
                raise ValueError(f"num_groups must be at most {_MAX_WIDE_GROUPS} on a GPU, got {method.num_groups}")
            function, grid = "activation_topk_wide", min(num_tokens, 2**31 - 1)
            return Kernel(function, function, macros, grid, _WIDE_BLOCK, fixed, headers(method))
        lanes, columns = row_lanes.lanes_and_columns(num_experts, row_lanes.lanes_needed(method))
        interleaved = interleaved_lanes(gpu, method, num_tokens)
        if interleaved:
            lanes, columns = interleaved, row_lanes.interleaved_columns(num_experts, interleaved)
        biases = [view for view in (arrays.bias, arrays.logit_bias) if view is not None]
        more = method.logit_softcap is not None or arrays.given_experts is not None
        macros |= {
            "INTERLEAVED": int(bool(interleaved)),
            "MIN_BLOCKS": row_lanes.min_blocks(gpu, lanes, columns, num_experts, bool(interleaved), more),
            "DENSE": int(dense),
            "LANES": lanes,
            "PER_LANE": columns,
            "ALIGNED": int(row_lanes.aligned(logits.pointer, logits.row_stride, logits.dtype, columns)),
            "BIAS_ALIGNED": int(
                bool(biases)
                and all(
                    row_lanes.aligned(view.pointer, macros.get("BIAS_STRIDE", num_experts), view.dtype, columns)
                    for view in biases
                )
            ),
        }
        grid, block = row_lanes.grid_and_block(gpu, num_tokens, lanes, bool(interleaved))
        return Kernel("activation_topk", "activation_topk", macros, grid, block, fixed, headers(method))

    def fused(self, options: MethodOptions, arrays: Arrays, gpu: Gpu) -> Kernel | None:
        found = fused_layout.problem(options, arrays, gpu)
        if found is None or not row_lanes.fits_method(options.method):
            return None
        tuned, num_tokens = gpu.table.fused_layout, arrays.logits.shape[0]
        routed = self.selecting(options, arrays, gpu)
        warps = -(-num_tokens * routed.macros["LANES"] // 32)
        name, layout_by, grid = f"{self.name}_layout", fused_layout.ONE_BLOCK, 1
        if warps > tuned.max_block_warps or found.padding > tuned.max_block_padding_rows:
            if gpu.capability >= fused_layout.CLUSTER_FROM and warps <= tuned.max_cluster_warps:
                name, layout_by, grid = f"{self.name}_cluster", fused_layout.CLUSTER, fused_layout.CLUSTER_BLOCKS
            else:
                layout_by, grid = fused_layout.LAST_BLOCK, -(-warps // tuned.last_block_warps)
        routed = routed._replace(grid=grid, block=tuned.threads)
        numbers = {"routing_warps": -(-warps // grid)}
        return fused_layout.fused(options, routed, found, arrays, gpu, name, layout_by, numbers)


OP = ActivationTopK()


def activation_topk(
    logits: Any,
    method: RoutingMethod | str,
    *,
    bias: Any = None,
    bias_index: Any = None,
    logit_bias: Any = None,
    expert_scale: Any = None,
    indices: Any = None,
    unset: str = ROUTE,
    replicas: Any = None,
    replica_counts: Any = None,
    replica_offset: int = 0,
    num_physical: int | None = None,
    layout: LayoutSpec | None = None,
    num_valid: Any = None,
    out: Any = None,
    stream: Any = None,
) -> Any:  # Routing, or RoutingPlan with a layout
    """Score the logits of each token, select its top_k experts by score plus bias, and return their weights.

    Args:
        logits: [num_tokens, num_experts] float32, float16 or bfloat16; with the method's `shared_in_normalizer`
            [num_tokens, num_experts + num_shared_experts].
        method: a :class:`RoutingMethod`, or the name of a preset such as "deepseek-v4-flash".
        bias: [num_experts] float32, added for the selection only: to the scores, or to the logits (`bias_on`). With
            `bias_index` [num_biases, num_experts], several of which each token has one.
        bias_index: [num_tokens] int32, the bias of each token, such as a second one of image tokens. A row whose index
            is not in 0..num_biases - 1 gets indices -1 and weights 0.
        logit_bias: [num_experts] float32, added to the logits before all other steps.
        expert_scale: [num_experts] float32, a factor of the weight of each expert, after all other steps.
        indices: [num_tokens, top_k], or with the columns of shared experts, which are not read, of any dtype that a
            routing has: the experts of each token, in place of a selection, so that biases and groups do not matter. A
            row with an id that is no expert gets indices -1 and weights 0.
        unset: what becomes of a row of `indices` that is -1 throughout: with "route", it is routed as usual, with
            "empty" it gets indices -1 and weights 0. Unsigned dtypes have no such row.
        replicas: [num_experts, max_replicas] int32 or int64, the physical experts of each expert, of which the first
            `replica_counts` are in use and the others -1. Indices are then physical: a token at row t has
            replicas[e, (t + replica_offset) % replica_counts[e]] in place of an expert e. Weights stay those of the
            experts. A count that is not in 1..max_replicas, or a replica that is not in 0..num_physical - 1, gives
            index -1 for this pair alone.
        replica_counts: [num_experts] int32 or int64; with `replicas`.
        replica_offset: an int in 0..2**31 - 1, such as a rank, so that ranks begin with different replicas.
        num_physical: number of physical experts, an int; with `replicas`. Shared experts come after them, and a layout
            counts num_physical + num_shared_experts experts.
        layout: a :class:`LayoutSpec`, to lay the pairs of tokens and experts out by expert as well, shared experts
            included. The layout is what :func:`expert_layout` returns for the indices.
        num_valid: number of valid rows. The rows after them are padding and get indices -1 and weights 0. Either an int
            in 0..num_tokens, or a one-element int32 array on the device of the logits, which is clamped, and may change
            between replays of a CUDA graph.
        out: what is returned, of preallocated arrays that overlap nothing, filled in place and returned.
        stream: an object with `__cuda_stream__`, or an int handle. By default, work is enqueued on the current stream
            of the logits' framework. The host never waits.

    Returns:
        Routing of weights and indices [num_tokens, top_k + num_shared_experts], float32 and int32 unless the method has
        other dtypes. Experts are in order of descending score + bias, equal values by ascending index, NaN below -inf,
        or as given, shared experts last. Arrays belong to the logits' framework and are on their device.
        With `layout`, RoutingPlan of these two and an :class:`ExpertLayout`.

    Raises:
        TypeError: an argument is no array, or its dtype is not allowed.
        ValueError: ranks, shapes, strides, devices or num_valid are wrong.
        RuntimeError: CUDA arrays were given, but CuPy, NVRTC or a driver is missing.

    docs/methods.md has the mathematics, with the source of each step.

    >>> import numpy as np
    >>> from cupy_router import RoutingMethod, activation_topk
    >>> logits = np.array([[0.0, 2.0, 1.0, 2.0]], np.float32)
    >>> weights, indices = activation_topk(logits, RoutingMethod(4, 2, "softmax"))
    >>> indices, weights
    (array([[1, 3]], dtype=int32), array([[0.5, 0.5]], dtype=float32))
    >>> activation_topk(logits, RoutingMethod(4, 2, "softmax"), indices=np.array([[2, 1]])).weights  # replayed
    array([[0.2689414, 0.7310586]], dtype=float32)

    Expert 1 has two replicas, which tokens take in turn:

    >>> replicas, counts = np.array([[0, -1], [1, 4], [2, -1], [3, -1]], np.int32), np.array([1, 2, 1, 1], np.int32)
    >>> given = {"replicas": replicas, "replica_counts": counts, "num_physical": 5}
    >>> activation_topk(np.repeat(logits, 2, axis=0), RoutingMethod(4, 2, "softmax"), **given).indices
    array([[1, 3],
           [4, 3]], dtype=int32)

    With one bias for text and one for images, a token of an image:

    >>> biases, is_image = np.array([[0.0, 0.0, 0.0, 0.0], [9.0, 0.0, 0.0, 0.0]], np.float32), np.array([1], np.int32)
    >>> activation_topk(logits, RoutingMethod(4, 2, "softmax"), bias=biases, bias_index=is_image).indices
    array([[0, 1]], dtype=int32)
    """
    number, num_valid = check.split_num_valid("activation_topk", num_valid)
    inputs = (logits, bias, bias_index, logit_bias, expert_scale, indices, replicas, replica_counts, num_valid)
    fields: Any = resolve(method) if layout is None else (resolve(method), as_spec("activation_topk", layout))
    if not isinstance(unset, str) or unset != ROUTE or num_physical is not None or replica_offset != 0:
        spec = None if layout is None else fields[1]
        physical = as_physical("activation_topk", num_physical, replica_offset)
        fields = (resolve(method), spec, as_unset("activation_topk", unset), *physical)
    return run(OP, fields, inputs, out, stream, number)


def interleaved_lanes(gpu: Gpu, method: RoutingMethod, num_tokens: int) -> int:
    """Return the lanes over which to interleave a row, which then selects by truncated keys; 0 for adjacent columns.

    For softmax the choice ignores the number of rows, because the rounding of its sum must not depend on that.
    """
    softmax = needs_whole_rows(method)
    if method.top_groups < method.num_groups:
        return row_lanes.group_lanes(gpu, method) if softmax or not row_lanes.few(gpu, num_tokens) else 0
    return 0 if softmax else row_lanes.interleaved_lanes(gpu, num_tokens, method.num_experts, method.num_columns, True)
