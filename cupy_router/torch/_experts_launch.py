# SPDX-License-Identifier: Apache-2.0
"""expert_layout and permute as one cached call, for eager inference on a GPU, where the host is what takes time."""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from operator import itemgetter
from typing import Any

from cupy_router.arrays import Output, View
from cupy_router.arrays._torch import FRAMEWORK
from cupy_router.ops import _cached
from cupy_router.ops import _checks as check
from cupy_router.ops._cached import CachedCall, Work
from cupy_router.ops._op import Op
from cupy_router.ops._rows import LayoutInts
from cupy_router.ops.expert_layout import OP as LAYOUT
from cupy_router.ops.expert_layout import LayoutOptions
from cupy_router.ops.permute import OP as PERMUTE
from cupy_router.results import ExpertLayout

_NAME = "expert_layout and permute"


def layout_and_rows(x: Any, indices: Any, num_experts: int, want: tuple[str, ...]) -> tuple[Any, ExpertLayout] | None:
    """Return the rows of all pairs in order of experts, and their layout.

    Args:
        x: [num_tokens, hidden]
        indices: [num_tokens, top_k]
        num_experts, want: As in `expert_layout`; `order` and `positions` are wanted.

    Returns:
        As `permute` and `expert_layout`; None if these cannot be called in this way.
    """
    stream = FRAMEWORK.current_stream(x)
    if stream is None:
        return None
    pointers: list[int] = []
    key: list[Hashable] = [_NAME, num_experts, want]
    if not FRAMEWORK.describe_all((indices, x), stream, [], pointers, key):
        return None
    known = tuple(key)
    call = _cached.found(known)
    if call is None:
        call = _cached.keep(known, _prepared(x, indices, num_experts, want, stream))
    results = call.allocate(pointers)
    call.work(stream, pointers)  # type: ignore[misc]  # it has one
    return call.pack(*results)  # type: ignore[misc, no-any-return]  # it has one


class _Both:
    """The launches of both ops, called like one with the addresses of indices, x, the arrays of the layout and rows."""

    def __init__(self, layout: Work, permute: Work, names: Sequence[str], parameters: Sequence[str]) -> None:
        self.function = permute.function
        self._layout, self._permute = layout, permute
        null = len(names)
        places = {name: place for place, name in enumerate(names)}
        self._for_layout = itemgetter(*[places.get(name, null) for name in parameters], null + 1)
        self._for_permute = itemgetter(*[places.get(name, null) for name in PERMUTE.parameters(LayoutInts())])

    def __call__(self, stream: int, varying: Sequence[int | float]) -> None:
        given = (*varying, 0, -1)  # nothing for what is left out, and no num_valid
        self._layout(stream, self._for_layout(given))
        self._permute(stream, self._for_permute(given))


def _prepared(x: Any, indices: Any, num_experts: int, want: tuple[str, ...], stream: int) -> CachedCall:
    options = LayoutOptions(num_experts, want=want)
    ids = FRAMEWORK.view("indices", indices, stream)
    layout, outputs = _work(LAYOUT, options, [ids, None, None, None])
    names = [result.name for result in LAYOUT.existing(options)]
    made = {
        name: _cached.dense_view(name, 0, shape, dtype, ids.device)
        for name, (shape, dtype) in zip(names, outputs, strict=True)
    }
    permute, rows = _work(
        PERMUTE, LayoutInts(), [FRAMEWORK.view("x", x, stream), made["order"], made["positions"], None]
    )
    sizes = LAYOUT.sizes_of(options, [ids.shape, None, None, None])
    ints = [sizes[LAYOUT.numbers[path]] for path in LAYOUT.numbers]
    fields = [names.index(name) if name in names else len(names) for name in ExpertLayout._fields[: -len(ints)]]

    def pack(*results: Any) -> tuple[Any, ExpertLayout]:
        *arrays, moved = results
        arrays.append(None)
        return moved, ExpertLayout(*[arrays[place] for place in fields], *ints)

    both = _Both(layout, permute, ("indices", "x", *names, "rows"), LAYOUT.parameters(options))
    return CachedCall(len(x), FRAMEWORK.allocator((*outputs, *rows), x), both, (), (), pack)


def _work(op: Op, options: Any, views: list[View | None]) -> tuple[Work, Sequence[Output]]:
    """Return the launch of an op, checked, and its outputs."""
    with check.named(op.label):
        op.check_inputs(options, views)
        for view in views:
            if view is not None:
                check.strides(view)
    outputs = op.outputs_of(options, views)
    work = _cached.work_of(op, options, _cached.arrays_of(op, options, views, (), outputs), views)
    return work, outputs  # type: ignore[return-value]  # these ops always have work
