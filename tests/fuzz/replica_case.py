# SPDX-License-Identifier: Apache-2.0
"""Calls with replicas of experts, checked as those without."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np

NAMES = {"replicas", "replica_counts", "num_physical", "replica_offset"}


def with_experts(case: Any, got: tuple[np.ndarray, ...]) -> tuple[Any, tuple[np.ndarray, ...]]:
    """Return the call without replicas, and its results with experts in place of physical ones.

    Replica j of expert e is e + j * num_experts. Tokens have to take them in turn.
    """
    turns, experts = np.divmod(got[1], case.method.num_experts)
    experts = np.where(got[1] < 0, got[1], experts)
    tokens = np.arange(case.shape[0])[:, None] + case.options["replica_offset"]
    counts = case.arrays["replica_counts"][np.maximum(experts, 0)]
    np.testing.assert_array_equal(turns[got[1] >= 0], (tokens % counts)[got[1] >= 0])
    rest = [{name: given[name] for name in given.keys() - NAMES} for given in (case.arrays, case.options)]
    return replace(case, arrays=rest[0], options=rest[1]), (got[0], experts, *got[2:])
