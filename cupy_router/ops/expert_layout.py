# SPDX-License-Identifier: Apache-2.0
"""expert_layout: the order of pairs by expert, with counts and offsets, as grouped GEMMs take them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from cupy_router import _hooks
from cupy_router.ops import _checks as check
from cupy_router.ops import _expert_layout_launch as launch
from cupy_router.ops._cached import Kernel, Work
from cupy_router.ops._declared import IDS, INTS, NUM_VALID, Arrays, Minimum, layer, row
from cupy_router.ops._layout import (
    DEFAULT_WANT,
    MAX_ROWS,
    check_rows,
    checked_spec,
    layout_numbers,
    layout_results,
    layout_sizes,
)
from cupy_router.ops._op import Op
from cupy_router.ops._options import Options
from cupy_router.ops._run import run
from cupy_router.reference import expert_layout as reference
from cupy_router.results import ExpertLayout
from cupy_router.tuning import Gpu, gpu_of


@dataclass(frozen=True)
class LayoutOptions(Options):
    """Options of a call: see :func:`expert_layout`."""

    num_experts: int
    alignment: int = 1
    capacity: int | None = None
    want: tuple[str, ...] = DEFAULT_WANT
    experts: tuple[int, int] | None = None
    num_local: int | None = None  # with an expert_map
    pad: int = -1

    @property
    def num_counted(self) -> int:
        """Number of experts in question."""
        if self.num_local is not None:
            return self.num_local
        return self.num_experts if self.experts is None else self.experts[1]


class ExpertLayoutOp(Op):
    """The declaration of :func:`expert_layout`."""

    name = "expert_layout"
    options = LayoutOptions
    inputs = (
        row("indices", "num_tokens, top_k", IDS, required=True),
        layer("expert_map", "num_experts", ("int32",)),
        layer("load", "num_experts", INTS, written=True),
        NUM_VALID,
    )
    results = layout_results(lambda options: options.want)
    returns = ExpertLayout
    numbers = layout_numbers()
    symbolic = ("capacity", "pad")
    rows_independent = False
    vmap = "loop"

    def example(self) -> LayoutOptions:
        return LayoutOptions(5, 4)

    def sizes(self, options: LayoutOptions) -> dict[str, int]:
        return {"num_experts": options.num_experts}

    def result_sizes(
        self, options: LayoutOptions, sizes: Mapping[str, Any], minimum: Minimum = min
    ) -> Mapping[str, Any]:
        return layout_sizes(options, options.num_counted, sizes["num_tokens"], sizes["top_k"], minimum)

    def writing_options(self, options: LayoutOptions) -> LayoutOptions:
        return LayoutOptions(
            options.num_experts, want=("counts",), experts=options.experts, num_local=options.num_local
        )

    def instead(self, options: LayoutOptions) -> str:
        if options.num_local is not None:  # several experts may have one count
            here = f"(expert_map >= 0) & (expert_map < {options.num_local})"
            return f"compute load + where({here}, counts, 0), with the counts of a call without expert_map"
        if options.experts is not None:
            first, count = options.experts
            return f"in JAX compute load.at[{first}:{first + count}].add(layout.counts)"
        return "compute load + layout.counts"

    def check(self, options: LayoutOptions, arrays: Arrays) -> None:
        num_tokens, top_k = arrays.indices.shape
        check_rows(options, options.num_counted, num_tokens, top_k)
        if options.pad >= 0 and isinstance(num_tokens, int) and options.pad < num_tokens * top_k:
            raise ValueError(
                f"pad must lie outside of the pairs 0..{num_tokens * top_k - 1} of indices, got {options.pad}"
            )

    def reference(self, options: LayoutOptions, arrays: Arrays, num_valid: int) -> tuple[Any, ...]:
        found = reference.expert_layout(
            arrays.indices, options.num_experts, alignment=options.alignment, capacity=options.capacity,
            experts=options.experts, expert_map=arrays.expert_map, num_local=options.num_local, num_valid=num_valid,
            pad=options.pad, want=tuple(result.name for result in self.existing(options)),
        )  # fmt: skip
        if arrays.load is not None:
            question = options.num_experts, options.experts, arrays.expert_map, options.num_local
            load = arrays.load
            load += reference.demand(arrays.indices[:num_valid], *question).astype(load.dtype)
        return tuple(found.values())

    def is_single_kernel(self, options: LayoutOptions, arrays: Arrays) -> bool:
        return launch.is_single(options, arrays, gpu_of(arrays.indices.device))

    def kernel(self, options: LayoutOptions, arrays: Arrays, gpu: Gpu) -> Kernel | Work:
        return launch.work(self, options, arrays, gpu)


OP = ExpertLayoutOp()


def expert_layout(
    indices: Any,
    num_experts: int,
    *,
    alignment: int = 1,
    capacity: int | None = None,
    experts: tuple[int, int] | None = None,
    expert_map: Any = None,
    num_local: int | None = None,
    num_valid: Any = None,
    load: Any = None,
    want: tuple[str, ...] = DEFAULT_WANT,
    pad: int = -1,
    out: Any = None,
    stream: Any = None,
) -> ExpertLayout:
    """Lay the pairs of tokens and experts out by expert: counts, offsets, the order of rows and its inverse.

    Rows are ordered by expert, then by pair (token * top_k + slot): a stable sort, bitwise the same on every path, size
    and run. A pair whose index is no expert, or an expert that is not in question, has no row.

    Args:
        indices: [num_tokens, top_k] uint8, int16, uint16, int32 or int64, experts of each token, such as the indices
            of a :class:`Routing`. Entries outside 0..num_experts-1 are no experts. An expert twice in a row is two
            pairs.
        num_experts: number of experts.
        alignment: experts begin at multiples of this number of rows; the rows in between have no pair.
        capacity: number of rows, a multiple of the alignment. None: `layout_capacity`, enough for any indices. With
            less, rows are given away in order until none is left; pairs without one have position -1.
        experts: (first, count) of the experts in question; None: all. Expert `first` is entry 0 of the results.
        expert_map: [num_experts] int32, the expert in question, 0..num_local-1, that each expert is. Any other number
            means that it is not here. Several experts may be sent to one.
        num_local: number of experts in question, with `expert_map` and only with it.
        num_valid: number of valid rows of indices; the rows after them have no pairs. Either an int in 0..num_tokens,
            or a one-element int32 array on the device of the indices, which is clamped, and may change between replays
            of a CUDA graph.
        load: [num_experts] int32 or int64, written: the number of pairs of each expert in question is added to it.
            int32 wraps at 2**31, so count in int64 what is added up for long. Nothing is added while PyTorch's autograd
            runs a backward pass: where activations are recomputed, pairs count once. Inside of
            `torch.utils.checkpoint(..., use_reentrant=False)` the load has to be a buffer or in a closure: PyTorch
            refuses arguments that were written into. Refused for JAX, whose arrays are immutable, and inside
            torch.func.
        want: names of the arrays to compute, from those of :class:`ExpertLayout`. The others are None, and cost
            nothing. `ends` comes with `offsets`.
        pad: entry of `order` for rows without a pair, outside 0..num_tokens * top_k - 1.
        out: an earlier layout, or an :class:`ExpertLayout` of preallocated arrays that overlap nothing, filled in place
            and returned.
        stream: an object with `__cuda_stream__`, or an int handle. By default, work is enqueued on the current stream
            of the indices' framework. The host never waits.

    Returns:
        ExpertLayout of int32 arrays of the indices' framework, on their device.

    Raises:
        TypeError: an argument is no array or no int, or its dtype is not allowed.
        ValueError: ranks, shapes, strides, devices or numbers are wrong, arguments exclude each other, or there are
            more than 2**31 - 1 rows.
        RuntimeError: CUDA arrays were given, but CuPy, NVRTC or a driver is missing.

    docs/layout.md shows which consumer takes which of the arrays.

    >>> import numpy as np
    >>> from cupy_router import expert_layout
    >>> layout = expert_layout(np.array([[2, 0], [2, 1]], np.int32), 4)
    >>> layout.counts, layout.offsets, layout.order
    (array([1, 1, 2, 0], dtype=int32), array([0, 1, 2, 4, 4], dtype=int32), array([1, 3, 0, 2], dtype=int32))
    >>> layout.positions
    array([[2, 0],
           [3, 1]], dtype=int32)
    """
    if type(num_experts) is not int or not 0 < num_experts < MAX_ROWS:
        num_experts = check.integer("expert_layout: num_experts", num_experts, 1, MAX_ROWS - 1)
    alignment, capacity, want = checked_spec("expert_layout", alignment, capacity, want)
    if experts is not None:
        experts = _checked_experts(experts, num_experts)
        if expert_map is not None:
            raise ValueError("expert_layout: experts and expert_map exclude each other, but both were given")
    if expert_map is not None and num_local is None:
        raise ValueError("expert_layout: num_local must be the number of experts that expert_map leads to, got None")
    if num_local is not None:
        if expert_map is None:
            raise ValueError(f"expert_layout: num_local must be None without an expert_map, got {num_local!r}")
        num_local = check.integer("expert_layout: num_local", num_local, 0, MAX_ROWS - 1)
    if type(pad) is not int or pad != -1:
        pad = check.integer_or_symbolic("expert_layout: pad", pad, -(2**31), 2**31 - 1)
    if load is not None and any(passes() for passes in _hooks.in_backward):
        load = None  # the forward pass has counted these pairs
    number, num_valid = check.split_num_valid("expert_layout", num_valid)
    fields = num_experts, alignment, capacity, want, experts, num_local, pad
    return run(OP, fields, (indices, expert_map, load, num_valid), out, stream, number)  # type: ignore[no-any-return]


def _checked_experts(experts: Any, num_experts: int) -> tuple[int, int]:
    if not isinstance(experts, (tuple, list)) or len(experts) != 2:
        raise ValueError(f"expert_layout: experts must be (first, count), got {experts!r}")
    first = check.integer("expert_layout: the first of experts", experts[0], 0, num_experts)
    count = check.integer("expert_layout: the count of experts", experts[1], 0)
    if first + count > num_experts:
        raise ValueError(
            f"expert_layout: experts must end at most at num_experts = {num_experts}, got first {first}, "
            f"count {check.brief(count)}"
        )
    return first, count
