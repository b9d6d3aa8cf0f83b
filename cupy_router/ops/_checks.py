# SPDX-License-Identifier: Apache-2.0
"""Argument checks that the ops share. Errors are one sentence: the argument, what is allowed, and what was given."""

from __future__ import annotations

import math
import operator
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np

from cupy_router import _hooks
from cupy_router.arrays import NO_DEVICE, Output, View, item_bits


@contextmanager
def named(name: str, *others: type[Exception]) -> Iterator[None]:
    """Prefix the messages of a TypeError, a ValueError and other errors with a name."""
    try:
        yield
    except TypeError as error:
        raise TypeError(f"{name}: {error}") from error
    except ValueError as error:
        raise ValueError(f"{name}: {error}") from error
    except others as error:
        raise type(error)(f"{name}: {error}") from error


def dtype(view: View, allowed: Sequence[str]) -> None:
    if view.dtype not in allowed:
        remedy = "int32" if "int32" in allowed else allowed[0]  # of ids, uint8 would lose some
        raise TypeError(f"{view.name} must be {' or '.join(allowed)}, got {view}: convert it to {remedy}")


def moved(view: View) -> None:
    """Check the dtype of an array that is moved as bytes."""
    bits = item_bits(view.dtype)
    if view.dtype[:2] in (">i", ">u", ">f", ">c"):
        native = f"call {view.name}.astype({view.dtype[1:]!r})"
        raise TypeError(f"{view.name} must have the byte order of the machine, got {view}: {native}")
    if bits == 0 or bits % 8:
        raise TypeError(f"{view.name} must have a dtype of numbers of 8 bits or more, got {view}")


def axes(view: View, names: tuple[str, ...], sizes: dict[str, int]) -> None:
    """Check rank and shape by the names of the axes. Add the sizes of new names to `sizes`."""
    known = dict(sizes)
    if len(view.shape) != len(names) or view.shape != tuple(map(sizes.setdefault, names, view.shape)):
        wanted = f"[{', '.join(names)}]"
        if not known.keys().isdisjoint(names):
            wanted += f" = [{', '.join(str(known.get(axis, axis)) for axis in names)}]"
        raise ValueError(f"{view.name} must have shape {wanted}, got {view}{_reshape(view, names, known)}")


def _reshape(view: View, names: tuple[str, ...], sizes: dict[str, int]) -> str:
    """Return the remedy for an array of too many axes, if merging the first ones gives the wanted shape."""
    extra = len(view.shape) - len(names)
    merged = (math.prod(view.shape[: extra + 1]), *view.shape[extra + 1 :])
    if extra < 1 or any(sizes.get(name, size) != size for name, size in zip(names, merged, strict=True)):
        return ""
    return f": call {view.name}.reshape({', '.join(map(str, (-1, *merged[1:])))})"


def result(view: View, output: Output, axes: str) -> None:
    """Check an array of `out` against the shape and dtype that the result has."""
    shape, name = output
    if view.dtype != name:
        raise TypeError(f"{view.name} must be {name}, got {view}")
    if view.shape != shape:
        raise ValueError(f"{view.name} must have shape [{axes}] = {list(shape)}, got {view}")


def hosts(views: Sequence[View | None]) -> list[np.ndarray[Any, Any] | None]:
    """Return the arrays in CPU memory; TypeError if NumPy has no such dtype."""
    for view in views:
        if view is not None and view.host is None:
            raise TypeError(f"{view.name} must have a dtype that NumPy or ml_dtypes has, got {view}")
    return [None if view is None else view.host for view in views]


def is_int(value: Any) -> bool:
    """Return whether a value is an int, also NumPy's, and no bool."""
    return isinstance(value, (int, np.integer)) and not isinstance(value, bool)


def integer(name: str, value: Any, low: int, high: int | None = None) -> int:
    """Return an int (also NumPy's, never a bool) within low..high."""
    try:
        number = None if isinstance(value, (bool, np.bool_)) else operator.index(value)
    except TypeError:
        number = None
    if number is None:
        kind = type(value).__name__
        remedy = ": name it in the static_argnames of jax.jit" if kind.endswith("Tracer") else ""
        raise TypeError(f"{name} must be an int, got {kind}{remedy}")
    if number < low or (high is not None and number > high):
        allowed = f"in {low}..{high}" if high is not None else f"at least {low}"
        raise ValueError(f"{name} must be {allowed}, got {brief(number)}")
    return number


def integer_or_symbolic(name: str, value: Any, low: int, high: int) -> Any:
    """Return an int within low..high, or one that stands for a size which traced code does not know."""
    is_int = type(value) is int or type(value) in _hooks.symbolic_ints
    return value if is_int and low <= value <= high else integer(name, value, low, high)


def boolean(name: str, value: Any) -> bool:
    """Return a bool (also NumPy's)."""
    if not isinstance(value, (bool, np.bool_)):
        raise TypeError(f"{name} must be a bool, got {type(value).__name__}")
    return bool(value)


def brief(number: Any) -> str:
    """Return a number as text. Python refuses to print ints of thousands of digits."""
    if isinstance(number, int) and number.bit_length() > 128:
        return f"an int of {number.bit_length()} bits"
    return str(number)


def strides(view: View) -> None:
    """Check that the last axis is contiguous; rows may have any stride."""
    if view.shape and view.shape[-1] > 1 and view.strides[-1] != 1 and 0 not in view.shape:
        raise ValueError(
            f"{view.name} must be contiguous along its last axis, got strides {list(view.strides)} of {view}"
        )


def one_device(views: Sequence[View]) -> None:
    if len({view.device for view in views} - {NO_DEVICE}) > 1:
        raise ValueError(f"all arrays must lie on one device, got {', '.join(f'{v.name} {v}' for v in views)}")


def writable(view: View, instead: str = "") -> None:
    """Check that an array is not read-only, and that its rows do not overlap."""
    if view.readonly:
        raise ValueError(f"{view.name} must be writable, got a read-only {view}{instead and f': {instead}'}")
    if len(view.shape) == 2 and view.shape[0] > 1 and abs(view.strides[0]) < view.shape[1]:
        raise ValueError(f"{view.name} must have rows that do not overlap, got strides {list(view.strides)} of {view}")


def split_num_valid(op: str, num_valid: Any) -> tuple[int, Any]:
    """Return num_valid as an int (-1: all rows, or an array is given) and as an array (None if it is not one)."""
    if num_valid is None:
        return -1, None
    if isinstance(num_valid, (int, np.integer)):
        return integer(f"{op}: num_valid", num_valid, 0), None
    if isinstance(num_valid, (float, np.floating, str, list, tuple)):
        remedy = ": convert it by int()" if isinstance(num_valid, (float, np.floating)) else ""
        given = f"{type(num_valid).__name__} {num_valid}{remedy}"
        raise TypeError(f"{op}: num_valid must be an int or a one-element int32 array, got {given}")
    return -1, num_valid


def count(view: View) -> None:
    """Check the shape of a `num_valid` array."""
    if view.shape not in ((), (1,)):
        raise ValueError(f"{view.name} must be an int or an array of shape [] or [1], got {view}")


def valid_rows(number: int, array: np.ndarray[Any, Any] | None, num_rows: int) -> int:
    """Return the number of valid rows, from the two results of :func:`split_num_valid`."""
    if array is not None:
        return min(max(int(array.reshape(())), 0), num_rows)
    return num_rows if number < 0 else number
