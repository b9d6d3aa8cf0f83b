# SPDX-License-Identifier: Apache-2.0
"""Rules of comparison: which differences rounding explains. The right answers are those of tests/oracle.py."""

from __future__ import annotations

from typing import Any

import numpy as np

from cupy_router import RoutingMethod
from tests import oracle
from tests.methods import Layer
from tests.oracle import TINY, Routing

NO_ARRAYS = Layer()
ULP = float(np.finfo(np.float32).eps)
HALF_ULP = {"float32": 0.0, "float16": 2.0**-11, "bfloat16": 2.0**-8}  # relative, of a weight's last rounding


def assert_same_bits(got: np.ndarray, want: np.ndarray) -> None:
    """Assert equality of all bits, NaN payloads and the sign of zero included."""
    assert (got.dtype, got.shape) == (want.dtype, want.shape)
    word = np.dtype(f"u{want.dtype.itemsize}")
    np.testing.assert_array_equal(np.ascontiguousarray(got).view(word), np.ascontiguousarray(want).view(word))


def assert_selects_validly(indices: np.ndarray, columns: int) -> None:
    """Assert that indices are in range and unique within each row."""
    assert indices.size == 0 or (indices.min() >= 0 and indices.max() < columns), "index out of range"
    ranked = np.sort(indices, axis=-1)
    assert (ranked[:, 1:] != ranked[:, :-1]).all(), "the same index twice in a row"


def tolerance(logits: np.ndarray, indices: np.ndarray, method: Any, renormalize: bool | None = None) -> np.ndarray:
    """Return the relative tolerance of each weight: a few roundings, plus that of x - max in a softmax."""
    renormalize = method.renormalize if renormalize is None else renormalize
    rtol = np.full(indices.shape, 2e-6 if renormalize else 1e-6)
    if method.score == "softmax":
        x = logits.astype(np.float64)
        with np.errstate(invalid="ignore"):
            below = np.fmax.reduce(x, axis=-1, keepdims=True, initial=-np.inf) - np.take_along_axis(x, indices, -1)
        below[~np.isfinite(below)] = 0
        rtol += 6e-8 * (below.max(axis=-1, keepdims=True, initial=0) if renormalize else below)
    elif method.score == "identity" and renormalize:  # terms of either sign may cancel
        terms = np.take_along_axis(logits.astype(np.float64), indices, -1)
        with np.errstate(all="ignore"):
            condition = np.abs(terms).sum(-1, keepdims=True) / np.abs(terms.sum(-1, keepdims=True))
        rtol *= np.where(np.isfinite(condition), condition, 1)
    return rtol


def step_tolerance(prepared: np.ndarray, experts: np.ndarray, method: RoutingMethod) -> np.ndarray:
    """Return the relative tolerance [n, 1] of a token's weights before the last rounding, for any method."""
    largest = np.where(np.isfinite(prepared), np.abs(prepared), 0).astype(np.float64).max(-1, keepdims=True, initial=0)
    if method.score == "softmax" or method.shared_in_normalizer:
        rtol = 3e-6 + 1.2e-7 * largest  # of x - max before an exponential
    else:
        rtol = tolerance(prepared, experts, method).max(-1, keepdims=True, initial=3e-6)
    return np.asarray(rtol + 5e-7 * largest * (method.logit_softcap is not None))


def assert_weights_close(got: np.ndarray, want: np.ndarray, rtol: Any, scale: float = 1.0) -> None:
    """Assert that NaN and infinities agree exactly, the rest within rtol; a subnormal float32 may be 0."""
    assert (got.dtype, got.shape) == (want.dtype, want.shape)
    g, w = got.astype(np.float64), want.astype(np.float64)
    with np.errstate(invalid="ignore"):
        close = np.abs(g - w) <= rtol * np.abs(w) + TINY * max(1.0, abs(scale))
    bad = ~(close | (g == w) | (np.isnan(g) & np.isnan(w)))
    where = np.argwhere(bad)[:5].tolist()
    assert not bad.any(), f"{bad.sum()} of {bad.size} weights differ, at {where}: {got[bad][:5]} != {want[bad][:5]}"


def assert_routes(
    got: Routing, want: Routing, logits: np.ndarray, method: Any, bias: np.ndarray | None = None, exact: bool = False
) -> None:
    """Assert the same experts, except for ties within rounding, and the same weights.

    exact: the selection values of different logits are further apart than rounding, so that order and sets must agree.
    """
    rows, k = logits.shape[0], method.top_k
    assert str(got.indices.dtype) == "int32"
    assert got.indices.shape == (rows, k)
    assert_selects_validly(got.indices, logits.shape[1])
    prepared = oracle.prepare(logits, method)
    values = oracle.selection(prepared, method, bias)
    if exact or method.score == "identity":
        np.testing.assert_array_equal(got.indices, want.indices)
    else:
        with np.errstate(invalid="ignore"):
            rounding = tolerance(logits, want.indices, method, renormalize=False)
            _assert_within_rounding(got.indices, want.indices, values, bias, rounding)
    rtol = tolerance(logits, got.indices, method)
    assert_weights_close(got.weights, oracle.weigh(prepared, got.indices, method), rtol, method.scale)
    same = (np.sort(got.indices, -1) == np.sort(want.indices, -1)).all(-1)
    dense_got, dense_want, dense_rtol = (
        _scatter(weights, indices, logits.shape)[same]
        for weights, indices in ((got.weights, got.indices), (want.weights, want.indices), (rtol, got.indices))
    )
    assert_weights_close(dense_got, dense_want, dense_rtol, method.scale)


def assert_right(
    got: tuple[np.ndarray, np.ndarray],
    logits: np.ndarray,
    method: RoutingMethod,
    layer: Layer = NO_ARRAYS,
    table: np.ndarray | None = None,
) -> None:
    """Assert the oracle's experts (or the table's), and its weights within rounding, for any method.

    The logits are so far apart that no rounding decides between different ones.
    """
    weights, indices = got
    assert (str(weights.dtype), str(indices.dtype)) == (method.weight_dtype, method.index_dtype)
    x = oracle.prepare(logits, method, layer.logit_bias)
    experts = oracle.choose(x, method, layer.bias) if table is None else table
    want = oracle.weigh(x, experts, method, layer.expert_scale)
    np.testing.assert_array_equal(indices, oracle.results(want, experts, method).indices)
    rtol = step_tolerance(x, experts, method) + HALF_ULP[method.weight_dtype]
    scale = max(1.0, abs(method.scale))
    if method.weight_dtype == "float16":
        scale *= 2.0**-25 / TINY  # half of its smallest subnormal
    assert_weights_close(weights.astype(np.float32), want, rtol, scale)


def _assert_within_rounding(
    got: np.ndarray, want: np.ndarray, values: np.ndarray, bias: np.ndarray | None, rtol: np.ndarray
) -> None:
    """Assert that where picks differ, position by position, their values are nearly equal."""
    g, w = (np.take_along_axis(values, i, -1).astype(np.float64) for i in (got, want))
    shift = 0.0 if bias is None else 2 * ULP * float(np.abs(bias[np.isfinite(bias)]).max(initial=0))
    bad = (got != want) & ~(np.abs(g - w) <= rtol * np.abs(w) + shift + TINY)
    rows = np.flatnonzero(bad.any(-1))[:5]
    assert not bad.any(), f"rows {rows} select differently: {got[bad][:5]} for {want[bad][:5]}"


def _scatter(weights: np.ndarray, indices: np.ndarray, shape: tuple[int, ...]) -> np.ndarray:
    dense = np.zeros(shape, weights.dtype)
    np.put_along_axis(dense, indices.astype(np.int64), weights, -1)
    return dense
