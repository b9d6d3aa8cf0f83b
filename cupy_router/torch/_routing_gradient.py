# SPDX-License-Identifier: Apache-2.0
"""Gradients of the weights of a routing, and of its logits where it returns them.

If the call took x and the gate, the backward pass computes the logits again, unless they were returned in float32.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from contextlib import nullcontext
from typing import Any

import torch

from cupy_router.arrays import _torch as tensors
from cupy_router.method import RoutingMethod
from cupy_router.ops import activation_topk_backward, hash_router
from cupy_router.ops._cached import NUMBER
from cupy_router.ops._invariant_gradient import is_of_chosen_experts
from cupy_router.ops._op import Op
from cupy_router.ops._replicas import has_replicas, routing_alone
from cupy_router.ops._run import run
from cupy_router.ops.activation_topk_backward import BackwardOptions, without_factors
from cupy_router.ops.hash_router import HashOptions
from cupy_router.torch import _chosen_gradient
from cupy_router.torch._gate_gemm import gate_gemm, gate_gemm_gradients
from cupy_router.torch._invariant import invariant_logits, invariant_x_gradient

SMOOTH = "weights have a gradient"

MAY_REPEAT = ("table", "given_experts")  # inputs with experts, of which a row may have one twice

# Inputs that the backward pass may need. Those that the call got are also the ones that have a gradient.
_SAVED = ("logits", "x", "weight", "logit_bias", "expert_scale")
_SELECTING = ("bias", "bias_index", "given_experts")  # needed as well where indices are not those of the experts


def is_smooth(given: Mapping[str, Any]) -> bool:
    """Return whether weights depend on inputs of a call: not if there are neither logits nor a gate."""
    return given.get("logits") is not None or given.get("weight") is not None


def remember(ctx: Any, op: Op, options: Any, given: Mapping[str, Any], needed: Collection[str], output: Any) -> None:
    """Save what :func:`gradients` needs of a call."""
    weights, indices, *others = output
    logits_dtype = getattr(options, "logits_dtype", None)  # not every router can return logits
    returned = None if logits_dtype is None else others.pop(0)
    if options.method is None or not is_smooth(given):
        ctx.mark_non_differentiable(weights, indices, *others)
    else:
        ctx.mark_non_differentiable(indices, *others)
    ctx.method, ctx.batch_invariant = options.method, getattr(options, "batch_invariant", False)
    ctx.repeated = any(given.get(name) is not None for name in MAY_REPEAT)
    ctx.number, ctx.logits_place = given.get(NUMBER, -1), None if returned is None else 2
    exact = returned if logits_dtype == "float32" and given.get("logits") is None else None
    ctx.routed = (op, routing_alone(options)) if has_replicas(options) else None
    saved = _SAVED if ctx.routed is None else (*_SAVED, *_SELECTING)
    ctx.save_for_backward(indices, exact, given.get("num_valid"), *(given.get(name) for name in saved))


def gradients(ctx: Any, grads: Sequence[Any], needed: Collection[str], by_op: bool) -> dict[str, Any]:
    """Return the gradients with respect to the needed inputs, in their dtypes."""
    indices, returned, num_valid, *saved = ctx.saved_tensors
    arrays = dict(zip((*_SAVED, *_SELECTING), saved, strict=False))
    if ctx.routed is not None:
        op, options = ctx.routed
        indices = _experts(op, options, arrays | {"num_valid": num_valid}, ctx.number, by_op)
    if returned is not None:  # with the bias
        arrays |= {"logits": returned, "logit_bias": None}
    grad_logits = None if ctx.logits_place is None else grads[ctx.logits_place]
    if grad_logits is not None:
        grad_logits = without_padding(grad_logits.float(), ctx.number if num_valid is None else num_valid)
    return gradients_of(
        ctx.method, grads[0], indices, needed, arrays, grad_logits=grad_logits, repeated=ctx.repeated, by_op=by_op,
        batch_invariant=ctx.batch_invariant,
    )  # fmt: skip


def _experts(op: Op, options: Any, arrays: Mapping[str, Any], number: int, by_op: bool) -> Any:
    """Return the experts of a call whose indices are their replicas, by routing again, which gives the same."""
    inputs = tuple([arrays.get(name) for name in op.names])
    if by_op:
        return getattr(torch.ops.cupy_router, op.name)(options.text, *inputs, number)[1]
    with torch.no_grad():
        return run(op, options, inputs, None, None, number).indices


def without_padding(grad_logits: Any, num_valid: Any) -> Any:
    """Return a gradient of logits with zeros in the rows of padding, whose logits are constant."""
    if not isinstance(num_valid, torch.Tensor) and num_valid < 0:
        return grad_logits
    rows = torch.arange(grad_logits.shape[0], device=grad_logits.device)
    return torch.where((rows < num_valid)[:, None], grad_logits, 0.0)


def gradients_of(
    method: RoutingMethod,
    grad_weights: Any,
    indices: Any,
    needed: Collection[str],
    arrays: Mapping[str, Any],
    *,
    grad_logits: Any = None,
    repeated: bool,
    by_op: bool,
    batch_invariant: bool = False,
) -> dict[str, Any]:
    """Return the gradients with respect to the needed ones of `arrays`, in their dtypes.

    GEMMs are in float32, with the precision that PyTorch is set to.

    Args:
        grad_weights: the gradient of the weights, or None.
        arrays: logits or x and weight, logit_bias, expert_scale.
        grad_logits: the gradient of the logits that were returned, in float32, or None.
        repeated: a row may name an expert twice.
        by_op: call the ops through PyTorch's dispatcher, as graphs and batched gradients need it.
        batch_invariant: the call was, and so is each token's gradient with respect to x.
    """
    # Columns are selected by `narrow`: a slice of all columns is an alias, which PyTorch lacks for batched tensors.
    logits, x, weight, logit_bias, expert_scale = (arrays[name] for name in _SAVED)
    found: dict[str, Any] = {}
    with nullcontext() if x is None else torch.autocast(indices.device.type, enabled=False):
        exact = logits is not None or grad_logits is not None or batch_invariant
        if not exact and grad_weights is not None and _chosen_gradient.serves(method, needed, x):
            return _chosen_gradient.gradients(method, grad_weights, indices, needed, arrays, by_op)
        if logits is None and grad_weights is not None:
            logits = invariant_logits(x, weight, by_op) if batch_invariant else gate_gemm(x, weight)
        of_chosen = grad_logits is None and is_of_chosen_experts(method)
        smooth = not {"logits", "x", "weight", "logit_bias"}.isdisjoint(needed)
        if smooth and grad_weights is not None:
            # Logits computed from x are float32 already.
            in_float32 = "logit_bias" in needed or grad_logits is not None
            options = BackwardOptions(method, "float32" if in_float32 else None, repeated)
            given = (grad_weights.contiguous(), indices, logits, logit_bias, expert_scale)
            if by_op:
                from_weights = torch.ops.cupy_router.activation_topk_backward(options.text, *given)
            else:
                resolved = (tensors.resolved(given[0]), *given[1:])  # PyTorch's dispatcher does so for ops
                (from_weights,) = run(
                    activation_topk_backward.OP, (method, options.dtype, repeated), resolved, None, None
                )
            grad_logits = from_weights if grad_logits is None else grad_logits + from_weights
        if smooth:
            if "logits" in needed:
                found["logits"] = grad_logits.to(logits.dtype)
            if "logit_bias" in needed:
                found["logit_bias"] = grad_logits.narrow(1, 0, method.num_experts).sum(0)
            if x is not None:
                which = "x" in needed and not batch_invariant, "weight" in needed
                found["x"], found["weight"] = gate_gemm_gradients(x, weight, grad_logits, which)
                if "x" in needed and batch_invariant and of_chosen:
                    with_logits = {**arrays, "logits": logits}
                    found["x"] = _chosen_gradient.x_gradient(method, grad_weights, indices, with_logits, by_op)
                elif "x" in needed and batch_invariant:
                    found["x"] = invariant_x_gradient(x.dtype, weight, grad_logits, by_op)
        if "expert_scale" in needed and grad_weights is not None:
            found["expert_scale"] = _expert_scale_gradient(
                method, grad_weights, indices, logits, logit_bias, repeated=repeated, by_op=by_op
            )
    return found


def _expert_scale_gradient(
    method: RoutingMethod,
    grad_weights: Any,
    indices: Any,
    logits: Any,
    logit_bias: Any,
    *,
    repeated: bool,
    by_op: bool,
) -> Any:
    """Return the gradient with respect to expert_scale: for each expert, the sum of its unscaled weights times theirs.

    The unscaled weights come from `hash_router`, with the indices as its table.
    """
    rows = torch.arange(len(indices), dtype=torch.int32, device=indices.device)
    experts = indices[:, : method.top_k].long()
    given = (rows, experts, logits, None, None, None, None, logit_bias, None, None)
    options = HashOptions(without_factors(method))
    if by_op:
        plain, _ = torch.ops.cupy_router.hash_router(options.text, *given, -1)
    else:
        plain, _ = run(hash_router.OP, options.method, given, None, None)
    plain = plain[:, : method.top_k]
    products = grad_weights.narrow(1, 0, method.top_k).float() * plain
    # Rows without experts have weights 0. A scatter without repeated places, followed by a sum, is bitwise repeatable.
    dense = products.new_zeros((len(indices), method.num_experts))
    places = experts.clamp(0, method.num_experts - 1)
    dense = dense.scatter_add(1, places, products) if repeated else dense.scatter(1, places, products)
    return dense.sum(0)
