# SPDX-License-Identifier: Apache-2.0
"""Calls with replicas of experts, checked as those without."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np

from cupy_router.reference.replicas import physical_experts

NAMES = {"replicas", "replica_counts", "num_physical", "replica_offset"}


def without(case: Any) -> Any:
    """Return the call without replicas."""
    arrays, options = ({name: given[name] for name in given.keys() - NAMES} for given in (case.arrays, case.options))
    return replace(case, arrays=arrays, options=options)


def wanted(case: Any, routed: tuple[np.ndarray, ...]) -> tuple[np.ndarray, ...]:
    """Return the results of a call without replicas with physical experts in place of experts."""
    maps = (case.arrays[name] for name in ("replicas", "replica_counts"))
    options = (case.options[name] for name in ("replica_offset", "num_physical"))
    return routed[0], physical_experts(routed[1], case.method, *maps, *options), *routed[2:]


def with_experts(case: Any, got: tuple[np.ndarray, ...]) -> tuple[Any, tuple[np.ndarray, ...]]:
    """Return the call without replicas, and its results with experts in place of physical ones.

    Replica j of expert e is e + j * num_experts. Tokens have to take them in turn. Shared experts come after them.
    """
    ids, num_experts = got[1].astype(np.int64), case.method.num_experts
    none, shared = got[1] == np.array(-1).astype(got[1].dtype), ids >= case.options["num_physical"]
    turns, experts = np.divmod(ids, num_experts)
    routed = ~(none | shared)
    tokens = np.arange(case.shape[0])[:, None] + case.options["replica_offset"]
    counts = case.arrays["replica_counts"][np.where(routed, experts, 0)]
    np.testing.assert_array_equal(turns[routed], (tokens % counts)[routed])
    experts = np.where(shared, ids - case.options["num_physical"] + num_experts, experts)
    return without(case), (got[0], np.where(none, -1, experts).astype(got[1].dtype), *got[2:])
