# SPDX-License-Identifier: Apache-2.0
"""cupy_router.torch.ExpertParallel with 2, 3 and 4 processes, against one: tests/expert_parallel_ranks.py."""

from __future__ import annotations

import doctest
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

torch = pytest.importorskip("torch")
pytestmark = pytest.mark.skipif(not torch.distributed.is_available(), reason="PyTorch has no torch.distributed")

from cupy_router.torch import ExpertParallel, _expert_parallel  # noqa: E402
from tests import expert_parallel_problem as problem  # noqa: E402
from tests import expert_parallel_ranks as ranks  # noqa: E402
from tests import rank_processes  # noqa: E402  # PyTorch may be missing


@pytest.mark.slow("process")
@pytest.mark.backends("reference", "gpu")
@pytest.mark.parametrize("num_ranks", [2, 3, 4])
def test_ranks_do_what_one_process_does(num_ranks: int, backend: Any, tmp_path: Path) -> None:
    rank_processes.assert_all_pass(ranks.__name__, num_ranks, ranks.cases, tmp_path, backend.name)


# -- One rank ----------------------------------------------------------------------------------------------------------


@pytest.fixture
def group() -> Iterator[Any]:
    """The group of this process alone."""
    torch.distributed.init_process_group("gloo", store=torch.distributed.HashStore(), rank=0, world_size=1)
    yield torch.distributed.group.WORLD
    torch.distributed.destroy_process_group()


@pytest.fixture
def device(backend: Any) -> Iterator[None]:
    """Make tensors on the device of the backend."""
    with torch.device("cuda" if backend.name == "gpu" else "cpu"):
        yield


@pytest.mark.backends("reference", "gpu")
@pytest.mark.usefixtures("device")
@pytest.mark.parametrize("method", ["gather", "exchange"])
@pytest.mark.parametrize("exact", [False, True], ids=["", "exact"])
@pytest.mark.parametrize("transposed", [False, True], ids=["", "transposed"])
def test_one_rank_communicates_nothing(method: str, exact: bool, transposed: bool, group: Any) -> None:
    nine = problem.Problem((9,), 8, 3, weight_dtype=torch.bfloat16, transposed=transposed)
    parallel = ExpertParallel(None, 8, method=method, exact=exact, max_tokens=9)
    assert parallel.experts == (0, 8)
    with ranks.recorded() as calls:
        problem.check(parallel, nine, exact=True)
    assert calls == []
    rows, layout, _ = ExpertParallel(group, 8, capacity=4).dispatch(
        torch.ones(3, 2), torch.ones(3, 2), torch.zeros(3, 2, dtype=torch.uint8)
    )
    assert rows.shape == (4, 2)
    assert layout.counts[0] == 6


@pytest.mark.backends("reference")
def test_examples_of_docstrings() -> None:
    assert doctest.testmod(_expert_parallel).failed == 0


@pytest.mark.backends("reference")
@pytest.mark.parametrize(
    ("options", "error", "words"),
    [
        ({"num_experts": 0}, ValueError, "num_experts must be in"),
        ({"num_experts": 8.0}, TypeError, "num_experts must be an int"),
        ({"method": "all"}, ValueError, "method must be gather or exchange, got 'all'"),
        ({"exact": 1}, TypeError, "exact must be a bool"),
        ({"capacity": -1}, ValueError, "capacity must be in"),
        ({"max_tokens": 0}, ValueError, "max_tokens must be in"),
    ],
)
def test_refused_options(options: dict[str, Any], error: type[Exception], words: str, group: Any) -> None:
    with pytest.raises(error, match=f"^ExpertParallel: {words}"):
        ExpertParallel(None, **{"num_experts": 8, **options})


X, WEIGHTS, INDICES = torch.ones(3, 4), torch.ones(3, 2), torch.zeros(3, 2, dtype=torch.int32)


@pytest.mark.backends("reference")
@pytest.mark.parametrize(
    ("arguments", "error", "words"),
    [
        ((X.numpy(), WEIGHTS, INDICES), TypeError, "x must be a tensor, got ndarray"),
        ((X.double(), WEIGHTS, INDICES), TypeError, "x must be float32 or float16 or bfloat16, got float64"),
        ((X[0], WEIGHTS, INDICES), ValueError, r"x must have shape \[num_tokens, hidden\], got \[4\]"),
        ((X, WEIGHTS[:2], INDICES), ValueError, r"weights must have shape \[num_tokens, top_k\], got \[2, 2\]"),
        ((X, WEIGHTS, INDICES.float()), TypeError, "indices must be uint8 or .*, got float32"),
        ((X, WEIGHTS[:, :1], INDICES), ValueError, r"weights must have the shape of indices, \[3, 2\], got \[3, 1\]"),
        ((X, WEIGHTS, INDICES.to("meta")), ValueError, "indices must be on the device of x, cpu, got meta"),
        (
            (torch.ones(5, 4), torch.ones(5, 2), torch.zeros(5, 2).int()),
            ValueError,
            "x must have at most max_tokens = 4",
        ),
    ],
)
def test_refused_tokens(arguments: tuple[Any, ...], error: type[Exception], words: str, group: Any) -> None:
    with pytest.raises(error, match=f"^ExpertParallel: {words}"):
        ExpertParallel(None, 8, max_tokens=4).dispatch(*arguments)


@pytest.mark.backends("reference")
def test_refused_outputs_of_experts(group: Any) -> None:
    parallel = ExpertParallel(None, 8)
    rows, layout, ticket = parallel.dispatch(X, WEIGHTS, INDICES)
    for y, error, words in (
        (rows.bfloat16(), TypeError, "y must be a tensor of torch.float32, the dtype of x, got torch.bfloat16"),
        (rows.numpy(), TypeError, "y must be a tensor of torch.float32, the dtype of x, got ndarray"),
        (rows[:, :2], ValueError, r"y must have the shape of the rows, \[6, 4\], got \[6, 2\]"),
    ):
        with pytest.raises(error, match=f"^ExpertParallel: {words}"):
            parallel.combine(y, ticket)
    with pytest.raises(TypeError, match=r"^ExpertParallel: ticket must be the one of a dispatch, got ExpertLayout"):
        parallel.combine(rows, layout)
