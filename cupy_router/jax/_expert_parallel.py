# SPDX-License-Identifier: Apache-2.0
"""expert_parallel: the experts of a layer on several devices of a mesh, by collectives of XLA."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from cupy_router.jax._mesh import varying_alike
from cupy_router.ops import _checks as check
from cupy_router.ops._declared import FLOATS, IDS
from cupy_router.ops._layout import MAX_ROWS
from cupy_router.ops.expert_layout import expert_layout
from cupy_router.ops.permute import permute
from cupy_router.ops.unpermute import unpermute
from cupy_router.results import ExpertLayout

Axis = str | tuple[str, ...]


class Ticket(NamedTuple):
    """The state that a dispatch leaves for :meth:`ExpertParallel.combine`, a pytree.

    layout: :class:`ExpertLayout` of this device's experts.
    weights: [num_tokens, top_k] float32, of this device's tokens with `exact`, else of all tokens.
    home: :class:`ExpertLayout` of this device's pairs in the order of tokens and slots, with `exact`; None otherwise.
    """

    layout: ExpertLayout
    weights: Any
    home: ExpertLayout | None = None


@dataclass(frozen=True)
class ExpertParallel:
    """The dispatch and combine of :func:`expert_parallel`. Call both inside the `jax.shard_map` that made it.

    axis: Of the mesh.
    num_experts: Number of experts of all devices.
    num_devices: Number of devices along the axis.
    exact, capacity: See :func:`expert_parallel`.
    """

    axis: Axis
    num_experts: int
    num_devices: int
    exact: bool = False
    capacity: int | None = None

    @property
    def num_local(self) -> int:
        """Number of experts in a device's layout, the same on all devices: the most experts that one has."""
        return -(-self.num_experts // self.num_devices)

    @property
    def experts(self) -> tuple[Any, Any]:
        """(first, count) of this device's experts, int32 scalars that depend on the device."""
        # num_experts * num_devices may exceed 2**31.
        starts = jnp.array([d * self.num_experts // self.num_devices for d in range(self.num_devices + 1)], jnp.int32)
        device = jax.lax.axis_index(self.axis)
        return starts[device], starts[device + 1] - starts[device]

    def dispatch(self, x: Any, weights: Any, indices: Any) -> tuple[Any, ExpertLayout, Ticket]:
        """Bring tokens to the devices of their experts.

        Args:
            x: [num_tokens, hidden] float32, float16 or bfloat16, the tokens of this device. All devices have equally
                many; a token whose indices are -1 is only padding.
            weights: [num_tokens, top_k] float32, float16 or bfloat16.
            indices: [num_tokens, top_k] uint8, int16, uint16, int32 or int64, experts of all devices. Entries outside
                0..num_experts-1 are no experts.

        Returns:
            rows: [layout.capacity, hidden] in the dtype of x, the tokens of each expert of this device, those of
                earlier devices first.
            layout: :class:`ExpertLayout` of num_local experts, with counts, offsets, ends, order and positions. The
                last has no rows where a device has fewer.
            ticket: For :meth:`combine`.

        Raises:
            TypeError: An argument is no array, or its dtype is not allowed.
            ValueError: A shape is wrong, or there are too many tokens.
        """
        x, weights, indices = _checked(x, weights, indices)
        if self.num_devices == 1:
            layout = expert_layout(indices, self.num_experts, capacity=self.capacity)
            return permute(x, layout), layout, Ticket(layout, weights)
        x, weights, indices, _ = varying_alike([x, weights, indices, jax.lax.axis_index(self.axis)])
        is_expert = (indices >= 0) & (indices < self.num_experts)
        ids = jnp.where(is_expert, indices.astype(jnp.int32), -1)
        first, count = self.experts
        every = jnp.arange(self.num_experts, dtype=jnp.int32) - first
        layout = expert_layout(
            self._all_gather(ids), self.num_experts, capacity=self.capacity,
            expert_map=jnp.where(every < count, every, -1), num_local=self.num_local,
        )  # fmt: skip
        weights = weights.astype(jnp.float32)
        if not self.exact:
            return permute(self._all_gather(x), layout), layout, Ticket(layout, self._all_gather(weights))
        pairs = jnp.where(ids < 0, -1, jnp.arange(ids.size, dtype=jnp.int32).reshape(ids.shape))
        home = ExpertLayout(
            order=pairs.ravel(), positions=pairs, num_tokens=ids.shape[0], top_k=ids.shape[1], alignment=1,
            capacity=ids.size,
        )  # fmt: skip
        return _rows_of_pairs(self, x, layout, home), layout, Ticket(layout, weights, home)

    def combine(self, y: Any, ticket: Ticket) -> Any:
        """Return [num_tokens, hidden] in the dtype of y: for each token of this device, the weighted sum of its rows.

        Args:
            y: [layout.capacity, hidden] float32, float16 or bfloat16, what the experts return for the rows. Rows
                without a pair are never read.
            ticket: Of the dispatch.

        Raises:
            TypeError, ValueError: The ticket is none, or y has another shape than the rows or a dtype that is not
                allowed.
        """
        if not isinstance(ticket, Ticket):
            raise TypeError(f"expert_parallel: ticket must be the one of a dispatch, got {type(ticket).__name__}")
        (y,) = _arrays([("y", y, FLOATS, "hidden")])
        rows = ticket.layout.capacity
        if y.shape[0] != rows:
            raise ValueError(f"expert_parallel: y must have the {rows} rows of the layout, got shape {[*y.shape]}")
        if self.num_devices == 1:
            return unpermute(y, ticket.layout, ticket.weights)
        if ticket.home is not None:
            return unpermute(self.bring_pairs(y, ticket.layout), ticket.home, ticket.weights)
        return self._sum_scatter(unpermute(y, ticket.layout, ticket.weights))

    def bring_pairs(self, rows: Any, layout: ExpertLayout) -> Any:
        """Return the row of each pair of this device's tokens, [num_tokens * top_k, hidden], in the order of slots.

        It is added to zeros of the other devices, which is exact.

        rows: [layout.capacity, hidden] of this device's experts.
        """
        # permute reorders rows by a layout that has a row for each pair of all tokens.
        order = layout.positions.ravel()
        by_pair = ExpertLayout(
            order=order, positions=layout.order[:, None], num_tokens=layout.capacity, top_k=1, alignment=1,
            capacity=order.size,
        )  # fmt: skip
        return self._sum_scatter(permute(rows, by_pair))

    def _all_gather(self, array: Any) -> Any:
        return jax.lax.all_gather(array, self.axis, tiled=True)

    def _sum_scatter(self, rows: Any) -> Any:
        return jax.lax.psum_scatter(rows, self.axis, tiled=True)


def expert_parallel(
    axis: Axis, num_experts: int, *, exact: bool = False, capacity: int | None = None
) -> ExpertParallel:
    """Spread experts over the devices of a mesh axis, each of which has tokens of its own, inside `jax.shard_map`.

    `dispatch` brings tokens to the devices of their experts, in the order of an expert layout. The experts of the
    caller process these rows. `combine` returns the weighted sums to the devices of the tokens. Both are differentiable
    in reverse mode, with the transposed collectives. All tokens reach all devices by all_gather, and sums come back by
    psum_scatter. With one device nothing is communicated.

    `experts` are (first, count) of this device: device d has those from d * num_experts // num_devices up to the first
    of device d + 1. They are traced, because one program runs on all devices. `num_local` is the largest count, of
    which every layout is: where the number of devices does not divide num_experts, some devices have an expert without
    rows at the end.

    Args:
        axis: A manual axis of the mesh, or a tuple of such axes. It may be an explicit or automatic axis outside.
        num_experts: Number of experts of all devices.
        exact: Add the rows of a token in the order of its slots. If the experts are computed row by row, outputs and
            gradients are then bitwise those of one device that has the tokens of all devices, in their order. That
            moves one row for each pair instead of one for each token and device, top_k times as much, on the way back.
            By default, each device sums its rows of a token, in the dtype of y, and XLA adds these sums in its order.
        capacity: Number of rows for the experts of a device. If they need more, pairs are left out by the rule of
            :func:`cupy_router.expert_layout`; `layout.counts - (layout.ends - layout.offsets[:-1])` counts them. None:
            enough for any routing, num_devices * num_tokens * top_k.

    Returns:
        An object with `experts`, `num_local`, `dispatch` and `combine`.

    Raises:
        TypeError, ValueError: An argument is not allowed, or the call is not inside a `jax.shard_map` over the axis.

    >>> import jax, jax.numpy as jnp
    >>> from jax.sharding import PartitionSpec as P
    >>> from cupy_router.jax import expert_parallel
    >>> def layer(x, weights, indices):
    ...     parallel = expert_parallel("experts", num_experts=4)
    ...     rows, layout, ticket = parallel.dispatch(x, weights, indices)
    ...     y = rows * 3  # jax.lax.ragged_dot takes the rows with layout.counts
    ...     return parallel.combine(y, ticket)
    >>> mesh = jax.make_mesh((1,), ("experts",), axis_types=(jax.sharding.AxisType.Auto,))  # or of more devices
    >>> layer = jax.jit(jax.shard_map(layer, mesh=mesh, in_specs=P("experts"), out_specs=P("experts")))
    >>> layer(jnp.array([[1.0], [5.0]]), jnp.full((2, 2), 0.5), jnp.array([[2, 0], [2, 1]]))
    Array([[ 3.],
           [15.]], dtype=float32)
    """
    num_experts = check.integer("expert_parallel: num_experts", num_experts, 1, MAX_ROWS - 1)
    if capacity is not None:
        capacity = check.integer("expert_parallel: capacity", capacity, 0, MAX_ROWS)
    exact = check.boolean("expert_parallel: exact", exact)
    try:
        num_devices = jax.lax.axis_size(axis)
    except (NameError, TypeError, ValueError) as error:  # ValueError: an int
        raise ValueError(
            f"expert_parallel: axis must be an axis of a jax.shard_map around the call, got {axis!r}"
        ) from error
    return ExpertParallel(axis, num_experts, num_devices, exact, capacity)


@partial(jax.custom_vjp, nondiff_argnums=(0,))
def _rows_of_pairs(parallel: ExpertParallel, x: Any, layout: ExpertLayout, home: ExpertLayout) -> Any:
    """Return the rows of a dispatch, with a gradient that is added up in the order of slots."""
    return permute(jax.lax.all_gather(x, parallel.axis, tiled=True), layout)


def _forward(parallel: ExpertParallel, x: Any, layout: ExpertLayout, home: ExpertLayout) -> tuple[Any, Any]:
    return _rows_of_pairs(parallel, x, layout, home), (layout, home)


def _backward(parallel: ExpertParallel, saved: Any, grad: Any) -> tuple[Any, None, None]:
    layout, home = saved
    return unpermute(parallel.bring_pairs(grad, layout), home), None, None


_rows_of_pairs.defvjp(_forward, _backward)


def _checked(x: Any, weights: Any, indices: Any) -> list[Any]:
    given = (("x", x, FLOATS, "hidden"), ("weights", weights, FLOATS, "top_k"), ("indices", indices, IDS, "top_k"))
    x, weights, indices = arrays = _arrays(given)
    if weights.shape != indices.shape:
        raise ValueError(
            f"expert_parallel: weights must have the shape of indices, {[*indices.shape]}, got {[*weights.shape]}"
        )
    return arrays


def _arrays(given: Sequence[tuple[str, Any, Sequence[str], str]]) -> list[Any]:
    """Return arrays of JAX; given are their names, values, dtypes and last axes. The first has as many rows as all."""
    arrays: list[Any] = []
    for name, array, dtypes, axis in given:
        if not isinstance(array, jax.Array | np.ndarray) and not hasattr(array, "__jax_array__"):
            raise TypeError(f"expert_parallel: {name} must be an array of JAX, got {type(array).__name__}")
        arrays.append(jnp.asarray(array))
        dtype, shape = arrays[-1].dtype.name, arrays[-1].shape
        if dtype not in dtypes:
            raise TypeError(f"expert_parallel: {name} must be {' or '.join(dtypes)}, got {dtype}")
        if len(shape) != 2 or shape[0] != arrays[0].shape[0]:
            raise ValueError(f"expert_parallel: {name} must have shape [num_tokens, {axis}], got {[*shape]}")
    return arrays
