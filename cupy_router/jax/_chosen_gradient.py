# SPDX-License-Identifier: Apache-2.0
"""The backward pass of few tokens by the gate's rows of their experts alone.

XLA reads the rows in the loops that sum them, and maps these loops over batches.
"""

from __future__ import annotations

from typing import Any

import jax.numpy as jnp

from cupy_router.jax import _mesh
from cupy_router.jax._vmap import call_of
from cupy_router.method import RoutingMethod
from cupy_router.ops import activation_topk_backward
from cupy_router.ops._chosen_gradient import method_of_chosen, takes_chosen_only
from cupy_router.ops.activation_topk_backward import BackwardOptions


def serves(method: RoutingMethod, arrays: dict[str, Any]) -> bool:
    """Return whether :func:`gradients` returns all that are needed, and takes less time than products of all experts.

    Over explicit axes of a mesh, JAX does not map reads at indices.
    """
    if arrays["expert_scale"] is not None or _mesh.is_explicit((arrays["x"], arrays["weight"])):
        return False
    return takes_chosen_only(method, arrays["x"].shape[0], None)


def gradients(method: RoutingMethod, grad_weights: Any, indices: Any, arrays: dict[str, Any]) -> tuple[Any, Any]:
    """Return the gradients with respect to x, in its dtype, and to the logits [num_tokens, num_logits], in float32.

    A row may name an expert twice. An index that is no expert has no gradient.
    """
    x, weight, top_k = arrays["x"], arrays["weight"], method.top_k
    experts, exist, places = _experts(method, indices)
    rows = [weight[places[:, place]].astype(jnp.float32) for place in range(top_k)]
    logits = jnp.stack([(x.astype(jnp.float32) * row).sum(1) for row in rows], 1)
    factors = _factors(method, grad_weights, places, logits, arrays["logit_bias"], arrays["expert_scale"])
    grad_x = jnp.zeros(x.shape, jnp.float32)
    for place, row in enumerate(rows):
        grad_x = grad_x + jnp.where(exist[:, place, None], factors[:, place, None] * row, 0)
    columns = jnp.arange(weight.shape[0], dtype=jnp.int32)
    grad_logits = jnp.where(experts[:, :, None] == columns, factors[:, :, None], 0).sum(1)
    return grad_x.astype(x.dtype), grad_logits


def factors_by_logits(
    method: RoutingMethod, grad_weights: Any, indices: Any, logits: Any, logit_bias: Any, expert_scale: Any
) -> tuple[Any, Any]:
    """Return the chosen experts, or no expert, and the gradient with respect to their logits, by those of all."""
    experts, _, places = _experts(method, indices)
    chosen = _at(logits, places)
    return experts, _factors(method, grad_weights, places, chosen, logit_bias, expert_scale)


def _experts(method: RoutingMethod, indices: Any) -> tuple[Any, Any, Any]:
    """Return the chosen experts, whether they exist, and the experts with 0 in place of those that do not."""
    experts = indices[:, : method.top_k].astype(jnp.int32)
    exist = (experts >= 0) & (experts < method.num_experts)
    return experts, exist, jnp.where(exist, experts, 0)


def _factors(
    method: RoutingMethod, grad_weights: Any, places: Any, logits: Any, logit_bias: Any, expert_scale: Any
) -> Any:
    """Return the gradient with respect to the logits [num_tokens, top_k] of a token's experts, which lack their bias.

    It is anything where there is no expert.
    """
    grad = grad_weights[:, : method.top_k].astype(jnp.float32)
    if logit_bias is not None:
        logits = logits + _at(logit_bias, places)
    if expert_scale is not None:
        grad = grad * _at(expert_scale, places)
    all_chosen = jnp.broadcast_to(jnp.arange(method.top_k, dtype=jnp.int32), places.shape)
    given = {"grad_weights": grad, "indices": all_chosen, "logits": logits}
    options = BackwardOptions(method_of_chosen(method), None, False)
    (factors,) = call_of(activation_topk_backward.OP, options, given)
    return factors


def _at(values: Any, places: Any) -> Any:
    """Return the values of a token, or of all, at its places, by a sum that is mapped over explicit axes of a mesh."""
    columns = jnp.arange(values.shape[-1], dtype=jnp.int32)
    return jnp.where(places[:, :, None] == columns, jnp.expand_dims(values, -2), 0).sum(2)
