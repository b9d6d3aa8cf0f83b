# SPDX-License-Identifier: Apache-2.0
"""dense_router: gate GEMM, scores, bias, top-k and weights, in one launch for few tokens, with cuBLAS for many."""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import partial
from typing import Any

from cupy_router import gemm
from cupy_router.arrays import View
from cupy_router.method import RoutingMethod, resolve
from cupy_router.ops import _checks as check
from cupy_router.ops import _dense_decode as decode
from cupy_router.ops import _dense_launches as launches
from cupy_router.ops import _fused_layout as fused_layout
from cupy_router.ops import _row_lanes as row_lanes
from cupy_router.ops import activation_topk
from cupy_router.ops._cached import Work, launch_of
from cupy_router.ops._chunks import GateChunks, budget
from cupy_router.ops._declared import NUM_VALID, Arrays, row
from cupy_router.ops._given import (
    GIVEN,
    ROUTE,
    as_unset,
    check_given,
    given_kernel,
    selects,
    without_logits,
)
from cupy_router.ops._invariant import as_batch_invariant, check_invariant
from cupy_router.ops._layout import LayoutSpec, as_spec
from cupy_router.ops._method import (
    BIAS,
    BIAS_INDEX,
    EXPERT_SCALE,
    LOGIT_BIAS,
    MethodOptions,
    check_bias,
    check_bias_index,
    gate,
    method_sizes,
    needs_whole_rows,
)
from cupy_router.ops._options import Options
from cupy_router.ops._replicas import (
    REPLICA_COUNTS,
    REPLICAS,
    RouteThenReplace,
    as_physical,
    check_replicas,
    has_replicas,
    replaced_on_host,
)
from cupy_router.ops._routed import VARIANTS_WITH_LOGITS, RoutedOp, as_logits_dtype, routing_results
from cupy_router.ops._run import run
from cupy_router.reference import dense_router as reference
from cupy_router.tuning import Gpu

PATHS = ("decode", "prefill")


@dataclass(frozen=True)
class DenseOptions(Options):
    """The method; the path, "decode", "prefill" or None to choose by size; the layout; the dtype of the logits; what
    becomes of a given row of -1; whether rows are the same to the bit in any batch; the number of physical experts and
    the offset of their replicas."""

    method: RoutingMethod
    path: str | None
    layout: LayoutSpec | None = None
    logits_dtype: str | None = None
    unset: str = ROUTE
    batch_invariant: bool = False
    num_physical: int | None = None
    replica_offset: int = 0


class DenseRouter(RoutedOp):
    """The declaration of :func:`dense_router`."""

    name = "dense_router"
    options = DenseOptions
    inputs = (
        row("x", "num_tokens, hidden", required=True),
        gate(required=True),
        BIAS,
        BIAS_INDEX,
        LOGIT_BIAS,
        EXPERT_SCALE,
        GIVEN,
        REPLICAS,
        REPLICA_COUNTS,
        NUM_VALID,
    )
    results = routing_results("x", "weight", "logit_bias", "expert_scale", logits=("x", "weight", "logit_bias"))
    variants = VARIANTS_WITH_LOGITS

    def example(self) -> DenseOptions:
        return DenseOptions(RoutingMethod(8, 2), None)

    def sizes(self, options: DenseOptions) -> dict[str, int]:
        return method_sizes(options.method)

    def max_rows(self, options: DenseOptions) -> int | None:
        return decode.MAX_TOKENS if options.path == "decode" else None

    def check(self, options: DenseOptions, arrays: Arrays) -> None:
        super().check(options, arrays)
        method, (num_tokens, hidden) = options.method, arrays.x.shape
        if hidden < 1:
            raise ValueError(f"x must have at least one column, got {arrays.x}")
        check_bias(method, arrays.bias)
        check_bias_index(arrays.bias, arrays.bias_index)
        check_given(options, arrays)
        if options.batch_invariant:
            check_invariant(method)
        check_replicas(options, arrays, num_tokens)
        if options.path == "decode" and (num_tokens > decode.MAX_TOKENS or not row_lanes.fits_method(method)):
            raise ValueError(
                f"path 'decode' takes at most {decode.MAX_TOKENS} tokens, {row_lanes.limits(method)}, "
                f"got {num_tokens} tokens and {method}"
            )

    def route_reference(self, options: DenseOptions, arrays: Arrays, num_valid: int) -> tuple[Any, ...]:
        more = arrays.named("bias", "bias_index", "logit_bias", "expert_scale", "given_experts")
        more |= {"unset": options.unset, "logits_dtype": options.logits_dtype}
        more |= {"batch_invariant": options.batch_invariant}
        routed = reference.dense_router(arrays.x, arrays.weight, options.method, **more, num_valid=num_valid)
        return replaced_on_host(options, arrays, routed)

    def route(self, options: DenseOptions, arrays: Arrays, gpu: Gpu) -> Work:
        method, path, device = options.method, options.path, arrays.x.device
        num_tokens = arrays.x.shape[0]
        fits = launches.fits_decode(method, gpu)
        if path == "decode" and not fits:
            raise ValueError("path 'decode' takes a GPU of compute capability 8.0 or later")
        if options.batch_invariant and not fits:
            raise ValueError("batch_invariant takes a GPU of compute capability 8.0 or later")
        given_only = _multiplies_given_only(options, arrays, gpu)
        is_few = not given_only and fits and launches.decodes(path, num_tokens, gpu)
        if not (given_only or is_few or has_replicas(options)) and launches.fuses(options, arrays, gpu):
            options = replace(options, batch_invariant=True)
        if has_replicas(options) and not (given_only or is_few or _is_one_chunk(options, arrays, gpu)):
            return RouteThenReplace(self, options, arrays, gpu)
        if given_only:
            return launch_of(self, options, without_logits(given_kernel(options, arrays, gpu)), device)
        if is_few:
            few = launches.decode_kernel(options, num_tokens, arrays, gpu)
            return launches.Decode(*few, device, self.parameters(options))
        if not options.batch_invariant and gemm.why_not(device) is None:
            return GateChunks(self, arrays, gpu, activation_topk.OP, partial(_on_logits, options, arrays, gpu))
        return launches.fused_chunks(self, options, arrays, gpu)

    def fused(self, options: DenseOptions, arrays: Arrays, gpu: Gpu) -> Work | None:
        num_tokens = arrays.x.shape[0]
        found = fused_layout.problem(options, arrays, gpu)
        is_few = launches.fits_decode(options.method, gpu) and launches.decodes(options.path, num_tokens, gpu)
        if found is None or not is_few:
            return None
        routed, partials, _ = launches.decode_kernel(options, num_tokens, arrays, gpu, with_layout=True)
        several = routed.macros["SHARE"] > 0 or num_tokens > routed.macros["TOKENS"]
        layout_by = fused_layout.LAST_BLOCK if several else fused_layout.ONE_BLOCK
        kernel = fused_layout.fused(options, routed, found, arrays, gpu, f"{decode.FILE}_layout", layout_by)
        if kernel is None:
            return None
        kernel.macros["SHARED_FLOATS"] = fused_layout.shared_bytes(found.num_experts, routed.block) // 4
        return launches.Decode(kernel, partials, [], arrays.x.device, self.parameters(options))


OP = DenseRouter()


def dense_router(
    x: Any,
    weight: Any,
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
    path: str | None = None,
    return_logits: bool = False,
    logits_dtype: str = "float32",
    batch_invariant: bool = False,
    layout: LayoutSpec | None = None,
    num_valid: Any = None,
    out: Any = None,
    stream: Any = None,
) -> Any:  # Routing, RoutingWithLogits, or with a layout RoutingPlan, RoutingPlanWithLogits
    """Multiply each token with the gate, score the logits, select top_k experts by score plus bias, return weights.

    Logits are accumulated and kept in float32 for all dtypes of x and weight. float32 inputs are multiplied without
    tf32. Results are bitwise repeatable. The rounding of logits may depend on the number of tokens, unless
    `batch_invariant`.

    Args:
        x: [num_tokens, hidden] float32, float16 or bfloat16.
        weight: [num_experts, hidden] float32, float16 or bfloat16, the gate; its dtype may differ from that of x. With
            the method's `shared_in_normalizer` it has num_shared_experts more rows.
        method: a :class:`RoutingMethod`, or the name of a preset such as "deepseek-v4-flash".
        bias: [num_experts] float32, added for the selection only: to the scores, or to the logits (`bias_on`). With
            `bias_index` [num_biases, num_experts], several of which each token has one.
        bias_index: [num_tokens] int32, the bias of each token, such as a second one of image tokens. A row whose index
            is not in 0..num_biases - 1 gets indices -1 and weights 0.
        logit_bias: [num_experts] float32, the bias of the linear layer, added to the logits before all other steps.
        expert_scale: [num_experts] float32, a factor of the weight of each expert, after all other steps.
        indices, unset: the experts of each token, in place of a selection, and what becomes of a row of -1: as for
            :func:`activation_topk`. With few tokens and `unset="empty"`, only their dot products are computed, unless
            all logits are needed, for a softmax or to be returned.
        replicas, replica_counts, replica_offset, num_physical: physical experts in place of experts, as for
            :func:`activation_topk`.
        path: "decode" is one fused launch, for at most 64 tokens, top_k 32 and 1024 experts. "prefill" is cuBLAS and a
            second kernel, for any size. None chooses what is fastest for the size; on Hopper, that is one launch for
            some hundred tokens, too.
        return_logits: whether to return the logits, too: of all experts, with logit_bias, before all other steps. They
            cost no further launch.
        logits_dtype: their dtype, "float32", "float16" or "bfloat16". Experts are chosen by those in float32.
        batch_invariant: whether logits, weights and indices of a token are the same to the bit in any batch, on any
            path, for one GPU model and version of this library: docs/batch_invariance.md. Hidden is divided into 16
            parts of whole steps of 32 columns. Each is summed by itself; pairs of neighbours are added first, and then
            their sums in order, in float32. Takes what the path "decode" takes, for any number of tokens.
        layout: a :class:`LayoutSpec`, to lay the pairs of tokens and experts out by expert as well, shared experts
            included. The layout is what :func:`expert_layout` returns for the indices.
        num_valid: number of valid rows. The rows after them are padding and get indices -1 and weights 0. Either an int
            in 0..num_tokens, or a one-element int32 array on the device of x, which is clamped, and may change between
            replays of a CUDA graph.
        out: what is returned, of preallocated arrays that overlap nothing, filled in place and returned.
        stream: an object with `__cuda_stream__`, or an int handle. By default, work is enqueued on the current stream
            of the framework of x. The host never waits.

    Returns:
        Routing of weights and indices [num_tokens, top_k + num_shared_experts], float32 and int32 unless the method has
        other dtypes. Experts are in order of descending score + bias, equal values by ascending index, NaN below -inf,
        or as given, shared experts last. Arrays belong to the framework of x and are on its device.
        With `return_logits`, RoutingWithLogits of these two and logits [num_tokens, num_experts], with the method's
        `shared_in_normalizer` [num_tokens, num_experts + num_shared_experts]; those of padding are 0.
        With `layout`, RoutingPlan or RoutingPlanWithLogits, which have an :class:`ExpertLayout` as well.

    Raises:
        TypeError: an argument is no array, or its dtype is not allowed.
        ValueError: ranks, shapes, strides, devices, num_valid or logits_dtype are wrong, or the path is unknown or does
            not support the size.
        RuntimeError: CUDA arrays were given, but CuPy, NVRTC, a driver or a cuBLAS that the size needs is missing.

    >>> import numpy as np
    >>> from cupy_router import RoutingMethod, dense_router
    >>> x, gate = np.array([[1.0, 2.0]], np.float32), np.array([[3, 0], [0, 1], [0, 2]], np.float32)
    >>> dense_router(x, gate, RoutingMethod(3, 2, "identity", renormalize=False))
    Routing(weights=array([[4., 3.]], dtype=float32), indices=array([[2, 0]], dtype=int32))
    >>> dense_router(x, gate, RoutingMethod(3, 2), return_logits=True).logits
    array([[3., 2., 4.]], dtype=float32)
    """
    if path is not None and path not in PATHS:
        raise ValueError(f"dense_router: path must be None, 'decode' or 'prefill', got {path!r}")
    number, num_valid = check.split_num_valid("dense_router", num_valid)
    fields: tuple[Any, ...] = (resolve(method), path)
    if layout is not None:
        fields = (*fields, as_spec("dense_router", layout))
    if return_logits is not False or logits_dtype != "float32":
        wanted = as_logits_dtype("dense_router", return_logits, logits_dtype)
        fields = (*fields, wanted) if layout is not None else (*fields, None, wanted)
    physical = num_physical is not None or replica_offset != 0
    if not isinstance(unset, str) or unset != ROUTE:
        no_layout_or_logits = (None,) * (4 - len(fields))
        fields = (*fields, *no_layout_or_logits, as_unset("dense_router", unset))
    if batch_invariant is not False or physical:
        invariant = as_batch_invariant("dense_router", batch_invariant)
        fields = (*fields, *(None, None, ROUTE)[len(fields) - 2 :], invariant)
    if physical:
        fields = (*fields, *as_physical("dense_router", num_physical, replica_offset))
    arrays = (x, weight, bias, bias_index, logit_bias, expert_scale, indices, replicas, replica_counts)
    inputs = (*arrays, num_valid)
    return run(OP, fields, inputs, out, stream, number)


# -- Launches ----------------------------------------------------------------------------------------------------------


def _on_logits(dense: DenseOptions, arrays: Arrays, gpu: Gpu, logits: View) -> Work:
    """Return the launch of `activation_topk` on the logits of a chunk, of which it also makes those to return."""
    options = MethodOptions(dense.method, None, dense.unset, dense.num_physical, dense.replica_offset)
    given = arrays.replaced(logits=logits, x=None, weight=None)
    if arrays.logits_out is not None:
        return activation_topk.OP.with_logits(options, given, gpu)
    kernel = activation_topk.OP.route(options, given, gpu)
    return launch_of(activation_topk.OP, options, kernel, logits.device)


def _is_one_chunk(options: DenseOptions, arrays: Arrays, gpu: Gpu) -> bool:
    """Return whether the kernel on logits gets all tokens at once, and so knows which token a row is."""
    (num_tokens, hidden), num_logits = arrays.x.shape, arrays.weight.shape[0]
    fits = 4 * num_tokens * (num_logits + hidden) <= budget(gpu)  # of logits, and of x converted to float32
    return fits and not options.batch_invariant and gemm.why_not(arrays.x.device) is None


def _multiplies_given_only(options: DenseOptions, arrays: Arrays, gpu: Gpu) -> bool:
    """Return whether only the dot products of given experts are needed, and less work than the gate GEMM."""
    method = options.method
    if options.batch_invariant:  # products of given experts are those of the gate GEMM
        return False
    if selects(options, arrays.given_experts) or options.path == "prefill" or options.logits_dtype is not None:
        return False
    if needs_whole_rows(method) or method.shared_in_normalizer or method.num_columns > row_lanes.MAX_LANES:
        return False
    tuned, (num_tokens, hidden) = gpu.table.given_experts, arrays.x.shape
    rows = num_tokens * method.top_k
    few = rows <= tuned.max_gates_read * method.num_experts and rows * hidden <= tuned.max_elements_read
    return options.path == "decode" or few or gemm.why_not(arrays.x.device) is not None
