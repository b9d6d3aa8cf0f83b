# SPDX-License-Identifier: Apache-2.0
"""The backward pass of few tokens by the gate's rows of their experts alone."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Any

import torch

from cupy_router.arrays import _torch as tensors
from cupy_router.method import RoutingMethod
from cupy_router.ops import _unpermute_backward, activation_topk_backward
from cupy_router.ops._chosen_gradient import method_of_chosen, takes_chosen_only
from cupy_router.ops._op import Op
from cupy_router.ops._rows import GradientOptions
from cupy_router.ops._run import run
from cupy_router.ops.activation_topk_backward import BackwardOptions
from cupy_router.torch._gate_gemm import gate_gemm_gradients
from cupy_router.torch._invariant import sum_of_rows
from cupy_router.torch._state import in_torch_func


def serves(method: RoutingMethod, needed: Collection[str], x: Any) -> bool:
    """Return whether :func:`gradients` returns all that are needed, and takes less time than products of all experts.

    Inside torch.func it would loop over the batch.
    """
    if "expert_scale" in needed or in_torch_func():
        return False
    return takes_chosen_only(method, x.shape[0], (x.device.type, x.device.index or 0))


def gradients(
    method: RoutingMethod,
    grad_weights: Any,
    indices: Any,
    needed: Collection[str],
    arrays: Mapping[str, Any],
    by_op: bool,
) -> dict[str, Any]:
    """Return the gradients with respect to the needed ones of x, weight and logit_bias, in their dtypes.

    A row may name an expert twice. An index that is no expert has no gradient.
    """
    x, weight, num_experts = arrays["x"], arrays["weight"], method.num_experts
    experts = indices.narrow(1, 0, method.top_k).int().contiguous()
    unread = experts.new_empty((weight.shape[0],))  # the order of rows, which dot products do not depend on
    inputs = x, unread, experts, None, weight, None, None
    logits = _result(_unpermute_backward.OP, "dots", GradientOptions(("dots",)), inputs, by_op)
    columns = torch.arange(weight.shape[0], dtype=torch.int32, device=x.device)
    factors = _factors(method, grad_weights, experts, logits, columns, arrays, by_op)
    found = {}
    if "x" in needed:
        found["x"] = sum_of_rows(x.dtype, weight, experts, factors, by_op)
    if "weight" in needed or "logit_bias" in needed:
        # As a sum over a token's experts, which is bitwise repeatable: atomic additions to the same expert are not.
        grad_logits = torch.where(experts.unsqueeze(2) == columns, factors.unsqueeze(2), 0.0).sum(1)
        if "weight" in needed:
            _, found["weight"] = gate_gemm_gradients(x, weight, grad_logits, (False, True))
        if "logit_bias" in needed:
            found["logit_bias"] = grad_logits.narrow(1, 0, num_experts).sum(0)
    return found


def x_gradient(method: RoutingMethod, grad_weights: Any, indices: Any, arrays: Mapping[str, Any], by_op: bool) -> Any:
    """Return the gradient with respect to x, in its dtype, by the logits of all experts, which are in `arrays`."""
    experts = indices.narrow(1, 0, method.top_k).int().contiguous()
    logits = arrays["logits"].gather(1, experts.long().clamp(0, method.num_experts - 1))
    columns = torch.arange(method.top_k, dtype=torch.int32, device=logits.device)
    factors = _factors(method, grad_weights, experts, logits, columns, arrays, by_op)
    return sum_of_rows(arrays["x"].dtype, arrays["weight"], experts, factors, by_op)


def _factors(
    method: RoutingMethod,
    grad_weights: Any,
    experts: Any,
    logits: Any,
    columns: Any,
    arrays: Mapping[str, Any],
    by_op: bool,
) -> Any:
    """Return the gradient with respect to the logits [num_tokens, top_k] of a token's experts, which lack their bias.

    It is anything where there is no expert. columns: 0, 1, ..., at least top_k of them.
    """
    logit_bias, expert_scale, top_k = arrays["logit_bias"], arrays["expert_scale"], method.top_k
    grad = (grad_weights if by_op else tensors.resolved(grad_weights)).narrow(1, 0, top_k).float().contiguous()
    if logit_bias is not None or expert_scale is not None:
        places = experts.clamp(0, method.num_experts - 1)
        logits = logits if logit_bias is None else logits + logit_bias[places]
        grad = grad if expert_scale is None else grad * expert_scale[places]
    all_chosen = columns.narrow(0, 0, top_k).expand(logits.shape)
    options, inputs = BackwardOptions(method_of_chosen(method), None, False), (grad, all_chosen, logits, None, None)
    return _result(activation_topk_backward.OP, "grad_logits", options, inputs, by_op)


def _result(op: Op, name: str, options: Any, inputs: tuple[Any, ...], by_op: bool) -> Any:
    """Return a result of an op."""
    if not by_op:
        return getattr(run(op, options, inputs, None, None), name)
    results = getattr(torch.ops.cupy_router, op.name)(options.text, *inputs)
    return results if isinstance(results, torch.Tensor) else results[op.result_names.index(name)]
