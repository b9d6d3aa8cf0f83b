# SPDX-License-Identifier: Apache-2.0
"""hash_router: experts from a table by token id, with weights from a gate if there is one."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from cupy_router.method import RoutingMethod, resolve
from cupy_router.ops import _checks as check
from cupy_router.ops import _fused_layout as fused_layout
from cupy_router.ops import _hash_biased as biased
from cupy_router.ops._cached import Kernel, Work
from cupy_router.ops._chunks import launch_with_logits
from cupy_router.ops._declared import INTS, NUM_VALID, Arrays, Minimum, row
from cupy_router.ops._hash_gate import by_gate_gemm
from cupy_router.ops._invariant import as_batch_invariant, check_invariant
from cupy_router.ops._layout import LayoutSpec, as_spec
from cupy_router.ops._method import (
    BIAS,
    BIAS_INDEX,
    EXPERT_SCALE,
    LOGIT_BIAS,
    TABLE,
    check_bias,
    check_bias_index,
    gate,
    method_sizes,
)
from cupy_router.ops._options import Options
from cupy_router.ops._routed import LOGITS, VARIANTS_WITH_LOGITS, RoutedOp, as_logits_dtype, routing_results
from cupy_router.ops._run import run
from cupy_router.ops._table_kernel import table_kernel
from cupy_router.reference import hash_router as reference
from cupy_router.tuning import Gpu


@dataclass(frozen=True)
class HashOptions(Options):
    """The method, or None: uniform weights; the layout; the dtype of the logits; what becomes of a given row of -1;
    whether rows are the same to the bit in any batch."""

    method: RoutingMethod | None
    layout: LayoutSpec | None = None
    logits_dtype: str | None = None
    unset: str = "route"
    batch_invariant: bool = False

    @property
    def is_plain(self) -> bool:
        """True if nothing is asked for that needs all products of the gate."""
        return self.logits_dtype is None and not self.batch_invariant


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
        BIAS,
        BIAS_INDEX,
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
        by_table = arrays.x is None or options.is_plain
        return by_table and arrays.bias is None and super().is_single_kernel(options, arrays)

    def check(self, options: HashOptions, arrays: Arrays) -> None:
        super().check(options, arrays)
        check_combination(options, arrays)

    def route_reference(self, options: HashOptions, arrays: Arrays, num_valid: int) -> tuple[Any, ...]:
        given = arrays.named("logits", "x", "weight", "bias", "bias_index", "logit_bias", "expert_scale")
        given |= {"logits_dtype": options.logits_dtype, "num_valid": num_valid}
        given |= {"batch_invariant": options.batch_invariant}
        return reference.hash_router(arrays.token_ids, arrays.table, options.method, **given)

    def route(self, options: HashOptions, arrays: Arrays, gpu: Gpu) -> Kernel | Work:
        if arrays.x is not None and (arrays.bias is not None or not options.is_plain):
            return by_gate_gemm(self, self, options, arrays, gpu)
        return self.on_arrays(options, arrays, gpu)

    def on_arrays(self, options: HashOptions, arrays: Arrays, gpu: Gpu) -> Kernel | Work:
        """Choose the kernel that computes weights from what the call got: nothing, logits, or x and the gate."""
        if arrays.bias is not None:
            return biased.on_logits(self, options, arrays, gpu)
        return self.by_table(options, arrays, gpu)

    def by_table(self, options: HashOptions, arrays: Arrays, gpu: Gpu) -> Kernel:
        """Choose the kernel where all experts are those of the table."""
        kernel = table_kernel(options.method, arrays, gpu)
        return kernel._replace(fixed={LOGITS: 0} | kernel.fixed | {f"{LOGITS}_stride": 0})

    def with_logits(self, options: HashOptions, arrays: Arrays, gpu: Gpu) -> Work:
        """Return the launch on the logits of a gate GEMM that also returns them."""
        if arrays.bias is not None:
            return biased.on_logits(self, options, arrays, gpu)
        return launch_with_logits(self, table_kernel(options.method, arrays, gpu), arrays)

    def fused(self, options: HashOptions, arrays: Arrays, gpu: Gpu) -> Kernel | None:
        found = fused_layout.problem(options, arrays, gpu)
        by_table = arrays.x is None or options.is_plain
        if found is None or not by_table or arrays.bias is not None:
            return None
        tuned, num_tokens = gpu.table.fused_layout, arrays.token_ids.shape[0]
        routed = table_kernel(options.method, arrays, gpu, shared_block=True)
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
    bias: Any = None,
    bias_index: Any = None,
    logit_bias: Any = None,
    expert_scale: Any = None,
    return_logits: bool = False,
    batch_invariant: bool = False,
    layout: LayoutSpec | None = None,
    num_valid: Any = None,
    out: Any = None,
    stream: Any = None,
) -> Any:  # Routing, RoutingWithLogits, or with a layout RoutingPlan, RoutingPlanWithLogits
    """Look up the experts of each token in `table[token_ids]`, and return them with weights.

    Without logits and x, the weights are uniform, 1 / top_k. Otherwise they are the scores of these experts,
    renormalised and scaled. With x and weight, only the necessary dot products are computed. Tokens may be exempt from
    the table, such as those of images: see `bias`.

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
        bias: [num_biases, num_experts] float32; only with logits or x, and with `bias_index`. A token with an index
            above 0 leaves the table: it has the top_k experts by score plus this row, as in :func:`activation_topk`.
            Row 0 is unused.
        bias_index: [num_tokens] int32. A row whose index is not in 0..num_biases - 1 gets indices -1 and weights 0.
        logit_bias: [num_experts] float32, added to the logits; only with logits or x.
        expert_scale: [num_experts] float32, a factor of the weight of each expert; only with logits or x.
        return_logits: whether to return the logits, too; only with x. Then the whole product with the gate is computed.
        batch_invariant: as for :func:`dense_router`. With x, the whole product with the gate is computed then.
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
    >>> from cupy_router import RoutingMethod, hash_router
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

    The second token is of an image, and has the best experts by score plus bias:

    >>> logits, biases = np.array([[0.0, 1.0, 2.0, 3.0]] * 3, np.float32), np.zeros((2, 4), np.float32)
    >>> is_image = np.array([0, 1, 0], np.int32)
    >>> given = {"logits": logits, "bias": biases, "bias_index": is_image}
    >>> hash_router(np.array([1, 0, 7], np.int32), table, RoutingMethod(4, 2), **given).indices
    array([[ 1,  3],
           [ 3,  2],
           [-1, -1]], dtype=int32)
    """
    number, num_valid = check.split_num_valid("hash_router", num_valid)
    resolved = None if method is None else resolve(method)
    fields: Any = resolved or (None,)
    if layout is not None and method is None:
        raise ValueError("hash_router: layout needs a method, which says how many experts there are")
    if layout is not None or return_logits is not False:
        spec = None if layout is None else as_spec("hash_router", layout)
        fields = (resolved, spec, as_logits_dtype("hash_router", return_logits, "float32"))
    if batch_invariant is not False:
        plain = fields if isinstance(fields, tuple) else (fields,)
        fields = (*plain, *(None, None, "route")[len(plain) - 1 :], as_batch_invariant("hash_router", batch_invariant))
    inputs = (token_ids, table, logits, x, weight, bias, bias_index, logit_bias, expert_scale, num_valid)
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
    if arrays.bias is not None and len(arrays.bias.shape) == 1:
        raise ValueError(f"bias must have shape [num_biases, num_experts] beside a table, got {arrays.bias}")
    check_bias_index(arrays.bias, arrays.bias_index)
    if logits is None and x is None:
        for name in arrays.given("bias", "logit_bias", "expert_scale"):
            raise ValueError(f"{name} needs logits or x, without which weights are uniform")
        if method is not None and method.shared_in_normalizer:
            raise ValueError("a method with shared_in_normalizer needs logits or x, from which shared experts weigh")
    elif method is None:
        raise ValueError("logits or x need a method, which says how to score them")
    else:
        check_bias(method, arrays.bias)
        if options.batch_invariant and x is not None:
            check_invariant(method)
