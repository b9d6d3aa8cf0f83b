# SPDX-License-Identifier: Apache-2.0
"""Arrays for any op, made from its declaration."""

from __future__ import annotations

from typing import Any

import numpy as np

from cupy_router.arrays._numpy import dtype_of
from cupy_router.ops._op import Op
from cupy_router.reference.expert_layout import expert_layout
from tests import inputs

ROWS, SIZE = 6, 5  # of the rows of a call, and of axes whose size nothing fixes


def arrays(op: Op, seed: int = 0) -> dict[str, np.ndarray]:
    """Return the required inputs: floats are normal, integers small, the dtype is the first that is allowed."""
    sizes = {op.inputs[0].axes[0]: ROWS, **op.sizes(op.example())}
    made: dict[str, np.ndarray] = {}
    for place, declared in enumerate(op.inputs):
        if declared.required or declared.unless:
            shape = tuple(sizes.setdefault(axis, SIZE) for axis in declared.axes)
            dtype = dtype_of((declared.dtypes or ("float32",))[0])
            normal = inputs.normal(shape, seed=300 + 10 * seed + place)
            made[declared.name] = (
                (np.abs(normal) * 2).astype(dtype) if np.dtype(dtype).kind in "iu" else normal.astype(dtype)
            )
    if "positions" in made:  # rows of pairs, each at most once
        layout = expert_layout(made["positions"], 3, capacity=sizes["capacity"])
        made |= {name: layout[name] for name in ("order", "positions") if name in made}
    return made


def sizes(op: Op, given: dict[str, Any]) -> dict[str, Any]:
    """Return the sizes of a call of the op's example with these inputs."""
    return op.sizes_of(op.example(), [given[name].shape if name in given else None for name in op.names])


def positional(op: Op, given: dict[str, Any]) -> tuple[Any, ...]:
    """Return all inputs of an op in order, None for those left out."""
    return tuple(given.get(name) for name in op.names)
