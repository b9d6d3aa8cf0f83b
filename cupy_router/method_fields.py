# SPDX-License-Identifier: Apache-2.0
"""Checks of the fields of a RoutingMethod, each with the sentence that refuses a value."""

from __future__ import annotations

import math
import operator
from numbers import Real
from typing import Any

FLOAT32_TINY = 2.0**-126  # smallest normal float32; kernels flush smaller values to 0
FLOAT32_MAX = (2.0 - 2.0**-23) * 2.0**127

INDEX_DTYPES = {  # the most experts, shared ones included, whose ids they hold beside one value for "none"
    "int32": 2**31, "int64": 2**63, "int16": 2**15, "uint16": 2**16 - 1, "uint8": 2**8 - 1,
}  # fmt: skip


def integer(name: str, value: Any, lowest: int, highest: int, limit: str) -> int:
    """Return an int within lowest..highest."""
    try:
        # Older releases of NumPy take their bool for an index.
        if isinstance(value, bool) or (not isinstance(value, int) and type(value).__name__ == "bool"):
            raise TypeError
        number = operator.index(value)
    except TypeError:
        raise TypeError(f"RoutingMethod: {name} is {value!r}, but must be an int") from None
    if not lowest <= number <= highest:
        raise ValueError(f"RoutingMethod: {name} is {number}, but must be from {lowest} to {limit}")
    return number


def one_of(name: str, value: Any, allowed: tuple[str, ...]) -> str:
    """Return a string that is allowed."""
    listed = ", ".join(map(repr, allowed)) + (" or a ScoreFunction" if name == "score" else "")
    if not isinstance(value, str):
        raise TypeError(f"RoutingMethod: {name} is {value!r}, but must be one of {listed}")
    if value not in allowed:
        raise ValueError(f"RoutingMethod: {name} is {value!r}, but must be one of {listed}")
    return str(value)


def boolean(name: str, value: Any) -> bool:
    """Return a bool."""
    if not isinstance(value, bool):
        raise TypeError(f"RoutingMethod: {name} is {value!r}, but must be True or False")
    return value


def real(name: str, value: Any, *, nonnegative: bool = False) -> float:
    """Return a float that float32 holds as 0 or a normal number."""
    if isinstance(value, bool) or not isinstance(value, Real):
        raise TypeError(f"RoutingMethod: {name} is {value!r}, but must be a number")
    (value,) = {value}  # makes a constant of a symbolic number of torch.compile
    try:
        number = float(value)
    except OverflowError:
        number = math.inf
    # Kernels compute in float32 and flush subnormals to 0, so any other number would mean another method there. They
    # also divide by the non-negative ones, so the inverse has to be representable too.
    highest = 1.0 / FLOAT32_TINY if nonnegative else FLOAT32_MAX
    representable = number == 0.0 or FLOAT32_TINY <= abs(number) <= highest  # False for NaN
    if not representable or (nonnegative and number < 0.0):
        allowed = "a non-negative number" if nonnegative else "a number"
        inverse = ", as is its inverse" if nonnegative else ""
        raise ValueError(
            f"RoutingMethod: {name} is {value!r}, but must be {allowed} that is 0 or normal in float32{inverse}"
        )
    return number + 0.0  # -0.0 becomes 0.0


def check_index_dtype(index_dtype: str, num_ids: int) -> None:
    """Check that ids fit, and in an unsigned dtype also the value for a row without experts."""
    most = INDEX_DTYPES[index_dtype]
    if num_ids > most:
        better = "int16" if num_ids <= INDEX_DTYPES["int16"] else "int32"
        raise ValueError(
            f"RoutingMethod: index_dtype is {index_dtype!r}, which holds the ids of at most {most} experts, but "
            f"num_experts + num_shared_experts is {num_ids}: use {better!r}"
        )
