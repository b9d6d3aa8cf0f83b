# SPDX-License-Identifier: Apache-2.0
"""The ops, step by step, independent of cupy_router.reference: what the reference and the kernels are tested against.

The numbered steps are those of docs/methods.md. They take all tokens at once, [n, columns], compute in float64 and
round to float32 where the document says so. With ``rounded=unrounded`` nothing is rounded, so that weights are smooth
functions of logits and can be differentiated numerically.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np

from cupy_router import RoutingMethod

TINY = np.finfo(np.float32).tiny  # smaller float32 are subnormal and count as 0
Rounding = Callable[[Any], np.ndarray]


class Routing(NamedTuple):
    weights: np.ndarray
    indices: np.ndarray


def float32(values: Any) -> np.ndarray:
    """Round to float32, subnormals to 0."""
    with np.errstate(over="ignore"):
        rounded = np.asarray(values).astype(np.float32)
    return np.where(np.abs(rounded) < TINY, np.float32(0), rounded)


def unrounded(values: Any) -> np.ndarray:
    return np.asarray(values, np.float64)


# -- From logits to experts --------------------------------------------------------------------------------------------


def gate_logits(x: np.ndarray, weight: np.ndarray) -> np.ndarray:
    """Step 1: products of hidden states and gate."""
    with np.errstate(invalid="ignore"):
        return np.asarray(x.astype(np.float64) @ weight.astype(np.float64).T, np.float32)


def prepare(
    logits: np.ndarray, method: RoutingMethod, logit_bias: np.ndarray | None = None, rounded: Rounding = float32
) -> np.ndarray:
    """Steps 1 and 2: logits as they are scored: with their bias, scaled, capped."""
    x = rounded(logits)
    with np.errstate(all="ignore"):
        if logit_bias is not None:
            all_columns = np.zeros(x.shape[-1])  # shared experts' logits have no bias
            all_columns[: method.num_experts] = rounded(logit_bias)
            x = rounded(x + all_columns)
        return rounded(scale_and_cap(unrounded(x), method, np.tanh, lambda values: unrounded(rounded(values))))


def scale_and_cap(
    x: Any, method: RoutingMethod, tanh: Callable[[Any], Any], rounded: Callable[[Any], Any] = lambda values: values
) -> Any:
    """Step 2, in the dtype of x, an array of any framework."""
    x = rounded(x * method.logit_scale)
    if method.logit_softcap is not None:
        x = rounded(method.logit_softcap * tanh(x / method.logit_softcap))
    return x


def score(logits: np.ndarray, method: RoutingMethod, rounded: Rounding = float32) -> np.ndarray:
    """Step 3: the score of each logit; softmax is over the columns that there are."""
    x = logits.astype(np.float64)
    with np.errstate(all="ignore"):
        return rounded(SCORES[method.score](x) if isinstance(method.score, str) else method.score.numpy(x))


def _softmax(x: np.ndarray) -> np.ndarray:
    """NaN takes no part in maximum and sum; the maximum counts as exp(0) = 1 even where it is infinite."""
    highest = np.fmax.reduce(x, axis=-1, keepdims=True, initial=-np.inf)
    shares = np.where(x == highest, 1.0, np.exp(x - highest))
    return np.asarray(shares / np.nansum(shares, axis=-1, keepdims=True))


SCORES: dict[str, Callable[[np.ndarray], np.ndarray]] = {
    "identity": lambda x: x,
    "sigmoid": lambda x: np.exp(-np.logaddexp(0, -x)),
    "sqrtsoftplus": lambda x: np.sqrt(np.logaddexp(0, x)),
    "softmax": _softmax,
}


def selection(x: np.ndarray, method: RoutingMethod, bias: np.ndarray | None = None) -> np.ndarray:
    """Step 4: what experts are ranked by, from prepared logits."""
    logits = x[:, : method.num_experts]
    by_logits = method.score_after_topk or method.bias_on == "logits"
    values = logits if by_logits else score(logits, method)
    if bias is None:
        return values
    with np.errstate(invalid="ignore"):
        return float32(values.astype(np.float64) + float32(bias))


def eligible(values: np.ndarray, method: RoutingMethod) -> np.ndarray:
    """Step 5: True for the experts of the best groups."""
    size = method.num_experts // method.num_groups
    groups = values.reshape(-1, method.num_groups, size)
    best = np.take_along_axis(groups, ranking(groups)[..., : 1 if method.group_score == "max" else 2], -1)
    with np.errstate(invalid="ignore"):
        worth = float32(best.astype(np.float64).sum(-1))
    kept = np.zeros(worth.shape, bool)
    np.put_along_axis(kept, ranking(worth)[:, : method.top_groups], True, -1)
    return np.repeat(kept, size, axis=-1)


def ranking(values: np.ndarray, among: np.ndarray | None = None) -> np.ndarray:
    """Step 6: columns, best first: descending value, equal values by ascending index, NaN last.

    Columns that are not `among` the eligible come last of all.
    """
    best_first = np.argsort(-values.astype(np.float32), axis=-1, kind="stable")  # NumPy sorts NaN to the end
    if among is not None:
        left_out = ~np.take_along_axis(among, best_first, -1)
        best_first = np.take_along_axis(best_first, np.argsort(left_out, axis=-1, kind="stable"), -1)
    return best_first


def choose(x: np.ndarray, method: RoutingMethod, bias: np.ndarray | None = None) -> np.ndarray:
    """Steps 4 to 6: the experts [n, top_k] of prepared logits."""
    values = selection(x, method, bias)
    among = eligible(values, method) if method.top_groups < method.num_groups else None
    return ranking(values, among)[:, : method.top_k]


# -- From experts to weights -------------------------------------------------------------------------------------------


def weigh(
    x: np.ndarray,
    experts: np.ndarray,
    method: RoutingMethod,
    expert_scale: np.ndarray | None = None,
    rounded: Rounding = float32,
) -> np.ndarray:
    """Steps 7 to 10: weights [n, num_columns] of given experts [n, top_k], from prepared logits."""
    logits, k = x[:, : method.num_experts], method.top_k
    with np.errstate(all="ignore"):
        if method.shared_in_normalizer:
            both = np.concatenate([np.take_along_axis(logits, experts, -1), x[:, method.num_experts :]], axis=-1)
            weights = _softmax(-np.logaddexp(0, -both.astype(np.float64)))
        else:
            if method.score_after_topk:
                weights = score(np.take_along_axis(logits, experts, -1), method, rounded)
            else:
                weights = np.take_along_axis(score(logits, method, rounded), experts, -1)
            if method.renormalize:
                weights = renormalize(weights, method)
        weights = rounded(weights.astype(np.float64) * method.scale)
        if expert_scale is not None:
            weights[:, :k] = rounded(weights[:, :k].astype(np.float64) * rounded(expert_scale)[experts])
    fixed = np.full((len(x), method.num_columns - weights.shape[1]), method.shared_weight, weights.dtype)
    return np.concatenate([weights, fixed], axis=1)


def renormalize(scores: np.ndarray, method: RoutingMethod) -> np.ndarray:
    """Step 8: scores over their sum, which leaves NaN out and is taken from left to right."""
    scores = scores.astype(np.float64)
    finite = np.where(np.isfinite(scores), 0.0, np.nan)  # weights of a token that has none: 0, and NaN where infinite
    total = np.add.accumulate(np.where(np.isnan(scores), 0.0, scores), axis=-1)[:, -1:]
    if method.renormalize_min is None:
        divisor = total + method.renormalize_eps
    else:
        divisor = np.maximum(total, method.renormalize_min)
    none = (total == 0) | (divisor == 0) | (scores == np.inf).any(axis=-1, keepdims=True)
    return np.where(none, finite, scores / divisor)


# -- The ops -----------------------------------------------------------------------------------------------------------


def route(
    logits: np.ndarray,
    method: RoutingMethod,
    bias: np.ndarray | None = None,
    num_valid: int | None = None,
    *,
    logit_bias: np.ndarray | None = None,
    expert_scale: np.ndarray | None = None,
) -> Routing:
    """activation_topk; with :func:`gate_logits`, dense_router."""
    x = prepare(logits, method, logit_bias)
    experts = choose(x, method, bias)
    return pad(results(weigh(x, experts, method, expert_scale), experts, method), num_valid)


def hash_route(
    token_ids: np.ndarray,
    table: np.ndarray,
    method: RoutingMethod | None = None,
    logits: np.ndarray | None = None,
    num_valid: int | None = None,
    *,
    logit_bias: np.ndarray | None = None,
    expert_scale: np.ndarray | None = None,
) -> Routing:
    """hash_router: a row whose token id or any expert of it does not exist gets -1 and 0."""
    (vocab_size, k), n = table.shape, token_ids.size
    num_experts = 2**31 if method is None else method.num_experts
    known = np.flatnonzero((token_ids >= 0) & (token_ids < vocab_size))
    rows = table[token_ids[known]]
    good = known[((rows >= 0) & (rows < num_experts)).all(-1)]
    experts = table[token_ids[good]].astype(np.int64)
    method_of_table = method or RoutingMethod(2**31 - 1, k)
    if method is None or logits is None:
        weights = np.full((good.size, method_of_table.num_columns), np.float32(1 / k))
        weights[:, k:] = method_of_table.shared_weight
    else:
        weights = weigh(prepare(logits[good], method, logit_bias), experts, method, expert_scale)
    found = results(weights, experts, method_of_table)
    everywhere = Routing(*(np.empty((n, array.shape[1]), array.dtype) for array in found))
    pad(everywhere, 0)
    for whole, part in zip(everywhere, found, strict=True):
        whole[good] = part
    return pad(everywhere, num_valid)


def results(weights: np.ndarray, experts: np.ndarray, method: RoutingMethod) -> Routing:
    """Steps 10 and 11: indices of the shared experts, dtypes."""
    shared = np.arange(method.num_experts, method.num_experts + method.num_shared_experts)
    indices = np.concatenate([experts, np.tile(shared, (len(experts), 1))], axis=1)
    with np.errstate(over="ignore"):
        return Routing(weights.astype(method.weight_dtype), indices.astype(method.index_dtype))


def pad(routing: Routing, num_valid: int | None) -> Routing:
    """Weight 0 and index -1 from row num_valid on; the highest value of an unsigned dtype stands for -1."""
    if num_valid is not None:
        routing.weights[num_valid:] = 0
        routing.indices[num_valid:] = np.array(-1).astype(routing.indices.dtype)
    return routing


def topk(
    scores: np.ndarray, k: int, lengths: Any = None, starts: Any = None, *, order: str = "value", index_map: Any = None,
    page_size: int = 1,
) -> tuple[np.ndarray, np.ndarray]:  # fmt: skip
    """topk_select: each row of it for itself."""
    rows, columns = scores.shape
    values = np.full((rows, k), -np.inf, scores.dtype)
    indices = np.full((rows, k), -1, np.int32)
    for r in range(rows):
        start = 0 if starts is None else int(starts[r])
        if not 0 <= start < columns:
            continue
        length = columns - start if lengths is None else min(int(lengths[r]), columns - start)
        row = scores[r, start : start + max(length, 0)]
        chosen = ranking(row)[:k]
        if order == "column":
            chosen = np.sort(chosen)
        values[r, : chosen.size] = row[chosen]
        if index_map is not None:
            pages = index_map[r % len(index_map)]
            chosen = np.array([pages[c // page_size] * page_size + c % page_size for c in chosen])
        indices[r, : chosen.size] = chosen
    return values, indices
