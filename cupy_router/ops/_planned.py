# SPDX-License-Identifier: Apache-2.0
"""All kernels that calls of an op need, for every number of rows in a range, found by planning them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from cupy_router import kernel_plan
from cupy_router.arrays import View
from cupy_router.kernel_plan import Wanted
from cupy_router.ops._cached import arrays_of, work_of
from cupy_router.ops._count import classes
from cupy_router.ops._op import Op
from cupy_router.tuning import Gpu


def with_rows(op: Op, views: Sequence[View | None], number: int) -> list[View | None]:
    """Return the views of the inputs of a call with another number of rows."""
    return [
        replace(view, shape=(number, *view.shape[1:])) if view and name in op.by_row else view
        for name, view in zip(op.names, views, strict=True)
    ]


def kernels_of(
    op: Op, options: Any, views: Sequence[View | None], num_rows: tuple[int, int], gpu: Gpu
) -> dict[Wanted, None]:
    """Return the kernels of all calls with these inputs but for their number of rows, which is in a range.

    views: of the inputs of one call; the first axes of those with an entry for each row are replaced.
    """
    wanted: dict[Wanted, None] = {}
    for count in classes(*num_rows):
        rows = with_rows(op, views, count)
        op.check_inputs(options, rows)
        arrays = arrays_of(op, options, rows, (), op.outputs_of(options, rows))
        with kernel_plan.collecting() as found:
            work_of(op, options, arrays, rows, gpu)
        wanted |= found
    return wanted
