# SPDX-License-Identifier: Apache-2.0
"""The parts of a declaration: inputs and results of an op, and the arrays of one call by name."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any

FLOATS, INTS, IDS = (
    ("float32", "float16", "bfloat16"),
    ("int32", "int64"),
    ("uint8", "int16", "uint16", "int32", "int64"),
)
ANY: tuple[str, ...] = ()  # any dtype: the op moves bytes

Minimum = Callable[[Any, Any], Any]  # of two sizes, which may be symbolic


@dataclass(frozen=True)
class Input:
    """An array argument.

    kind: "row": an entry of its first axis belongs to each row of the call; "layer": the same for all rows; "row or
        one": an entry for each row, or one for all; "count": `num_valid`, an int or a one-element int32 array.
    axes: names of its axes. An axis has one size in a call, wherever it stands.
    dtypes: the allowed dtypes, or ANY.
    written: the op writes into it.
    path: where the caller has it, such as "layout.order"; the name by default.
    leading: name of an axis that it may have before the others.
    unless: name of another input without which this one is required.
    """

    name: str
    kind: str
    axes: tuple[str, ...] = ()
    dtypes: tuple[str, ...] = FLOATS
    required: bool = False
    written: bool = False
    path: str = ""
    leading: str = ""
    unless: str = ""

    def axes_of(self, rank: int) -> tuple[str, ...]:
        """Return the names of the axes of an array of this rank."""
        return (self.leading, *self.axes) if self.leading and rank == len(self.axes) + 1 else self.axes

    @cached_property
    def shown(self) -> str:
        """Name in errors."""
        return self.path or self.name


def row(
    name: str,
    axes: str,
    dtypes: tuple[str, ...] = FLOATS,
    *,
    required: bool = False,
    path: str = "",
    unless: str = "",
) -> Input:
    """Declare an input with one entry for each row of the call."""
    return Input(name, "row", _split(axes), dtypes, required, path=path, unless=unless)


def layer(
    name: str,
    axes: str,
    dtypes: tuple[str, ...] = FLOATS,
    *,
    required: bool = False,
    written: bool = False,
    path: str = "",
    leading: str = "",
) -> Input:
    """Declare an input that all rows share."""
    return Input(name, "layer", _split(axes), dtypes, required, written, path, leading)


def row_or_one(name: str, axes: str, dtypes: tuple[str, ...] = FLOATS) -> Input:
    """Declare an input with an entry for each row of the call, or with one entry for all."""
    return Input(name, "row or one", _split(axes), dtypes)


NUM_VALID = Input("num_valid", "count", (), ("int32",))


@dataclass(frozen=True)
class Result:
    """An array that an op returns.

    path: its field in what the caller gets, such as "weights", or "layout.counts" in a nested tuple.
    axes: names of its axes; their sizes are those of inputs, or come from `Op.sizes` and `Op.result_sizes`.
    dtype: its dtype, or a function of the options and the dtypes of the inputs by name.
    fill: what stands in rows from `num_valid` on.
    parameter: of kernels; the last part of the path by default. No input has this name.
    exists: whether these options ask for it; None: always.
    differentiable: the inputs that it has a gradient with respect to.
    """

    path: str
    axes: str
    dtype: str | Callable[[Any, Mapping[str, str]], str]
    fill: float | int = 0
    exists: Callable[[Any], bool] | None = None
    differentiable: tuple[str, ...] = ()
    parameter: str = ""

    @cached_property
    def name(self) -> str:
        """The parameter of kernels."""
        return self.parameter or self.path.rpartition(".")[2]

    @cached_property
    def axis_names(self) -> tuple[str, ...]:
        """Names of the axes as a tuple."""
        return _split(self.axes)


class Arrays:
    """The arrays of one call as attributes: views, or host arrays for the reference. None if left out."""

    def __init__(self, names: Sequence[str], arrays: Sequence[Any]) -> None:
        for name, array in zip(names, arrays, strict=True):
            setattr(self, name, array)  # torch.compile traces this; before PyTorch 2.13 not __dict__.update

    if TYPE_CHECKING:

        def __getattr__(self, name: str) -> Any: ...

    def given(self, *names: str) -> list[str]:
        """Return the names of the arrays that are not None, among these."""
        return [name for name in names if getattr(self, name) is not None]

    def replaced(self, **arrays: Any) -> Arrays:
        """Return the same arrays but for some."""
        found = {**self.__dict__, **arrays}
        return Arrays(tuple(found), tuple(found.values()))

    def named(self, *names: str) -> dict[str, Any]:
        """Return the arrays of these names, None among them."""
        return {name: self.__dict__[name] for name in names}


def _split(axes: str) -> tuple[str, ...]:
    return tuple(axes.split(", ")) if axes else ()
