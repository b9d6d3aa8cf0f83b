# SPDX-License-Identifier: Apache-2.0
"""Rows moved by permute, unpermute and their gradients, and what is right, by sums in float64.

Layouts are made up: pairs at any rows, numbers outside of the range where there is none.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np

from cupy_router.ops import permute as permute_op
from cupy_router.ops import unpermute as unpermute_op
from cupy_router.ops._permute_backward import OP as PERMUTE_BACKWARD
from cupy_router.ops._rows import GradientOptions, LayoutInts
from cupy_router.ops._run import run
from cupy_router.ops._unpermute_backward import OP as UNPERMUTE_BACKWARD
from tests import compare, inputs
from tests.backends import Backend

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
        found = run(op, options, arrays, None, None)
        results = self.numpy([found] if op.bare else found)
        into = [self.device(np.full(array.shape, 7, array.dtype)) for array in results]
        if op.bare:
            (out,) = into
        else:
            names = [result.name for result in op.existing(options)]
            out = op.returns(**dict.fromkeys(op.returns._fields) | dict(zip(names, into, strict=True)))
        run(op, options, arrays, out, None)
        for first, second in zip(results, self.numpy(into), strict=True):
            compare.assert_same_bits(second, first)
        return results

    def permute(self) -> np.ndarray:
        return self.run(permute_op.OP, LayoutInts(), self.x, *self.layout, self.weights)[0]

    def unpermute(self, *, has_residual: bool = True) -> np.ndarray:
        residual, scale = (self.residual, self.scale) if has_residual else (None, None)
        layout = self.layout.positions, None
        return self.run(unpermute_op.OP, LayoutInts(), self.y, *layout, self.weights, residual, scale)[0]

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
