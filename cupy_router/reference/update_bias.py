# SPDX-License-Identifier: Apache-2.0
"""Move the bias of each expert by a fixed step towards balance: the sign rule of loss-free load balancing."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from .scoring import flush

_WARPS, _LANES = 8, 32

Float32 = NDArray[np.float32]


@np.errstate(all="ignore")
def update_bias(bias: Float32, counts: NDArray[Any], rate: float = 1e-3, center: bool = False) -> Float32:
    """Return [num_experts] float32: bias + rate * sign(mean of the counts - count), with `center` minus its mean.

    Args:
        bias: [num_experts].
        counts: [num_experts] int32 or int64.
        rate: The step.
        center: Subtract the mean of the new bias.

    >>> update_bias(np.zeros(3, np.float32), np.array([4, 1, 1]), 0.5)
    array([-0.5,  0.5,  0.5], dtype=float32)
    """
    # 1. Compare with the mean in integers: the total with the number of experts times the count.
    total, scaled = counts.sum(dtype=np.int64), len(counts) * counts.astype(np.int64)
    sign = (total > scaled).astype(np.float32) - (total < scaled).astype(np.float32)
    # 2. Move the bias.
    updated = flush(flush(bias) + flush(np.float32(rate) * sign))
    # 3. Centre it.
    if center:
        updated = flush(updated - flush(ordered_sum(updated) / np.float32(len(updated))))
    return updated


def ordered_sum(values: Float32) -> Float32:
    """Return the sum in the order of the kernel: a block of 8 warps of 32 lanes, each of which adds every 256th value.

    The sums of the lanes of a warp, and then those of the warps, are added by halves.

    >>> ordered_sum(np.arange(1000, dtype=np.float32))
    array(499500., dtype=float32)
    """
    padded = np.zeros(-(-len(values) // (_WARPS * _LANES)) * _WARPS * _LANES, np.float32)
    padded[: len(values)] = values
    sums = np.zeros((_WARPS, _LANES), np.float32)
    for row in padded.reshape(-1, _WARPS, _LANES):
        sums = flush(sums + row)
    for axis in (1, 0):
        while sums.shape[axis] > 1:
            first, second = np.split(sums, 2, axis)
            sums = flush(first + second)
    return sums.reshape(())
