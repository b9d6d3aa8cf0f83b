# SPDX-License-Identifier: Apache-2.0
"""Three checks that trainers make of a router in PyTorch: each returns how many tokens have other bits."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch.utils.checkpoint import checkpoint

Route = Callable[[Any], Any]  # x [num_tokens, hidden] -> RoutingWithLogits


def trained(route: Route, x: Any, grad: Any) -> list[Any]:
    """Return the results of a step with autograd and a checkpoint, and the gradient with respect to x."""
    x = x.clone().requires_grad_()
    results = checkpoint(route, x, use_reentrant=False)
    ((results.weights * grad).sum() + results.logits.square().sum()).backward()
    return [*(array.detach() for array in results), x.grad]


@torch.no_grad()
def inferred(route: Route, x: Any) -> list[Any]:
    return list(route(x))


def changed(found: Sequence[Any], wanted: Sequence[Any]) -> int:
    """Return the number of tokens of which any array has other bits; arrays that only one side has are left out."""
    rows = torch.zeros(len(found[0]), dtype=torch.bool, device=found[0].device)
    for array, want in zip(found, wanted, strict=False):
        assert (array.dtype, array.shape) == (want.dtype, want.shape)
        rows |= (array.contiguous().view(torch.uint8) != want.contiguous().view(torch.uint8)).any(1)
    return int(rows.sum())


def joined(batches: Sequence[list[Any]], order: Any = None) -> list[Any]:
    """Return the arrays of all batches one after the other, in the order of the tokens."""
    arrays = [torch.cat(parts) for parts in zip(*batches, strict=True)]
    return arrays if order is None else [array[order.argsort()] for array in arrays]


def composition_of_the_batch(route: Route, x: Any, grad: Any, lengths: Sequence[int]) -> int:
    """Compare a training step of each sequence alone with steps of several, in another order."""
    alone = joined([trained(route, *pair) for pair in zip(x.split(lengths), grad.split(lengths), strict=True)])
    tokens = torch.arange(len(x), device=x.device).split(lengths)
    count = 0
    for size in (2, len(lengths)):
        groups = [torch.cat(tokens[i : i + size]) for i in range(0, len(tokens), size)][::-1]
        steps = [trained(route, x[group], grad[group]) for group in groups]
        count = max(count, changed(joined(steps, torch.cat(groups)), alone))
    return count


def trainer_against_prefill(route: Route, x: Any, grad: Any, lengths: Sequence[int]) -> int:
    """Compare one training step of all sequences with the prefill of each."""
    prefill = joined([inferred(route, sequence) for sequence in x.split(lengths)])
    return changed(trained(route, x, grad), prefill)


def decode_against_prefill(route: Route, x: Any, grad: Any, lengths: Sequence[int]) -> int:
    """Compare steps of one token of each sequence that has not ended with the prefill of all."""
    starts = torch.tensor([0, *lengths[:-1]], device=x.device).cumsum(0)
    most = torch.tensor(lengths, device=x.device)
    steps = [(starts + step)[most > step] for step in range(max(lengths))]
    decoded = joined([inferred(route, x[tokens]) for tokens in steps], torch.cat(steps))
    return changed(decoded, inferred(route, x))


CHECKS = (composition_of_the_batch, trainer_against_prefill, decode_against_prefill)
