# SPDX-License-Identifier: Apache-2.0
"""Physical experts: the replica of its expert that each token takes."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from ..method import RoutingMethod


def physical_experts(
    indices: NDArray[Any],
    method: RoutingMethod,
    replicas: NDArray[np.int32],
    replica_counts: NDArray[np.int32],
    replica_offset: int,
    num_physical: int,
) -> NDArray[Any]:
    """Return the ids of physical experts, of the same shape and dtype as those of experts.

    Args:
        indices: [num_tokens, top_k (+ shared)] experts of each token, as routers return them.
        method: How they were selected.
        replicas: [num_experts, max_replicas], the physical experts of each expert.
        replica_counts: [num_experts], how many of these are in use.
        replica_offset: Token t takes the replica (t + replica_offset) % count.
        num_physical: Number of physical experts; shared experts come after them.

    An expert with a count that is not in 1..max_replicas, or a replica that is not in 0..num_physical - 1, gives -1, or
    the highest value of unsigned ids.

    >>> method, replicas = RoutingMethod(2, 1), np.array([[0, 2], [1, -1]], np.int32)
    >>> physical_experts(np.array([[0], [0], [1], [-1]]), method, replicas, np.array([2, 1], np.int32), 0, 3)
    array([[ 0],
           [ 2],
           [ 1],
           [-1]])
    """
    ids = indices.astype(np.int64)
    routed = (ids >= 0) & (ids < method.num_experts)
    experts = np.where(routed, ids, 0)
    counts = replica_counts.astype(np.int64)[experts]
    known = routed & (counts >= 1) & (counts <= replicas.shape[1])
    turns = (np.arange(len(ids))[:, None] + replica_offset) % np.where(known, counts, 1)
    found = replicas.astype(np.int64)[experts, turns]
    known &= (found >= 0) & (found < num_physical)
    physical = np.where(known, found, -1)
    shared = ids[:, method.top_k :] - method.num_experts
    exist = (shared >= 0) & (shared < method.num_shared_experts)
    physical[:, method.top_k :] = np.where(exist, num_physical + shared, -1)
    return physical.astype(indices.dtype)
