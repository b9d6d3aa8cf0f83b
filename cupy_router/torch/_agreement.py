# SPDX-License-Identifier: Apache-2.0
"""Ranks exchange sizes before tokens move, and check that all make the same call.

That is one all_gather of int64 numbers, for which the host waits. Every rank sees the numbers of all, so all raise an
error together, and none waits for another in a collective.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
import torch.distributed as dist

from cupy_router.arrays import _torch as tensors
from cupy_router.ops._declared import FLOATS, IDS

METHODS = ("gather", "exchange")


class Call(NamedTuple):
    """Options, shapes and dtype of a call, which have to be the same on all ranks, as numbers; -1: None."""

    method: int
    exact: int
    num_experts: int
    capacity: int
    max_tokens: int
    hidden: int = -1
    top_k: int = -1
    dtype: int = -1

    def with_shapes(self, x: Any, indices: Any) -> Call:
        """Return the call with the shapes and dtypes of its tensors."""
        dtype = FLOATS.index(tensors.name_of(x.dtype))
        return Call(*self[:5], x.shape[1], indices.shape[1], dtype)  # PyTorch 2.11 cannot compile `_replace`

    def shown(self, field: str) -> str:
        """Return a field as messages show it."""
        number = getattr(self, field)
        names: dict[str, Sequence[Any]] = {"method": METHODS, "exact": (False, True), "dtype": FLOATS}
        return str(names[field][number] if field in names else None if number < 0 else number)


_SHOWN = {"hidden": "hidden size of x", "top_k": "number of experts per token", "dtype": "dtype of x"}


def difference(calls: Sequence[Call], who: Sequence[str]) -> str | None:
    """Return where calls differ, as a sentence, or None. who: "on rank 0" and so on."""
    for field in Call._fields:
        for call, other in zip(calls, who, strict=True):
            if getattr(call, field) != getattr(calls[0], field):
                name, first = _SHOWN.get(field, field), calls[0].shown(field)
                return f"{name} must not differ, got {first} {who[0]} and {call.shown(field)} {other}"
    return None


def refusal(x: Any, weights: Any, indices: Any, max_tokens: int | None) -> Exception | None:
    """Return the error of arguments that are not allowed, not raised yet: the other ranks have to know first."""
    given = (("x", x, FLOATS), ("weights", weights, FLOATS), ("indices", indices, IDS))
    for name, tensor, dtypes in given:
        if not isinstance(tensor, torch.Tensor):
            return TypeError(f"ExpertParallel: {name} must be a tensor, got {type(tensor).__name__}")
        dtype, shape = tensors.name_of(tensor.dtype), [*tensor.shape]
        if dtype not in dtypes:
            return TypeError(f"ExpertParallel: {name} must be {' or '.join(dtypes)}, got {dtype}")
        if len(shape) != 2 or shape[0] != x.shape[0]:
            axes = "hidden" if name == "x" else "top_k"
            return ValueError(f"ExpertParallel: {name} must have shape [num_tokens, {axes}], got {shape}")
        if tensor.device != x.device:
            return ValueError(f"ExpertParallel: {name} must be on the device of x, {x.device}, got {tensor.device}")
    if weights.shape != indices.shape:
        shapes = [*weights.shape], [*indices.shape]
        return ValueError(f"ExpertParallel: weights must have the shape of indices, {shapes[1]}, got {shapes[0]}")
    if max_tokens is not None and x.shape[0] > max_tokens:
        return ValueError(f"ExpertParallel: x must have at most max_tokens = {max_tokens} rows, got {x.shape[0]}")
    return None


def all_gather(found: Sequence[Any], mine: Sequence[Any], group: Any) -> None:
    """Fill tensors with those of all ranks, one after the other: contiguous matrices, in one launch of NCCL."""
    # PyTorch 2.13 has a new name for it.
    function = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor
    if len(found) == 1:
        function(found[0], mine[0], group=group)
        return
    with dist._coalescing_manager(group):  # gloo takes one dtype: bytes
        for output, tensor in zip(found, mine, strict=True):
            function(output.view(torch.uint8), tensor.view(torch.uint8), group=group)


class Sizes(NamedTuple):
    """Numbers of each rank: its tokens, and those that it sends to each rank, if it knows."""

    num_tokens: list[int]
    counts: list[list[int]]


def exchange(group: Any, call: Call, num_tokens: int, counts: Any, error: Exception | None) -> Sizes:
    """Return the sizes of all ranks.

    Args:
        group: Of torch.distributed.
        call: What this rank is about to do.
        num_tokens: Number of tokens of this rank.
        counts: [any] int tensor where the group communicates, as long on every rank.
        error: Why this rank refuses its arguments, or None.

    Raises:
        ValueError: Two ranks make different calls.
        RuntimeError: Another rank refuses its arguments.
    """
    numbers = torch.tensor([error is not None, *call, num_tokens], dtype=torch.int64, device=counts.device)
    mine = torch.cat([numbers, counts.to(torch.int64)])
    everything = mine.new_empty(dist.get_world_size(group) * len(mine))
    all_gather([everything], [mine], group)
    rows = everything.view(-1, len(mine)).tolist()
    if error is not None:
        raise error
    for rank, (failed, *_) in enumerate(rows):
        if failed:
            raise RuntimeError(f"ExpertParallel: rank {rank} refuses its arguments, its own error says why")
    last = 1 + len(call)
    found = difference([Call(*row[1:last]) for row in rows], [f"on rank {rank}" for rank in range(len(rows))])
    if found is not None:
        raise ValueError(f"ExpertParallel: {found}")
    return Sizes([row[last] for row in rows], [row[last + 1 :] for row in rows])
