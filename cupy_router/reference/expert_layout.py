# SPDX-License-Identifier: Apache-2.0
"""Lay pairs of tokens and experts out by expert: one stable sort of the pairs by their expert."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
from numpy.typing import NDArray

Int32 = NDArray[np.int32]

ARRAYS = "counts", "offsets", "ends", "order", "positions", "block_experts", "row_experts"


def expert_layout(
    indices: NDArray[Any],
    num_experts: int,
    *,
    alignment: int = 1,
    capacity: int | None = None,
    experts: tuple[int, int] | None = None,
    expert_map: Int32 | None = None,
    num_local: int | None = None,
    num_valid: int | None = None,
    pad: int = -1,
    want: tuple[str, ...] = ARRAYS,
) -> dict[str, Int32]:
    """Return the arrays of an :class:`ExpertLayout` by name.

    Args:
        indices: [num_tokens, top_k] of any integer dtype. Anything outside 0..num_experts-1 is no expert.
        num_experts: Number of experts.
        alignment: Experts begin at multiples of this number of rows.
        capacity: Number of rows, a multiple of the alignment; None: as many as any indices may need.
        experts: (first, count) of the experts in question; None: all.
        expert_map: [num_experts], the expert in question, 0..num_local-1, that each expert is; others are not here.
        num_local: Number of the experts in question, with `expert_map`.
        num_valid: Number of rows of indices before the padding; None if there is no padding.
        pad: Entry of `order` for a row without a pair.
        want: Names of the arrays to compute.

    >>> layout = expert_layout(np.array([[2, 0], [2, -1]]), 3, alignment=2)
    >>> {name: layout[name].tolist() for name in ("counts", "offsets", "ends", "order")}
    {'counts': [1, 0, 2], 'offsets': [0, 2, 2, 4], 'ends': [1, 2, 4], 'order': [1, -1, 0, 2, -1, -1]}
    """
    num_tokens, top_k = indices.shape
    num_pairs = num_tokens * top_k
    ids = indices[:num_valid].reshape(-1)
    num_counted = _num_counted(num_experts, experts, num_local)
    expert = np.full(num_pairs, -1, np.int64)
    expert[: ids.size] = local_experts(ids, num_experts, experts, expert_map, num_local)
    here = expert >= 0
    if capacity is None:
        capacity = exact_capacity(num_pairs, num_counted, alignment)

    counts = np.bincount(expert[here], minlength=num_counted)
    starts = np.concatenate([[0], np.cumsum(-(-counts // alignment) * alignment)])
    offsets = np.minimum(starts, capacity)
    ends = np.minimum(starts[:-1] + counts, capacity)

    pairs = np.flatnonzero(here)
    pairs = pairs[np.argsort(expert[pairs], kind="stable")]
    sorted_expert = expert[pairs]
    rank = np.arange(len(pairs)) - (np.cumsum(counts) - counts)[sorted_expert]
    rows = starts[sorted_expert] + rank
    fits = rows < capacity
    pairs, rows, sorted_expert = pairs[fits], rows[fits], sorted_expert[fits]

    arrays: dict[str, Callable[[], NDArray[Any]]] = {
        "counts": lambda: counts,
        "offsets": lambda: offsets,
        "ends": lambda: ends,
        "order": lambda: _placed(capacity, pad, rows, pairs),
        "positions": lambda: _placed(num_pairs, -1, pairs, rows).reshape(num_tokens, top_k),
        "block_experts": lambda: _placed(
            capacity // alignment,
            -1,
            slice(offsets[-1] // alignment),
            np.repeat(np.arange(num_counted), np.diff(offsets) // alignment),
        ),
        "row_experts": lambda: _placed(capacity, -1, rows, sorted_expert),
    }
    return {name: arrays[name]().astype(np.int32, copy=False) for name in want}


def _placed(length: int, empty: int, places: Any, values: NDArray[Any]) -> Int32:
    """Return an array of values at some places, empty elsewhere."""
    array = np.full(length, empty, np.int32)
    array[places] = values
    return array


def exact_capacity(num_pairs: int, num_experts: int, alignment: int) -> int:
    """Return the most rows that pairs may need: every expert in use but for one pair fills its last block badly."""
    in_use = min(num_experts, num_pairs)
    return (in_use + (num_pairs - in_use) // alignment) * alignment


def local_experts(
    ids: NDArray[Any],
    num_experts: int,
    experts: tuple[int, int] | None = None,
    expert_map: Int32 | None = None,
    num_local: int | None = None,
) -> NDArray[np.int64]:
    """Return the expert in question, counted from 0, that each id is; -1 if it is none."""
    ids = ids.astype(np.int64)
    known = (ids >= 0) & (ids < num_experts)
    local = ids - (0 if experts is None else experts[0])
    if expert_map is not None:
        local = expert_map.astype(np.int64)[np.where(known, ids, 0)]
    inside = known & (local >= 0) & (local < _num_counted(num_experts, experts, num_local))
    return np.where(inside, local, -1)


def demand(indices: NDArray[Any], num_experts: int, *question: Any) -> NDArray[np.int64]:
    """Return [num_experts], the pairs of each expert in question by its id; `question` is that of `local_experts`."""
    ids = indices.reshape(-1)
    here = local_experts(ids, num_experts, *question) >= 0
    return np.bincount(ids[here].astype(np.int64), minlength=num_experts)


def _num_counted(num_experts: int, experts: tuple[int, int] | None, num_local: int | None) -> int:
    if num_local is not None:
        return num_local
    return num_experts if experts is None else experts[1]
