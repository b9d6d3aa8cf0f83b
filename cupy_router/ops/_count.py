# SPDX-License-Identifier: Apache-2.0
"""A number of rows that stands for many: it records for which others a plan would be the same.

A planner only compares and computes with the number of rows. A :class:`Count` does so with all numbers of a range at
once, and each comparison removes those for which it turns out differently. After the plan, those that are left are
exactly the numbers with this plan, since each of them went the same way.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
from numpy.typing import NDArray


class Same:
    """The numbers of a range for which everything has turned out alike so far."""

    def __init__(self, numbers: NDArray[np.int64]) -> None:
        self.numbers, self.left = numbers, np.ones(len(numbers), bool)

    def keep(self, alike: Any) -> None:
        """Remove the numbers for which `alike`, an array of bools or one of them, is false."""
        self.left &= alike


class Count(int):
    """An int with its value for each number of a range. `same` is shared by all that is computed from one number."""

    values: Any  # [numbers in question] int64
    same: Same

    def __new__(cls, value: int, values: Any, same: Same) -> Count:
        made = super().__new__(cls, value)
        made.values, made.same = values, same
        return made

    def fixed(self) -> int:
        """Return the value as a plain int, and keep only the numbers that have it."""
        value = int.__int__(self)
        self.same.keep(self.values == value)
        return value

    __int__ = __index__ = __trunc__ = fixed

    def __hash__(self) -> int:
        return hash(self.fixed())

    def __bool__(self) -> bool:
        return bool(self != 0)

    def bit_length(self) -> Any:
        values = np.frexp(np.abs(self.values).astype(np.float64))[1].astype(np.int64)  # exact up to 2**53
        return Count(int.bit_length(self), values, self.same)


def _computed(name: str, plain: Callable[..., Any], reverse: bool = False) -> None:
    """Define an operator whose result is another Count."""

    def apply(self: Count, *others: Any) -> Any:
        if not all(isinstance(other, int) for other in others):
            return NotImplemented
        operands = (self, *others)[:: -1 if reverse else 1]
        value = plain(*[int.__int__(each) for each in operands])
        return Count(value, plain(*[each.values if isinstance(each, Count) else each for each in operands]), self.same)

    setattr(Count, f"__{'r' if reverse else ''}{name}__", apply)


def _compared(name: str, plain: Callable[[Any, Any], Any]) -> None:
    """Define a comparison, which is as it is for the number at hand."""

    def apply(self: Count, other: Any) -> Any:
        if not isinstance(other, (int, float)):
            return NotImplemented
        outcome = plain(int.__int__(self), int.__int__(other) if isinstance(other, Count) else other)
        self.same.keep(plain(self.values, other.values if isinstance(other, Count) else other) == outcome)
        return outcome

    setattr(Count, f"__{name}__", apply)


def _refused(name: str) -> None:
    """Define an operator that raises, since a plain result would be taken for that of all numbers."""

    def apply(self: Count, *others: Any) -> Any:
        raise NotImplementedError(f"Count has no {name}: define it where the others are")

    setattr(Count, f"__{name}__", apply)


for _name in ("add", "sub", "mul", "floordiv", "mod", "lshift", "rshift", "and_", "or_", "xor"):
    _computed(_name.strip("_"), getattr(operator, _name))
    _computed(_name.strip("_"), getattr(operator, _name), reverse=True)
for _name in ("neg", "pos", "abs", "invert"):
    _computed(_name, getattr(operator, _name))
for _name in ("lt", "le", "eq", "ne", "gt", "ge"):
    _compared(_name, getattr(operator, _name))
for _name in ("truediv", "rtruediv", "divmod", "rdivmod", "pow", "rpow", "float", "round", "floor", "ceil"):
    _refused(_name)


def classes(first: int, last: int) -> Iterator[Count]:
    """Yield counts until each number from `first` to `last` was the like of one of them.

    Plan with each count before the next is taken.

    >>> for n in classes(1, 1000):
    ...     block = 32 if n > 8 else 16 if n > 2 else 8
    ...     print(f"{n}: {block}")
    1: 8
    3: 16
    9: 32
    """
    numbers = np.arange(first, last + 1, dtype=np.int64)
    while len(numbers):
        same = Same(numbers)
        yield Count(int(numbers[0]), numbers, same)
        same.left[0] = True
        numbers = numbers[~same.left]
