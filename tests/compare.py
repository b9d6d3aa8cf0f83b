# SPDX-License-Identifier: Apache-2.0
"""Brute-force versions of the three ops, independent of cupy_router.reference, and the rules of comparison."""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np

TINY = np.finfo(np.float32).tiny  # smaller float32 are subnormal and count as 0
ULP = float(np.finfo(np.float32).eps)


class Routing(NamedTuple):
    weights: np.ndarray
    indices: np.ndarray


# -- Brute force -------------------------------------------------------------------------------------------------------


def by_value(row: np.ndarray) -> np.ndarray:
    """Columns by descending value, equal values by ascending index, NaN last: all that an op may assume about order."""
    row = row.astype(np.float32)
    if row.size <= 2048:
        keys = [(value != value, -value) for value in row.tolist()]
        return np.array(sorted(range(row.size), key=keys.__getitem__), dtype=np.int64)
    return np.argsort(-row, kind="stable")  # NumPy sorts NaN to the end and keeps equal values in place


def topk(
    scores: np.ndarray, k: int, lengths: Any = None, starts: Any = None, *, order: str = "value", index_map: Any = None,
    page_size: int = 1,
) -> tuple[np.ndarray, np.ndarray]:  # fmt: skip
    rows, columns = scores.shape
    values = np.full((rows, k), -np.inf, scores.dtype)
    indices = np.full((rows, k), -1, np.int32)
    for r in range(rows):
        start = 0 if starts is None else int(starts[r])
        if not 0 <= start < columns:
            continue
        length = columns - start if lengths is None else min(int(lengths[r]), columns - start)
        row = scores[r, start : start + max(length, 0)]
        chosen = by_value(row)[:k]
        if order == "column":
            chosen = np.sort(chosen)
        values[r, : chosen.size] = row[chosen]
        if index_map is not None:
            pages = index_map[r % len(index_map)]
            chosen = np.array([pages[c // page_size] * page_size + c % page_size for c in chosen])
        indices[r, : chosen.size] = chosen
    return values, indices


def score(logits: np.ndarray, name: str) -> np.ndarray:
    """float32 scores of [n, E] logits, from float64 arithmetic; a score that float32 holds only as subnormal is 0."""
    x = logits.astype(np.float64)
    with np.errstate(all="ignore"):
        if name == "identity":
            y = x
        elif name == "sigmoid":
            y = 1 / (1 + np.exp(-x))
        elif name == "sqrtsoftplus":
            y = np.sqrt(np.logaddexp(0, x))
        else:
            top = np.fmax.reduce(x, axis=-1, keepdims=True, initial=-np.inf)
            e = np.where(x == top, 1.0, np.exp(x - top))
            y = e / np.nansum(e, axis=-1, keepdims=True)
        return flush(y.astype(np.float32))


def flush(x: np.ndarray) -> np.ndarray:
    """Subnormal float32 as 0, as kernels see them and make them."""
    return np.where(np.abs(x) < TINY, np.float32(0), x)


def selection(scores: np.ndarray, bias: np.ndarray | None) -> np.ndarray:
    with np.errstate(all="ignore"):
        return scores if bias is None else flush(scores + flush(bias))


def weigh(chosen: np.ndarray, method: Any) -> np.ndarray:
    """float32 weights of the [n, k] chosen scores."""
    w = chosen.astype(np.float64)
    with np.errstate(all="ignore"):
        if method.renormalize:
            total = np.nansum(w, axis=-1, keepdims=True)
            total = np.where(np.isnan(total), np.inf, total)  # infinities of both signs
            divisor = total + method.renormalize_eps
            if method.renormalize_min is not None:
                divisor = np.maximum(divisor, method.renormalize_min)
            w = np.where((total == 0) | (divisor == 0), w * 0, w / divisor)
        return np.asarray(w * method.scale, np.float32)


def route(logits: np.ndarray, method: Any, bias: np.ndarray | None = None, num_valid: int | None = None) -> Routing:
    scores = score(logits, method.score)
    chosen = [by_value(row)[: method.top_k] for row in selection(scores, bias)]
    indices = np.array(chosen, dtype=np.int32).reshape(len(logits), method.top_k)
    return pad(Routing(weigh(np.take_along_axis(scores, indices, -1), method), indices), num_valid)


def hashed(
    ids: np.ndarray, table: np.ndarray, method: Any, logits: np.ndarray | None, num_experts: int | None
) -> Routing:
    """Weights at the table's experts; a row whose token id or table entry is outside gets -1 and 0."""
    k, experts_end = table.shape[1], 2**31 if num_experts is None else num_experts
    indices, weights = np.full((ids.size, k), -1, np.int32), np.zeros((ids.size, k), np.float32)
    good = []
    for r, token in enumerate(ids.tolist()):
        if 0 <= token < len(table) and table[token].min() >= 0 and table[token].max() < experts_end:
            indices[r] = table[token]
            good.append(r)
    if logits is None:
        weights[good] = np.float32(1 / k)
    else:
        weights[good] = weigh(np.take_along_axis(score(logits[good], method.score), indices[good], -1), method)
    return Routing(weights, indices)


def pad(result: Routing, num_valid: int | None) -> Routing:
    if num_valid is not None:
        result.indices[num_valid:] = -1
        result.weights[num_valid:] = 0
    return result


# -- Rules of comparison -----------------------------------------------------------------------------------------------


def assert_same_bits(got: np.ndarray, want: np.ndarray) -> None:
    """Equal to the last bit, NaN payloads and the sign of zero included."""
    assert (got.dtype, got.shape) == (want.dtype, want.shape)
    word = np.dtype(f"u{want.dtype.itemsize}")
    np.testing.assert_array_equal(np.ascontiguousarray(got).view(word), np.ascontiguousarray(want).view(word))


def assert_selects_validly(indices: np.ndarray, columns: int) -> None:
    """In range and unique within each row."""
    assert indices.size == 0 or (indices.min() >= 0 and indices.max() < columns), "index out of range"
    ranked = np.sort(indices, axis=-1)
    assert (ranked[:, 1:] != ranked[:, :-1]).all(), "the same index twice in a row"


def tolerance(logits: np.ndarray, indices: np.ndarray, method: Any, renormalize: bool | None = None) -> np.ndarray:
    """Relative tolerance of each weight: a few roundings, plus that of x - max before the exponential of a softmax."""
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


def assert_weights_close(got: np.ndarray, want: np.ndarray, rtol: Any, scale: float = 1.0) -> None:
    """NaN and infinities agree exactly, the rest within rtol; what float32 holds only as subnormal may be 0."""
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
    """Both select the same experts, but for ties within rounding, and weigh what they chose alike.

    exact: the selection values of different logits are further apart than rounding, so that order and sets must agree.
    """
    rows, k = logits.shape[0], method.top_k
    assert str(got.indices.dtype) == "int32"
    assert got.indices.shape == (rows, k)
    assert_selects_validly(got.indices, logits.shape[1])
    scores = score(logits, method.score)
    values = selection(scores, bias)
    if exact or method.score == "identity":
        np.testing.assert_array_equal(got.indices, want.indices)
    else:
        with np.errstate(invalid="ignore"):
            rounding = tolerance(logits, want.indices, method, renormalize=False)
            _assert_within_rounding(got.indices, want.indices, values, bias, rounding)
    chosen = np.take_along_axis(scores, got.indices, -1)
    rtol = tolerance(logits, got.indices, method)
    assert_weights_close(got.weights, weigh(chosen, method), rtol, method.scale)
    same = (np.sort(got.indices, -1) == np.sort(want.indices, -1)).all(-1)
    dense_got, dense_want, dense_rtol = (
        _scatter(weights, indices, logits.shape)[same]
        for weights, indices in ((got.weights, got.indices), (want.weights, want.indices), (rtol, got.indices))
    )
    assert_weights_close(dense_got, dense_want, dense_rtol, method.scale)


def _assert_within_rounding(
    got: np.ndarray, want: np.ndarray, values: np.ndarray, bias: np.ndarray | None, rtol: np.ndarray
) -> None:
    """Where the picks differ, position by position, the values there are nearly equal."""
    g, w = (np.take_along_axis(values, i, -1).astype(np.float64) for i in (got, want))
    shift = 0.0 if bias is None else 2 * ULP * float(np.abs(bias[np.isfinite(bias)]).max(initial=0))
    bad = (got != want) & ~(np.abs(g - w) <= rtol * np.abs(w) + shift + TINY)
    rows = np.flatnonzero(bad.any(-1))[:5]
    assert not bad.any(), f"rows {rows} select differently: {got[bad][:5]} for {want[bad][:5]}"


def _scatter(weights: np.ndarray, indices: np.ndarray, shape: tuple[int, ...]) -> np.ndarray:
    dense = np.zeros(shape, weights.dtype)
    np.put_along_axis(dense, indices.astype(np.int64), weights, -1)
    return dense
