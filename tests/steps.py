# SPDX-License-Identifier: Apache-2.0
"""Every step of a routing method, one token at a time and independent of cupy_router.reference."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import numpy as np

from cupy_router import RoutingMethod
from tests import compare

HALF_ULP = {"float32": 0.0, "float16": 2.0**-11, "bfloat16": 2.0**-8}  # relative, of a weight's last rounding


@dataclass(frozen=True)
class Layer:
    """The arrays of a layer beside its gate, each [num_experts] float32 or None."""

    bias: np.ndarray | None = None
    logit_bias: np.ndarray | None = None
    expert_scale: np.ndarray | None = None

    def arguments(self, upload: Any) -> dict[str, Any]:
        return {name: upload(array) for name, array in vars(self).items() if array is not None}


def prepare(logits: np.ndarray, method: RoutingMethod, layer: Layer) -> np.ndarray:
    """float32 logits, of one token or of several, as they are scored; each operation is rounded by itself."""
    x = compare.flush(logits.astype(np.float32))
    with np.errstate(all="ignore"):
        if layer.logit_bias is not None:
            x[..., : method.num_experts] += compare.flush(layer.logit_bias)
            x = compare.flush(x)
        x = x * np.float32(method.logit_scale)
        if method.logit_softcap is not None:
            cap = method.logit_softcap
            x = (cap * np.tanh(x.astype(np.float64) / cap)).astype(np.float32)
    return compare.flush(x)


def scores(x: np.ndarray, method: RoutingMethod) -> np.ndarray:
    if not isinstance(method.score, str):
        with np.errstate(all="ignore"):
            return compare.flush(np.asarray(method.score.numpy(x.astype(np.float64))).astype(np.float32))
    return compare.score(x[None], method.score)[0]


def eligible(values: np.ndarray, method: RoutingMethod) -> list[int]:
    """Experts of the best groups, in order."""
    size = method.num_experts // method.num_groups
    worth = []
    for group in range(method.num_groups):
        members = values[group * size : (group + 1) * size]
        best = [members[i] for i in compare.order(members)[: 1 if method.group_score == "max" else 2]]
        worth.append(compare.flush(np.array([math.nan if any(map(math.isnan, best)) else sum(best)], np.float32))[0])
    kept = sorted(compare.order(np.array(worth, np.float32))[: method.top_groups].tolist())
    return [group * size + i for group in kept for i in range(size)]


def selection(row: np.ndarray, method: RoutingMethod, layer: Layer) -> np.ndarray:
    x = prepare(row, method, layer)[: method.num_experts]
    by_logits = method.score_after_topk or method.bias_on == "logits"
    return compare.selection(x if by_logits else scores(x, method), layer.bias)


def choose(row: np.ndarray, method: RoutingMethod, layer: Layer) -> list[int]:
    values = selection(row, method, layer)
    candidates = eligible(values, method) if method.top_groups < method.num_groups else range(method.num_experts)
    among = np.array(list(candidates))
    return [int(among[i]) for i in compare.order(values[among])[: method.top_k]]


def weigh(row: np.ndarray, experts: list[int], method: RoutingMethod, layer: Layer) -> np.ndarray:
    """float64 weights of given experts and of the shared ones."""
    x, routed = prepare(row, method, layer), experts[: method.top_k]
    with np.errstate(all="ignore"):
        if method.shared_in_normalizer:
            both = x[[*routed, *range(method.num_experts, method.num_logits)]].astype(np.float64)
            logs = -np.logaddexp(0, -both)
            shares = np.exp(logs - np.fmax.reduce(logs))
            weights = shares / np.nansum(shares) * method.scale
        else:
            among = x[: method.num_experts]
            chosen = scores(among[routed], method) if method.score_after_topk else scores(among, method)[routed]
            weights = compare.weigh(chosen[None], method)[0].astype(np.float64)
        if layer.expert_scale is not None:
            weights[: method.top_k] *= layer.expert_scale[routed]
    if not method.shared_in_normalizer:
        weights = np.concatenate([weights, np.full(method.num_shared_experts, method.shared_weight)])
    return weights


def assert_right(
    got: Any, logits: np.ndarray, method: RoutingMethod, layer: Layer = Layer(), table: np.ndarray | None = None
) -> None:
    """Experts are those of :func:`choose` (or of the table's rows), weights within rounding.

    The logits are so far apart that no rounding decides between different ones.
    """
    weights, indices = got
    assert str(weights.dtype) == method.weight_dtype
    assert str(indices.dtype) == method.index_dtype
    shared = list(range(method.num_experts, method.num_experts + method.num_shared_experts))
    assert weights.shape == indices.shape == (len(logits), method.top_k + len(shared))
    for r, row in enumerate(logits):
        experts = choose(row, method, layer) if table is None else table[r].tolist()
        assert indices[r].tolist() == experts + shared, f"row {r}"
        want = weigh(row, experts, method, layer)
        x = prepare(row, method, layer)[: method.num_experts].astype(np.float64)
        numbers = np.abs(x[np.isfinite(x)])
        # A few roundings, that of x - max in a softmax, that of tanh.
        rtol = 3e-6 + 6e-8 * (2 * numbers.max(initial=0.0)) * (method.score == "softmax")
        rtol += 5e-7 * numbers.max(initial=0.0) * (method.logit_softcap is not None)
        rtol += HALF_ULP[method.weight_dtype]
        tiny = 2.0**-25 if method.weight_dtype == "float16" else compare.TINY  # half of its smallest subnormal
        have = weights[r].astype(np.float64)
        with np.errstate(invalid="ignore"):
            close = np.abs(have - want) <= rtol * np.abs(want) + tiny * max(1.0, abs(method.scale))
        same = (have == want) | (np.isnan(have) & np.isnan(want))
        assert (close | same).all(), f"row {r}: {have} != {want}"
