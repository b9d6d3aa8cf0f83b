# SPDX-License-Identifier: Apache-2.0
"""Batch invariance: a token's logits, weights and experts are the same to the bit in any batch."""

from __future__ import annotations

from typing import Any

from cupy_router.method import RoutingMethod
from cupy_router.ops import _row_lanes as row_lanes
from cupy_router.tuning import Gpu


def as_batch_invariant(label: str, batch_invariant: Any) -> bool:
    """Return the option of a call."""
    if not isinstance(batch_invariant, bool):
        raise TypeError(f"{label}: batch_invariant must be a bool, got {batch_invariant!r}")
    return batch_invariant


def check_invariant(method: RoutingMethod) -> None:
    """Refuse a method whose logits no kernel with a fixed order of sums can route."""
    if not row_lanes.fits_method(method):
        raise ValueError(f"batch_invariant takes at most {row_lanes.limits(method)}, got {method}")


def check_gpu(gpu: Gpu) -> None:
    """Refuse a GPU without the instructions of these kernels."""
    if gpu.capability < (8, 0):
        raise ValueError("batch_invariant takes a GPU of compute capability 8.0 or later")
