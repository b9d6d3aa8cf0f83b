# SPDX-License-Identifier: Apache-2.0
"""Shared by permute, unpermute and their gradients, which are each other's kernels with more results."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from cupy_router.ops import _move_rows as move_rows
from cupy_router.ops._cached import Kernel
from cupy_router.ops._declared import Arrays
from cupy_router.ops._op import Op
from cupy_router.ops._options import Options
from cupy_router.tuning import Gpu

_PERMUTE_TAKES = (
    "x", "order", "positions", "weights", "y", "residual", "residual_scale", "rows", "dots", "scaled", "residual_dots",
)  # fmt: skip
_UNPERMUTE_TAKES = ("y", "positions", "weights", "residual", "residual_scale", "x", "sums", "dots")

NO_SECOND_DERIVATIVE = "cupy_router: permute and unpermute have first derivatives only, so this has no gradient"


@dataclass(frozen=True)
class LayoutInts(Options):
    """Ints of the layout of a call, None if unknown. Its arrays are checked against them; graphs do not have them.

    clears: permute writes 0 to rows without a pair. Without, which is for ExpertParallel, they may keep what they hold.
    """

    num_tokens: Any = None
    top_k: Any = None
    capacity: Any = None
    clears: bool = True

    text = "{}"  # the same program for any layout


def check_layout(label: str, ints: LayoutInts, order: Any, positions: Any) -> None:
    """Refuse arrays of a layout, or views of them, whose shapes are not those that its ints say."""
    if ints.num_tokens is not None:
        _check_shape(label, "positions", "num_tokens, top_k", positions, (ints.num_tokens, ints.top_k))
    if ints.capacity is not None:
        _check_shape(label, "order", "capacity", order, (ints.capacity,))


def _check_shape(label: str, name: str, axes: str, array: Any, shape: tuple[Any, ...]) -> None:
    if array is not None and tuple(array.shape) != shape:
        raise ValueError(f"{label}layout.{name} must have shape [{axes}] = {[*shape]}, got {[*array.shape]}")


@dataclass(frozen=True)
class GradientOptions(Options):
    """Names of the wanted results of a gradient."""

    want: tuple[str, ...]


def permute_kernel(op: Op, want: tuple[str, ...], arrays: Arrays, gpu: Gpu, clears: bool = True) -> Kernel:
    """Return the kernel that goes from tokens to rows, for the wanted results of an op."""
    given = _with_nulls(_PERMUTE_TAKES, arrays)
    return _kernel(op, _PERMUTE_TAKES, move_rows.permute_kernel(GradientOptions(want), given, gpu, clears))


def unpermute_kernel(op: Op, want: tuple[str, ...], arrays: Arrays, gpu: Gpu) -> Kernel:
    """Return the kernel that goes from rows to tokens, for the wanted results of an op."""
    given = _with_nulls(_UNPERMUTE_TAKES, arrays)
    return _kernel(op, _UNPERMUTE_TAKES, move_rows.unpermute_kernel(GradientOptions(want), given, gpu))


def _with_nulls(takes: tuple[str, ...], arrays: Arrays) -> Arrays:
    return Arrays(takes, [getattr(arrays, name, None) for name in takes])


def _kernel(op: Op, takes: tuple[str, ...], kernel: Kernel) -> Kernel:
    known = {*op.names, *op.result_names}
    return kernel._replace(takes=takes, nulls=tuple([name for name in takes if name not in known]))
