# SPDX-License-Identifier: Apache-2.0
"""topk_select at the sizes of sparse attention, against CuPy's sort, repeated under load and in graphs."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from cupy_router import topk_select
from tests import compare, inputs, oracle
from tests.topk_calls import by_index

# num_rows, num_columns, k
SHAPES = [
    (1, 32_768, 512), (8, 32_768, 512), (64, 32_768, 512), (8, 65_536, 1024), (16, 65_536, 33), (1, 131_072, 2048),
    (8, 131_072, 2048), (256, 32_768, 2048), (64, 262_144, 1024), (300, 131_072, 1024), (150, 32_768, 512),
    (1500, 32_768, 512), (1200, 8192, 512), (1, 1_048_576, 2048), (2, 131_072, 8192), (1, 1_048_576, 8192),
    (200, 70_000, 4096), (3, 20_000, 20_000),
]  # fmt: skip


def sorted_by_cupy(cupy: Any, scores: Any, k: int) -> Any:
    """Columns of the k best of each row of float32 without NaN: by value, then by column."""
    bits = scores.view(np.uint32)
    keys = cupy.where(bits >> 31 != 0, (1 << 31) - (bits & 0x7FFFFFFF), (1 << 31) + bits).astype(np.uint64)
    columns = cupy.arange(scores.shape[1], dtype=np.uint64)
    best = cupy.stack([cupy.sort(~((row << 32) | (0xFFFFFFFF - columns)))[:k] for row in keys])
    return (0xFFFFFFFF - (~best & 0xFFFFFFFF)).astype(np.int32)


def kinds(cupy: Any, rows: int, columns: int) -> dict[str, Any]:
    normal = cupy.random.default_rng(7).standard_normal((rows, columns), dtype=np.float32)
    spread = cupy.arange(columns, dtype=np.uint32) * np.uint32(2654435761) % np.uint32(columns)
    shared = cupy.broadcast_to((spread + np.uint32(0x3F800000)).view(np.float32), normal.shape)
    one_bin = normal.copy()
    one_bin[:, ::2] = 1 + cupy.arange(one_bin[:, ::2].shape[1], dtype=np.float32) * np.float32(2**-23)
    return {
        "normal": normal,
        "all equal": cupy.full((rows, columns), 1.5, np.float32),
        "quantised, half zeros": cupy.round(cupy.maximum(normal, 0) * 8) / 8,
        "shared high bits": cupy.ascontiguousarray(shared),
        "one giant bin": one_bin,
        "ascending": cupy.sort(normal, axis=1),
        "smooth": cupy.sin(cupy.arange(columns, dtype=np.float32) / 300) + normal / 1000,
        "slowly ascending": normal * np.float32(1e-6) + cupy.arange(columns, dtype=np.float32) * np.float32(6.4e-6),
        "zeros at the k-th": cupy.maximum(normal - 3, 0),
        "random walk": cupy.cumsum(normal, axis=1, dtype=np.float32),
        "large at the end": normal + cupy.where(cupy.arange(columns) >= 0.97 * columns, 10, 0).astype(np.float32),
        "periodic": cupy.ascontiguousarray(cupy.broadcast_to(normal[:1, cupy.arange(columns) % 4096], normal.shape)),
        "neighbours equal": cupy.repeat(normal[:, ::32], 32, axis=1)[:, :columns].copy(),
    }


@pytest.mark.parametrize(("rows", "columns", "k"), SHAPES)
@pytest.mark.acceptance("sizes of sparse attention", "all-equal, quantised, shared high bits, one bin at full size")
def test_full_sizes(cupy: Any, rows: int, columns: int, k: int) -> None:
    few = np.unique(np.linspace(0, rows - 1, 12).astype(int))
    for name, scores in kinds(cupy, rows, columns).items():
        values, indices = topk_select(scores, k)
        want = sorted_by_cupy(cupy, scores[few], k)
        assert bool((indices[few] == want).all()), name
        assert bool((values == cupy.take_along_axis(scores, indices, axis=1)).all()), name
        in_any_order = topk_select(scores, k, order="any")
        assert bool((cupy.sort(in_any_order.indices, axis=1) == cupy.sort(indices, axis=1)).all()), name
        entries = cupy.take_along_axis(scores, in_any_order.indices, axis=1)
        assert bool((in_any_order.values == entries).all()), name


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
@pytest.mark.parametrize(
    ("rows", "columns", "k"),
    [(1, 131_072, 2048), (8, 65_536, 1024), (8, 16_384, 512), (64, 32_768, 512), (200, 65_536, 1024)],
)
def test_full_sizes_of_16_bits(cupy: Any, rows: int, columns: int, k: int, dtype: str) -> None:
    scores = inputs.normal((rows, columns), dtype)
    values, indices = topk_select(cupy.asarray(scores.view(np.uint16)).view(scores.dtype), k)
    few = [0, rows // 2, rows - 1]
    want = oracle.topk(scores[few], k)
    np.testing.assert_array_equal(indices[few].get(), want[1])
    compare.assert_same_bits(cupy.asnumpy(values[few].view(np.uint16)).view(scores.dtype), want[0])


@pytest.mark.parametrize(
    ("rows", "columns", "k"), [(1, 131_072, 2048), (300, 32_768, 512), (140, 40_000, 1024), (3, 20_000, 20_000)]
)
@pytest.mark.acceptance("order=column", "return_values=False", "index_map and page tables")
def test_options_at_full_sizes(cupy: Any, rows: int, columns: int, k: int) -> None:
    """Against the sorted result without options."""
    page_size = 64
    num_pages = rows * -(-columns // page_size)
    table = cupy.asarray(inputs.rng(9).permutation(num_pages).astype(np.int32).reshape(rows, -1))
    for name, scores in kinds(cupy, rows, columns).items():
        want = topk_select(scores, k).indices
        by_column = topk_select(scores, k, order="column")
        any_order = topk_select(scores, k, order="any")
        assert bool((cupy.sort(any_order.indices, axis=1) == by_column.indices).all()), name
        assert bool((any_order.values == cupy.take_along_axis(scores, any_order.indices, axis=1)).all()), name
        assert bool((by_column.indices == cupy.sort(want, axis=1)).all()), name
        assert bool((by_column.values == cupy.take_along_axis(scores, by_column.indices, axis=1)).all()), name
        mapped = topk_select(scores, k, index_map=table, page_size=page_size, return_values=False).indices
        pages = cupy.take_along_axis(table, want // page_size, axis=1)
        assert bool((mapped == pages * page_size + want % page_size).all()), name


@pytest.mark.acceptance("more than 65,535 rows")
def test_more_rows_than_the_grid_limit(cupy: Any) -> None:
    rows, columns, k = 70_000, 2100, 100
    scores = cupy.random.default_rng(7).standard_normal((rows, columns), dtype=np.float32)
    few = [0, 1, 65_535, 65_536, rows - 1]
    assert bool((topk_select(scores, k).indices[few] == sorted_by_cupy(cupy, scores[few], k)).all())


@pytest.mark.parametrize("order", ["value", "any"])
@pytest.mark.parametrize(("rows", "columns", "k"), [(8, 131_072, 2048), (300, 32_768, 512), (1200, 8192, 512)])
@pytest.mark.acceptance(
    "100 bitwise repeats under load from another stream", "1,000 bitwise repeats under load from another stream"
)
def test_a_thousand_repeats_under_load(cupy: Any, rows: int, columns: int, k: int, order: str) -> None:
    scores = kinds(cupy, rows, columns)["quantised, half zeros"]
    first = topk_select(scores, k, order=order)
    load, stream = cupy.cuda.Stream(non_blocking=True), cupy.cuda.Stream(non_blocking=True)
    other = cupy.random.default_rng(8).standard_normal((64, 40_000), dtype=np.float32)
    differing = cupy.zeros((), np.int64)
    cupy.cuda.Device().synchronize()
    for repeat in range(1000):
        with load:
            if repeat % 4 == 0:
                topk_select(other, 700)
        with stream:
            again = topk_select(scores, k, order=order)
            for a, b in zip(first, again, strict=True):
                differing += (a.view(np.int32) != b.view(np.int32)).sum()
    cupy.cuda.Device().synchronize()
    assert int(differing) == 0


@pytest.mark.acceptance("graph replay with lengths changed in place")
@pytest.mark.parametrize(("rows", "columns", "k"), [(3, 131_072, 2048), (150, 20_000, 300)])
def test_replay_with_other_lengths(cupy: Any, rows: int, columns: int, k: int) -> None:
    """From rows that are read whole to rows that are sampled, and back, with one plan."""
    scores = inputs.normal((rows, columns))
    on_device, lengths = cupy.asarray(scores), cupy.full(rows, columns, np.int32)
    stream = cupy.cuda.Stream(non_blocking=True)
    with stream:
        for order in ("value", "any"):
            topk_select(on_device, k, lengths=lengths, order=order)
        stream.synchronize()
        stream.begin_capture()
        result = topk_select(on_device, k, lengths=lengths)
        in_any_order = topk_select(on_device, k, lengths=lengths, order="any")
        graph = stream.end_capture()
    for seed in range(6):
        host = inputs.rng(seed).integers(0, (100, k + 1, 5000, columns)[seed % 4], rows).astype(np.int32)
        lengths[...] = cupy.asarray(host)
        cupy.cuda.Device().synchronize()
        graph.launch(stream)
        stream.synchronize()
        want = oracle.topk(scores[:5], k, host[:5])
        np.testing.assert_array_equal(result.indices[:5].get(), want[1])
        compare.assert_same_bits(result.values[:5].get(), want[0])
        indices = in_any_order.indices[:5].get()
        for array, right in ((in_any_order.values[:5].get(), want[0]), (indices, want[1])):
            compare.assert_same_bits(by_index(array, indices), by_index(right, want[1]))
