# SPDX-License-Identifier: Apache-2.0
"""A hash layer as `Router` calls it: x first, and the gate GEMM or single dot products, whichever is less work."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from cupy_router import gemm
from cupy_router.method import RoutingMethod
from cupy_router.ops import _checks as check
from cupy_router.ops import _fused_layout as fused_layout
from cupy_router.ops import _hash_given as given
from cupy_router.ops import hash_router
from cupy_router.ops._cached import Kernel, Reordered, Work, launch_of
from cupy_router.ops._declared import INTS, NUM_VALID, Arrays, row
from cupy_router.ops._given import GIVEN, ROUTE, as_unset, check_given
from cupy_router.ops._hash_gate import by_gate_gemm
from cupy_router.ops._invariant import as_batch_invariant
from cupy_router.ops._layout import LayoutSpec, as_spec
from cupy_router.ops._method import BIAS, BIAS_INDEX, EXPERT_SCALE, LOGIT_BIAS, TABLE, gate
from cupy_router.ops._routed import VARIANTS_WITH_LOGITS, RoutedOp, as_logits_dtype, routing_results
from cupy_router.ops._run import run
from cupy_router.ops.hash_router import HashOptions
from cupy_router.tuning import Gpu


class HashLayer(RoutedOp):
    """The declaration of a call of a hash `Router`; without a gate its weights are uniform."""

    name = "hash_layer"
    label = "Router"
    options = HashOptions
    inputs = (
        row("x", "num_tokens, hidden", required=True),
        row("token_ids", "num_tokens", INTS, unless=GIVEN.name),
        TABLE,
        gate(required=False),
        BIAS,
        BIAS_INDEX,
        LOGIT_BIAS,
        EXPERT_SCALE,
        GIVEN,
        NUM_VALID,
    )
    results = routing_results("x", "weight", "logit_bias", "expert_scale", logits=("x", "weight", "logit_bias"))
    variants = VARIANTS_WITH_LOGITS

    def example(self) -> HashOptions:
        return HashOptions(RoutingMethod(8, 2))

    def sizes(self, options: HashOptions) -> Mapping[str, int]:
        return hash_router.OP.sizes(options)

    def check(self, options: HashOptions, arrays: Arrays) -> None:
        super().check(options, arrays)
        check_given(options, arrays)
        hash_router.check_combination(options, _hashed(arrays))

    def route_reference(self, options: HashOptions, arrays: Arrays, num_valid: int) -> tuple[Any, ...]:
        if arrays.given_experts is not None:
            return given.reference(self, options, arrays, num_valid)
        return hash_router.OP.route_reference(options, _hashed(arrays), num_valid)

    def route(self, options: HashOptions, arrays: Arrays, gpu: Gpu) -> Work:
        if arrays.given_experts is not None:
            return given.TableThenGiven(self, options, arrays, gpu)
        if _multiplies_all(options, arrays, gpu):
            return by_gate_gemm(self, hash_router.OP, options, arrays, gpu)
        kernel = hash_router.OP.by_table(options, _hashed(arrays), gpu)
        return launch_of(self, options, kernel._replace(nulls=("logits",)), arrays.x.device)

    def fused(self, options: HashOptions, arrays: Arrays, gpu: Gpu) -> Kernel | Work | None:
        if arrays.given_experts is not None:
            return None
        hashed = HashOptions(options.method, options.layout)
        many = _multiplies_all(options, arrays, gpu)
        kernel = None if many else hash_router.OP.fused(hashed, _hashed(arrays), gpu)
        if kernel is None or not fused_layout.counts(kernel):
            return kernel and kernel._replace(nulls=("logits",))
        work = fused_layout.counted(hash_router.OP, hashed, kernel, arrays)
        return Reordered(work, self.parameters(options), hash_router.OP.parameters(hashed), self.takes_number)


OP = HashLayer()


def hash_layer(
    method: RoutingMethod,
    x: Any,
    token_ids: Any,
    table: Any,
    weight: Any,
    bias: Any,
    bias_index: Any,
    logit_bias: Any,
    expert_scale: Any,
    layout: LayoutSpec | None,
    num_valid: Any,
    out: Any,
    stream: Any,
    return_logits: bool = False,
    indices: Any = None,
    unset: str = ROUTE,
    batch_invariant: bool = False,
) -> Any:  # Routing, RoutingWithLogits, or with a layout RoutingPlan, RoutingPlanWithLogits
    """Return `hash_router(token_ids, table, method, x=x, weight=weight, ...)`, uniform weights if `weight` is None.

    Results belong to the framework of x.
    """
    number, num_valid = check.split_num_valid("Router", num_valid)
    inputs = (x, token_ids, table, weight, bias, bias_index, logit_bias, expert_scale, indices, num_valid)
    fields: Any = method
    if layout is not None or return_logits is not False or unset != ROUTE or batch_invariant is not False:
        spec = None if layout is None else as_spec("Router", layout)
        wanted = as_logits_dtype("Router", return_logits, "float32")
        fields = (method, spec, wanted, as_unset("Router", unset), as_batch_invariant("Router", batch_invariant))
    return run(OP, fields, inputs, out, stream, number)


def _multiplies_all(options: HashOptions, arrays: Arrays, gpu: Gpu) -> bool:
    """Return whether all logits are needed, or the gate GEMM is less work than the dot products that are."""
    method: Any = options.method  # a Router has one
    if arrays.weight is not None and (arrays.bias is not None or not options.is_plain):
        return True
    most = gpu.table.hash_layer.max_gates_read * method.num_experts  # rows of the gate to read
    few = arrays.x.shape[0] * method.top_k <= most
    return arrays.weight is not None and not few and gemm.why_not(arrays.x.device) is None


def _hashed(arrays: Arrays) -> Arrays:
    """Return the arrays of a hash layer as arguments of `hash_router`."""
    found = {name: getattr(arrays, name, None) for name in (*hash_router.OP.names, *hash_router.OP.result_names)}
    if arrays.weight is None:
        found["x"] = None
    return Arrays(tuple(found), tuple(found.values()))
