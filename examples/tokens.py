# SPDX-License-Identifier: Apache-2.0
"""The task of all examples, as NumPy arrays: predict the cluster of the next token from a token's hidden state.

The data come from `minilm_router.npz`: 2048 tokens of English prose and the centroids of 128 clusters of hidden states.
A token belongs to the cluster with the largest dot product.
"""

from __future__ import annotations

from collections.abc import Iterator
from importlib import resources
from typing import Any

import numpy as np

from cupy_router import RoutingMethod

METHOD = RoutingMethod(num_experts=16, top_k=2, score="sqrtsoftplus")
WIDTH, CLUSTERS = 64, 128  # inner width of an expert; number of clusters
LEARNING_RATE, MOMENTUM, BATCH = 0.1, 0.9, 256

Array = np.ndarray[Any, Any]


def load() -> tuple[Array, Array]:
    """Return hidden states [2047, 384] float32 and the cluster of each next token, [2047] int64."""
    with (resources.files("cupy_router") / "data" / "minilm_router.npz").open("rb") as file:
        data = np.load(file)
        hidden, centroids = data["hidden"].astype(np.float32), data["gate_weight"].astype(np.float32)
    centred = hidden - hidden.mean(axis=0)
    return centred[:-1] / centred.std(), (centred @ centroids.T).argmax(axis=1)[1:]


def batches(steps: int) -> Iterator[Array]:
    """Yield the token indices of each step."""
    rng = np.random.default_rng(1)
    for _ in range(steps):
        yield rng.choice(2047, BATCH, replace=False)


def parameters() -> dict[str, Array]:
    """Return the initial parameters, the same in every framework."""
    rng, hidden = np.random.default_rng(0), 384

    def normal(*shape: int) -> Array:
        return (rng.standard_normal(shape) / np.sqrt(shape[-2])).astype(np.float32)

    return {
        "gate": normal(hidden, METHOD.num_experts).T.copy(),  # [num_experts, hidden]
        "up": normal(METHOD.num_experts, hidden, WIDTH),
        "down": normal(METHOD.num_experts, WIDTH, hidden),
        "head": normal(hidden, CLUSTERS),
    }
