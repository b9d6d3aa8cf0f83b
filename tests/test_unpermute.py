# SPDX-License-Identifier: Apache-2.0
"""unpermute against float64 sums by loops, within its roundings; on small integers, whose sums are exact, to a bit."""

from __future__ import annotations

import numpy as np
import pytest

from cupy_router import permute, unpermute
from tests import inputs
from tests.backends import DTYPES, Backend
from tests.inputs import FLOATS
from tests.layout_calls import layout_of, same_bytes, to_tokens, tokens
from tests.layout_inputs import DISTRIBUTIONS, HIDDEN, hidden_states, uniform, zipf

ITEM = pytest.mark.acceptance
POISON = (np.nan, np.inf, -np.inf)


def weights_of(n: int, k: int, dtype: str = "float32", seed: int = 0) -> np.ndarray:
    return np.abs(inputs.normal((n, k), dtype, seed=430 + seed))


# -- Sizes, dtypes, memory ---------------------------------------------------------------------------------------------


@pytest.mark.many_kernels
@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("hidden", [pytest.param(h, marks=ITEM(f"rows: hidden {h}")) for h in HIDDEN])
def test_every_hidden_size(backend: Backend, hidden: int, dtype: str, weighted: bool) -> None:
    n, k = (5 if backend.name == "simt" else 33), 6
    layout = layout_of(backend, DISTRIBUTIONS["-1 sprinkled"](n, k, 20), 20, alignment=4)
    y = inputs.normal((layout.capacity, hidden), dtype)
    weights = weights_of(n, k, FLOATS[hidden % 3]) if weighted else None
    to_tokens(backend, y, layout, weights)
    exact = hidden_states((layout.capacity, hidden), DTYPES[dtype])
    to_tokens(backend, exact, layout, hidden_states((n, k), np.float32, 1) if weighted else None, exact=True)


@pytest.mark.many_kernels
@pytest.mark.parametrize("dtypes", [(a, b, c) for a in FLOATS for b in FLOATS for c in FLOATS], ids="-".join)
@pytest.mark.parametrize("scaled", [False, True])
@ITEM("rows: float32, float16, bfloat16", "rows: residual")
def test_every_dtype_of_rows_weights_and_residual(backend: Backend, dtypes: tuple[str, str, str], scaled: bool) -> None:
    n, k, hidden = 20, 6, 40
    layout = layout_of(backend, uniform(n, k, 30), 30, alignment=4)
    y, residual = (
        inputs.normal((rows, hidden), dtype) for rows, dtype in ((layout.capacity, dtypes[0]), (n, dtypes[2]))
    )
    scale = inputs.normal((n,), seed=5) if scaled else None
    to_tokens(backend, y, layout, weights_of(n, k, dtypes[1]), residual, scale)


@pytest.mark.many_kernels
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("hidden", [1, 7, 64, 1000])
@pytest.mark.parametrize(("row_pad", "offset", "place"), [(0, 1, 0), (1, 0, 1), (3, 2, 5), (8, 8, 8), (0, 0, 16)])
@pytest.mark.parametrize("with_all", [False, True])
@ITEM("rows: strided and misaligned", "rows: poison behind the output")
def test_strided_and_misaligned_rows(
    backend: Backend, hidden: int, dtype: str, row_pad: int, offset: int, place: int, with_all: bool
) -> None:
    n, k = 9, 2
    layout = layout_of(backend, uniform(n, k, 7), 7, alignment=4)
    y = inputs.normal((layout.capacity, hidden), dtype)
    more = (weights_of(n, k), inputs.normal((n, hidden), dtype), inputs.normal((n,))) if with_all else ()
    to_tokens(backend, y, layout, *more, row_pad=row_pad, offset=offset, place=place)


@pytest.mark.parametrize("n", [0, 1, 3, 64, pytest.param(1025, marks=pytest.mark.slow("seconds"))])
@pytest.mark.parametrize("k", [1, 2, 6, 8, 22])
def test_every_number_of_tokens(backend: Backend, n: int, k: int) -> None:
    n = tokens(backend, n, 8 * k)
    layout = layout_of(backend, zipf(n, k, 60), 60, alignment=7)
    to_tokens(backend, inputs.normal((layout.capacity, 24), "bfloat16"), layout, weights_of(n, k, "bfloat16"))


@pytest.mark.parametrize("with_residual", [False, True])
@pytest.mark.parametrize("hidden", [0, 5])
def test_no_rows_or_no_columns(backend: Backend, hidden: int, with_residual: bool) -> None:
    residual = inputs.normal((4, hidden)) if with_residual else None
    none = layout_of(backend, uniform(4, 2, 5), 5, capacity=0)
    got = to_tokens(backend, np.empty((0, hidden), np.float32), none, weights_of(4, 2), residual)
    np.testing.assert_array_equal(got, np.zeros((4, hidden)) if residual is None else residual)
    no_tokens = layout_of(backend, np.empty((0, 2), np.int32), 5, capacity=6)
    assert to_tokens(backend, inputs.normal((6, hidden)), no_tokens).shape == (0, hidden)


# -- Which rows --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", DISTRIBUTIONS)
@pytest.mark.parametrize("with_residual", [False, True])
@ITEM("rows: tokens without a pair")
def test_every_distribution(backend: Backend, kind: str, with_residual: bool) -> None:
    n, k = 20, 6
    layout = layout_of(backend, DISTRIBUTIONS[kind](n, k, 12), 12, alignment=16)
    residual = inputs.normal((n, 33), "float16", seed=1) if with_residual else None
    got = to_tokens(backend, inputs.normal((layout.capacity, 33), "float16"), layout, weights_of(n, k), residual)
    alone = (backend.numpy(layout.positions) < 0).all(axis=1)
    np.testing.assert_array_equal(got[alone], 0 if residual is None else residual[alone])


@pytest.mark.parametrize("poison", POISON, ids=str)
@pytest.mark.parametrize("dtype", FLOATS)
@ITEM("rows: NaN and inf in padding rows")
def test_rows_without_a_pair_are_never_read(backend: Backend, dtype: str, poison: float) -> None:
    """Padding of blocks, rows after the last, rows of pairs that were cut off, and weights of pairs at -1."""
    n, k, capacity = 20, 6, 96
    layout = layout_of(backend, DISTRIBUTIONS["-1 sprinkled"](n, k, 12), 12, alignment=8, capacity=capacity)
    order, positions = backend.numpy(layout.order), backend.numpy(layout.positions)
    y, weights = hidden_states((capacity, 40), DTYPES[dtype]), hidden_states((n, k), DTYPES[dtype], 1)
    clean = to_tokens(backend, y, layout, weights, exact=True)
    y[order < 0], weights[positions < 0] = poison, poison
    assert not np.isfinite(y.astype(np.float32)).all()
    same_bytes(to_tokens(backend, y, layout, weights, exact=True), clean)


@ITEM("rows: NaN and inf in rows of weight 0")
def test_a_weight_of_zero_is_a_factor(backend: Backend) -> None:
    """As in the formula, 0 times NaN is NaN, in its own token alone."""
    layout = layout_of(backend, uniform(8, 2, 5), 5)
    positions = backend.numpy(layout.positions)
    y, weights = hidden_states((16, 12), np.float32), np.ones((8, 2), np.float32)
    weights[3, 1] = weights[5, 0] = 0
    y[positions[3, 1]], y[positions[5, 0]] = np.nan, np.inf
    got = to_tokens(backend, y, layout, weights, exact=True)
    assert np.isnan(got[[3, 5]]).all()
    assert np.isfinite(np.delete(got, [3, 5], axis=0)).all()


@ITEM("rows: positions outside of the rows")
def test_any_position_outside_of_the_rows_is_left_out(backend: Backend) -> None:
    layout = layout_of(backend, uniform(6, 2, 4), 4)
    positions = backend.numpy(layout.positions).copy()
    positions[0], positions[2, 1], positions[4] = (12, 2**31 - 1), -(2**31), (-2, 13)
    odd = layout._replace(positions=backend.array(positions))
    got = to_tokens(backend, hidden_states((12, 40), np.float32) + 9, odd, exact=True)
    assert np.flatnonzero(~got.any(-1)).tolist() == [0, 4]


def test_rows_may_be_used_more_than_once(backend: Backend) -> None:
    layout = layout_of(backend, uniform(6, 3, 4), 4)
    same = layout._replace(positions=backend.array(np.full((6, 3), 7, np.int32)))
    y = hidden_states((18, 24), np.float32)
    np.testing.assert_array_equal(to_tokens(backend, y, same, exact=True), np.broadcast_to(3 * y[7], (6, 24)))


# -- Arithmetic --------------------------------------------------------------------------------------------------------


@ITEM("rows: sums in slot order")
def test_sums_are_float32_in_the_order_of_slots_and_the_residual_is_last(backend: Backend) -> None:
    """2**24 + 1 is 2**24 in float32, so that every other order gives another sum."""
    big = 2.0**24
    layout = layout_of(backend, np.array([[0, 1, 2], [0, 1, 2]]), 3)
    positions = backend.numpy(layout.positions)
    y = np.zeros((6, 8), np.float32)
    for token, terms in enumerate([(big, 1, -big), (1, 1, big)]):
        y[positions[token]] = np.array(terms, np.float32)[:, None]
    residual = np.array([[1.0], [-big]], np.float32) * np.ones((2, 8), np.float32)
    for scale in (None, np.ones(2, np.float32)):
        given = {"residual": backend.array(residual), "residual_scale": None if scale is None else backend.array(scale)}
        got = backend.numpy(unpermute(backend.array(y), layout, **given))
        np.testing.assert_array_equal(got[:, 0], [1.0, 2.0])
    np.testing.assert_array_equal(backend.numpy(unpermute(backend.array(y), layout))[:, 0], [0.0, big + 2])


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_sums_are_rounded_once(backend: Backend, dtype: str) -> None:
    """A sum of a large and many small terms, which a sum in 16 bits would lose."""
    k = 22
    layout = layout_of(backend, np.arange(k)[None].repeat(5, 0), k)
    y = np.full((5 * k, 16), 2.0**-8, DTYPES[dtype])
    y[backend.numpy(layout.positions)[:, 0]] = 1
    got = to_tokens(backend, y, layout, exact=True)
    assert (got.astype(np.float32) > 1).all()


def test_overflow_and_subnormals(backend: Backend) -> None:
    layout = layout_of(backend, np.array([[0, 1]]), 2)
    for dtype, values in (("float16", [60000.0, 60000.0]), ("float32", [3e38, 3e38]), ("bfloat16", [3e38, 3e38])):
        y = np.array(values, np.float32).astype(DTYPES[dtype])[:, None] * np.ones((2, 8), DTYPES[dtype])
        assert np.isposinf(to_tokens(backend, y, layout, exact=True).astype(np.float32)).all()
    half = np.full((2, 8), 2.0**-24, np.float16)  # the smallest, which float16 has as a result too
    assert (to_tokens(backend, half, layout, exact=True) == np.float16(2.0**-23)).all()


@pytest.mark.parametrize("dtype", FLOATS)
def test_a_row_with_its_weight_and_back_is_the_token(backend: Backend, dtype: str) -> None:
    """permute, then unpermute with weights of powers of two that sum to 1."""
    n, k = 33, 4
    layout = layout_of(backend, uniform(n, k, 12), 12, alignment=8)
    x, weights = backend.array(hidden_states((n, 72), DTYPES[dtype])), np.full((n, k), 0.25, DTYPES[dtype])
    back = unpermute(permute(x, layout), layout, backend.array(weights))
    same_bytes(backend.numpy(back), backend.numpy(x))
    weighted = unpermute(permute(x, layout, weights=backend.array(weights)), layout)
    same_bytes(backend.numpy(weighted), backend.numpy(x))


@ITEM("rows: zero experts")
def test_zero_experts_give_the_token_times_their_weights(backend: Backend) -> None:
    """Ids from L on have no row; their weights are those of the token itself."""
    n, k, experts, zero = 40, 6, 12, 4
    ids = uniform(n, k, experts + zero)
    layout = layout_of(backend, ids, experts)
    assert (backend.numpy(layout.positions)[ids >= experts] == -1).all()
    x, y = hidden_states((n, 48), np.float32), hidden_states((layout.capacity, 48), np.float32, 1)
    weights = hidden_states((n, k), np.float32, 2)
    scale = np.where(ids >= experts, weights, 0).sum(1).astype(np.float32)
    got = to_tokens(backend, y, layout, weights, x, scale, exact=True)
    for token in range(n):
        total = np.zeros(48)
        for slot, expert in enumerate(ids[token]):
            row = backend.numpy(layout.positions)[token, slot]
            total += float(weights[token, slot]) * (x[token] if expert >= experts else y[row])
        np.testing.assert_array_equal(got[token], total)


@pytest.mark.parametrize("dtype", FLOATS)
def test_every_run_gives_the_same(backend: Backend, dtype: str) -> None:
    n, repeats = (300, 100) if backend.name == "gpu" else (20, 10)
    layout = layout_of(backend, zipf(n, 6, 30), 30, alignment=16)
    y, weights = backend.array(inputs.normal((layout.capacity, 264), dtype)), backend.array(weights_of(n, 6))
    first = backend.numpy(unpermute(y, layout, weights))
    for _ in range(repeats):
        assert backend.numpy(unpermute(y, layout, weights)).tobytes() == first.tobytes()
