# SPDX-License-Identifier: Apache-2.0
"""Shared by permute, unpermute and their gradients, which are each other's kernels with more results."""

from __future__ import annotations

from dataclasses import dataclass

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
class NoOptions(Options):
    """The op has none."""


NO_OPTIONS = NoOptions()


@dataclass(frozen=True)
class GradientOptions(Options):
    """Names of the wanted results of a gradient."""

    want: tuple[str, ...]


def permute_kernel(op: Op, want: tuple[str, ...], arrays: Arrays, gpu: Gpu) -> Kernel:
    """Return the kernel that goes from tokens to rows, for the wanted results of an op."""
    given = _with_nulls(_PERMUTE_TAKES, arrays)
    return _kernel(op, _PERMUTE_TAKES, move_rows.permute_kernel(GradientOptions(want), given, gpu))


def unpermute_kernel(op: Op, want: tuple[str, ...], arrays: Arrays, gpu: Gpu) -> Kernel:
    """Return the kernel that goes from rows to tokens, for the wanted results of an op."""
    given = _with_nulls(_UNPERMUTE_TAKES, arrays)
    return _kernel(op, _UNPERMUTE_TAKES, move_rows.unpermute_kernel(GradientOptions(want), given, gpu))


def _with_nulls(takes: tuple[str, ...], arrays: Arrays) -> Arrays:
    return Arrays(takes, [getattr(arrays, name, None) for name in takes])


def _kernel(op: Op, takes: tuple[str, ...], kernel: Kernel) -> Kernel:
    known = {*op.names, *op.result_names}
    return kernel._replace(takes=takes, nulls=tuple([name for name in takes if name not in known]))
