# SPDX-License-Identifier: Apache-2.0
"""The acceptance lists of layouts and rows, and ids of experts in all distributions."""

from __future__ import annotations

from collections.abc import Callable
from itertools import pairwise
from typing import Any

import numpy as np

from tests.inputs import rng

TOKENS = (0, 1, 3, 64, 65, 1025, 8192, 70_000)
TOP_K = (1, 2, 6, 8, 22)
EXPERTS = (1, 2, 8, 60, 128, 256, 257, 384, 1000, 1024, 4096, 40_000)
ALIGNMENTS = (1, 7, 16, 64, 128, 160, 224)
IDS = ("uint8", "int16", "uint16", "int32", "int64")
HIDDEN = (1, 7, 64, 1000, 4096, 7168)


def uniform(n: int, k: int, experts: int, seed: int = 0) -> np.ndarray:
    """Return distinct experts in each row where there are as many, drawn uniformly."""
    draw = rng(400, n, k, experts, seed)
    if experts < k:
        return draw.integers(0, experts, (n, k))
    start, step = draw.integers(0, experts, (n, 1)), draw.integers(1, max(2, experts // k + 1), (n, 1))
    return (start + step * np.arange(k)) % experts


def _none_empty(n: int, k: int, experts: int) -> np.ndarray:
    return rng(401, n, k, experts).permutation(np.resize(np.arange(experts), n * k)).reshape(n, k)


def _one_empty(n: int, k: int, experts: int) -> np.ndarray:
    ids = _none_empty(n, k, experts)
    return np.where(ids == experts // 2, (experts // 2 + 1) % max(experts, 2), ids)


def _sprinkled(n: int, k: int, experts: int) -> np.ndarray:
    return np.where(rng(402, n, k).random((n, k)) < 0.3, -1, uniform(n, k, experts))


def _beyond(n: int, k: int, experts: int) -> np.ndarray:
    """Ids at the number of experts and beyond, some of which an id of fewer bits would take for an expert."""
    draw = rng(403, n, k)
    far = np.array([experts, experts + 1, 2**31 - 1, -(2**31), 2**32, 2**32 + experts - 1, -(2**63), 2**63 - 1, -2])
    return np.where(draw.random((n, k)) < 0.4, draw.choice(far, (n, k)), uniform(n, k, experts))


def zipf(n: int, k: int, experts: int) -> np.ndarray:
    return np.minimum(rng(404, n, k).zipf(1.3, (n, k)) - 1, experts - 1)


DISTRIBUTIONS: dict[str, Callable[[int, int, int], np.ndarray]] = {
    "uniform": uniform,
    "all pairs to one expert": lambda n, k, experts: np.full((n, k), experts - 1),
    "one expert empty": _one_empty,
    "none empty": _none_empty,
    "ascending": lambda n, k, experts: np.sort(_none_empty(n, k, experts), axis=None).reshape(n, k),
    "descending": lambda n, k, experts: np.sort(_none_empty(n, k, experts), axis=None)[::-1].reshape(n, k),
    "-1 sprinkled": _sprinkled,
    "all -1": lambda n, k, experts: np.full((n, k), -1),
    "ids at E and beyond": _beyond,
    "Zipf": zipf,
    "duplicates in a row": lambda n, k, experts: np.repeat(rng(405, n).integers(0, experts, (n, 1)), k, axis=1),
}


def as_ids(ids: np.ndarray, dtype: str) -> np.ndarray:
    """Return the ids in a dtype. Of those that it has not, it takes the nearest, so that -1 is 0 or stays -1."""
    limits = np.iinfo(dtype)
    return np.clip(ids, limits.min, limits.max).astype(dtype)


def any_map(experts: int, num_local: int, seed: int = 0) -> np.ndarray:
    """Return a map with holes, with several experts sent to one, and with numbers far outside."""
    draw = rng(406, experts, seed)
    found = draw.integers(0, max(num_local, 1), experts)
    far = draw.choice(np.array([-1, num_local, num_local + 7, 2**31 - 1, -(2**31)]), experts)
    return np.where(draw.random(experts) < 0.4, far, found).astype(np.int32)


def shards(experts: int, ranks: int) -> list[tuple[int, int]]:
    """Return (first, count) of every rank."""
    firsts = [rank * experts // ranks for rank in range(ranks + 1)]
    return [(first, end - first) for first, end in pairwise(firsts)]


def hidden_states(shape: tuple[int, int], dtype: Any, seed: int = 0) -> np.ndarray:
    """Return small integers, whose products and sums every float holds exactly."""
    return rng(407, *shape, seed).integers(-8, 9, shape).astype(dtype)
