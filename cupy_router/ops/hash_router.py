# SPDX-License-Identifier: Apache-2.0
"""hash_router: experts from a table by token id, with weights from a gate if there is one."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from cupy_router.launcher import MAX_GRID
from cupy_router.method import RoutingMethod, resolve
from cupy_router.ops import _checks as check
from cupy_router.ops import _fused_layout as fused_layout
from cupy_router.ops import _row_lanes as row_lanes
from cupy_router.ops._cached import Kernel, Work
from cupy_router.ops._chunks import launch_with_logits
from cupy_router.ops._declared import INTS, NUM_VALID, Arrays, Minimum, row
from cupy_router.ops._hash_gate import by_gate_gemm
from cupy_router.ops._layout import LayoutSpec, as_spec
from cupy_router.ops._method import (
    EXPERT_SCALE,
    LOGIT_BIAS,
    TABLE,
    gate,
    headers,
    method_arguments,
    method_macros,
    method_sizes,
    needs_whole_rows,
)
from cupy_router.ops._options import Options
from cupy_router.ops._routed import LOGITS, VARIANTS_WITH_LOGITS, RoutedOp, as_logits_dtype, routing_results
from cupy_router.ops._run import run
from cupy_router.reference import hash_router as reference
from cupy_router.tuning import Gpu

_UNIFORM, _LOGITS, _PRODUCTS = 0, 1, 2  # source of the weights

_MAX_PRODUCTS = 8192  # per token; a float of shared memory each
_UNKNOWN_EXPERTS = 0  # as many as int32 indices can name


@dataclass(frozen=True)
class HashOptions(Options):
    """The method, or None: uniform weights; the layout; and the dtype of the logits."""

    method: RoutingMethod | None
    layout: LayoutSpec | None = None
    logits_dtype: str | None = None


class HashRouter(RoutedOp):
    """The declaration of :func:`hash_router`."""

    name = "hash_router"
    options = HashOptions
    inputs = (
        row("token_ids", "num_tokens", INTS, required=True),
        TABLE,
        row("logits", "num_tokens, num_experts (+ shared)"),
        row("x", "num_tokens, hidden"),
        gate(required=False),
        LOGIT_BIAS,
        EXPERT_SCALE,
        NUM_VALID,
    )
    results = routing_results(
        "logits", "x", "weight", "logit_bias", "expert_scale", logits=("x", "weight", "logit_bias")
    )
    variants = VARIANTS_WITH_LOGITS
    single_kernel = True

    def example(self) -> HashOptions:
        return HashOptions(None)

    def sizes(self, options: HashOptions) -> dict[str, int]:
        return {} if options.method is None else {"top_k": options.method.top_k} | method_sizes(options.method)

    def result_sizes(self, options: HashOptions, sizes: Mapping[str, Any], minimum: Minimum = min) -> Mapping[str, Any]:
        if options.method is None:
            return {"top_k (+ shared)": sizes["top_k"]}
        return super().result_sizes(options, sizes, minimum)

    def is_single_kernel(self, options: HashOptions, arrays: Arrays) -> bool:
        return options.logits_dtype is None and super().is_single_kernel(options, arrays)

    def check(self, options: HashOptions, arrays: Arrays) -> None:
        super().check(options, arrays)
        check_combination(options, arrays)

    def route_reference(self, options: HashOptions, arrays: Arrays, num_valid: int) -> tuple[Any, ...]:
        given = arrays.named("logits", "x", "weight", "logit_bias", "expert_scale")
        given |= {"logits_dtype": options.logits_dtype, "num_valid": num_valid}
        return reference.hash_router(arrays.token_ids, arrays.table, options.method, **given)

    def route(self, options: HashOptions, arrays: Arrays, gpu: Gpu) -> Kernel | Work:
        if options.logits_dtype is not None:
            return by_gate_gemm(self, self, options, arrays, gpu)
        return self.on_arrays(options, arrays, gpu)

    def on_arrays(self, options: HashOptions, arrays: Arrays, gpu: Gpu) -> Kernel:
        """Choose the kernel that computes weights from what the call got: nothing, logits, or x and the gate."""
        kernel = self._chosen(options, arrays, gpu)
        return kernel._replace(fixed={LOGITS: 0} | kernel.fixed | {f"{LOGITS}_stride": 0})

    def with_logits(self, options: HashOptions, arrays: Arrays, gpu: Gpu) -> Work:
        """Return the launch on the logits of a gate GEMM that also returns them."""
        return launch_with_logits(self, self._chosen(options, arrays, gpu), arrays)

    def _chosen(self, options: HashOptions, arrays: Arrays, gpu: Gpu) -> Kernel:
        """Choose the kernel for the source of the weights, without parameters for logits_out."""
        method, token_ids, table = options.method, arrays.token_ids, arrays.table
        logits, x, weight = arrays.logits, arrays.x, arrays.weight
        out_strides = arrays.weights.row_stride, arrays.indices.row_stride
        num_tokens, (vocab_size, top_k) = token_ids.shape[0], table.shape
        macros = {
            "TOKEN_ID_BYTES": 4 if token_ids.dtype == "int32" else 8,
            "TABLE_BYTES": 4 if table.dtype == "int32" else 8,
            "TOP_K": top_k,
            "NUM_EXPERTS": _UNKNOWN_EXPERTS if method is None else method.num_experts,
            "HAS_NUM_VALID": int(arrays.num_valid is not None),
        }
        fixed: dict[str, int | float] = {
            "num_tokens": num_tokens,
            **method_arguments(method),  # next to other early arguments, because constants are loaded by cache line
            "vocab_size": vocab_size,
            "hidden": 0 if x is None else x.shape[1],
            "table_stride": table.row_stride,
            "logits_stride": 0 if logits is None else logits.row_stride,
            "x_stride": 0 if x is None else x.row_stride,
            "weight_stride": 0 if weight is None else weight.row_stride,
            "weights_stride": out_strides[0],
            "indices_stride": out_strides[1],
        }
        if method is not None:
            macros |= method_macros(method, arrays.given("logit_bias", "expert_scale"))
        if x is not None and weight is not None and method is not None:
            both_aligned = all(row_lanes.aligned(view.pointer, view.row_stride, view.dtype, 8) for view in (x, weight))
            macros |= {
                "SOURCE": _PRODUCTS,
                "DTYPE": row_lanes.DTYPE_CODES[x.dtype],
                "WEIGHT_DTYPE": row_lanes.DTYPE_CODES[weight.dtype],
                "ALIGNED": int(both_aligned and x.shape[1] % 8 == 0),
            }
            whole_rows, hidden = needs_whole_rows(method), x.shape[1]
            tuned = gpu.table.hash_products
            if method.num_columns > _MAX_PRODUCTS:
                raise ValueError(f"top_k + num_shared_experts must be at most {_MAX_PRODUCTS} with x, got {method}")
            if (
                whole_rows
                or method.shared_in_normalizer
                or method.num_columns > row_lanes.MAX_LANES
                or num_tokens > MAX_GRID
            ):
                warps = min(method.num_experts if whole_rows else top_k, tuned.max_warps)
            else:
                parts = max(1, min(tuned.sharing_warps // top_k, tuned.max_parts, -(-hidden // 256)))
                warps = top_k * parts
                float32 = "float32" in (x.dtype, weight.dtype)
                in_flight = tuned.loads_in_flight // (1 + float32) // (1 + (warps > tuned.sharing_warps))
                steps = max(1, -(-hidden // (256 * parts)))
                batches = -(-steps // in_flight)
                macros |= {"PARTS": parts, "UNROLL": -(-steps // batches), "HIDDEN": hidden}
            macros["WARPS"] = warps
            grid = min(num_tokens, MAX_GRID)
            return Kernel("hash_router", "hash_router", macros, grid, 32 * warps, fixed, headers(method))
        lanes = row_lanes.MAX_LANES
        if method is None or logits is None or not needs_whole_rows(method):
            while lanes // 2 >= (top_k if method is None else method.num_columns):
                lanes //= 2
        columns = (top_k, top_k if method is None else method.num_columns)
        dense = (table.row_stride, *out_strides) == (columns[0], columns[1], columns[1])
        macros |= {"SOURCE": _UNIFORM if logits is None else _LOGITS, "LANES": lanes}
        if method is not None and logits is not None:
            macros["DTYPE"] = row_lanes.DTYPE_CODES[logits.dtype]
            dense = dense and logits.row_stride == method.num_logits
        macros["DENSE"] = int(dense)
        block = gpu.table.hash_router.block
        grid = -(-num_tokens * lanes // block)
        return Kernel("hash_router", "hash_router", macros, grid, block, fixed, headers(method))

    def fused(self, options: HashOptions, arrays: Arrays, gpu: Gpu) -> Kernel | None:
        found = fused_layout.problem(options, arrays, gpu)
        if found is None or options.logits_dtype is not None:
            return None
        tuned, num_tokens = gpu.table.fused_layout, arrays.token_ids.shape[0]
        routed = self._chosen(options, arrays, gpu)
        if arrays.x is None:
            threads = num_tokens * routed.macros["LANES"]
            block = next((block for block in tuned.table_blocks if threads <= block), tuned.threads)
            routed = routed._replace(grid=-(-threads // block), block=block)
        layout_by = fused_layout.ONE_BLOCK if routed.grid == 1 else fused_layout.LAST_BLOCK
        return fused_layout.fused(options, routed, found, arrays, gpu, f"{self.name}_layout", layout_by)


OP = HashRouter()


def hash_router(
    token_ids: Any,
    table: Any,
    method: RoutingMethod | str | None = None,
    *,
    logits: Any = None,
    x: Any = None,
    weight: Any = None,
    logit_bias: Any = None,
    expert_scale: Any = None,
    return_logits: bool = False,
    layout: LayoutSpec | None = None,
    num_valid: Any = None,
    out: Any = None,
    stream: Any = None,
) -> Any:  # Routing, RoutingWithLogits, or with a layout RoutingPlan, RoutingPlanWithLogits
    """Look up the experts of each token in `table[token_ids]`, and return them with weights.

    Without logits and x, the weights are uniform, 1 / top_k. Otherwise they are the scores of these experts,
    renormalised and scaled. With x and weight, only the necessary dot products are computed.

    Args:
        token_ids: [num_tokens] int32 or int64.
        table: [vocab_size, top_k] int32 or int64, expert ids.
        method: a :class:`RoutingMethod` whose top_k is the number of columns of the table, or the name of a preset;
            required with logits or x.
        logits: [num_tokens, num_experts] float32, float16 or bfloat16; with the method's `shared_in_normalizer`
            [num_tokens, num_experts + num_shared_experts].
        x: [num_tokens, hidden] float32, float16 or bfloat16, instead of logits.
        weight: [num_experts, hidden] float32, float16 or bfloat16, the gate; with x. It has one row per column of
            logits.
        logit_bias: [num_experts] float32, added to the logits; only with logits or x.
        expert_scale: [num_experts] float32, a factor of the weight of each expert; only with logits or x.
        return_logits: whether to return the logits, too; only with x. Then the whole product with the gate is computed.
        layout: a :class:`LayoutSpec`, to lay the pairs of tokens and experts out by expert as well, shared experts
            included. The layout is what :func:`expert_layout` returns for the indices. It needs a method.
        num_valid: number of valid rows. The rows after them are padding and get indices -1 and weights 0. Either an int
            in 0..num_tokens, or a one-element int32 array on the same device, which is clamped, and may change between
            replays of a CUDA graph.
        out: what is returned, of preallocated arrays that overlap nothing, filled in place and returned.
        stream: an object with `__cuda_stream__`, or an int handle. By default, work is enqueued on the current stream
            of the token ids' framework. The host never waits.

    Returns:
        Routing of weights and indices [num_tokens, top_k + num_shared_experts], float32 and int32 unless the method has
        other dtypes. Experts are in the order of the table, shared experts last. If a token id is outside the table, or
        a table entry is no expert, the whole row has indices -1 and weights 0.
        With `return_logits`, RoutingWithLogits of these two and float32 logits as :func:`dense_router` returns them: of
        all experts and all tokens, also of those without experts; those of padding are 0.
        With `layout`, RoutingPlan or RoutingPlanWithLogits, which have an :class:`ExpertLayout` as well.

    Raises:
        TypeError: an argument is no array, or its dtype is not allowed.
        ValueError: ranks, shapes, strides, devices or num_valid are wrong, or arguments cannot be combined.
        RuntimeError: CUDA arrays were given, but CuPy, NVRTC or a driver is missing.

    The first layers of DeepSeek-V4 are hash layers.

    >>> import numpy as np
    >>> from cupy_router import hash_router
    >>> table = np.array([[2, 0], [1, 3]], np.int32)
    >>> weights, indices = hash_router(np.array([1, 0, 7], np.int32), table)
    >>> indices
    array([[ 1,  3],
           [ 2,  0],
           [-1, -1]], dtype=int32)
    >>> weights
    array([[0.5, 0.5],
           [0.5, 0.5],
           [0. , 0. ]], dtype=float32)
    """
    number, num_valid = check.split_num_valid("hash_router", num_valid)
    resolved = None if method is None else resolve(method)
    fields: Any = resolved or (None,)
    if layout is not None and method is None:
        raise ValueError("hash_router: layout needs a method, which says how many experts there are")
    if layout is not None or return_logits is not False:
        spec = None if layout is None else as_spec("hash_router", layout)
        fields = (resolved, spec, as_logits_dtype("hash_router", return_logits, "float32"))
    inputs = (token_ids, table, logits, x, weight, logit_bias, expert_scale, num_valid)
    return run(OP, fields, inputs, out, stream, number)


def check_combination(options: HashOptions, arrays: Arrays) -> None:
    """Refuse arguments of hash_router that cannot be combined."""
    method, logits, x = options.method, arrays.logits, arrays.x
    if arrays.table.shape[1] < 1:
        raise ValueError(f"table must have at least one column, got {arrays.table}")
    if (x is None) != (arrays.weight is None):
        raise ValueError("x and weight go together, but only one of them was given")
    if logits is not None and x is not None:
        raise ValueError("logits and x are alternatives, but both were given")
    if options.logits_dtype is not None and x is None:
        raise ValueError("return_logits needs x and weight, whose products the logits are")
    if logits is None and x is None:
        for name in arrays.given("logit_bias", "expert_scale"):
            raise ValueError(f"{name} needs logits or x, without which weights are uniform")
        if method is not None and method.shared_in_normalizer:
            raise ValueError("a method with shared_in_normalizer needs logits or x, from which shared experts weigh")
    elif method is None:
        raise ValueError("logits or x need a method, which says how to score them")
