# SPDX-License-Identifier: Apache-2.0
"""Faults of ranks in the tests of ExpertParallel: who hears of them, and that nobody hangs."""

from __future__ import annotations

import time
from collections.abc import Callable
from datetime import timedelta
from functools import partial
from typing import Any
from unittest import mock

import torch
import torch.distributed as dist

from cupy_router.torch import ExpertParallel, _expert_parallel
from cupy_router.torch import _agreement as agreement
from tests.expert_parallel_problem import HIDDEN, refused


def ranks_disagree(field: str) -> None:
    """All ranks raise the same sentence, at once, and the group still works."""
    odd = dist.get_rank() == dist.get_world_size() - 1
    options: dict[str, Any] = {"method": "gather", "exact": False, "capacity": None, "max_tokens": None}
    num_experts, hidden, top_k, dtype = 8, HIDDEN, 2, torch.float32
    changed = {"method": "exchange", "exact": True, "capacity": 7, "max_tokens": 9}
    sentence = {
        "method": "method must not differ, got gather on rank 0 and exchange",
        "exact": "exact must not differ, got False on rank 0 and True",
        "capacity": "capacity must not differ, got None on rank 0 and 7",
        "max_tokens": "max_tokens must not differ, got None on rank 0 and 9",
        "num_experts": "num_experts must not differ, got 8 on rank 0 and 9",
        "hidden": f"hidden size of x must not differ, got {HIDDEN} on rank 0 and {HIDDEN + 1}",
        "top_k": "number of experts per token must not differ, got 2 on rank 0 and 3",
        "dtype": "dtype of x must not differ, got float32 on rank 0 and bfloat16",
    }[field]
    if odd:
        options |= {field: changed[field]} if field in changed else {}
        num_experts += field == "num_experts"
        hidden += field == "hidden"
        top_k += field == "top_k"
        dtype = torch.bfloat16 if field == "dtype" else dtype
    parallel = ExpertParallel(None, num_experts, **options)
    x, indices = torch.ones(3, hidden, dtype=dtype), torch.zeros(3, top_k, dtype=torch.int32)
    message = refused(lambda: parallel.dispatch(x, indices.float(), indices), ValueError)
    assert message == f"ExpertParallel: {sentence} on rank {dist.get_world_size() - 1}", message


def a_rank_refuses_its_arguments(method: str) -> None:
    """It raises its own error, the others name it, and the next call works."""
    parallel = ExpertParallel(None, 8, method=method, max_tokens=4)
    x, indices = torch.ones(3, HIDDEN), torch.zeros(3, 2, dtype=torch.int32)
    if dist.get_rank() == 1:
        for wrong, kind, words in (
            ((torch.ones(5, HIDDEN), torch.ones(5, 2), torch.zeros(5, 2, dtype=torch.int32)), ValueError, "at most"),
            (([1.0], x, indices), TypeError, "x must be a tensor, got list"),
        ):
            assert words in refused(partial(parallel.dispatch, *wrong), kind)
    else:
        for _ in range(2):
            message = refused(lambda: parallel.dispatch(x, indices.float(), indices), RuntimeError)
            assert message == "ExpertParallel: rank 1 refuses its arguments, its own error says why", message
    rows, _, ticket = parallel.dispatch(x, indices.float() + 1, indices)
    assert torch.equal(parallel.combine(rows, ticket), 2 * x)


def a_rank_fails_before_the_ranks_agree(method: str) -> None:
    """As if it had too little memory for what it prepares: the others hear of it."""
    parallel = ExpertParallel(None, 8, method=method)
    x, indices = torch.ones(3, HIDDEN), torch.zeros(3, 2, dtype=torch.int32)
    if dist.get_rank() == 1:
        with mock.patch.object(_expert_parallel, "_as_ids", side_effect=torch.OutOfMemoryError("too little memory")):
            message = refused(lambda: parallel.dispatch(x, indices.float(), indices), torch.OutOfMemoryError)
        assert message == "too little memory"
    else:
        message = refused(lambda: parallel.dispatch(x, indices.float(), indices), RuntimeError)
        assert "rank 1 refuses its arguments" in message


def later_calls_have_the_shapes_of_the_first() -> None:
    parallel = ExpertParallel(None, 8, max_tokens=4)
    x, indices = torch.ones(3, HIDDEN), torch.zeros(3, 2, dtype=torch.int32)
    parallel.dispatch(x, indices.float(), indices)
    message = refused(lambda: parallel.dispatch(x.bfloat16(), indices.float(), indices), ValueError)
    words = "the dtype of x must not differ, got float32 in the first call and bfloat16 now"
    assert message == f"ExpertParallel: with max_tokens, {words}", message
    more = torch.ones(5, HIDDEN), torch.ones(5, 2), torch.zeros(5, 2, dtype=torch.int32)
    assert "at most max_tokens = 4 rows, got 5" in refused(lambda: parallel.dispatch(*more), ValueError)


def a_group_of_some_ranks() -> None:
    """Ranks count within the group, and others are refused."""
    last = dist.get_world_size() - 1
    group = dist.new_group([0, last])
    if dist.get_rank() in (0, last):
        parallel = ExpertParallel(group, 5)
        assert parallel.experts == ((0, 2) if dist.get_rank() == 0 else (2, 3))
        indices = torch.tensor([[0, 4]])
        rows, _, ticket = parallel.dispatch(torch.ones(1, HIDDEN), torch.ones(1, 2), indices)
        assert torch.equal(parallel.combine(rows, ticket), torch.full((1, HIDDEN), 2.0))
    else:
        assert "group must have this process" in refused(lambda: ExpertParallel(group, 5), ValueError)


def a_rank_that_raises(method: str) -> None:
    """The others get the time-out of the group as it is."""
    group = dist.new_group(timeout=timedelta(seconds=2))
    parallel = ExpertParallel(group, 8, method=method)
    rows, _, ticket = parallel.dispatch(
        torch.ones(3, HIDDEN), torch.ones(3, 8), torch.arange(8, dtype=torch.int32).expand(3, 8)
    )
    if dist.get_rank() == 1:
        return  # its experts have raised
    start = time.monotonic()
    message = refused(lambda: parallel.combine(rows, ticket), RuntimeError)
    assert "ExpertParallel" not in message
    assert time.monotonic() - start < 30


def cases(backend: str) -> dict[str, Callable[[], None]]:
    """Return the faults by name, last those that end a group; with NCCL, PyTorch ends the process then."""
    found: dict[str, Callable[[], None]] = {}
    for field in agreement.Call._fields:
        found[f"ranks disagree, {field}"] = partial(ranks_disagree, field)
    for method in agreement.METHODS:
        found[f"a rank refuses its arguments, {method}"] = partial(a_rank_refuses_its_arguments, method)
    for method in agreement.METHODS:
        found[f"a rank fails early, {method}"] = partial(a_rank_fails_before_the_ranks_agree, method)
    found["later calls"] = later_calls_have_the_shapes_of_the_first
    found["a group of some ranks"] = a_group_of_some_ranks
    for method in agreement.METHODS if backend == "gloo" else ():
        found[f"a rank that raises, {method}"] = partial(a_rank_that_raises, method)
    return found
