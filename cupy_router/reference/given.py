# SPDX-License-Identifier: Apache-2.0
"""Experts that the caller gives in place of a selection."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from ..method import RoutingMethod

Ids = NDArray[np.int64]


def given_ids(indices: NDArray[np.integer], method: RoutingMethod) -> Ids:
    """Return the ids of the selected experts; the columns of shared experts, if there are any, are left out."""
    return indices[:, : method.top_k].astype(np.int64)


def unset_rows(ids: Ids) -> NDArray[np.bool_]:
    """Return which rows say nothing: all their ids are -1.

    >>> unset_rows(np.array([[-1, -1], [-1, 3], [0, 3]]))
    array([ True, False, False])
    """
    unset: NDArray[np.bool_] = (ids == -1).all(axis=-1)
    return unset


def known_rows(ids: Ids, method: RoutingMethod) -> NDArray[np.bool_]:
    """Return in which rows all ids are experts.

    >>> known_rows(np.array([[-1, 3], [0, 3], [0, 8]]), RoutingMethod(8, 2))
    array([False,  True, False])
    """
    exist = (ids >= 0) & (ids < method.num_experts)
    return np.asarray(exist.all(axis=-1), np.bool_)
