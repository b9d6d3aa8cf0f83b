# SPDX-License-Identifier: Apache-2.0
"""What ranks compute in the tests of ExpertParallel, and one process in their place."""

from __future__ import annotations

from collections.abc import Callable
from itertools import accumulate, pairwise
from typing import Any, NamedTuple

import torch
import torch.distributed as dist

from cupy_router import expert_layout, permute, unpermute
from cupy_router.torch import ExpertParallel

HIDDEN = 12
TOLERANCE = {torch.float32: 1e-5, torch.float16: 5e-3, torch.bfloat16: 3e-2}


class Problem(NamedTuple):
    """Tokens of each rank, and their experts."""

    num_tokens: tuple[int, ...]  # of each rank, as many as there are ranks
    num_experts: int
    top_k: int
    dtype: torch.dtype = torch.float32
    weight_dtype: torch.dtype = torch.float32
    index_dtype: torch.dtype = torch.int32
    transposed: bool = False  # what ranks pass is stored column by column

    def arrays(self, seed: int = 0) -> dict[str, torch.Tensor]:
        """Return the arrays of all ranks together: x, weights, indices, matrices of the experts, gradients."""
        generator, n = torch.Generator().manual_seed(seed), sum(self.num_tokens)

        def normal(*shape: int) -> torch.Tensor:
            return torch.randn(shape, generator=generator, device="cpu").to(torch.get_default_device())

        indices = normal(n, self.num_experts).argsort(dim=1)[:, : self.top_k].to(self.index_dtype)
        weights = normal(n, self.top_k).to(self.weight_dtype)
        if n > 4:
            indices[1, 0] = indices[1, -1]  # an expert twice
            indices[3, -1], weights[3, -1] = self.num_experts, torch.inf  # no expert
        return {
            "x": normal(n, HIDDEN).to(self.dtype),
            "weights": weights,
            "indices": indices,
            "matrices": normal(self.num_experts, HIDDEN, HIDDEN) / HIDDEN**0.5,
            "grad": normal(n, HIDDEN).to(self.dtype),
        }


def experts(rows: torch.Tensor, ends: torch.Tensor, matrices: torch.Tensor) -> torch.Tensor:
    """Return what experts return for their rows, and NaN for rows without a pair.

    An expert's arrays have the same shapes, and so the same bits on any device, in one process and in several.
    """
    bounds, x = [0, *ends.tolist()], rows.float()[:, :, None]
    found = [
        (x[first:end] * matrix).sum(dim=1) for matrix, (first, end) in zip(matrices, pairwise(bounds), strict=True)
    ]
    if not found:
        return torch.full_like(rows, torch.nan)  # depends on nothing, so it does not require grad
    return torch.cat([*found, torch.full_like(x[bounds[-1] :, :, 0], torch.nan)]).tanh().to(rows.dtype)


def of_one_process(problem: Problem, seed: int) -> dict[str, torch.Tensor]:
    """Return the sums and gradients of all tokens and experts."""
    arrays = problem.arrays(seed)
    x, weights, matrices = (arrays[name].requires_grad_() for name in ("x", "weights", "matrices"))
    layout = expert_layout(arrays["indices"], problem.num_experts)
    out = unpermute(experts(permute(x, layout), layout.ends, matrices), layout, weights)
    out.backward(arrays["grad"])
    gradients = {"x": x.grad, "weights": weights.grad, "matrices": matrices.grad}
    return {"out": out.detach(), "counts": layout.counts, **gradients}


def of_ranks(parallel: ExpertParallel, problem: Problem, seed: int) -> dict[str, torch.Tensor]:
    """Return the same, computed by all ranks: this one's tokens and experts."""
    arrays, (first, count) = problem.arrays(seed), parallel.experts
    own = tokens_of(problem, dist.get_rank())
    x, weights, indices = (_stored(problem, arrays[name][own]) for name in ("x", "weights", "indices"))
    x.requires_grad_()
    weights.requires_grad_()
    matrices = arrays["matrices"][first : first + count].requires_grad_()
    rows, layout, ticket = parallel.dispatch(x, weights, indices)
    assert rows.shape == (layout.capacity, HIDDEN)
    assert count or not layout.capacity
    assert rows.dtype == x.dtype
    assert not rows[int(layout.offsets[-1]) :].any()
    out = parallel.combine(_stored(problem, experts(rows, layout.ends, matrices)), ticket)
    assert out.shape == x.shape
    out.backward(arrays["grad"][own])
    gradients = {"x": x.grad, "weights": weights.grad, "matrices": matrices.grad if count else matrices.detach()}
    return {"out": out.detach(), "counts": layout.counts, **gradients}


def _stored(problem: Problem, matrix: torch.Tensor) -> torch.Tensor:
    return matrix.t().contiguous().t() if problem.transposed else matrix


def tokens_of(problem: Problem, rank: int) -> slice:
    """Return the tokens of a rank."""
    ends = [0, *accumulate(problem.num_tokens)]
    return slice(ends[rank], ends[rank + 1])


def check(parallel: ExpertParallel, problem: Problem, exact: bool, seed: int = 0) -> None:
    """Compare the ranks with one process: bitwise or within rounding."""
    wanted, got = of_one_process(problem, seed), of_ranks(parallel, problem, seed)
    first, count = parallel.experts
    for name, array in got.items():
        part = slice(first, first + count) if name in ("matrices", "counts") else tokens_of(problem, dist.get_rank())
        want = wanted[name][part]
        if exact:
            assert torch.equal(array, want), f"{name}: {array} is not {want}"
        else:
            tolerance = TOLERANCE[problem.dtype]
            torch.testing.assert_close(array, want, rtol=tolerance, atol=tolerance, msg=f"{name}: {{}}".format)


def refused(call: Callable[[], Any], kind: type[Exception]) -> str:
    try:
        call()
    except kind as error:
        return str(error)
    raise AssertionError(f"no {kind.__name__}")
