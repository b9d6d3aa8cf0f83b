# SPDX-License-Identifier: Apache-2.0
"""The kernels that move rows: permute, unpermute and their gradients, against sums in float64.

Layouts are made up: pairs at any rows, numbers outside of the range where there is none.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import ml_dtypes
import numpy as np
import pytest

from cupy_router.arrays import View, dense_strides
from cupy_router.ops import _move_rows as move_rows
from cupy_router.ops import permute as permute_op
from cupy_router.ops import unpermute as unpermute_op
from cupy_router.ops._declared import Arrays
from cupy_router.ops._permute_backward import OP as PERMUTE_BACKWARD
from cupy_router.ops._rows import NO_OPTIONS, GradientOptions
from cupy_router.ops._run import run
from cupy_router.ops._unpermute_backward import OP as UNPERMUTE_BACKWARD
from cupy_router.tuning import DEFAULT
from tests import compare, inputs
from tests.backends import DTYPES, Backend

pytestmark = pytest.mark.needs_kernels

# Of the results: relative error of rounding, and the largest error where a float16 is subnormal.
HALF_ULP = {"float32": 2.0**-24, "float16": 2.0**-11, "bfloat16": 2.0**-8}
SUBNORMAL = {"float32": 0.0, "float16": 2.0**-25, "bfloat16": 0.0}
NOWHERE = (-1, -7, -(2**31), 2**31 - 1)  # and what does not exist in a layout


@dataclass(frozen=True)
class Case:
    """What to move and how; `pad` and `offset` in elements, between rows and before them."""

    num_tokens: int = 9
    top_k: int = 6
    hidden: int = 264
    dtype: str = "bfloat16"
    weight_dtype: str | None = "float32"
    other_dtype: str | None = None  # of the residual, and of y or x of a gradient; None: the same
    has_scale: bool = True
    padding: int = 5  # rows
    pad: int = 0
    offset: int = 0

    def __str__(self) -> str:
        return f"{self.num_tokens}-{self.top_k}-{self.hidden}-{self.dtype}-{self.pad}-{self.offset}"


class Layout(NamedTuple):
    """Pairs at any rows of a buffer."""

    order: np.ndarray
    positions: np.ndarray


def layout_of(case: Case, seed: int = 60) -> Layout:
    rng = np.random.default_rng(seed)
    num_pairs = case.num_tokens * case.top_k
    capacity = max(0, num_pairs + case.padding)
    order = rng.choice([*NOWHERE, num_pairs], capacity).astype(np.int32)
    positions = rng.choice([*NOWHERE, capacity], num_pairs).astype(np.int32)
    pairs = rng.permutation(num_pairs)[: max(0, min(num_pairs, capacity) - num_pairs // 8)]
    if case.num_tokens > 2:
        pairs = pairs[pairs // case.top_k != 1]  # token 1 has no pair
    rows = rng.permutation(capacity)[: len(pairs)]
    order[rows], positions[pairs] = pairs, rows
    return Layout(order, positions.reshape(case.num_tokens, case.top_k))


class Moved:
    """Host arrays of a case, and the results of the kernels of a backend."""

    def __init__(self, backend: Backend, case: Case) -> None:
        self.backend, self.case, self.layout = backend, case, layout_of(case)
        shape, other = (case.num_tokens, case.hidden), case.other_dtype or case.dtype
        self.x = inputs.normal(shape, case.dtype, seed=61)
        self.y = inputs.normal((len(self.layout.order), case.hidden), case.dtype, seed=62)
        self.residual, self.other_x = inputs.normal(shape, other, seed=63), inputs.normal(shape, other, seed=66)
        self.other_y = inputs.normal(self.y.shape, other, seed=65)
        slots = (case.num_tokens, case.top_k)
        self.weights = inputs.normal(slots, case.weight_dtype, seed=64) if case.weight_dtype else None
        self.scale = inputs.normal((case.num_tokens,), seed=67) if case.has_scale else None

    def device(self, host: np.ndarray | None) -> Any:
        if host is None:
            return None
        return self.backend.array(host, self.case.pad, self.case.offset if host.ndim == 2 else 0)

    def numpy(self, arrays: Any) -> list[np.ndarray]:
        return [self.backend.numpy(array) for array in arrays if array is not None]

    def run(self, op: Any, options: Any, *hosts: np.ndarray | None) -> list[np.ndarray]:
        """Return the results, the same to the bit in a second call into the caller's strided arrays."""
        arrays = tuple(map(self.device, hosts))
        results = self.numpy(run(op, options, arrays, None, None))
        into = [self.device(np.full(array.shape, 7, array.dtype)) for array in results]
        names = [result.name for result in op.existing(options)]
        run(
            op,
            options,
            arrays,
            op.returns(**dict.fromkeys(op.returns._fields) | dict(zip(names, into, strict=True))),
            None,
        )
        for first, second in zip(results, self.numpy(into), strict=True):
            compare.assert_same_bits(second, first)
        return results

    def permute(self) -> np.ndarray:
        return self.run(permute_op.OP, NO_OPTIONS, self.x, *self.layout, self.weights)[0]

    def unpermute(self, *, has_residual: bool = True) -> np.ndarray:
        residual, scale = (self.residual, self.scale) if has_residual else (None, None)
        layout = self.layout.positions, None
        return self.run(unpermute_op.OP, NO_OPTIONS, self.y, *layout, self.weights, residual, scale)[0]

    def permute_backward(self, *want: str) -> list[np.ndarray]:
        given = self.y, self.layout.positions, self.weights, self.other_x
        return self.run(PERMUTE_BACKWARD, GradientOptions(want), *given)

    def unpermute_backward(self, *want: str) -> list[np.ndarray]:
        given = self.x, *self.layout, self.weights, self.other_y, self.residual, self.scale
        return self.run(UNPERMUTE_BACKWARD, GradientOptions(want), *given)

    # -- What is right -------------------------------------------------------------------------------------------------

    def pairs(self) -> Iterator[tuple[int, int, int]]:
        """Token, slot and row of each pair that has one."""
        positions = self.layout.positions
        for token, slot in np.argwhere((positions >= 0) & (positions < len(self.layout.order))):
            yield int(token), int(slot), int(positions[token, slot])

    def check_rows(self, rows: np.ndarray) -> None:
        want = np.zeros(rows.shape, rows.dtype)
        for token, slot, row in self.pairs():
            want[row] = self.x[token]
            if self.weights is not None:
                product = self.x[token].astype(np.float32) * self.weights[token, slot].astype(np.float32)
                want[row] = product.astype(rows.dtype)
        compare.assert_same_bits(rows, want)

    def check_sums(self, sums: np.ndarray, *, has_residual: bool = True) -> None:
        want, sizes = np.zeros((2, *sums.shape))
        for token, slot, row in self.pairs():
            weight = 1.0 if self.weights is None else float(self.weights[token, slot])
            want[token] += weight * self.y[row].astype(np.float64)
            sizes[token] += np.abs(weight * self.y[row].astype(np.float64))
        if has_residual:
            factors = np.ones(len(want)) if self.scale is None else self.scale.astype(np.float64)
            want += factors[:, None] * self.residual.astype(np.float64)
            sizes += np.abs(factors[:, None] * self.residual.astype(np.float64))
        rounding = HALF_ULP[self.case.dtype] * np.abs(want) + SUBNORMAL[self.case.dtype]
        bound = rounding + (self.case.top_k + 3) * 2.0**-23 * sizes
        assert (np.abs(sums.astype(np.float64) - want) <= bound).all()

    def check_dots(self, dots: np.ndarray, a: np.ndarray, b: np.ndarray) -> None:
        assert dots.dtype == np.float32
        want, sizes = np.zeros((2, *dots.shape))
        for token, slot, row in self.pairs():
            products = a[token].astype(np.float64) * b[row].astype(np.float64)
            want[token, slot], sizes[token, slot] = products.sum(), np.abs(products).sum()
        assert (np.abs(dots - want) <= 2e-6 * sizes).all()

    def check_residual(self, scaled: np.ndarray, residual_dots: np.ndarray) -> None:
        factors = np.float32(1) if self.scale is None else self.scale[:, None]
        compare.assert_same_bits(scaled, (self.x.astype(np.float32) * factors).astype(self.residual.dtype))
        products = self.x.astype(np.float64) * self.residual.astype(np.float64)
        assert (np.abs(residual_dots - products.sum(axis=1)) <= 2e-6 * np.abs(products).sum(axis=1)).all()

    def check_all(self) -> None:
        self.check_rows(self.permute())
        self.check_sums(self.unpermute())
        sums, dots = self.permute_backward("sums", "dots")
        self.check_sums(sums, has_residual=False)
        self.check_dots(dots, self.other_x, self.y)
        rows, dots, scaled, residual_dots = self.unpermute_backward("rows", "dots", "scaled", "residual_dots")
        self.check_rows(rows)
        self.check_dots(dots, self.x, self.other_y)
        self.check_residual(scaled, residual_dots)


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
        rows = backend.numpy(run(permute_op.OP, NO_OPTIONS, given, None, None).rows)
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
    run(permute_op.OP, NO_OPTIONS, given, permute_op.Rows(rows), None)
    np.testing.assert_array_equal(backend.numpy(into[-1:]), x.view(np.uint16))
    sums = run(unpermute_op.OP, NO_OPTIONS, (rows, backend.array(positions), None, None, None, None), None, None).sums
    np.testing.assert_array_equal(backend.numpy(sums), x)


def test_strides_beyond_32_bits(backend: Backend) -> None:
    memory = backend.xp.zeros(2**31 + 100, np.uint16)
    x = memory[: 2 * (2**30 + 50)].reshape(2, 2**30 + 50)[:, :40].view(DTYPES["bfloat16"])
    host = inputs.normal((2, 40), "bfloat16", seed=70)
    x[...] = backend.upload(host)
    order = np.array([1, 0], np.int32)
    given = x, backend.array(order), backend.array(order[:, None].copy()), None
    rows = run(permute_op.OP, NO_OPTIONS, given, None, None).rows
    np.testing.assert_array_equal(backend.numpy(rows), host[::-1])


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
