# SPDX-License-Identifier: Apache-2.0
"""The kernels that move rows: permute, unpermute and their gradients, against sums in float64."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import ml_dtypes
import numpy as np
import pytest

from cupy_router.arrays import View, dense_strides
from cupy_router.ops import _move_rows as move_rows
from cupy_router.ops import permute as permute_op
from cupy_router.ops import unpermute as unpermute_op
from cupy_router.ops._declared import Arrays
from cupy_router.ops._rows import GradientOptions, LayoutInts
from cupy_router.ops._run import run
from cupy_router.tuning import DEFAULT
from tests import compare, inputs
from tests.backends import DTYPES, Backend
from tests.moved_rows import Case, Moved, layout_of

pytestmark = [pytest.mark.needs_kernels, pytest.mark.many_kernels]


def cases() -> Iterator[Case]:
    for hidden in (1, 7, 64, 1000, 4096, 7168):
        for dtype in ("float32", "float16", "bfloat16"):
            yield Case(hidden=hidden, dtype=dtype, num_tokens=4 if hidden > 1000 else 9)
    yield Case(weight_dtype=None, has_scale=False)
    yield Case(weight_dtype="bfloat16", dtype="float16", other_dtype="bfloat16")
    yield Case(weight_dtype="float16", other_dtype="float32")
    yield Case(dtype="float32", other_dtype="float16", hidden=1030)
    for top_k in (1, 2, 8, 9, 22, 32, 45):
        yield Case(top_k=top_k, hidden=72)
    yield Case(top_k=17, hidden=2056, num_tokens=3)  # several groups of slots, and several steps along the row
    yield Case(padding=-20)  # of fewer rows than pairs
    yield Case(padding=200)  # many more


@pytest.mark.parametrize("case", list(cases()), ids=str)
def test_shapes_and_dtypes(backend: Backend, case: Case) -> None:
    Moved(backend, case).check_all()


@pytest.mark.parametrize(
    ("dtype", "pad", "offset", "hidden"),
    [
        ("bfloat16", 3, 1, 264),
        ("bfloat16", 8, 8, 264),
        ("bfloat16", 0, 4, 264),
        ("float32", 1, 0, 7),
        ("float32", 2, 2, 1030),
    ],
)
def test_any_stride_and_offset(backend: Backend, dtype: str, pad: int, offset: int, hidden: int) -> None:
    Moved(backend, Case(dtype=dtype, pad=pad, offset=offset, hidden=hidden, num_tokens=4)).check_all()


@pytest.mark.parametrize("num_tokens", [0, 1, 3, 65, 200])
def test_few_tokens_and_more(backend: Backend, num_tokens: int) -> None:
    moved = Moved(backend, Case(num_tokens=num_tokens, hidden=72, has_scale=False))
    moved.check_all()
    moved.check_sums(moved.unpermute(has_residual=False), has_residual=False)


def test_the_results_of_a_gradient_one_by_one(backend: Backend) -> None:
    moved = Moved(backend, Case())
    everything = "rows", "dots", "scaled", "residual_dots"
    for want, result in zip(everything, moved.unpermute_backward(*everything), strict=True):
        compare.assert_same_bits(moved.unpermute_backward(want)[0], result)
    for want, result in zip(("sums", "dots"), moved.permute_backward("sums", "dots"), strict=True):
        compare.assert_same_bits(moved.permute_backward(want)[0], result)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_dot_products_do_not_depend_on_other_tokens(backend: Backend, dtype: str) -> None:
    """Nor on how many they are, though few are divided over more blocks."""
    many = Moved(backend, Case(num_tokens=150, dtype=dtype, hidden=520))
    dots, residual_dots = many.unpermute_backward("dots", "residual_dots")
    (other_dots,) = many.permute_backward("dots")
    for host in ("x", "other_x", "residual", "weights", "scale"):
        setattr(many, host, getattr(many, host)[:5])
    many.layout = many.layout._replace(positions=many.layout.positions[:5])
    few = many.unpermute_backward("dots", "residual_dots")
    compare.assert_same_bits(few[0], dots[:5])
    compare.assert_same_bits(few[1], residual_dots[:5])
    compare.assert_same_bits(many.permute_backward("dots")[0], other_dots[:5])


@pytest.mark.parametrize("hidden", [1, 3, 13, 48, 1000])
@pytest.mark.parametrize(
    "dtype", ["bool", "uint8", "float8_e4m3fn", "int16", "float32", "int64", "complex64", "complex128"]
)
def test_any_dtype_is_moved_as_bytes(backend: Backend, dtype: str, hidden: int) -> None:
    if backend.name == "gpu" and dtype.startswith("float8"):
        pytest.skip("CuPy makes no arrays of this dtype")
    kind = np.dtype(getattr(ml_dtypes, dtype, dtype))
    case = Case(hidden=hidden, weight_dtype=None)
    for pad, offset in ((0, 0), (3, 1)):
        layout, rng = layout_of(case), np.random.default_rng(68)
        num_bytes = (case.num_tokens * (hidden + pad) + offset) * kind.itemsize
        flat = rng.integers(0, 2 if dtype == "bool" else 256, num_bytes, np.uint8)

        def view(memory: Any, pad: int = pad, offset: int = offset) -> Any:
            return memory.view(kind)[offset:].reshape(case.num_tokens, hidden + pad)[:, :hidden]

        x, device = view(flat), view(backend.upload(flat))
        given = device, *map(backend.array, layout), None
        rows = backend.numpy(run(permute_op.OP, LayoutInts(), given, None, None))
        want = np.zeros(rows.shape, kind)
        used = (layout.order >= 0) & (layout.order < layout.positions.size)
        want[used] = x[layout.order[used] // case.top_k]
        assert rows.tobytes() == want.tobytes()


# -- NaN and infinity --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("poison", [np.nan, np.inf])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_rows_without_a_pair_are_never_read(backend: Backend, dtype: str, poison: float) -> None:
    clean, spoilt = Moved(backend, Case(dtype=dtype)), Moved(backend, Case(dtype=dtype))
    padding = np.ones(len(spoilt.y), bool)
    padding[[row for _, _, row in spoilt.pairs()]] = False
    assert padding.sum() > 5
    spoilt.y[padding], spoilt.other_y[padding] = poison, poison
    spoilt.weights[~used_slots(spoilt)] = poison
    compare.assert_same_bits(spoilt.unpermute(), clean.unpermute())
    for ours, want in zip(spoilt.permute_backward("sums", "dots"), clean.permute_backward("sums", "dots"), strict=True):
        compare.assert_same_bits(ours, want)
    for ours, want in zip(
        spoilt.unpermute_backward("rows", "dots"), clean.unpermute_backward("rows", "dots"), strict=True
    ):
        compare.assert_same_bits(ours, want)


def used_slots(moved: Moved) -> np.ndarray:
    """Which slots have a row."""
    used = np.zeros(moved.layout.positions.shape, bool)
    for token, slot, _ in moved.pairs():
        used[token, slot] = True
    return used


def test_a_weight_of_zero_hides_nothing(backend: Backend) -> None:
    """0 * NaN and 0 * inf are NaN, as in the formula."""
    moved = Moved(backend, Case())
    token, slot, row = next(pair for pair in moved.pairs() if pair[0] == 3)
    moved.weights[token, slot] = 0
    moved.y[row, 5], moved.y[row, 6], moved.x[token, 7] = np.nan, np.inf, np.nan
    sums, rows = moved.unpermute().astype(np.float32), moved.permute().astype(np.float32)
    assert np.argwhere(np.isnan(sums)).tolist() == [[token, 5], [token, 6]]
    assert set(np.argwhere(np.isnan(rows))[:, 1]) == {7}
    assert np.isnan(rows[row, 7])
    assert not rows[row, :7].any()


def test_nan_and_infinity_in_a_row_stay_in_its_token(backend: Backend) -> None:
    moved = Moved(backend, Case(dtype="float16"))
    clean = moved.unpermute()
    token, _, row = next(pair for pair in moved.pairs() if pair[0] == 4)
    moved.y[row] = np.inf
    moved.residual[6] = np.nan
    sums = moved.unpermute()
    others = [t for t in range(len(sums)) if t not in (token, 6)]
    compare.assert_same_bits(sums[others], clean[others])
    assert not np.isfinite(sums[[token, 6]].astype(np.float32)).any()


# -- Sizes -------------------------------------------------------------------------------------------------------------


def test_more_rows_than_a_grid_of_two_dimensions_has(backend: Backend) -> None:
    Moved(backend, Case(num_tokens=66_000, top_k=1, hidden=1)).check_rows(
        Moved(backend, Case(num_tokens=66_000, top_k=1, hidden=1)).permute()
    )


def test_rows_that_lie_beyond_32_bits(backend: Backend) -> None:
    """The last row of a dense buffer of more than 2**31 elements; what is between is never touched."""
    capacity, hidden = 530_000, 4096
    x = inputs.normal((1, hidden), "bfloat16", seed=69)
    order, positions = np.zeros(capacity, np.int32), np.array([[capacity - 1]], np.int32)
    into = backend.xp.zeros((capacity, hidden), np.uint16)
    rows = into.view(DTYPES["bfloat16"])
    given = backend.array(x), backend.array(order), backend.array(positions), None
    run(permute_op.OP, LayoutInts(), given, rows, None)
    np.testing.assert_array_equal(backend.numpy(into[-1:]), x.view(np.uint16))
    sums = run(unpermute_op.OP, LayoutInts(), (rows, backend.array(positions), None, None, None, None), None, None)
    np.testing.assert_array_equal(backend.numpy(sums), x)


def test_strides_beyond_32_bits(backend: Backend) -> None:
    memory = backend.xp.zeros(2**31 + 100, np.uint16)
    x = memory[: 2 * (2**30 + 50)].reshape(2, 2**30 + 50)[:, :40].view(DTYPES["bfloat16"])
    host = inputs.normal((2, 40), "bfloat16", seed=70)
    x[...] = backend.upload(host)
    order = np.array([1, 0], np.int32)
    given = x, backend.array(order), backend.array(order[:, None].copy()), None
    rows = run(permute_op.OP, LayoutInts(), given, None, None)
    np.testing.assert_array_equal(backend.numpy(rows), host[::-1])


@pytest.mark.needs_kernels
def test_rows_without_a_pair_may_keep_what_they_hold(backend: Backend) -> None:
    """ExpertParallel asks for that where their bytes would be many."""
    x, positions = inputs.normal((3, 40), seed=71), np.array([[4, -1], [-1, -1], [0, 2]], np.int32)
    order, held = np.array([4, -1, 5, -1, 0, 17], np.int32), np.full((6, 40), 7, np.float32)
    into = backend.array(held)
    given = backend.array(x), backend.array(order), backend.array(positions), None
    run(permute_op.OP, LayoutInts(clears=False), given, into, None)
    np.testing.assert_array_equal(backend.numpy(into), np.stack([x[2], held[0], x[2], held[0], x[0], held[0]]))
    run(permute_op.OP, LayoutInts(), given, into, None)
    assert not backend.numpy(into)[[1, 3, 5]].any()


def test_too_many_slots_for_a_dot_product(backend: Backend) -> None:
    moved = Moved(backend, Case(num_tokens=1, top_k=20_000, hidden=1, padding=0))
    moved.check_sums(moved.unpermute(), has_residual=True)
    with pytest.raises(ValueError, match="positions must have at most 11775 columns for such a gradient, got int32"):
        moved.permute_backward("dots")


# -- Launch shape ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("case", [Case(), Case(hidden=4096), Case(hidden=7168, dtype="float32"), Case(hidden=5)])
def test_threads_of_a_dot_product_do_not_depend_on_the_number_of_tokens(case: Case) -> None:
    shapes = set()
    for num_tokens in (1, 100, 1000, 100_000):
        kernel = planned(replace(case, num_tokens=num_tokens), ("rows", "dots"))
        shapes.add(tuple(kernel.macros[name] for name in ("TEAM", "TEAMS", "UNROLL", "VECTOR", "PARTS")))
    assert len(shapes) == 1


def planned(case: Case, want: tuple[str, ...]) -> Any:
    def view(name: str, shape: tuple[int, ...], dtype: str) -> View:
        return View(name, 0, shape, dense_strides(shape), dtype, ("cuda", 0), False, None)

    n, m, hidden = case.num_tokens, case.num_tokens * case.top_k, case.hidden
    arrays: dict[str, Any] = dict.fromkeys(("residual", "residual_scale", "scaled", "residual_dots"))
    arrays |= {"x": view("x", (n, hidden), case.dtype), "order": view("order", (m,), "int32")}
    arrays |= {name: view(name, (m, hidden), case.dtype) for name in ("y", "rows")}
    arrays |= {name: view(name, (n, case.top_k), "int32") for name in ("positions", "dots")}
    arrays |= {"weights": view("weights", (n, case.top_k), "float32")}
    return move_rows.permute_kernel(GradientOptions(want), Arrays(tuple(arrays), tuple(arrays.values())), DEFAULT)
