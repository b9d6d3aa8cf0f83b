# SPDX-License-Identifier: Apache-2.0
"""topk_select moves bits and compares, so everything here is exact: values to the last bit, indices, order, ties."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest

from cupy_router import TopK, topk_select
from tests import compare, inputs, oracle
from tests.backends import DTYPES, Backend
from tests.topk_calls import edge_lengths, poisoned, select

ITEM = pytest.mark.acceptance


# -- Widths and k ------------------------------------------------------------------------------------------------------


def widths_and_k() -> Iterator[Any]:
    picks = {
        1: [1], 8: [1, 6, 7, 8], 31: [1, 6, 30, 31], 32: [1, 7, 31, 32], 33: [1, 31, 32, 33],
        255: [1, 6, 33, 254, 255], 257: [1, 7, 31, 256, 257], 1024: [1, 33, 511, 1000, 1023, 1024],
        1025: [1, 513, 1000, 1024, 1025], 8191: [1, 6, 511, 2047, 4096, 8190, 8191],
        8193: [7, 513, 2049, 4096, 8192, 8193], 16_385: [31, 1000, 2051, 4096, 16_384, 16_385],
        131_072: [1, 33, 2047, 2049, 4096, 131_071], 1_048_576: [6, 511, 2051, 4096, 1_048_576],
    }  # fmt: skip
    assert tuple(picks) == inputs.WIDTHS
    for i, (columns, ks) in enumerate(picks.items()):
        for j, k in enumerate(ks):
            name = {columns: "E", columns - 1: "E-1"}.get(k, str(k)) if columns > 1 else "1"
            items = [f"k = {name}", f"E = {columns}"] + (["k = 1"] if k == 1 else [])
            yield pytest.param(columns, k, inputs.FLOATS[(i + j) % 3], id=f"{columns}-{k}", marks=ITEM(*items))


@pytest.mark.many_kernels
@pytest.mark.parametrize(("columns", "k", "dtype"), list(widths_and_k()))
def test_widths_and_k(backend: Backend, columns: int, k: int, dtype: str) -> None:
    rows = backend.rows(3 if columns < 100_000 else 1, columns)
    select(backend, inputs.normal((rows, columns), dtype), k)


@pytest.mark.parametrize(
    "columns", [pytest.param(w, marks=ITEM(f"all-equal row at E = {w}"), id=str(w)) for w in inputs.WIDTHS]
)
def test_all_equal_rows(backend: Backend, columns: int) -> None:
    k = min(columns, 64)
    _, indices = select(backend, np.full((backend.rows(2, columns), columns), 1.5, np.float32), k)
    np.testing.assert_array_equal(indices, np.broadcast_to(np.arange(k), indices.shape))


@pytest.mark.many_kernels
@pytest.mark.parametrize("k", [1, 2, 3, 4, 5, 8, 9, 16, 17, 24, 32])
def test_small_k(backend: Backend, k: int) -> None:
    select(backend, inputs.normal((5, 256), seed=k), k)


# -- What rows hold ----------------------------------------------------------------------------------------------------


def kinds_of_rows() -> Iterator[Any]:
    shapes = [(256, 8), (33, 7), (1000, 31), (2051, 513), (8193, 2049), (131_072, 2048)]
    for i, kind in enumerate(inputs.ROWS):
        for j, (columns, k) in enumerate(shapes):
            dtype = inputs.FLOATS[(i + j) % 3] if j else "float32"
            if kind in inputs.BITS_OF_FLOAT32:
                dtype = "float32"
            elif kind.startswith("above 65504") and dtype == "float16":
                dtype = "bfloat16"
            yield pytest.param(kind, columns, k, dtype, id=f"{kind}-{columns}-{k}-{dtype}", marks=ITEM(kind))


@pytest.mark.parametrize(("kind", "columns", "k", "dtype"), list(kinds_of_rows()))
def test_every_kind_of_rows(backend: Backend, kind: str, columns: int, k: int, dtype: str) -> None:
    rows = backend.rows(4 if columns < 100_000 else 2, columns)
    select(backend, inputs.ROWS[kind](rows, columns, k, dtype), k)


@pytest.mark.parametrize("k", [64, 2048])
@pytest.mark.parametrize(
    "candidates", [pytest.param(c, marks=ITEM(f"one bin of {c} candidates"), id=str(c)) for c in (4097, 16_385, 65_537)]
)
def test_one_histogram_bin_holds_the_candidates(backend: Backend, candidates: int, k: int) -> None:
    columns = 131_072 if candidates > 16_385 else 2 * candidates
    select(backend, inputs.one_bin(candidates)(backend.rows(2, columns), columns, k, "float32"), k)


@pytest.mark.parametrize("columns", [24, 700, 9000])
@pytest.mark.parametrize("dtype", inputs.FLOATS)
def test_nan_is_last_and_copied_to_the_bit(backend: Backend, dtype: str, columns: int) -> None:
    scores = inputs.from_bits(inputs.nan_bits(2, columns, dtype), dtype)
    scores[:, columns // 2] = -np.inf
    values, indices = select(backend, scores, 8)
    np.testing.assert_array_equal(indices[0], [columns // 2, *range(7)])
    assert np.isnan(values[:, 1:].astype(np.float32)).all()


@pytest.mark.parametrize("columns", [32, 5000])
def test_subnormals_are_ordered_exactly(backend: Backend, columns: int) -> None:
    ramp = np.arange(columns) - columns // 2
    bits = np.where(ramp < 0, 0x80000000 - ramp, ramp)
    _, indices = select(backend, inputs.from_bits(bits[None], "float32"), columns // 4)
    np.testing.assert_array_equal(indices[0], columns - 1 - np.arange(columns // 4))


# -- Lengths and starts ------------------------------------------------------------------------------------------------


SHAPES = [(64, 8), (300, 32), (1000, 31), (3000, 600), (20_000, 2000)]


@pytest.mark.parametrize(("columns", "k"), SHAPES)
@pytest.mark.parametrize("dtype", inputs.FLOATS)
@pytest.mark.acceptance("lengths 0, 1, k-1, k, k+1, E, all different", "poison outside the row")
def test_lengths(backend: Backend, columns: int, k: int, dtype: str) -> None:
    lengths = edge_lengths(k, columns)[: backend.rows(10**6, columns)]
    select(backend, poisoned(lengths.size, columns, lengths, None, dtype), k, lengths=lengths)


@pytest.mark.parametrize(("columns", "k"), SHAPES)
@pytest.mark.parametrize("with_lengths", [False, True])
@pytest.mark.acceptance("starts and lengths", "poison outside the row")
def test_starts(backend: Backend, columns: int, k: int, with_lengths: bool) -> None:
    edges = [0, 1, columns - k, columns - k + 1, columns - 1, columns, columns + 5, -1, -(2**31), 2**31 - 1]
    starts = np.array([*edges, *range(3, columns, max(1, columns // 20))], np.int32)[: backend.rows(10**6, columns)]
    lengths = np.resize(edge_lengths(k, columns), starts.size) if with_lengths else None
    scores = poisoned(starts.size, columns, lengths, starts, "float32")
    select(backend, scores, k, lengths=lengths, starts=starts)


@pytest.mark.parametrize("columns", [5, 40, 600])
def test_with_lengths_k_may_exceed_the_columns(backend: Backend, columns: int) -> None:
    values, indices = select(
        backend, inputs.normal((3, columns)), columns + 3, lengths=np.array([columns, 2, 0], np.int32)
    )
    assert (indices[:, columns:] == -1).all()
    assert (values[:, columns:] == -np.inf).all()


@pytest.mark.parametrize("columns", [64, 3000])
def test_ties_within_a_row_that_starts_late(backend: Backend, columns: int) -> None:
    scores = np.zeros((3, columns), np.float32)
    _, indices = select(backend, scores, 8, starts=np.array([0, 7, columns - 4], np.int32))
    np.testing.assert_array_equal(indices, [[*range(8)], [*range(8)], [0, 1, 2, 3, -1, -1, -1, -1]])


# -- Layout and size ---------------------------------------------------------------------------------------------------


@pytest.mark.many_kernels
@pytest.mark.parametrize("columns", [40, 256, 5000])
@pytest.mark.parametrize("dtype", inputs.FLOATS)
@pytest.mark.parametrize(
    ("row_pad", "offset"),
    [
        pytest.param(8, 0, marks=ITEM("strided rows"), id="row-stride-of-8-more"),
        pytest.param(3, 0, marks=ITEM("strided rows"), id="odd-row-stride"),
        pytest.param(0, 1, marks=ITEM("misaligned base"), id="base-one-element-off"),
        pytest.param(1, 1, marks=ITEM("strided rows", "misaligned base"), id="both"),
    ],
)
def test_layout(backend: Backend, columns: int, dtype: str, row_pad: int, offset: int) -> None:
    select(backend, inputs.normal((5, columns), dtype), 9, row_pad=row_pad, offset=offset)


@pytest.mark.acceptance("strided rows")
def test_reversed_rows_and_a_repeated_row(backend: Backend) -> None:
    scores = inputs.normal((6, 100))
    for view, host in zip(
        inputs.row_views(backend.xp, backend.array(scores)), inputs.row_views(np, scores), strict=True
    ):
        result = topk_select(view, 1)
        np.testing.assert_array_equal(backend.numpy(result.indices), oracle.topk(host, 1)[1])


@pytest.mark.acceptance("more than 65,535 rows")
def test_more_rows_than_the_grid_limit(backend: Backend) -> None:
    select(backend, inputs.normal((backend.rows(70_000, 8, exactly=True), 8)), 3)


def test_many_rows_with_several_warps_per_block(backend: Backend) -> None:
    select(backend, inputs.normal((backend.rows(1090, 256, exactly=True), 256)), 8)


@pytest.mark.parametrize("columns", [16, 4000])
def test_no_rows(backend: Backend, columns: int) -> None:
    values, indices = select(backend, np.empty((0, columns), np.float16), 4)
    assert values.shape == indices.shape == (0, 4)


def test_no_columns(backend: Backend) -> None:
    _, indices = select(backend, np.empty((3, 0), np.float32), 2, lengths=np.array([0, 1, 2], np.int32))
    assert (indices == -1).all()


@pytest.mark.parametrize(("columns", "k"), [(256, 8), (6000, 500)])
@pytest.mark.acceptance("100 bitwise repeats")
def test_a_hundred_repeats_agree_bitwise(backend: Backend, columns: int, k: int) -> None:
    scores = backend.array(inputs.ROWS["differ in the lowest 8 bits"](backend.rows(3, columns), columns, k, "float32"))
    first = [backend.numpy(a) for a in topk_select(scores, k)]
    for _ in range(100):
        again = [backend.numpy(a) for a in topk_select(scores, k)]
        for a, b in zip(first, again, strict=True):
            compare.assert_same_bits(b, a)


@pytest.mark.parametrize("columns", [100, 3000])
@pytest.mark.parametrize("dtype", inputs.FLOATS)
def test_out_is_filled_and_returned(backend: Backend, columns: int, dtype: str) -> None:
    scores = inputs.normal((4, columns), dtype)
    out = TopK(backend.array(np.zeros((4, 5), DTYPES[dtype])), backend.array(np.zeros((4, 5), np.int32)))
    result = topk_select(backend.array(scores), 5, out=out)
    assert result.values is out.values
    assert result.indices is out.indices
    want = oracle.topk(scores, 5)
    compare.assert_same_bits(backend.numpy(out.values), want[0])
    compare.assert_same_bits(backend.numpy(out.indices), want[1])


def test_a_row_does_not_depend_on_the_others(backend: Backend) -> None:
    scores = inputs.ROWS["differ in the lowest bit"](9, 4000, 300, "float32")
    _, together = select(backend, scores, 300)
    for r in (0, 4, 8):
        _, alone = select(backend, scores[r : r + 1], 300)
        np.testing.assert_array_equal(alone[0], together[r])
