# SPDX-License-Identifier: Apache-2.0
"""Expert layouts in declarations: the results, their sizes, and `LayoutSpec`, the options of a router's layout."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from cupy_router.ops import _checks as check
from cupy_router.ops._declared import Minimum, Result
from cupy_router.ops._options import Options
from cupy_router.results import ExpertLayout

MAX_ROWS = 2**31 - 1
DEFAULT_WANT = ("counts", "offsets", "order", "positions")
NUMBERS = ("num_tokens", "top_k", "alignment", "capacity")

# Axes of the arrays, in the order of the kernels' parameters, and what stands where a row has no pair.
_ARRAYS = {
    "counts": ("num_local", 0),
    "offsets": ("num_local + 1", 0),
    "ends": ("num_local", 0),
    "order": ("capacity", -1),
    "positions": ("num_tokens, {top_k}", -1),
    "block_experts": ("capacity / alignment", -1),
    "row_experts": ("capacity", -1),
}


@dataclass(frozen=True)
class LayoutSpec(Options):
    """The expert layout that a router returns with its results, covering all of their columns.

    Args:
        alignment: Experts begin at multiples of this number of rows.
        capacity: Number of rows, a multiple of the alignment; None: as many as any routing may need.
        want: Names of the arrays to compute, from those of :class:`ExpertLayout`. The others are None, and cost
            nothing.

    Raises:
        TypeError, ValueError: A number or a name is not allowed.

    >>> import numpy as np
    >>> from cupy_router import LayoutSpec, RoutingMethod, activation_topk
    >>> logits = np.array([[0.0, 2.0, 1.0, 2.0]], np.float32)
    >>> activation_topk(logits, RoutingMethod(4, 2), layout=LayoutSpec(want=("counts",))).layout.counts
    array([0, 1, 0, 1], dtype=int32)
    """

    alignment: int = 1
    capacity: int | None = None
    want: tuple[str, ...] = DEFAULT_WANT

    def __post_init__(self) -> None:
        alignment, capacity, want = checked_spec("LayoutSpec", self.alignment, self.capacity, self.want)
        for name, value in (("alignment", alignment), ("capacity", capacity), ("want", want)):
            object.__setattr__(self, name, value)


def checked_spec(label: str, alignment: Any, capacity: Any, want: Any) -> tuple[int, int | None, tuple[str, ...]]:
    """Return alignment, capacity and the wanted names in the order of the results, or raise what is wrong."""
    if type(alignment) is not int or not 0 < alignment <= MAX_ROWS:
        alignment = check.integer(f"{label}: alignment", alignment, 1, MAX_ROWS)
    if capacity is not None:
        capacity = check.integer_or_symbolic(f"{label}: capacity", capacity, 0, MAX_ROWS)
        if capacity % alignment:
            raise ValueError(f"{label}: capacity must be a multiple of the alignment {alignment}, got {capacity}")
    if want is not DEFAULT_WANT:
        want = _canonical(label, want)
    return alignment, capacity, want


def _canonical(label: str, want: Any) -> tuple[str, ...]:
    names = (want,) if isinstance(want, str) else want
    is_list = isinstance(names, (tuple, list, set, frozenset))
    if not is_list or not all(isinstance(name, str) and name in _ARRAYS for name in names):
        raise ValueError(f"{label}: want must be names among {', '.join(_ARRAYS)}, got {want!r}")
    if not names:
        raise ValueError(f"{label}: want must name at least one array, got {want!r}")
    return tuple([name for name in _ARRAYS if name in names])


ARRAYS = tuple(_ARRAYS)


def layout_results(
    want: Callable[[Any], tuple[str, ...]], prefix: str = "", top_k: str = "top_k"
) -> tuple[Result, ...]:
    """Declare the arrays of a layout; `want` returns the wanted names of some options."""

    def exists(name: str) -> Callable[[Any], bool]:
        if name == "ends":  # comes with offsets
            return lambda options: "ends" in want(options) or "offsets" in want(options)
        return lambda options: name in want(options)

    return tuple(
        Result(prefix + name, axes.format(top_k=top_k), "int32", fill, exists(name))
        for name, (axes, fill) in _ARRAYS.items()
    )


def layout_numbers(prefix: str = "", top_k: str = "top_k") -> dict[str, str]:
    """Declare the ints of a layout."""
    return {prefix + name: top_k if name == "top_k" else name for name in NUMBERS}


def layout_sizes(spec: Any, num_local: int, num_tokens: Any, top_k: Any, minimum: Minimum = min) -> Mapping[str, Any]:
    """Return the sizes of the axes of a layout of `num_local` experts; `spec` has its alignment and capacity."""
    capacity, alignment = spec.capacity, spec.alignment
    if capacity is None:
        capacity = exact_capacity(num_tokens * top_k, num_local, alignment, minimum)
    return {
        "num_local": num_local,
        "num_local + 1": num_local + 1,
        "alignment": alignment,
        "capacity": capacity,
        "capacity / alignment": capacity // alignment,
    }


def exact_capacity(num_pairs: Any, num_experts: int, alignment: int, minimum: Minimum = min) -> Any:
    """Return the most rows that pairs may need, from sizes that may be symbolic: one block of rows for each pair, or
    for the pairs in full blocks and each expert's last one.

    No term can be negative, so that PyTorch sees without a guard that the number of rows is not.
    """
    return minimum(num_pairs, (num_pairs + num_experts * (alignment - 1)) // alignment) * alignment


def check_rows(spec: Any, num_local: int, num_tokens: int, top_k: int) -> None:
    """Refuse more pairs or rows than int32 can count. Of a symbolic number, the call refuses it."""
    if not isinstance(num_tokens, int):
        return
    capacity = layout_sizes(spec, num_local, num_tokens, top_k)["capacity"]
    if num_tokens * top_k > MAX_ROWS or capacity > MAX_ROWS:
        raise ValueError(
            f"a layout must have at most 2**31 - 1 pairs and rows, got {num_tokens} tokens with {top_k} experts each, "
            f"and {capacity} rows"
        )


def as_spec(label: str, layout: Any) -> LayoutSpec:
    """Return an argument `layout` of a router."""
    if type(layout) is not LayoutSpec:
        raise TypeError(f"{label}: layout must be a LayoutSpec or None, got {type(layout).__name__}")
    return layout


def layout_capacity(num_tokens: int, top_k: int, num_experts: int, alignment: int = 1) -> int:
    """Return the most rows that the layout of any indices [num_tokens, top_k] may need, without looking at them.

    This is the `capacity` of :func:`expert_layout` by default. Each of the experts in use wastes at most alignment - 1
    rows.

    Args:
        num_tokens, top_k: Shape of the indices.
        num_experts: Number of experts in question, which may be 0 for a shard of more ranks than experts.
        alignment: Experts begin at multiples of this number of rows.

    Raises:
        TypeError, ValueError: An argument is no int, or negative, or the alignment is less than 1.

    >>> layout_capacity(64, 8, 256), layout_capacity(64, 8, 256, alignment=16)
    (512, 4352)
    """
    label = "layout_capacity: "
    num_tokens = check.integer(label + "num_tokens", num_tokens, 0)
    top_k = check.integer(label + "top_k", top_k, 0)
    num_experts = check.integer(label + "num_experts", num_experts, 0)
    alignment = check.integer(label + "alignment", alignment, 1)
    return int(exact_capacity(num_tokens * top_k, num_experts, alignment))


def as_layout(label: str, layout: Any, needs_order: bool = False) -> ExpertLayout:
    """Return an argument `layout`, which must have positions, and order if it is needed."""
    if type(layout) is not ExpertLayout:
        raise TypeError(f"{label}: layout must be an ExpertLayout, got {type(layout).__name__}")
    if layout.positions is None or (needs_order and layout.order is None):
        missing = "order" if needs_order and layout.order is None else "positions"
        raise ValueError(f"{label}: layout must have {missing}, got None: name it in want= of expert_layout")
    if type(layout.num_tokens) is not int:
        _check_ints(label, layout)
    return layout


def _check_ints(label: str, layout: ExpertLayout) -> None:
    """Refuse ints that were traced by a framework that did not know yet that they are static."""
    for name in NUMBERS:
        value = getattr(layout, name)
        if hasattr(value, "dtype") and not check.is_int(value):
            kind, package = type(value).__name__, type(value).__module__.partition(".")[0]
            remedy = f": import cupy_router.{package} before a layout is traced" if kind.endswith("Tracer") else ""
            raise TypeError(f"{label}: layout.{name} must be an int, got {kind}{remedy}")
