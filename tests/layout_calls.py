# SPDX-License-Identifier: Apache-2.0
"""Calls of expert_layout, permute and unpermute that are checked as they are made."""

from __future__ import annotations

from typing import Any

import numpy as np

from cupy_router import ExpertLayout, expert_layout, permute, unpermute
from cupy_router.reference import expert_layout as reference
from cupy_router.reference import permute as permute_reference
from tests import compare, oracle_layout
from tests.backends import Backend
from tests.canvas import Canvas


def tokens(backend: Backend, n: int, k: int) -> int:
    """Return how many of n tokens this backend runs."""
    return min(n, max(1, 1500 // max(k, 1))) if backend.name == "simt" else n


def lay_out(
    backend: Backend, indices: np.ndarray, num_experts: int, *, row_pad: int = 0, offset: int = 0,
    place: int | None = None, load: np.ndarray | None = None, num_valid: Any = None, stream: Any = None,
    **options: Any,
) -> dict[str, np.ndarray]:  # fmt: skip
    """Return the arrays of a layout by name; the reference is checked by the oracle, kernels by the reference.

    row_pad, offset: elements between the rows of the indices, and before them.
    place: results go into memory of the caller with marks around each, `positions` with this many elements between its
        rows; None: the op allocates.
    load: what the load is before the call; it is checked after it.
    """
    given = backend.array(indices, row_pad, offset)
    arrays = {"load": load, "expert_map": options.get("expert_map"), "num_valid": num_valid}
    on_device = {name: backend.array(a) if isinstance(a, np.ndarray) else a for name, a in arrays.items()}
    options = {name: option for name, option in options.items() if name != "expert_map"}
    want = options.get("want", oracle_layout.DEFAULT_WANT)

    n, k = indices.shape
    valid = n if num_valid is None else min(max(int(np.reshape(num_valid, ())), 0), n)
    right = expected(backend, indices, num_experts, arrays["expert_map"], valid, options)
    canvases: dict[str, Canvas] = {}
    out = None
    if place is not None:
        for name, array in right.items():
            canvases[name] = Canvas(array.shape, place, np.int32, backend)
        out = ExpertLayout(**{name: canvas.array for name, canvas in canvases.items()})

    result = expert_layout(given, num_experts, **on_device, **options, out=out, stream=stream)
    assert type(result) is ExpertLayout
    capacity = options.get("capacity")
    local = options.get("num_local")
    if local is None:
        local = num_experts if options.get("experts") is None else options["experts"][1]
    alignment = options.get("alignment", 1)
    capacity = oracle_layout.formula(n * k, local, alignment) if capacity is None else capacity
    numbers = result.num_tokens, result.top_k, result.alignment, result.capacity
    assert numbers == (n, k, alignment, capacity)
    assert all(type(number) is int for number in numbers)
    found = {}
    for name in oracle_layout.NAMES:
        array = getattr(result, name)
        assert (array is None) == (name not in oracle_layout.returned(want)), name
        if array is not None:
            if out is not None:
                assert array is getattr(out, name)
            found[name] = backend.numpy(array)
            assert (found[name].dtype, found[name].shape) == (np.int32, right[name].shape), name
            np.testing.assert_array_equal(found[name], right[name], err_msg=name)
    for name, canvas in canvases.items():
        assert canvas.is_clean(), f"something beside {name} was written"
    compare.assert_same_bits(backend.numpy(given), indices)
    for name in ("expert_map", "num_valid"):
        if isinstance(arrays[name], np.ndarray):
            compare.assert_same_bits(backend.numpy(on_device[name]), arrays[name])
    if load is not None:
        question = options.get("experts"), arrays["expert_map"], options.get("num_local")
        more = oracle_layout.demand(indices, num_experts, *question, num_valid=valid)
        compare.assert_same_bits(backend.numpy(on_device["load"]), load + more.astype(load.dtype))
    return found


def expected(
    backend: Backend, indices: np.ndarray, num_experts: int, expert_map: Any, valid: int, options: dict[str, Any]
) -> dict[str, np.ndarray]:
    """Return what a call has to give: by the reference for kernels, by the oracle for the reference."""
    if not backend.runs_kernels:
        return oracle_layout.expert_layout(
            indices,
            num_experts,
            expert_map=expert_map,
            num_valid=valid,
            **{"want": oracle_layout.DEFAULT_WANT} | options,
        )
    plain = {name: option for name, option in options.items() if name != "want"}
    made = reference.expert_layout(indices, num_experts, expert_map=expert_map, num_valid=valid, **plain)
    wanted = oracle_layout.returned(options.get("want", oracle_layout.DEFAULT_WANT))
    return {name: made[name] for name in oracle_layout.NAMES if name in wanted}


def layout_of(backend: Backend, indices: np.ndarray, num_experts: int, **options: Any) -> ExpertLayout:
    """Return a layout on the backend, made by the oracle: rows do not depend on the kernels of layouts."""
    made = oracle_layout.expert_layout(indices, num_experts, **options)
    n, k = indices.shape
    alignment, capacity = options.get("alignment", 1), len(made["order"])
    arrays = {name: backend.array(array) for name, array in made.items()}
    return ExpertLayout(**arrays, num_tokens=n, top_k=k, alignment=alignment, capacity=capacity)


# -- Rows --------------------------------------------------------------------------------------------------------------


def to_rows(
    backend: Backend, x: np.ndarray, layout: ExpertLayout, weights: np.ndarray | None = None, *, row_pad: int = 0,
    offset: int = 0, place: int | None = None,
) -> np.ndarray:  # fmt: skip
    """Return `permute`, checked to the last bit: without weights bytes are moved, with them one product is rounded."""
    given = backend.array(x, row_pad, offset)
    factors = None if weights is None else backend.array(weights, row_pad, offset)
    order, top_k = backend.numpy(layout.order), layout.positions.shape[1]
    right = (permute_reference if backend.runs_kernels else oracle_layout).permute(x, order, top_k, weights)
    canvas = None if place is None else Canvas(right.shape, place, x.dtype, backend)
    out = None if canvas is None else canvas.array
    result = permute(given, layout, weights=factors, out=out)
    assert canvas is None or (result is out and canvas.is_clean())
    got = backend.numpy(result)
    assert (got.dtype, got.shape) == (right.dtype, right.shape)
    if weights is None:
        same_bytes(got, right)
    else:
        np.testing.assert_array_equal(got.astype(np.float32), right.astype(np.float32))
    same_bytes(backend.numpy(given), x)
    return got


def same_bytes(got: np.ndarray, want: np.ndarray) -> None:
    """Assert the same bytes, of arrays of any dtype."""
    assert (got.dtype, got.shape) == (want.dtype, want.shape)
    assert np.ascontiguousarray(got).tobytes() == np.ascontiguousarray(want).tobytes()


def to_tokens(
    backend: Backend, y: np.ndarray, layout: ExpertLayout, weights: np.ndarray | None = None,
    residual: np.ndarray | None = None, residual_scale: np.ndarray | None = None, *, row_pad: int = 0,
    offset: int = 0, place: int | None = None, exact: bool = False,
) -> np.ndarray:  # fmt: skip
    """Return `unpermute`, checked within its roundings of float64 sums; with `exact` inputs every sum is exact."""
    host = {"weights": weights, "residual": residual, "residual_scale": residual_scale}
    given = {name: None if a is None else backend.array(a, row_pad, offset) for name, a in host.items()}
    positions = backend.numpy(layout.positions)
    (n, k), hidden = positions.shape, y.shape[1]
    canvas = None if place is None else Canvas((n, hidden), place, y.dtype, backend)
    out = None if canvas is None else canvas.array
    on_device = backend.array(y, row_pad, offset)
    result = unpermute(on_device, layout, **given, out=out)
    assert canvas is None or (result is out and canvas.is_clean())
    got = backend.numpy(result)
    assert (got.dtype, got.shape) == (y.dtype, (n, hidden))
    sums, sizes = oracle_layout.unpermute(y, positions, weights, residual, residual_scale)
    with np.errstate(over="ignore"):
        right = sums.astype(np.float32).astype(y.dtype).astype(np.float64)
    if exact:
        np.testing.assert_array_equal(got.astype(np.float64), right)
    else:
        assert_within_rounding(got, right, sums, sizes, k)
    same_bytes(backend.numpy(on_device), y)
    return got


def assert_within_rounding(got: np.ndarray, right: np.ndarray, sums: np.ndarray, sizes: np.ndarray, k: int) -> None:
    """Assert that each sum differs by no more than a rounding per product and term, and one to the dtype."""
    finite = np.isfinite(sums) & np.isfinite(right)
    np.testing.assert_array_equal(got.astype(np.float64)[~finite], right[~finite])
    tiny = 2.0**-25 if got.dtype == np.float16 else 0.0  # half of its smallest subnormal
    with np.errstate(invalid="ignore"):
        bound = 2 * (k + 1) * 2.0**-24 * sizes + compare.HALF_ULP[str(got.dtype)] * np.abs(sums) + tiny + 4e-38
        worst = (np.abs(got.astype(np.float64) - sums) / bound)[finite]
    assert worst.size == 0 or worst.max() <= 1.01, f"{worst.max()} times the rounding"
