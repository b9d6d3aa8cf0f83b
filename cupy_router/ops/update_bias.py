# SPDX-License-Identifier: Apache-2.0
"""update_bias: balance the load of experts by their bias, without a loss."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np

from cupy_router.arrays import ITEM_SIZES
from cupy_router.ops import _checks as check
from cupy_router.ops._cached import Kernel
from cupy_router.ops._declared import INTS, Arrays, Result, row
from cupy_router.ops._op import Op
from cupy_router.ops._options import Options
from cupy_router.ops._run import run
from cupy_router.reference import update_bias as reference
from cupy_router.tuning import Gpu

_BLOCK = 256  # the reference adds in the order of a block of this size
_MAX_RATE = float(np.finfo(np.float32).max)


class UpdatedBias(NamedTuple):
    """The result of the op, which the caller gets as an array."""

    updated: Any


@dataclass(frozen=True)
class UpdateOptions(Options):
    """Options of a call: see :func:`update_bias`."""

    rate: float = 1e-3
    center: bool = False


class UpdateBias(Op):
    """The declaration of :func:`update_bias`."""

    name = "update_bias"
    options = UpdateOptions
    inputs = (
        row("bias", "num_experts", ("float32",), required=True),
        row("counts", "num_experts", INTS, required=True),
    )
    results = (Result("updated", "num_experts", "float32"),)
    returns = UpdatedBias
    bare = True
    rows_independent = False
    vmap = "loop"
    single_kernel = True

    def example(self) -> UpdateOptions:
        return UpdateOptions(0.25, True)

    def reference(self, options: UpdateOptions, arrays: Arrays, num_valid: int) -> tuple[Any]:
        return (reference.update_bias(arrays.bias, arrays.counts, options.rate, options.center),)

    def kernel(self, options: UpdateOptions, arrays: Arrays, gpu: Gpu) -> Kernel:
        macros = {"COUNT_BYTES": ITEM_SIZES[arrays.counts.dtype], "CENTER": int(options.center)}
        fixed = {"num_experts": arrays.bias.shape[0], "rate": options.rate}
        return Kernel("update_bias", "update_bias", macros, 1, _BLOCK, fixed)


OP = UpdateBias()


def update_bias(
    bias: Any, counts: Any, *, rate: float = 1e-3, center: bool = False, out: Any = None, stream: Any = None
) -> Any:
    """Move the bias of each expert by `rate`: up if it got fewer tokens than the mean, down if it got more.

    This is the rule of auxiliary-loss-free load balancing (Wang et al., arXiv 2408.15664, algorithm 1): bias + rate *
    sign(mean of the counts - count). The sum of the counts is compared with the number of experts times the count: the
    sign is exact while both fit into 64-bit integers. An expert whose count is the mean keeps its bias.

    Args:
        bias: [num_experts] float32, as the routers take it.
        counts: [num_experts] int32 or int64, the pairs of each expert since the last update, such as the `load` that
            :func:`expert_layout` adds to, or its `counts`. The counts of several ranks are summed by the caller.
        rate: the step, a number of at least 0, finite in float32. It is a constant of a graph or compiled program.
        center: subtract the mean of the new bias, which the choice of experts does not depend on. Sums are float32 in a
            fixed order, so ranks with the same counts keep the same bias.
        out: a float32 array for the result, filled in place and returned. It may be `bias` itself.
        stream: an object with `__cuda_stream__`, or an int handle. By default, work is enqueued on the current stream
            of the framework of the bias. The host never waits.

    Returns:
        [num_experts] float32, an array of the framework of the bias, on its device. It has no gradient. The same
        arguments give the same bits on every path and device.

    Raises:
        TypeError: an argument is no array or no number, or its dtype is not allowed.
        ValueError: ranks, shapes, strides, devices or the rate are wrong, or `out` requires grad while PyTorch records
            gradients: call it under `torch.no_grad()`.
        RuntimeError: CUDA arrays were given, but CuPy, NVRTC or a driver is missing.

    >>> import numpy as np
    >>> from cupy_router import update_bias
    >>> bias, load = np.zeros(4, np.float32), np.array([7, 0, 4, 1], np.int32)
    >>> update_bias(bias, load, rate=0.25, out=bias) is bias
    True
    >>> bias
    array([-0.25,  0.25, -0.25,  0.25], dtype=float32)
    """
    if type(rate) is not float or not 0 <= rate <= _MAX_RATE:
        rate = _checked_rate(rate)
    if type(center) is not bool:
        center = check.boolean("update_bias: center", center)
    return run(OP, (rate, center), (bias, counts), out, stream)


def _checked_rate(rate: Any) -> float:
    if isinstance(rate, (bool, np.bool_)) or not isinstance(rate, (int, float, np.integer, np.floating)):
        raise TypeError(f"update_bias: rate must be a float, got {type(rate).__name__}")
    try:
        number = float(rate)
    except OverflowError:  # an int
        number = math.inf
    if not 0 <= number <= _MAX_RATE:
        raise ValueError(f"update_bias: rate must be at least 0 and finite in float32, got {check.brief(rate)}")
    return number
