# SPDX-License-Identifier: Apache-2.0
"""Sizes beyond 32 bits, with a few planted winners per row instead of a reference."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from cupy_router import RoutingMethod, activation_topk, hash_router, topk_select

LIMIT = 2**31


@pytest.fixture(autouse=True)
def enough_memory(cupy: Any) -> Any:
    pool = cupy.get_default_memory_pool()
    pool.free_all_blocks()
    if cupy.cuda.runtime.memGetInfo()[0] < 12 * 2**30:
        pytest.skip("needs 12 GiB of free device memory")
    yield
    pool.free_all_blocks()


def planted(cupy: Any, rows: int, columns: int, k: int) -> tuple[Any, Any]:
    """Return float16 zeros in which k columns of each row hold k, k - 1 ... 1; and these columns, best first."""
    scores = cupy.zeros((rows, columns), np.float16)
    row = cupy.arange(rows)[:, None]
    at = (row * 7919 + cupy.arange(k)[None] * (columns // k)) % columns
    scores[row, at] = cupy.arange(k, 0, -1).astype(np.float16)
    return scores, at.astype(np.int32)


@pytest.mark.parametrize(("columns", "k"), [(512, 8), (32_768, 64)])
@pytest.mark.acceptance("rows * E above 2**31")
def test_topk_select_beyond_31_bits(cupy: Any, columns: int, k: int) -> None:
    rows = LIMIT // columns + 1000
    scores, columns_of_winners = planted(cupy, rows, columns, k)
    assert scores.size > LIMIT
    values, indices = topk_select(scores, k)
    assert bool((indices == columns_of_winners).all())
    assert bool((values == cupy.arange(k, 0, -1)).all())


@pytest.mark.acceptance("rows * E above 2**31")
def test_activation_topk_beyond_31_bits(cupy: Any) -> None:
    rows, experts = LIMIT // 1024 + 1000, 1024
    logits, winners = planted(cupy, rows, experts, 4)
    weights, indices = activation_topk(logits, RoutingMethod(experts, 4, "identity"))
    assert bool((indices == winners).all())
    assert bool((cupy.abs(weights - cupy.asarray([0.4, 0.3, 0.2, 0.1], np.float32)) < 1e-6).all())


@pytest.mark.acceptance("rows * E above 2**31")
def test_hash_router_beyond_31_bits(cupy: Any) -> None:
    rows, experts = LIMIT // 1024 + 1000, 1024
    logits, winners = planted(cupy, rows, experts, 4)
    ids = cupy.arange(rows, dtype=np.int32)
    weights, indices = hash_router(ids, winners, RoutingMethod(experts, 4, "identity"), logits=logits)
    assert bool((indices == winners).all())
    assert bool((cupy.abs(weights - cupy.asarray([0.4, 0.3, 0.2, 0.1], np.float32)) < 1e-6).all())


@pytest.mark.acceptance("rows * E above 2**31")
def test_a_row_stride_beyond_31_bits(cupy: Any) -> None:
    memory = cupy.zeros(LIMIT + 1000, np.float16)
    memory[[5, LIMIT + 7]] = 1
    scores = cupy.lib.stride_tricks.as_strided(memory, (2, 100), (2 * LIMIT, 2))
    assert topk_select(scores, 2).indices.tolist() == [[5, 0], [7, 0]]


@pytest.mark.acceptance("2**31 - 1 columns")
def test_as_many_columns_as_an_index_can_count(cupy: Any) -> None:
    """A window at the end of the row: one block would be slow for all of it."""
    columns = LIMIT - 1
    scores = cupy.zeros((1, columns), np.float16)
    scores[0, [columns - 1, columns - 900, 7]] = cupy.asarray([3, 2, 9], np.float16)
    for length, indices in ((1000, [999, 100, 0]), (LIMIT - 1, [999, 100, 0]), (500, [100, 0, 1])):
        window = {"starts": cupy.asarray([columns - 1000], np.int32), "lengths": cupy.asarray([length], np.int32)}
        assert topk_select(scores, 3, **window).indices.tolist() == [indices]


@pytest.mark.parametrize("name", ["topk_select", "activation_topk", "hash_router"])
@pytest.mark.acceptance("more than 65,535 rows")
def test_millions_of_rows(cupy: Any, name: str) -> None:
    rows = 5_000_000
    scores, winners = planted(cupy, rows, 16, 2)
    if name == "topk_select":
        indices = topk_select(scores, 2).indices
    elif name == "activation_topk":
        indices = activation_topk(scores, RoutingMethod(16, 2, "softmax")).indices
    else:
        indices = hash_router(cupy.arange(rows, dtype=np.int64), winners).indices
    assert bool((indices == winners).all())
