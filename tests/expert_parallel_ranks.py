# SPDX-License-Identifier: Apache-2.0
"""One rank of the tests of ExpertParallel: `python -m tests.expert_parallel_ranks RANK NUM_RANKS FOLDER BACKEND`.

Every rank knows the tokens of all, and computes by itself what one process returns.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed.nn  # before a group exists: its default arguments would hold the group until Python ends

from cupy_router.torch import ExpertParallel
from cupy_router.torch import _agreement as agreement
from tests import expert_parallel_faults as faults
from tests import rank_processes
from tests.expert_parallel_problem import (
    HIDDEN,
    Problem,
    check,
    experts,
    of_one_process,
    of_ranks,
    refused,
    tokens_of,
)

# -- Values ------------------------------------------------------------------------------------------------------------


def problems(num_ranks: int) -> dict[str, Problem]:
    even, uneven = (5,) * num_ranks, (7, 0, 3, 1)[:num_ranks]
    return {
        "even": Problem(even, 8, 3),
        "uneven": Problem(uneven, 8, 3),
        "more experts per token than ranks": Problem(uneven, 9, 6),
        "more ranks than experts per token": Problem(even, 8, 1),
        "experts not divisible": Problem(even, 7, 2),
        "a rank without experts": Problem(uneven, num_ranks - 1, 1),
        "no tokens at all": Problem((0,) * num_ranks, 8, 3),
        "tokens on the last rank only": Problem((*[0] * (num_ranks - 1), 6), 8, 3),
        "bfloat16": Problem(uneven, 8, 3, torch.bfloat16, torch.bfloat16, torch.int64),
        "float16, uint8": Problem(uneven, 8, 3, torch.float16, torch.float32, torch.uint8),
        "transposed": Problem(uneven, 8, 3, transposed=True),
    }


def compare(name: str, **options: Any) -> None:
    problem = problems(dist.get_world_size())[name]
    if options.pop("static", False):
        options["max_tokens"] = max(problem.num_tokens) + 2
    parallel = ExpertParallel(None, problem.num_experts, **options)
    for seed in (0, 1):  # the second call of one with max_tokens exchanges no sizes
        check(parallel, problem, options["exact"], seed)


def value_cases(num_ranks: int) -> Iterator[tuple[str, Callable[[], None]]]:
    for name in problems(num_ranks):
        for exact in (False, True):
            for kind in ("gather", "static", "exchange"):
                method = "gather" if kind == "static" else kind
                options = {"method": method, "exact": exact, "static": kind == "static"}
                yield f"{kind}{', exact' * exact}, {name}", partial(compare, name, **options)


# -- What moves --------------------------------------------------------------------------------------------------------


NEW_NAMES = {"all_gather_single": "all_gather_into_tensor", "reduce_scatter_single": "reduce_scatter_tensor"}
COLLECTIVES = ("all_gather_into_tensor", "reduce_scatter_tensor", "all_to_all_single")


@contextmanager
def recorded() -> Iterator[list[tuple[str, tuple[int, ...]]]]:
    """Record the name of each collective and the shape that it receives."""
    calls: list[tuple[str, tuple[int, ...]]] = []
    names = [name for name in (*COLLECTIVES, *NEW_NAMES) if hasattr(dist, name)]
    kept = {name: getattr(dist, name) for name in names}

    def recorder(name: str, output: torch.Tensor, *arguments: Any, **options: Any) -> Any:
        calls.append((NEW_NAMES.get(name, name), tuple(output.shape)))
        return kept[name](output, *arguments, **options)

    for name in names:
        setattr(dist, name, partial(recorder, name))
    try:
        yield calls
    finally:
        for name in names:
            setattr(dist, name, kept[name])


def shapes_are_static() -> None:
    """With max_tokens, later calls communicate the same whatever the tokens are, and exchange no sizes."""
    num_ranks, seen = dist.get_world_size(), []
    parallel = ExpertParallel(None, 8, max_tokens=6)
    for num_tokens in (5, 6, 0, 2):
        with recorded() as calls:
            of_ranks(parallel, Problem((num_tokens,) * num_ranks, 8, 3), num_tokens)
        seen.append(calls)
    rows, one = (6 * num_ranks, HIDDEN), (6, HIDDEN)
    gather, scatter = "all_gather_into_tensor", "reduce_scatter_tensor"
    together = [(gather, (6 * num_ranks, 4 * width)) for width in (3, 3, HIDDEN)]  # bytes of ids, weights, x
    forward = [*together, (scatter, one)]
    backward = [(gather, rows), (scatter, (6, 3)), (scatter, one)]  # of sums, weights, x
    assert seen == [[(gather, seen[0][0][1]), *forward, *backward], *[forward + backward] * 3], seen


def a_rank_gets_a_token_once() -> None:
    """And with exact=True, sums come back pair by pair."""
    num_ranks, rank = dist.get_world_size(), dist.get_rank()
    indices = torch.arange(2 * num_ranks).expand(4, -1)  # all experts, two of each rank
    x, weights = torch.ones(4, HIDDEN), torch.ones(4, 2 * num_ranks)
    for exact, back in ((False, 4 * num_ranks), (True, 8 * num_ranks)):
        parallel = ExpertParallel(None, 2 * num_ranks, method="exchange", exact=exact)
        with recorded() as calls, torch.no_grad():
            rows, layout, ticket = parallel.dispatch(x * (rank + 1), weights, indices)
            out = parallel.combine(rows, ticket)
        shapes = [shape for name, shape in calls if name == "all_to_all_single"]
        assert shapes == [(4 * num_ranks, 4 * num_ranks), (4 * num_ranks, HIDDEN), (back, HIDDEN)], shapes
        assert layout.counts.tolist() == [4 * num_ranks] * 2
        assert layout.capacity == len(rows) == 8 * num_ranks
        assert torch.equal(out, x * (rank + 1) * 2 * num_ranks)
        expected = torch.arange(1.0, num_ranks + 1).repeat_interleave(4).repeat(2)
        assert torch.equal(rows[:, 0], expected)


def capacity(method: str, exact: bool) -> None:
    """Experts are laid out in order until the rows are full; what has no room is left out."""
    num_ranks = dist.get_world_size()
    indices = torch.tensor([[0, 1]] * 3 + [[2 * num_ranks - 1, 0]])
    parallel = ExpertParallel(None, 2 * num_ranks, method=method, exact=exact, capacity=4)
    rows, layout, ticket = parallel.dispatch(torch.ones(4, HIDDEN), torch.tensor([[1.0, 10.0]] * 4), indices)
    assert rows.shape == (4, HIDDEN)
    wanted = [4 * num_ranks * (dist.get_rank() == 0), 3 * num_ranks * (dist.get_rank() == 0)]
    if dist.get_rank() == num_ranks - 1:
        wanted[1] += num_ranks
    assert layout.counts.tolist() == wanted
    assert int(layout.ends[-1]) == min(4, sum(wanted))
    out = parallel.combine(rows, ticket)[:, 0].tolist()
    # Rank 0 has room for the four pairs of its own tokens with expert 0, rank 1 for those of one with its second one.
    last = 1.0 if dist.get_rank() < 4 else 0.0
    own = [1.0] * 3 + [last + 10.0] if dist.get_rank() == 0 else [0.0] * 3 + [last]
    assert out == own, (out, own)


# -- Autograd ----------------------------------------------------------------------------------------------------------


def backward_without_gradients_of_a_rank(method: str) -> None:
    """Every rank takes part in the backward pass, whatever requires grad there; others still get their gradients."""
    num_ranks, rank = dist.get_world_size(), dist.get_rank()
    problem = Problem((4,) * num_ranks, 8, 2)
    arrays, wanted, own = problem.arrays(), of_one_process(problem, 0), tokens_of(problem, rank)
    x, weights = arrays["x"][own].requires_grad_(rank > 0), arrays["weights"][own].requires_grad_(rank > 0)
    parallel = ExpertParallel(None, 8, method=method, exact=True)
    rows, layout, ticket = parallel.dispatch(x, weights, arrays["indices"][own])
    first, count = parallel.experts
    out = parallel.combine(experts(rows, layout.ends, arrays["matrices"][first : first + count]), ticket)
    out.backward(arrays["grad"][own])
    for tensor, name in ((x, "x"), (weights, "weights")):
        assert tensor.grad is None if rank == 0 else torch.equal(tensor.grad, wanted[name][own]), name


def no_gradient_without_grad_mode() -> None:
    x, weights = torch.ones(2, HIDDEN, requires_grad=True), torch.ones(2, 1)
    parallel = ExpertParallel(None, 8)
    with torch.no_grad():
        rows, _, ticket = parallel.dispatch(x, weights, torch.zeros(2, 1, dtype=torch.int32))
        out = parallel.combine(rows, ticket)
    assert not rows.requires_grad
    assert not out.requires_grad


def compiled() -> None:
    """Around graphs of torch.compile, values and gradients are the same."""
    arrays, parallel = Problem((5,) * dist.get_world_size(), 8, 3).arrays(), ExpertParallel(None, 8)
    x, weights, indices = (arrays[name][:5] for name in ("x", "weights", "indices"))

    def layer(x: torch.Tensor) -> torch.Tensor:
        rows, _, ticket = parallel.dispatch(x * 2, weights, indices)
        return parallel.combine(rows.tanh(), ticket) + 1

    found = []
    for function in (layer, torch.compile(layer, backend="eager")):
        leaf = x.clone().requires_grad_()
        out = function(leaf)
        out.sum().backward()
        found.append((out.detach(), leaf.grad))
    assert all(map(torch.equal, *found))


def second_derivatives_are_refused() -> None:
    x, weights = torch.ones(2, HIDDEN, requires_grad=True), torch.ones(2, 1)
    parallel = ExpertParallel(None, 8)
    rows, _, ticket = parallel.dispatch(x, weights, torch.zeros(2, 1, dtype=torch.int32))
    out = parallel.combine(rows, ticket)
    (grad,) = torch.autograd.grad(out.sum(), x, create_graph=True)
    assert "first derivatives only" in refused(grad.sum().backward, RuntimeError)


# -- CUDA graphs ------------------------------------------------------------------------------------------------------


def captured(exact: bool) -> None:
    """Replays give what eager calls do, whatever tokens, experts and weights are by then."""
    rank, problem = dist.get_rank(), Problem((5,) * dist.get_world_size(), 8, 3)
    own, names = tokens_of(problem, rank), ("x", "weights", "indices")
    parallel = ExpertParallel(None, 8, exact=exact, max_tokens=6)
    matrix = problem.arrays()["matrices"][0]

    def layer(given: dict[str, torch.Tensor]) -> torch.Tensor:
        rows, _, ticket = parallel.dispatch(*(given[name] for name in names))
        return parallel.combine(torch.tanh(rows @ matrix), ticket)

    with torch.no_grad():
        held = {name: array[own].clone() for name, array in problem.arrays().items() if name in names}
        for _ in range(2):
            layer(held)
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            found = layer(held)
        for seed in (1, 2, 3):
            arrays = problem.arrays(seed)
            for name in names:
                held[name].copy_(arrays[name][own])
            graph.replay()
            assert torch.equal(found, layer({name: arrays[name][own] for name in names}))


def cases(num_ranks: int, backend: str) -> dict[str, Callable[[], None]]:
    """Return all cases by name. Ranks run them in this order."""
    found = dict(value_cases(num_ranks))
    found["shapes are static"] = shapes_are_static
    found["a rank gets a token once"] = a_rank_gets_a_token_once
    for method in agreement.METHODS:
        for exact in (False, True):
            found[f"capacity, {method}{', exact' * exact}"] = partial(capacity, method, exact)
        found[f"gradients of some ranks, {method}"] = partial(backward_without_gradients_of_a_rank, method)
    found["no grad mode"] = no_gradient_without_grad_mode
    found["compiled"] = compiled
    found["second derivatives"] = second_derivatives_are_refused
    if backend == "nccl":
        for exact in (False, True):
            found[f"captured{', exact' * exact}"] = partial(captured, exact)
    return found | faults.cases(backend)


if __name__ == "__main__":
    rank_processes.main(cases)
