# SPDX-License-Identifier: Apache-2.0
"""Kernels in which several rows share a warp choose by cut keys and look again at what came out. Here are the rows for
which a look at the keys alone is wrong; the results must be those of a warp for each row, to the bit."""

from __future__ import annotations

from dataclasses import replace
from typing import Any
from unittest import mock

import numpy as np
import pytest

from cupy_router import RoutingMethod
from cupy_router.ops import _row_lanes
from cupy_router.ops.activation_topk import interleaved_lanes
from cupy_router.reference.activation_topk import activation_topk as route
from cupy_router.reference.topk_select import topk_select as reference
from cupy_router.tuning import DEFAULT, assume
from tests import compare, inputs
from tests.backends import DTYPES, Backend
from tests.fuzz.case import call

FEW, SOME, MANY = 100, 1000, 5000  # as of so many rows


def one_row_a_warp(**given: Any) -> Any:
    """activation_topk by the exact scores of whole rows."""
    with mock.patch.multiple(_row_lanes, interleaved_lanes=lambda *_: 0, group_lanes=lambda *_: 0):
        return call("activation_topk", SOME, **given)


def hard_rows(columns: int, top_k: int, seed: int = 0) -> np.ndarray:
    """Float32 rows; what makes each hard stands beside it."""
    rng = inputs.rng(41, seed)
    ramp = np.arange(columns, dtype=np.float32)
    rows = [
        ramp / 8,  # the best are neighbours
        -ramp,
        rng.permutation(1 + ramp * np.float32(2.0**-23)),  # differ where keys are cut
        rng.permutation(-1 - ramp * np.float32(2.0**-23)),
        np.zeros(columns),  # ties alone
        np.full(columns, np.nan),
        np.full(columns, -np.inf),
        np.full(columns, np.inf),
        -2 - ramp / 8,  # nothing is positive
        rng.permutation(ramp) * 1e-3 + 200,  # sigmoids that are all 1
        rng.permutation(ramp) * 1e-3 - 40,  # scores far below the error of a bound
    ]
    for lane_columns in (4, 8):  # of a word: the best lie in one of 8 or 16 lanes
        for lanes in (8, 16):
            row = rng.standard_normal(columns)
            row[ramp // lane_columns % lanes == 3] += 8
            rows.append(row)
    signs = np.where(rng.random(columns) < 0.5, np.float32(-0.0), np.float32(0.0))
    rows.append(np.where(ramp % 9 < 8, -1 - rng.random(columns), signs))  # zeros of both signs
    for best in (top_k - 1, top_k, top_k + 1, top_k + 2):  # so many equal ones lead, or other numbers do
        row = rng.standard_normal(columns)
        row[rng.choice(columns, best, replace=False)] = 9
        rows.append(row)
        row = np.full(columns, np.nan)
        row[rng.choice(columns, best, replace=False)] = rng.standard_normal(best)
        rows.append(row)
        row = np.where(rng.random(columns) < 0.5, 0.0, -0.0)  # so many, then ties
        row[rng.choice(columns, best - 1, replace=False)] = 1 + rng.random(best - 1)
        rows.append(row)
    masked = np.full(columns, -np.inf)
    masked[columns // 2 :: 11] = np.nan
    rows.append(masked)
    nan = rng.standard_normal(columns)
    nan[::5], nan[2::7] = np.nan, -np.nan
    few = np.round(2 * rng.standard_normal(columns))
    return np.stack([*rows, nan, few, rng.standard_normal(columns)]).astype(np.float32)


@pytest.mark.parametrize("dtype", inputs.FLOATS)
@pytest.mark.parametrize(("columns", "k"), [(256, 6), (384, 7), (200, 8), (256, 32)])
@pytest.mark.parametrize(("as_of_rows", "capability"), [(SOME, (9, 0)), (MANY, (9, 0)), (MANY, (8, 0))])
def test_topk_select(
    backend: Backend, dtype: str, columns: int, k: int, as_of_rows: int, capability: tuple[int, int]
) -> None:
    scores = hard_rows(columns, k).astype(DTYPES[dtype])
    limits: list[dict[str, Any]] = [{}, {"lengths": (np.arange(len(scores)) * 5 % (columns + 3)).astype(np.int32)}]
    for given in limits:
        on_device = {name: backend.array(array) for name, array in given.items()}
        with assume(replace(DEFAULT, capability=capability)):
            result = call("topk_select", as_of_rows, scores=backend.array(scores), k=k, **on_device)
        want = reference(scores, k, given.get("lengths"))
        np.testing.assert_array_equal(backend.numpy(result.indices), want[1])
        compare.assert_same_bits(backend.numpy(result.values), want[0])


OPTIONS: dict[str, dict[str, Any]] = {
    "by column": {"order": "column"},
    "any": {"order": "any", "return_values": False},
    "by column, pages": {"order": "column", "return_values": False, "page_size": 8},
}


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize(("columns", "k"), [(256, 6), (200, 13)])
@pytest.mark.parametrize("as_of_rows", [FEW, SOME, MANY])
@pytest.mark.parametrize("name", OPTIONS)
def test_options_of_topk_select(backend: Backend, dtype: str, columns: int, k: int, as_of_rows: int, name: str) -> None:
    scores, options = hard_rows(columns, k, seed=5).astype(DTYPES[dtype]), OPTIONS[name]
    given = {"lengths": (np.arange(len(scores)) * 11 % (columns + 3)).astype(np.int32)}
    if "page_size" in options:
        pages = inputs.rng(44).permutation(len(scores) * -(-columns // 8)).astype(np.int32)
        given["index_map"] = pages.reshape(len(scores), -1)
    on_device = {array: backend.array(given[array]) for array in given}
    result = call("topk_select", as_of_rows, scores=backend.array(scores), k=k, **on_device, **options)
    order, page_size = options["order"], options.get("page_size", 1)
    want = reference(scores, k, given["lengths"], order=order, page_size=page_size, index_map=given.get("index_map"))
    np.testing.assert_array_equal(backend.numpy(result.indices), want[1])
    if options.get("return_values", True):
        compare.assert_same_bits(backend.numpy(result.values), want[0])


@pytest.mark.parametrize("biased", [False, True])
@pytest.mark.parametrize("score", ["sqrtsoftplus", "sigmoid", "identity"])
@pytest.mark.parametrize(
    ("experts", "k", "dtype"), [(256, 6, "float32"), (256, 8, "bfloat16"), (200, 3, "float16"), (200, 16, "float32")]
)
def test_activation_topk(backend: Backend, experts: int, k: int, dtype: str, score: str, biased: bool) -> None:
    logits = backend.array(hard_rows(experts, k, seed=1).astype(DTYPES[dtype]))
    method = RoutingMethod(experts, k, score, renormalize_eps=1e-20, scale=2.5)
    biases = [
        inputs.normal((experts,), seed=42),
        np.full(experts, -3, np.float32),
        np.float32(8.08) + np.zeros(experts),
    ]
    for bias in biases if biased else [None]:
        given = {} if bias is None else {"bias": backend.array(bias.astype(np.float32))}
        want = one_row_a_warp(logits=logits, method=method, **given)
        for as_of_rows in (SOME, MANY):
            got = call("activation_topk", as_of_rows, logits=logits, method=method, **given)
            np.testing.assert_array_equal(backend.numpy(got.indices), backend.numpy(want.indices))
            compare.assert_same_bits(backend.numpy(got.weights), backend.numpy(want.weights))


GROUPED = {
    "a group to a lane": RoutingMethod(160, 6, "identity", num_groups=8, top_groups=3),
    "to two lanes": RoutingMethod(256, 8, "sigmoid", num_groups=8, top_groups=4, group_score="top2", scale=2.5),
    "to four": RoutingMethod(128, 7, "sqrtsoftplus", num_groups=4, top_groups=1, group_score="top2"),
    "no more than the winners": RoutingMethod(64, 8, "sigmoid", num_groups=8, top_groups=1),
}


@pytest.mark.parametrize("dtype", inputs.FLOATS)
@pytest.mark.parametrize("name", GROUPED)
def test_groups(backend: Backend, name: str, dtype: str) -> None:
    method = GROUPED[name]
    assert interleaved_lanes(DEFAULT, method, MANY) > 0
    experts = method.num_experts
    logits = backend.array(hard_rows(experts, method.top_k, seed=3).astype(DTYPES[dtype]))
    biases = [inputs.normal((experts,), seed=43), np.full(experts, -3, np.float32)]
    for bias in biases if dtype == "float32" else [None]:
        given = {} if bias is None else {"bias": backend.array(bias)}
        want = one_row_a_warp(logits=logits, method=method, **given)
        got = call("activation_topk", MANY, logits=logits, method=method, **given)
        np.testing.assert_array_equal(backend.numpy(got.indices), backend.numpy(want.indices))
        np.testing.assert_array_equal(backend.numpy(got.weights), backend.numpy(want.weights))  # NaN of any kind


def test_groups_of_a_softmax(backend: Backend) -> None:
    """One kernel for any number of rows, so that the sum is always the same."""
    method = RoutingMethod(160, 6, "softmax", num_groups=8, top_groups=3, renormalize=False)
    assert interleaved_lanes(DEFAULT, method, 1) == interleaved_lanes(DEFAULT, method, MANY) > 0
    rows = np.delete(hard_rows(160, 6, seed=4), (2, 3), axis=0)  # in which rounding decides
    got = call("activation_topk", 0, logits=backend.array(rows), method=method)
    weights, indices = route(rows, method)
    np.testing.assert_array_equal(backend.numpy(got.indices), indices)
    np.testing.assert_allclose(backend.numpy(got.weights), weights, rtol=1e-5, atol=1e-37)


def test_padding(backend: Backend) -> None:
    """Rows that share a warp with padding."""
    logits = backend.array(hard_rows(256, 6, seed=2))
    whole = call("activation_topk", MANY, logits=logits, method=RoutingMethod(256, 6))
    for valid in (0, 1, 5, 15, 22):
        got = call("activation_topk", MANY, logits=logits, method=RoutingMethod(256, 6), num_valid=valid)
        for part, all_rows, padding in zip(got, whole, (0, -1), strict=True):
            compare.assert_same_bits(backend.numpy(part)[:valid], backend.numpy(all_rows)[:valid])
            assert (backend.numpy(part)[valid:] == padding).all()
