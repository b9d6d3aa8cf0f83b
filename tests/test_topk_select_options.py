# SPDX-License-Identifier: Apache-2.0
"""topk_select's options: order by column, no values, indices through a map; for rows of any length."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from cupy_router import TopK, topk_select
from tests import compare, inputs, oracle
from tests.backends import Backend
from tests.topk_calls import edge_lengths, poisoned, select

ITEM = pytest.mark.acceptance
SHAPES = [(40, 5), (300, 32), (300, 40), (3000, 600), (20_000, 1000)]


def pages(rows: int, columns: int, page_size: int) -> np.ndarray:
    """A page table that is a little longer than it has to be, in which all differ."""
    num_pages = -(-columns // page_size) + 3
    return inputs.rng(rows, columns).permutation(rows * num_pages).reshape(rows, num_pages).astype(np.int32)


@pytest.mark.parametrize(("columns", "k"), SHAPES)
@pytest.mark.parametrize("kind", ["normal", "all equal", "more than half exact zeros", "NaN of both signs"])
@ITEM("order=column")
def test_by_column(backend: Backend, columns: int, k: int, kind: str) -> None:
    scores = inputs.ROWS[kind](backend.rows(4, columns), columns, k, "float32")
    _, indices = select(backend, scores, k, order="column")
    assert (np.diff(indices) > 0).all()


@pytest.mark.parametrize(("columns", "k"), SHAPES)
@pytest.mark.parametrize("dtype", inputs.FLOATS)
@ITEM("order=column", "lengths 0, 1, k-1, k, k+1, E, all different")
def test_by_column_of_rows_with_limits(backend: Backend, columns: int, k: int, dtype: str) -> None:
    lengths = edge_lengths(k, columns)[: backend.rows(30, columns)]
    select(backend, poisoned(lengths.size, columns, lengths, None, dtype), k, lengths=lengths, order="column")


@pytest.mark.parametrize(("columns", "k"), SHAPES)
@pytest.mark.parametrize("order", ["column", "value", "any"])
@ITEM("return_values=False")
def test_without_values(backend: Backend, columns: int, k: int, order: str) -> None:
    scores = inputs.normal((backend.rows(4, columns), columns))
    select(backend, scores, k, order=order, return_values=False)


@pytest.mark.parametrize(("columns", "k"), SHAPES)
@pytest.mark.parametrize("page_size", [1, 3, 64])
@pytest.mark.parametrize("one_row", [False, True])
@ITEM("index_map and page tables", "poison outside the row")
def test_index_map(backend: Backend, columns: int, k: int, page_size: int, one_row: bool) -> None:
    rows = backend.rows(5, columns)
    table = pages(1 if one_row else rows, columns, page_size)
    lengths = np.resize(np.array([columns, k - 1, 0, k + 1], np.int32), rows)
    starts = np.resize(np.array([0, 2, 1], np.int32), rows)
    scores = poisoned(rows, columns, lengths, starts, "float32")
    _, indices = select(backend, scores, k, lengths, starts, index_map=table, page_size=page_size)
    assert (indices[lengths == 0] == -1).all()


@ITEM("order=column", "return_values=False", "index_map and page tables", "strided rows", "misaligned base")
def test_all_options_at_once(backend: Backend) -> None:
    scores, table = inputs.normal((3, 500), "bfloat16"), pages(3, 500, 16)
    select(backend, scores, 9, order="column", return_values=False, index_map=table, page_size=16, row_pad=3, offset=1)


@ITEM("index_map and page tables")
def test_rows_of_a_wider_table(backend: Backend) -> None:
    scores, table = inputs.normal((3, 500)), pages(3, 900, 4)
    device = backend.array(table)
    result = topk_select(backend.array(scores), 20, index_map=device[:, :125], page_size=4)
    want = oracle.topk(scores, 20, index_map=table, page_size=4)
    np.testing.assert_array_equal(backend.numpy(result.indices), want[1])


@pytest.mark.parametrize("columns", [100, 3000])
def test_out(backend: Backend, columns: int) -> None:
    scores = inputs.normal((4, columns))
    out = TopK(backend.array(np.zeros((4, 5), np.float32)), backend.array(np.zeros((4, 5), np.int32)))
    assert topk_select(backend.array(scores), 5, order="column", out=out) is out
    want = oracle.topk(scores, 5, order="column")
    compare.assert_same_bits(backend.numpy(out.values), want[0])
    compare.assert_same_bits(backend.numpy(out.indices), want[1])
    out = TopK(None, out.indices)
    assert topk_select(backend.array(scores), 5, return_values=False, out=out) is out
    compare.assert_same_bits(backend.numpy(out.indices), oracle.topk(scores, 5)[1])


def test_no_rows_and_no_columns(backend: Backend) -> None:
    select(backend, np.empty((0, 40), np.float32), 4, return_values=False)
    select(
        backend, np.empty((3, 0), np.float32), 4, lengths=np.zeros(3, np.int32), index_map=np.zeros((1, 0), np.int32)
    )


SCORES = np.zeros((6, 16), np.float32)


@pytest.mark.parametrize(
    ("options", "error", "says"),
    [
        ({"order": "descending"}, ValueError, "order must be 'value', 'column', 'any', got 'descending'"),
        ({"order": True}, ValueError, "order must be 'value', 'column', 'any', got True"),
        ({"return_values": None}, TypeError, "return_values must be a bool, got None"),
        ({"page_size": 2}, ValueError, "page_size belongs to an index_map"),
        ({"page_size": 0}, ValueError, "page_size must be in 1..2147483647, got 0"),
        ({"page_size": 2.0}, TypeError, "page_size must be an int, got float"),
        ({"index_map": [[1]]}, TypeError, "index_map must be"),
        ({"index_map": np.zeros((6, 16), np.int64)}, TypeError, "index_map must be int32, got"),
        ({"index_map": np.zeros(16, np.int32)}, ValueError, r"index_map must have shape \[num_rows or 1, num_pages\]"),
        ({"index_map": np.zeros((2, 16), np.int32)}, ValueError, "index_map must have 6 rows or 1"),
        ({"index_map": np.zeros((1, 15), np.int32)}, ValueError, ".* a page for each 1 of 16 columns"),
        ({"index_map": np.zeros((6, 3), np.int32), "page_size": 5}, ValueError, ".* a page for each 5 of 16 columns"),
        ({"index_map": np.zeros((16, 6), np.int32).T}, ValueError, "index_map must be contiguous"),
        (
            {"return_values": False, "out": TopK(SCORES, SCORES)},
            TypeError,
            "out.values must be None where it is not returned",
        ),
        ({"return_values": False, "out": TopK(None, SCORES)}, TypeError, r"out.indices must be int32"),
    ],
)
def test_bad_options(options: dict[str, Any], error: type[Exception], says: str) -> None:
    with pytest.raises(error, match=f"^topk_select: {says}"):
        topk_select(SCORES, 4, **options)


def test_in_jax_eager_and_inside_jit() -> None:
    jax = pytest.importorskip("jax")
    scores = jax.numpy.asarray(inputs.normal((3, 40)))
    values, indices = topk_select(scores, 5, order="column")
    want = oracle.topk(np.asarray(scores), 5, order="column")
    compare.assert_same_bits(np.asarray(values), want[0])
    compare.assert_same_bits(np.asarray(indices), want[1])
    assert topk_select(scores, 5, return_values=False).values is None
    inside = jax.jit(lambda scores: topk_select(scores, 5, order="column", return_values=False))(scores)
    assert inside.values is None
    compare.assert_same_bits(np.asarray(inside.indices), want[1])
