# SPDX-License-Identifier: Apache-2.0
"""How tokens reach the ranks of their experts and come back, by collectives of torch.distributed.

A transport serves one call. It starts with the tokens at the ranks of their experts. `share` takes other rows of these
tokens there. `collect`, its transpose, adds up what those ranks have for each token. `bring_pairs` returns the rows of
each token's pairs one by one, to be added up in the order of slots.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cached_property
from typing import Any, NamedTuple, Protocol

import torch
import torch.distributed as dist

from cupy_router.ops.expert_layout import expert_layout
from cupy_router.ops.permute import permute
from cupy_router.ops.unpermute import unpermute
from cupy_router.results import ExpertLayout
from cupy_router.torch._agreement import all_gather


class Shard(NamedTuple):
    """The experts of a rank, (first, count) of num_experts, and the number of rows for them, None for the bound."""

    num_experts: int
    experts: tuple[int, int]
    capacity: int | None


class Transport(Protocol):
    """See the module."""

    layout: ExpertLayout  # of this rank's experts, over the tokens that reached it
    weights: Any  # [num_tokens of the layout, top_k] float32

    @property
    def home(self) -> ExpertLayout:
        """Layout of the pairs of this rank's tokens, in the order of `bring_pairs`."""

    def take_tokens(self) -> Any:
        """Return the tokens that reached this rank, [num_tokens of the layout, hidden], once: they are not kept."""

    def share(self, x: Any) -> Any:
        """Return [num_tokens of the layout, width] for [num_tokens, width] of any dtype."""

    def collect(self, sums: Any) -> Any:
        """Return [num_tokens, width] for [num_tokens of the layout, width] floats."""

    def bring_pairs(self, rows: Any) -> Any:
        """Return [capacity of `home`, width] for rows [capacity of the layout, width] of this rank's experts."""


def weighted_sum(transport: Transport, rows: Any, weights: Any, exact: bool) -> Any:
    """Return [num_tokens, hidden]: for each token of this rank, the sum of its rows on all ranks.

    rows: [capacity of the layout, hidden] of this rank's experts.
    weights: [num_tokens, top_k], or None: 1.
    exact: add in the order of slots, as one process does.
    """
    if exact:
        return unpermute(transport.bring_pairs(rows), transport.home, weights)
    there = None if weights is None else transport.weights
    return transport.collect(unpermute(rows, transport.layout, there))


class _Arrivals:
    """Tokens that reached this rank, until somebody takes them."""

    _arrived: Any

    def take_tokens(self) -> Any:
        tokens, self._arrived = self._arrived, None
        return tokens


class Gather(_Arrivals):
    """All tokens reach all ranks: all_gather and reduce_scatter, whose shapes do not depend on the routing."""

    def __init__(self, group: Any, x: Any, ids: Any, weights: Any, shard: Shard, most_tokens: int) -> None:
        """Gather all tokens, with their experts and weights.

        x: [num_tokens, hidden].
        ids: [num_tokens, top_k] int32.
        weights: [num_tokens, top_k] float32.
        most_tokens: To this number the tokens of every rank are padded.
        """
        self._group, self._most_tokens, self._num_experts = group, most_tokens, shard.num_experts
        self._ids = ids
        all_ids, self.weights, self._arrived = self._all_gather((ids, -1), (weights, 0), (x, 0))
        capacity = shard.capacity if shard.experts[1] else 0
        self.layout = expert_layout(all_ids, shard.num_experts, experts=shard.experts, capacity=capacity)

    @cached_property
    def home(self) -> ExpertLayout:
        ids = self._ids
        pairs = torch.arange(ids.numel(), dtype=torch.int32, device=ids.device).view(ids.shape)
        positions = pairs.masked_fill((ids < 0) | (ids >= self._num_experts), -1)
        return ExpertLayout(
            positions=positions, num_tokens=ids.shape[0], top_k=ids.shape[1], alignment=1, capacity=ids.numel()
        )

    def share(self, x: Any) -> Any:
        return self._all_gather((x, 0))[0]

    def collect(self, sums: Any) -> Any:
        return self._reduce_scatter(sums)[: self._ids.shape[0]]

    def bring_pairs(self, rows: Any) -> Any:
        """Add the row of a pair to zeros of the other ranks, which is exact."""
        slots = permute(rows, _reordered(self.layout, self.layout.positions.view(-1)))
        return self._reduce_scatter(slots)[: self._ids.numel()]

    def _all_gather(self, *given: tuple[Any, int]) -> list[Any]:
        """Return arrays of all ranks. given: those of this rank, and what pads them."""
        padded = [self._padded(array.detach(), padding) for array, padding in given]
        num_rows = dist.get_world_size(self._group) * self._most_tokens
        found = [array.new_empty((num_rows, array.shape[1])) for array in padded]
        all_gather(found, padded, self._group)
        return found

    def _padded(self, array: Any, padding: int) -> Any:
        """Return a contiguous array with most_tokens rows."""
        num_tokens = array.shape[0]
        if num_tokens == self._most_tokens:
            return array.contiguous()
        padded = array.new_empty((self._most_tokens, array.shape[1]))
        padded[:num_tokens], padded[num_tokens:] = array, padding
        return padded

    def _reduce_scatter(self, rows: Any) -> Any:
        found = rows.new_empty((rows.shape[0] // dist.get_world_size(self._group), rows.shape[1]))
        reduce_scatter = getattr(dist, "reduce_scatter_single", None) or dist.reduce_scatter_tensor
        reduce_scatter(found, rows, group=self._group)
        return found


def rank_of(expert: Any, num_experts: int, num_ranks: int) -> Any:
    """Return the last rank whose first expert, rank * num_experts // num_ranks, is not after this one.

    expert: int64, in -1..num_experts. -1 gives -1, num_experts at least num_ranks: no ranks.
    """
    return ((expert + 1) * num_ranks - 1) // num_experts


class Destinations:
    """The ranks to which the tokens of this rank go."""

    def __init__(self, ids: Any, num_experts: int, num_ranks: int, exact: bool) -> None:
        """Lay tokens and pairs out by rank.

        ids: [num_tokens, top_k] int32.
        exact: pairs are wanted with their positions, not only their counts.
        """
        ranks = rank_of(ids.long().clamp(-1, num_experts), num_experts, num_ranks).int()
        self.pairs = expert_layout(ranks, num_ranks, want=("counts", "positions") if exact else ("counts",))
        earlier = (ranks[:, :, None] == ranks[:, None, :]).tril(-1).any(dim=2)
        once = ranks.masked_fill(earlier, -1)  # a rank that has several experts of a token gets it once
        self.tokens = expert_layout(once, num_ranks)
        self.counts = torch.cat([self.tokens.counts, self.pairs.counts])


class Exchange(_Arrivals):
    """Tokens reach the ranks of their experts only, each once: all_to_all, whose sizes the host has to know."""

    def __init__(
        self,
        group: Any,
        x: Any,
        ids: Any,
        weights: Any,
        shard: Shard,
        destinations: Destinations,
        counts: Sequence[Sequence[int]],
    ) -> None:
        """Exchange tokens, with their experts and weights.

        x, ids, weights: As for :class:`Gather`.
        counts: The counts of the destinations of every rank.
        """
        rank, num_ranks = dist.get_rank(group), len(counts)
        self._group = group
        self._tokens = counts[rank][:num_ranks], [sent[rank] for sent in counts]  # sent, received
        self._pairs = counts[rank][num_ranks:], [sent[num_ranks + rank] for sent in counts]
        num_sent, num_pairs = sum(self._tokens[0]), sum(self._pairs[1])
        tokens = destinations.tokens
        self._sent = tokens._replace(order=tokens.order[:num_sent], capacity=num_sent)
        self.home = destinations.pairs._replace(capacity=sum(self._pairs[0]))
        here, self.weights = _unpack(self.share(_pack(ids, weights)))
        self._arrived = self.share(x)
        capacity = num_pairs if shard.capacity is None else shard.capacity
        self.layout = expert_layout(here, shard.num_experts, experts=shard.experts, capacity=capacity)
        first, count = shard.experts
        mine = (here >= first) & (here < first + count)
        # The order in which pairs go home: by rank, token and slot.
        self._order = expert_layout(torch.where(mine, 0, -1).int(), 1, capacity=num_pairs, want=("order",)).order

    def share(self, x: Any) -> Any:
        return self._all_to_all(permute(x.contiguous(), self._sent), *self._tokens)

    def collect(self, sums: Any) -> Any:
        sent, received = self._tokens
        return unpermute(self._all_to_all(sums, received, sent), self._sent)

    def bring_pairs(self, rows: Any) -> Any:
        sent, received = self._pairs
        order = self.layout.positions.view(-1)[self._order.long()]
        return self._all_to_all(permute(rows, _reordered(self.layout, order)), received, sent)

    def _all_to_all(self, rows: Any, sent: Sequence[int], received: Sequence[int]) -> Any:
        found = rows.new_empty((sum(received), rows.shape[1]))
        dist.all_to_all_single(found, rows, received, sent, group=self._group)
        return found


def _pack(ids: Any, weights: Any) -> Any:
    """Return [num_tokens, 2 * top_k] int32: ids, and the bits of weights, which travel together."""
    return torch.cat([ids, weights.detach().view(torch.int32)], dim=1)


def _unpack(packed: Any) -> tuple[Any, Any]:
    ids, weights = packed.chunk(2, dim=1)
    return ids, weights.view(torch.float32)


def _reordered(layout: ExpertLayout, order: Any) -> ExpertLayout:
    """Return the layout by which `permute` reorders the rows of another one. order: [any] int32, rows, -1 for none."""
    return ExpertLayout(
        order=order, positions=layout.order.view(-1, 1), num_tokens=layout.capacity, top_k=1, alignment=1,
        capacity=order.numel(),
    )  # fmt: skip
