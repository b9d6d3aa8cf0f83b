# SPDX-License-Identifier: Apache-2.0
"""Train a mixture-of-experts layer in JAX: `python -m examples.moe_jax`, on a GPU if there is one.

Tokens are brought into the order of their experts, two grouped GEMMs process them, and their sum, weighted by the
router, is added to the token. With a plain router, every expert processes every token instead.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp

from cupy_router import LayoutSpec, dense_router, permute, unpermute
from examples import tokens


def plain_router(x: Any, gate: Any) -> tuple[Any, Any]:
    """Compute the same as `dense_router`, in plain JAX."""
    scores = jnp.sqrt(jax.nn.softplus(x @ gate.T))
    weights, indices = jax.lax.top_k(scores, tokens.METHOD.top_k)
    return weights / weights.sum(axis=1, keepdims=True), indices


def moe(parameters: dict[str, Any], x: Any, plain: bool) -> Any:
    """Return the cluster logits of x [num_tokens, hidden]."""
    gate, up, down = (parameters[name] for name in ("gate", "up", "down"))
    if plain:
        num_tokens = x.shape[0]  # len(x) has to be a number, which it is not in a program for any number of tokens
        weights, indices = plain_router(x, gate)
        mix = jnp.zeros((num_tokens, len(gate))).at[jnp.arange(num_tokens)[:, None], indices].set(weights)
        inner = jax.nn.relu(x @ up) * mix.T[:, :, None]  # [num_experts, num_tokens, width]
        return (x + (inner @ down).sum(axis=0)) @ parameters["head"]
    weights, _, layout = dense_router(x, gate, tokens.METHOD, layout=LayoutSpec())
    inner = jax.nn.relu(jax.lax.ragged_dot(permute(x, layout), up, layout.counts))  # [num_pairs, width]
    y = jax.lax.ragged_dot(inner, down, layout.counts)
    return unpermute(y, layout, weights, residual=x) @ parameters["head"]


def loss_fn(parameters: dict[str, Any], x: Any, clusters: Any, plain: bool) -> Any:
    log_probabilities = jax.nn.log_softmax(moe(parameters, x, plain))
    return -jnp.take_along_axis(log_probabilities, clusters[:, None], axis=1).mean()


@partial(jax.jit, static_argnames="plain", donate_argnums=(0, 1))
def step(parameters: Any, velocity: Any, x: Any, clusters: Any, plain: bool) -> tuple[Any, Any, Any]:
    """Return new parameters and velocity after a step of gradient descent with momentum, and the loss before it."""
    loss, grads = jax.value_and_grad(loss_fn)(parameters, x, clusters, plain)
    velocity = jax.tree.map(lambda v, g: tokens.MOMENTUM * v + g, velocity, grads)
    return jax.tree.map(lambda p, v: p - tokens.LEARNING_RATE * v, parameters, velocity), velocity, loss


def train(steps: int = 200, plain: bool = False) -> list[float]:
    """Return the loss of each step."""
    hidden, clusters = (jnp.array(array) for array in tokens.load())
    parameters = jax.tree.map(jnp.array, tokens.parameters())
    velocity = jax.tree.map(jnp.zeros_like, parameters)
    losses = []
    for batch in tokens.batches(steps):
        parameters, velocity, loss = step(parameters, velocity, hidden[batch], clusters[batch], plain)
        losses.append(loss)
    return [float(loss) for loss in losses]


if __name__ == "__main__":
    for number, loss in enumerate(train()):
        if number % 20 == 19:
            print(f"step {number + 1:3}: loss {loss:.3f}")
