# SPDX-License-Identifier: Apache-2.0
"""Layouts by loops over experts and pairs, rows by loops over rows and slots: independent of cupy_router.reference."""

from __future__ import annotations

from collections.abc import Iterator
from functools import cache
from typing import Any

import numpy as np

from tests.oracle import float32

NAMES = ("counts", "offsets", "ends", "order", "positions", "block_experts", "row_experts")
DEFAULT_WANT = ("counts", "offsets", "order", "positions")


def expert_layout(
    indices: np.ndarray,
    num_experts: int,
    *,
    alignment: int = 1,
    capacity: int | None = None,
    experts: tuple[int, int] | None = None,
    expert_map: np.ndarray | None = None,
    num_local: int | None = None,
    num_valid: int | None = None,
    want: Any = DEFAULT_WANT,
    pad: int = -1,
) -> dict[str, np.ndarray]:
    """Return the wanted arrays by name: rows are given away one by one, expert by expert, pair by pair."""
    (n, k), wanted = indices.shape, returned(want)
    first, count = (0, num_experts) if experts is None else experts
    count = count if num_local is None else num_local
    capacity = formula(n * k, count, alignment) if capacity is None else capacity

    pairs: list[list[int]] = [[] for _ in range(count)]
    for pair, expert in enumerate(indices[: n if num_valid is None else num_valid].reshape(-1).tolist()):
        if 0 <= expert < num_experts:
            local = expert - first if expert_map is None else int(expert_map[expert])
            if 0 <= local < count:
                pairs[local].append(pair)

    made: dict[str, Any] = {name: [] for name in ("counts", "offsets", "ends")}
    made["positions"] = [-1] * (n * k)
    made["order"] = [pad] * (capacity if "order" in wanted else 0)
    made["row_experts"] = [-1] * (capacity if "row_experts" in wanted else 0)
    made["block_experts"] = [-1] * (capacity // alignment if "block_experts" in wanted else 0)
    row = 0
    for local, own in enumerate(pairs):
        made["counts"].append(len(own))
        made["offsets"].append(min(row, capacity))
        for place, pair in enumerate(own[: max(0, capacity - row)], row):
            made["positions"][pair] = place
            for name, value in (("order", pair), ("row_experts", local)):
                if name in wanted:
                    made[name][place] = value
        made["ends"].append(min(row + len(own), capacity))
        blocks = -(-len(own) // alignment)
        for block in range(row // alignment, min(row // alignment + blocks, len(made["block_experts"]))):
            made["block_experts"][block] = local
        row += blocks * alignment
    made["offsets"].append(min(row, capacity))
    shapes = {"positions": (n, k)}
    return {name: np.array(made[name], np.int32).reshape(shapes.get(name, (-1,))) for name in NAMES if name in wanted}


def returned(want: Any) -> set[str]:
    """Return the names of the arrays that a call returns: `ends` comes with `offsets`."""
    return {*want, "ends"} if "offsets" in want else {*want}


def formula(num_pairs: int, num_experts: int, alignment: int) -> int:
    """Return the capacity as the contract has it."""
    few = min(num_experts, num_pairs)
    return (few + (num_pairs - few) // alignment) * alignment


@cache
def most_rows(num_pairs: int, num_experts: int, alignment: int) -> int:
    """Return the most rows that any distribution of at most so many pairs takes, by trying all."""
    return max(
        sum(-(-count // alignment) * alignment for count in counts)
        for pairs in range(num_pairs + 1)
        for counts in partitions(pairs, num_experts)
    )


def partitions(pairs: int, experts: int, most: int | None = None) -> Iterator[tuple[int, ...]]:
    """Yield every way to split pairs among experts, up to their order."""
    if experts == 0 or pairs == 0:
        if pairs == 0:
            yield ()
        return
    for count in range(1, min(pairs, pairs if most is None else most) + 1):
        for others in partitions(pairs - count, experts - 1, count):
            yield (count, *others)


def demand(
    indices: np.ndarray,
    num_experts: int,
    experts: tuple[int, int] | None = None,
    expert_map: np.ndarray | None = None,
    num_local: int | None = None,
    num_valid: int | None = None,
) -> np.ndarray:
    """Return what is added to `load`: the pairs of each expert in question, by its id."""
    found = [0] * num_experts
    for expert in indices[:num_valid].reshape(-1).tolist():
        if not 0 <= expert < num_experts:
            continue
        if experts is not None and not experts[0] <= expert < sum(experts):
            continue
        if expert_map is not None and num_local is not None and not 0 <= expert_map[expert] < num_local:
            continue
        found[expert] += 1
    return np.array(found, np.int64)


# -- Rows --------------------------------------------------------------------------------------------------------------


def permute(x: np.ndarray, order: np.ndarray, top_k: int, weights: np.ndarray | None = None) -> np.ndarray:
    """Return [capacity, hidden]: row by row, the token of the row's pair."""
    rows = np.zeros((len(order), x.shape[1]), x.dtype)
    for row, pair in enumerate(order.tolist()):
        if not 0 <= pair < len(x) * top_k:
            continue
        token, slot = divmod(pair, top_k)
        if weights is None:
            rows[row] = x[token]
        else:
            product = _product(x[token], weights[token, slot])
            with np.errstate(over="ignore"):
                rows[row] = product.astype(x.dtype)
    return rows


def _product(values: np.ndarray, factor: Any) -> np.ndarray:
    """Return values * factor in float32."""
    with np.errstate(all="ignore"):
        return float32(float32(values).astype(np.float64) * np.float64(float32(factor)))


def unpermute(
    y: np.ndarray,
    positions: np.ndarray,
    weights: np.ndarray | None = None,
    residual: np.ndarray | None = None,
    residual_scale: np.ndarray | None = None,
) -> tuple[np.ndarray, np.ndarray]:
    """Return [num_tokens, hidden] twice: float64 sums, slot by slot, and the sums of the terms' magnitudes."""
    (n, k), hidden = positions.shape, y.shape[1]
    sums, sizes = np.zeros((n, hidden)), np.zeros((n, hidden))
    with np.errstate(all="ignore"):
        for token in range(n):
            terms = []
            for slot in range(k):
                if 0 <= positions[token, slot] < len(y):
                    weight = 1.0 if weights is None else np.float64(weights[token, slot])
                    terms.append(y[positions[token, slot]].astype(np.float64) * weight)
            if residual is not None:
                scale = 1.0 if residual_scale is None else np.float64(residual_scale[token])
                terms.append(residual[token].astype(np.float64) * scale)
            for term in terms:
                sums[token] += term
                sizes[token] += np.abs(term)
    return sums, sizes
