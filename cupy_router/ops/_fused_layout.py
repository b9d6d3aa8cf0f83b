# SPDX-License-Identifier: Apache-2.0
"""The layout of few tokens in the launch that routes them: constants and launch shapes of kernels/*_layout.cu.

The parameters of such a kernel are those of the op, `num_valid_value`, `counter`, the numbers of the router's own
kernel, and those of the layout.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

from cupy_router import compiler, scratch
from cupy_router.ops._cached import NUMBER, Kernel, Work, launch_with
from cupy_router.ops._declared import Arrays
from cupy_router.ops._layout import ARRAYS, layout_sizes
from cupy_router.ops._op import Op
from cupy_router.ops._replicas import num_counted
from cupy_router.tuning import Gpu

ONE_BLOCK, LAST_BLOCK, CLUSTER = range(3)  # which block lays out: see kernels/layout/fused_layout.cuh
CLUSTER_BLOCKS = 8
CLUSTER_FROM = (9, 0)  # compute capability

_MAX_EXPERTS = 1024
_SHARED_BYTES = 46 * 1024  # static; the rest is for what waits for other blocks
_COUNTER = "counter"
_COUNTER_BYTES = 4


class Problem(NamedTuple):
    """Sizes of a layout."""

    num_pairs: int
    num_experts: int
    capacity: int
    padding: int  # least number of rows without a pair


def problem(options: Any, arrays: Arrays, gpu: Gpu) -> Problem | None:
    """Return what the layout of a call has to do; None if its own launch does it better, or has to."""
    spec = options.layout
    num_tokens, columns = arrays.indices.shape
    num_experts = num_counted(options)
    if not 0 < num_tokens <= gpu.table.fused_layout.max_tokens or num_experts > _MAX_EXPERTS:
        return None
    if arrays.indices.dtype.startswith("u"):  # the kernels look for -1
        return None
    num_pairs = num_tokens * columns
    capacity = layout_sizes(spec, num_experts, num_tokens, columns)["capacity"]
    return Problem(num_pairs, num_experts, capacity, max(0, capacity - num_pairs))


def macros_and_numbers(
    found: Problem, options: Any, arrays: Arrays, gpu: Gpu, layout_by: int, threads: int
) -> tuple[dict[str, int], dict[str, int]]:
    """Return the constants of the layout, and its parameters."""
    spec, positions, columns = options.layout, arrays.positions, arrays.indices.shape[1]
    by_pair = layout_by == ONE_BLOCK and found.num_pairs <= gpu.table.fused_layout.max_pairs_looked_at
    macros = {f"LAYOUT_{name.upper()}": int(getattr(arrays, name) is not None) for name in ARRAYS}
    macros |= {
        "LAYOUT_ALIGNMENT": spec.alignment,
        "LAYOUT_DENSE": int(positions is None or positions.row_stride == columns),
        "LAYOUT_PREFILLED": int(found.padding > 0 or spec.alignment > 1),
        "LAYOUT_THREADS": threads,
        "LAYOUT_PAIRS": found.num_pairs if by_pair else _rounded(found.num_pairs, threads),
        "LAYOUT_BY_PAIR": int(by_pair),
        "LAYOUT_BY": layout_by,
    }
    stride = 0 if positions is None else positions.row_stride
    return macros, {"capacity": found.capacity, "positions_stride": stride}


def _rounded(num_pairs: int, threads: int) -> int:
    """Return a number of pairs that calls of about this size share: a power of two for each thread."""
    rounds = -(-num_pairs // threads)
    return threads << (rounds - 1).bit_length()


def shared_bytes(num_experts: int, threads: int) -> int:
    """Return the shared memory of `BlockLayout` in kernels/layout/block_layout.cuh, or a little more."""
    warps, row = threads // 32, -(-num_experts // 8) * 8
    masks = 4 * warps * (row + 4) if warps * row <= 6144 else 16 * warps
    return masks + 2 * warps * (row + 8) + 12 * row + 64


def fused(
    options: Any,
    routed: Kernel,
    found: Problem,
    arrays: Arrays,
    gpu: Gpu,
    name: str,
    layout_by: int,
    more: dict[str, int] | None = None,
) -> Kernel | None:
    """Return the launch of kernels/<name>.cu, which does what `routed` does in the same shape, and lays out."""
    num_ids = 0 if layout_by == LAST_BLOCK else 4 * _rounded(found.num_pairs, routed.block)
    too_much_padding = found.padding > routed.grid * gpu.table.fused_layout.max_padding_rows
    if too_much_padding or shared_bytes(found.num_experts, routed.block) + num_ids > _SHARED_BYTES:
        return None
    macros, numbers = macros_and_numbers(found, options, arrays, gpu, layout_by, routed.block)
    fixed = routed.fixed | numbers | (more or {})
    takes = None if routed.takes is None else (*routed.takes, *ARRAYS)
    return routed._replace(file=name, function=name, macros=routed.macros | macros, fixed=fixed, takes=takes)


def counts(kernel: Kernel) -> bool:
    """Return whether the blocks of a kernel of :func:`fused` are counted as they arrive."""
    return kernel.macros["LAYOUT_BY"] == LAST_BLOCK


def with_counter(op: Op, options: Any, kernel: Kernel, arrays: Arrays) -> Kernel | Work:
    """Return the launch of a kernel that takes a counter, which is null unless blocks arrive."""
    if counts(kernel):
        return counted(op, options, kernel, arrays)
    return kernel._replace(fixed={_COUNTER: 0} | kernel.fixed)


def counted(op: Op, options: Any, kernel: Kernel, arrays: Arrays) -> Work:
    """Return the launch of a kernel whose blocks are counted."""
    return _LastBlock(op, options, kernel, arrays.indices.device)


class _LastBlock:
    """A launch whose last block to arrive lays out, with a counter in scratch memory of the stream."""

    def __init__(self, op: Op, options: Any, kernel: Kernel, device: tuple[str, int]) -> None:
        self._device = device
        passed = (*op.parameters(options), NUMBER, _COUNTER)
        varying = passed if kernel.takes is None else (*kernel.takes, NUMBER, _COUNTER)
        self._launch = launch_with(varying, kernel, device, passed)
        self.function: compiler.Function = self._launch.function

    def __call__(self, stream: int, varying: Sequence[int | float]) -> None:
        counter = scratch.buffer(self._device, stream, "fused layout", _COUNTER_BYTES)
        self._launch(stream, (*varying, counter))
