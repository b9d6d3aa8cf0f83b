# SPDX-License-Identifier: Apache-2.0
"""The layer of moe_jax.py on all devices: `python -m examples.moe_jax_mesh`.

Each device has some of the experts, all of the other parameters, and some of the tokens of each batch.
`XLA_FLAGS=--xla_force_host_platform_device_count=4` makes four devices of a CPU, and `NPROC=16` threads for them.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from cupy_router import dense_router
from cupy_router.jax import expert_parallel
from examples import tokens

SHARDED, SHARED = PartitionSpec("experts"), PartitionSpec()
SPECS = {"gate": SHARED, "up": SHARDED, "down": SHARDED, "head": SHARED}


def moe(parameters: dict[str, Any], x: Any, exact: bool) -> Any:
    """Return the cluster logits of the tokens of this device."""
    gate, up, down = (parameters[name] for name in ("gate", "up", "down"))
    parallel = expert_parallel("experts", tokens.METHOD.num_experts, exact=exact)
    rows, layout, ticket = parallel.dispatch(x, *dense_router(x, gate, tokens.METHOD))
    inner = jax.nn.relu(jax.lax.ragged_dot(rows, up, layout.counts))
    y = jax.lax.ragged_dot(inner, down, layout.counts)
    return (x + parallel.combine(y, ticket)) @ parameters["head"]


def loss_fn(parameters: dict[str, Any], x: Any, clusters: Any, exact: bool) -> Any:
    """Return the loss of the whole batch, to which each device adds that of its tokens."""
    log_probabilities = jax.nn.log_softmax(moe(parameters, x, exact))
    chosen = jnp.take_along_axis(log_probabilities, clusters[:, None], axis=1)
    return -jax.lax.psum(chosen.sum(), "experts") / tokens.BATCH


def train(steps: int = 200, num_devices: int | None = None, exact: bool = False) -> list[float]:
    """Return the loss of each step. num_devices: None for all; it divides the experts and a batch."""
    devices = jax.devices()[:num_devices]
    mesh = jax.make_mesh((len(devices),), ("experts",), axis_types=(AxisType.Auto,), devices=devices)
    loss_of = jax.shard_map(
        partial(loss_fn, exact=exact), mesh=mesh, in_specs=(SPECS, SHARDED, SHARDED), out_specs=SHARED
    )

    @partial(jax.jit, donate_argnums=(0, 1))
    def step(parameters: Any, velocity: Any, x: Any, clusters: Any) -> tuple[Any, Any, Any]:
        loss, grads = jax.value_and_grad(loss_of)(parameters, x, clusters)
        velocity = jax.tree.map(lambda v, g: tokens.MOMENTUM * v + g, velocity, grads)
        return jax.tree.map(lambda p, v: p - tokens.LEARNING_RATE * v, parameters, velocity), velocity, loss

    places = {name: NamedSharding(mesh, spec) for name, spec in SPECS.items()}
    parameters = jax.device_put(tokens.parameters(), places)
    velocity = jax.tree.map(jnp.zeros_like, parameters)
    hidden, clusters = tokens.load()
    losses = []
    for batch in tokens.batches(steps):
        rows = jax.device_put((hidden[batch], clusters[batch]), NamedSharding(mesh, SHARDED))
        parameters, velocity, loss = step(parameters, velocity, *rows)
        losses.append(loss)
    return [float(loss) for loss in losses]


if __name__ == "__main__":
    for number, loss in enumerate(train()):
        if number % 20 == 19:
            print(f"step {number + 1:3}: loss {loss:.3f}")
