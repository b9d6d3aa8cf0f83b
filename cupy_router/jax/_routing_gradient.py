# SPDX-License-Identifier: Apache-2.0
"""Gradients of the weights and logits of a routing, with respect to every float input that they depend on.

The backward pass is the op `activation_topk_backward`, followed by GEMMs of JAX. If the call took x and the gate, the
backward pass computes the logits again, unless they were returned in float32.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp

from cupy_router.jax import _chosen_gradient
from cupy_router.jax._vmap import call_of, function_of
from cupy_router.method import RoutingMethod
from cupy_router.ops import _checks as check
from cupy_router.ops import activation_topk_backward, dense_router, hash_router, unpermute
from cupy_router.ops._invariant_gradient import is_of_chosen_experts, logits_options
from cupy_router.ops._op import Op
from cupy_router.ops._replicas import NAMES as REPLICA_NAMES
from cupy_router.ops._replicas import has_replicas, routing_alone
from cupy_router.ops._rows import LayoutInts
from cupy_router.ops.activation_topk_backward import BackwardOptions, check_derivative, without_factors
from cupy_router.ops.hash_router import HashOptions

MAY_REPEAT = frozenset(("table", "given_experts"))  # inputs with experts, of which a row may have one twice

# Inputs that the backward pass may need. Those that the call got are also the ones that have a gradient.
_SAVED = ("logits", "x", "weight", "logit_bias", "expert_scale")
_SELECTING = ("bias", "bias_index", "given_experts")  # needed as well where indices are not those of the experts


def routing(op: Op, options: Any, given: tuple[int, ...], number: int) -> Any:
    """Return a call of an op that routes, with its gradient."""
    method: RoutingMethod | None = options.method
    names = [op.names[i] for i in given]
    paths = [result.path for result in op.existing(options)]
    place = paths.index("logits") if "logits" in paths else None
    exact = place is not None and options.logits_dtype == "float32"
    replaced = has_replicas(options)
    plain = tuple(i for i in given if op.names[i] not in REPLICA_NAMES)
    routed = jax.custom_vjp(function_of(op, options, given, number))

    def forward(*arrays: Any) -> tuple[Any, Any]:
        results = routed(*arrays)
        by_name = dict(zip(names, arrays, strict=True))
        returned = results[place] if exact else None
        saved = (*_SAVED, *_SELECTING, "num_valid") if replaced else (*_SAVED, "num_valid")
        return results, (results[1], returned, {name: by_name.get(name) for name in saved})

    def backward(saved: Any, cotangents: Any) -> tuple[Any, ...]:
        indices, returned, arrays = saved
        if replaced:  # the experts, by routing again, which gives the same
            chosen = [arrays[name] for name in names if name not in REPLICA_NAMES]
            indices = function_of(op, routing_alone(options), plain, number)(*chosen)[1]
        found = {}
        if method is not None and (arrays["logits"] is not None or arrays["weight"] is not None):
            grad_returned = None
            if place is not None:
                grad_returned = _of_valid_rows(cotangents[place], arrays["num_valid"], number)
            grads = cotangents[0], grad_returned
            repeated, invariant = not MAY_REPEAT.isdisjoint(names), getattr(options, "batch_invariant", False)
            found = _gradients(method, *grads, indices, returned, arrays, repeated=repeated, batch_invariant=invariant)
        return tuple(map(found.get, names))  # None: no gradient, or 0

    routed.defvjp(forward, backward)
    return routed


def _of_valid_rows(grad: Any, num_valid: Any, number: int) -> Any:
    """Return a gradient of logits as float32, with 0 in padding, whose logits are constants."""
    grad = grad.astype(jnp.float32)
    if num_valid is None and number < 0:
        return grad
    valid = number if num_valid is None else num_valid.reshape(())
    return jnp.where(jnp.arange(grad.shape[0])[:, None] < valid, grad, 0)


def _gradients(
    method: RoutingMethod,
    grad_weights: Any,
    grad_returned: Any,
    indices: Any,
    returned: Any,
    arrays: dict[str, Any],
    *,
    repeated: bool,
    batch_invariant: bool,
) -> dict[str, Any]:
    """The gradients by what there is of `arrays`, in their dtypes; those that nobody asks for, jax.jit leaves out.

    returned: the logits that the call returned, with their bias, and grad_returned their gradient in float32, or None.
    batch_invariant: the call was, and so is each token's gradient with respect to x.
    """
    with check.named(activation_topk_backward.OP.label):
        check_derivative(method)
    logits, x, weight, logit_bias, expert_scale = map(arrays.__getitem__, _SAVED)
    found: dict[str, Any] = {}
    bias, exact = logit_bias, logits is not None or grad_returned is not None or batch_invariant
    if not exact and _chosen_gradient.serves(method, arrays):
        found["x"], grad_logits = _chosen_gradient.gradients(method, grad_weights, indices, arrays)
        return found | _summed(method, grad_logits, arrays)
    if returned is not None:
        logits, bias = returned, None
    elif logits is None and batch_invariant:
        (*_, logits) = call_of(dense_router.OP, logits_options(weight.shape[0]), {"x": x, "weight": weight})
    elif logits is None:
        # With the forward pass's precision, not JAX's setting, so that scores are differentiated at the same logits.
        logits = _matmul(x, weight.T, jax.lax.Precision.HIGHEST)
    dtype = None if logit_bias is None else "float32"  # the sum over all tokens is rounded once
    given = {"grad_weights": grad_weights, "indices": indices, "logits": logits}
    given |= {"logit_bias": bias, "expert_scale": expert_scale}
    (grad_logits,) = call_of(activation_topk_backward.OP, BackwardOptions(method, dtype, repeated), given)
    if grad_returned is not None:
        grad_logits = grad_logits + grad_returned
    if x is None:
        found["logits"] = grad_logits.astype(logits.dtype)
    else:
        if batch_invariant:
            positions = jnp.broadcast_to(jnp.arange(grad_logits.shape[1], dtype=jnp.int32), grad_logits.shape)
            rows = positions, grad_logits
            if grad_returned is None and is_of_chosen_experts(method):
                rows = _chosen_gradient.factors_by_logits(method, grad_weights, indices, logits, bias, expert_scale)
            found["x"] = _sum_of_rows(x.dtype, weight, *rows)
        else:
            found["x"] = _matmul(grad_logits, weight).astype(x.dtype)
    if expert_scale is not None:
        found["expert_scale"] = _expert_scale_gradient(method, grad_weights, indices, logits, bias)
    return found | _summed(method, grad_logits, arrays)


def _summed(method: RoutingMethod, grad_logits: Any, arrays: dict[str, Any]) -> dict[str, Any]:
    """Return the gradients that are sums over the tokens, with respect to the gate and to logit_bias."""
    found, x, weight = {}, arrays["x"], arrays["weight"]
    if x is not None:
        found["weight"] = _matmul(grad_logits.T, x).astype(weight.dtype)
    if arrays["logit_bias"] is not None:
        found["logit_bias"] = grad_logits[:, : method.num_experts].sum(0)
    return found


def _matmul(a: Any, b: Any, precision: Any = None) -> Any:
    """Return the product in float32.

    Products of 16-bit floats of one dtype are exact. Others are converted to float32 and multiplied as JAX is set to.
    """
    if a.dtype != b.dtype:
        a, b = a.astype(jnp.float32), b.astype(jnp.float32)
    return jnp.dot(a, b, precision=precision, preferred_element_type=jnp.float32)


def _sum_of_rows(dtype: Any, weight: Any, positions: Any, factors: Any) -> Any:
    """Return, for each token, the sum of the gate's rows at these positions times their factors, in the order given.

    It is float32, and then rounded to dtype. A position that is no row is left out.
    """
    rows = weight if weight.dtype == dtype else weight.astype(jnp.float32)
    (summed,) = call_of(unpermute.OP, LayoutInts(), {"y": rows, "positions": positions, "weights": factors})
    return summed.astype(dtype)


def _expert_scale_gradient(method: RoutingMethod, grad_weights: Any, indices: Any, logits: Any, logit_bias: Any) -> Any:
    """Return the gradient with respect to expert_scale: for each expert, the sum of its unscaled weights times theirs.

    The unscaled weights come from `hash_router`, with the indices as its table.
    """
    num_tokens, experts = indices.shape[0], indices[:, : method.top_k]
    if experts.dtype.itemsize < 4:
        experts = experts.astype(jnp.int32)
    given = {"token_ids": jnp.arange(num_tokens, dtype=jnp.int32), "table": experts, "logits": logits}
    given |= {} if logit_bias is None else {"logit_bias": logit_bias}
    op, options = hash_router.OP, HashOptions(without_factors(method))
    places = tuple(op.names.index(name) for name in given)
    plain, _ = routing(op, options, places, -1)(*given.values())
    products = grad_weights[:, : method.top_k].astype(jnp.float32) * plain[:, : method.top_k]
    # Rows without experts have weights 0, and it does not matter that -1 is the last expert. JAX leaves out ids beyond.
    # A scatter without repeated places, followed by a sum, is bitwise repeatable.
    rows = jnp.arange(num_tokens)[:, None]
    dense = jnp.zeros((num_tokens, method.num_experts), jnp.float32)
    return dense.at[rows, experts].add(products).sum(0)
