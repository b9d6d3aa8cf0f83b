# SPDX-License-Identifier: Apache-2.0
"""ExpertParallel: the experts of a layer on several ranks, by collectives of torch.distributed."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import torch.distributed as dist

from cupy_router.ops import _checks as check
from cupy_router.ops._layout import MAX_ROWS
from cupy_router.ops.expert_layout import expert_layout
from cupy_router.ops.permute import permute
from cupy_router.ops.unpermute import unpermute
from cupy_router.results import ExpertLayout
from cupy_router.torch import _agreement as agreement
from cupy_router.torch._transport import Destinations, Exchange, Gather, Shard, Transport
from cupy_router.torch._transport_gradient import Combine, Dispatch


class Ticket(NamedTuple):
    """The state that a dispatch leaves for :meth:`ExpertParallel.combine`.

    layout: :class:`ExpertLayout` of this rank's experts.
    weights: [num_tokens, top_k] of this rank's tokens.
    shape, dtype: Of the rows.
    transport: The way back; None with one rank.
    anchor: An empty tensor that makes autograd run the backward pass of the dispatch, also where no rows are used.
    """

    layout: ExpertLayout
    weights: Any
    shape: Any
    dtype: Any
    transport: Any = None
    anchor: Any = None


class ExpertParallel:
    """Experts spread over the ranks of a group, each of which has tokens of its own.

    `dispatch` brings tokens to the ranks of their experts, in the order of an expert layout. The experts of the caller
    process these rows. `combine` returns the weighted sums to the ranks of the tokens. Both are differentiable, with
    the transposed collectives in the backward pass. `experts` are (first, count) of this rank: rank r has those from
    r * num_experts // num_ranks up to the first of rank r + 1.

    Both are collective operations: all ranks call them in the same order, also ranks without tokens or experts. In
    grad mode, the result requires grad, and all ranks run the backward pass. With one rank nothing is communicated.

    Args:
        group: A process group of torch.distributed. None: the default group.
        num_experts: Number of experts of all ranks.
        method: "gather": all tokens reach all ranks by all_gather, and sums come back by reduce_scatter. Shapes do not
            depend on the routing. "exchange": all_to_all, which moves less where there are more ranks than experts per
            token. A rank that has several experts of a token gets it once. The host waits for the sizes of each
            dispatch.
        exact: Add the rows of a token in the order of its slots. If the experts are computed row by row, outputs and
            gradients are then bitwise those of one process that has the tokens of all ranks, in the order of ranks.
            That moves one row for each pair instead of one for each token and rank, and with "gather" top_k times as
            much. By default, each rank sums its rows of a token, in the dtype of x, and these sums are added in the
            order of NCCL or, with "exchange", in that of slots.
        capacity: Number of rows for the experts of this rank. If they need more, pairs are left out by the rule of
            :func:`cupy_router.expert_layout`; `layout.counts - (layout.ends - layout.offsets[:-1])` counts them. None:
            enough for any routing. With "gather" these are num_ranks * num_tokens * top_k rows, of the most tokens
            that a rank has, and with "exchange" exactly as many as needed.
        max_tokens: The most tokens of a rank. With "gather", ranks are padded to it and shapes are static. The host
            does not wait, except in the first call, and a CUDA graph may capture later ones. None: ranks exchange
            their numbers of tokens in each dispatch, for which the host waits.

    Raises:
        TypeError, ValueError: An argument is not allowed, or this process is not in the group.

    Ranks with different arguments or shapes all get the same error from `dispatch`. With "gather" and `max_tokens` only
    the first call looks for that, and later ones must have its shapes and dtypes. Errors of collectives pass through,
    such as the time-out after another rank has failed.

    >>> import torch, torch.distributed as dist
    >>> from cupy_router.torch import ExpertParallel
    >>> dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)  # torchrun has its own
    >>> parallel = ExpertParallel(None, num_experts=4)
    >>> parallel.experts
    (0, 4)
    >>> x, indices, weights = torch.tensor([[1.0], [5.0]]), torch.tensor([[2, 0], [2, 1]]), torch.full((2, 2), 0.5)
    >>> rows, layout, ticket = parallel.dispatch(x, weights, indices)
    >>> y = rows * 3  # grouped_mm takes the rows with offs=layout.ends
    >>> parallel.combine(y, ticket)
    tensor([[ 3.],
            [15.]])
    >>> dist.destroy_process_group()
    """

    def __init__(
        self,
        group: Any,
        num_experts: int,
        *,
        method: str = "gather",
        exact: bool = False,
        capacity: int | None = None,
        max_tokens: int | None = None,
    ) -> None:
        num_experts = check.integer("ExpertParallel: num_experts", num_experts, 1, MAX_ROWS - 1)
        if method not in agreement.METHODS:
            raise ValueError(f"ExpertParallel: method must be {' or '.join(agreement.METHODS)}, got {method!r}")
        if capacity is not None:
            capacity = check.integer("ExpertParallel: capacity", capacity, 0, MAX_ROWS)
        if max_tokens is not None:
            max_tokens = check.integer("ExpertParallel: max_tokens", max_tokens, 1, MAX_ROWS)
        rank, num_ranks = dist.get_rank(group), dist.get_world_size(group)
        if rank < 0:
            raise ValueError(f"ExpertParallel: group must have this process, rank {dist.get_rank()}, among its ranks")
        self._exact, self._max_tokens = check.boolean("ExpertParallel: exact", exact), max_tokens
        numbers = [-1 if number is None else number for number in (num_experts, capacity, max_tokens)]
        self._call = agreement.Call(agreement.METHODS.index(method), int(self._exact), *numbers)
        self._static: Any = None  # the first call, if later ones have its shapes
        self._exchanges = method == "exchange"
        self._group, self._num_ranks = group, num_ranks
        first, end = (r * num_experts // num_ranks for r in (rank, rank + 1))
        self.experts = first, end - first
        self._shard = Shard(num_experts, self.experts, capacity)

    def dispatch(self, x: Any, weights: Any, indices: Any) -> tuple[Any, ExpertLayout, Ticket]:
        """Bring tokens to the ranks of their experts.

        Args:
            x: [num_tokens, hidden] float32, float16 or bfloat16, the tokens of this rank. Other ranks may have more or
                fewer, or none.
            weights: [num_tokens, top_k] float32, float16 or bfloat16.
            indices: [num_tokens, top_k] uint8, int16, uint16, int32 or int64, experts of all ranks. Entries outside
                0..num_experts-1 are no experts.

        They may have any strides; what is not contiguous is copied.

        Returns:
            rows, layout and ticket.

            - rows: [layout.capacity, hidden] in the dtype of x, the tokens of each expert of this rank, those of lower
              ranks first. Rows from layout.ends[-1] on have no token. They are 0 in grad mode and with one rank;
              otherwise they hold anything, NaN too.
            - layout: :class:`ExpertLayout` of these experts, with counts, offsets, ends, order and positions.
            - ticket: For :meth:`combine`.

        Raises:
            TypeError: An argument is no tensor, or its dtype is not allowed.
            ValueError: A shape or device is wrong, there are too many tokens, or ranks make different calls.
            RuntimeError: Another rank refuses its arguments, or a collective fails.
        """
        error = agreement.refusal(x, weights, indices, self._max_tokens)
        if self._num_ranks > 1:
            with torch.no_grad():
                transport = self._transport(x, weights, indices, error)
            # A leaf, so that every rank has the same backward passes, whatever requires grad there.
            leaf = x.new_empty(0, requires_grad=torch.is_grad_enabled())
            rows, anchor = Dispatch.apply(transport, self._exact, x, leaf)
            return rows, transport.layout, Ticket(
                transport.layout, weights.float().contiguous(), rows.shape, x.dtype, transport, anchor
            )  # fmt: skip
        if error is not None:
            raise error
        x, weights, indices = x.contiguous(), weights.contiguous(), indices.contiguous()
        layout = expert_layout(indices, self._shard.num_experts, capacity=self._shard.capacity)
        rows = permute(x, layout)
        return rows, layout, Ticket(layout, weights, rows.shape, x.dtype)

    def combine(self, y: Any, ticket: Ticket) -> Any:
        """Return [num_tokens, hidden] in the dtype of x: for each token of this rank, the weighted sum of its rows.

        Args:
            y: [layout.capacity, hidden] in the dtype of x, what the experts return for the rows. Rows without a pair
                are never read.
            ticket: Of the dispatch.

        Raises:
            TypeError, ValueError: The ticket is none, or y has another shape or dtype than the rows.
            RuntimeError: A collective fails.
        """
        if not isinstance(ticket, Ticket):
            raise TypeError(f"ExpertParallel: ticket must be the one of a dispatch, got {type(ticket).__name__}")
        if not isinstance(y, torch.Tensor) or y.dtype != ticket.dtype:
            got = y.dtype if isinstance(y, torch.Tensor) else type(y).__name__
            raise TypeError(f"ExpertParallel: y must be a tensor of {ticket.dtype}, the dtype of x, got {got}")
        if y.shape != ticket.shape:
            raise ValueError(f"ExpertParallel: y must have the shape of the rows, {[*ticket.shape]}, got {[*y.shape]}")
        if ticket.transport is None:
            return unpermute(y.contiguous(), ticket.layout, ticket.weights)
        return Combine.apply(ticket.transport, self._exact, y, ticket.weights, ticket.anchor)

    def _transport(self, x: Any, weights: Any, indices: Any, error: Exception | None) -> Transport:
        """Return the transport of a call, after all ranks have agreed on it."""
        call, num_tokens, ids, destinations = self._call, 0, None, None
        if error is None:
            try:
                call, num_tokens = call.with_shapes(x, indices), x.shape[0]
                x, weights = x.contiguous(), weights.float().contiguous()
                ids = _as_ids(indices, self._shard.num_experts).contiguous()
                if self._exchanges:
                    destinations = Destinations(ids, self._shard.num_experts, self._num_ranks, self._exact)
            except Exception as failure:  # such as too little memory, of which the other ranks have to hear
                error = failure
        if self._static is not None:
            self._check_again(call, error)
            return Gather(self._group, x, ids, weights, self._shard, self._static.max_tokens)
        counts = (
            torch.zeros(2 * self._num_ranks, device=self._device(x)) if destinations is None else destinations.counts
        )
        sizes = agreement.exchange(self._group, call, num_tokens, counts, error)
        if destinations is not None:
            return Exchange(self._group, x, ids, weights, self._shard, destinations, sizes.counts)
        if call.max_tokens > 0:
            self._static = call
        most_tokens = max(call.max_tokens, *sizes.num_tokens, 1)
        return Gather(self._group, x, ids, weights, self._shard, most_tokens)

    def _check_again(self, call: agreement.Call, error: Exception | None) -> None:
        """Check a call with static shapes, of which the other ranks are told nothing."""
        if error is not None:
            raise error
        found = agreement.difference([self._static, call], ["in the first call", "now"])
        if found is not None:
            raise ValueError(f"ExpertParallel: with max_tokens, the {found}")

    def _device(self, x: Any) -> Any:
        """Return where ranks communicate, also if x is no tensor."""
        if isinstance(x, torch.Tensor):
            return x.device
        return "cuda" if dist.get_backend(self._group) == "nccl" else "cpu"


def _as_ids(indices: Any, num_experts: int) -> Any:
    """Return indices as int32; what is no expert stays none."""
    return (indices.clamp(-1, num_experts) if indices.dtype == torch.int64 else indices).int()
