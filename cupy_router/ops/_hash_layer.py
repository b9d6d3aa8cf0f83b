# SPDX-License-Identifier: Apache-2.0
"""A hash layer as `Router` calls it: x first, and the way to the weights that is the least work for the shape."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from cupy_router import gemm
from cupy_router.arrays import Output, View
from cupy_router.launcher import Launch
from cupy_router.method import RoutingMethod
from cupy_router.ops import _checks as check
from cupy_router.ops import hash_router as hashing
from cupy_router.ops._call import Kernel, Op, Work, launch_of, run
from cupy_router.ops._slices import ByProduct
from cupy_router.ops.activation_topk import row_bytes
from cupy_router.results import Routing
from cupy_router.tuning import gpu_of

_OUTPUTS = ("weights", "indices")
_TAKEN = (*hashing.INPUTS, *_OUTPUTS)  # by kernels/hash_router.cu


def hash_layer(
    method: RoutingMethod,
    x: Any,
    token_ids: Any,
    table: Any,
    weight: Any,
    logit_bias: Any,
    expert_scale: Any,
    num_valid: Any,
    out: Any,
    stream: Any,
) -> Routing:
    """`hash_router(token_ids, table, method, x=x, weight=weight)`, without a gate uniform weights; results as x."""
    number, num_valid = check.split_num_valid(num_valid)
    inputs = (x, token_ids, table, weight, logit_bias, expert_scale, num_valid)
    return run(_OP, method, inputs, out, stream, number)  # type: ignore[no-any-return]  # an op.result


def _check(
    method: RoutingMethod, x: View, token_ids: View | None, table: View, weight: View | None, *others: View | None
) -> tuple[Output, Output]:
    if token_ids is None:
        raise TypeError("token_ids must be an array, got None: a hash layer routes by token id")
    return hashing.check_call(method, token_ids, table, None, None if weight is None else x, weight, *others)


def _plan(
    method: RoutingMethod,
    out_strides: Sequence[int],
    x: View,
    token_ids: View,
    table: View,
    weight: View | None,
    logit_bias: View | None,
    expert_scale: View | None,
    num_valid: View | None,
) -> Work:
    num_tokens = token_ids.shape[0]
    layer = {"logit_bias": logit_bias, "expert_scale": expert_scale}
    few = num_tokens * method.top_k <= gpu_of(x.device).table.hash_layer.max_gates_read * method.num_experts
    if weight is None or few or gemm.why_not(x.device) is not None:
        gated = None if weight is None else x
        kernel = hashing.kernel(
            method, out_strides, token_ids, table, None, gated, weight, **layer, num_valid=num_valid
        )
        return _XFirst(kernel, x.device)

    def plan(logits: View) -> Launch:
        ids = replace(token_ids, shape=logits.shape[:1])
        kernel = hashing.kernel(method, out_strides, ids, table, logits, None, None, **layer, num_valid=num_valid)
        return launch_of(kernel, (*_TAKEN, "num_valid_value"), x.device)

    arrays = {"x": x, "token_ids": token_ids, "table": table, "weight": weight, **layer, "num_valid": num_valid}
    return ByProduct(arrays, _OUTPUTS, row_bytes(method, out_strides), x, weight, _TAKEN, plan)


class _XFirst:
    """A kernel of hash_router.cu, called with the arrays in the order of a hash layer."""

    def __init__(self, kernel: Kernel, device: tuple[str, int]) -> None:
        self._launch = launch_of(kernel, (*_TAKEN, "num_valid_value"), device)
        self.function = self._launch.function

    def __call__(self, stream: int, varying: Sequence[int | float]) -> None:
        x, token_ids, table, weight, *rest = varying
        self._launch(stream, (token_ids, table, 0, x, weight, *rest))


def _reference(
    method: RoutingMethod, number: int, x: Any, token_ids: Any, table: Any, weight: Any, *others: Any
) -> tuple[Any, Any]:
    gated = None if weight is None else x
    return hashing.reference_call(method, number, token_ids, table, None, gated, weight, *others)


_OP = Op(
    name="Router",
    inputs=("x", "token_ids", "table", "weight", "logit_bias", "expert_scale", "num_valid"),
    result=Routing,
    check=_check,
    kernel=_plan,
    reference=_reference,
    takes_number=True,
    smooth=(0, 3, 4, 5),
)
