# SPDX-License-Identifier: Apache-2.0
"""Restrict the selection to the experts of the best groups."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from ..method import RoutingMethod
from .order import top_indices
from .scoring import flush


def eligible_experts(selection: NDArray[np.float32], method: RoutingMethod) -> NDArray[np.bool_] | None:
    """Return a mask of the experts in their token's best groups, or None if all groups are used.

    The score of a group is its greatest selection value, or the float32 sum of its two greatest (of one, if it has no
    more). Groups are ordered as in ``order.py``: NaN ranks lowest, and of equal groups the lower one comes first.

    Args:
        selection: [num_tokens, num_experts] float32.
        method: Its fields ``num_groups``, ``top_groups`` and ``group_score`` are used.

    >>> method = RoutingMethod(4, 1, num_groups=2, group_score="top2")
    >>> eligible_experts(np.array([[5, 0, 3, 3]], np.float32), method)
    array([[False, False,  True,  True]])
    """
    if method.top_groups == method.num_groups:
        return None
    size = method.num_experts // method.num_groups
    grouped = selection.reshape(-1, size)
    best = top_indices(grouped, min(2 if method.group_score == "top2" else 1, size))
    values = flush(np.take_along_axis(grouped, best, axis=-1).sum(axis=-1, dtype=np.float32))
    groups = top_indices(values.reshape(-1, method.num_groups), method.top_groups)
    eligible = np.zeros((len(selection), method.num_groups), np.bool_)
    np.put_along_axis(eligible, groups, True, axis=-1)
    return np.repeat(eligible, size, axis=-1)
