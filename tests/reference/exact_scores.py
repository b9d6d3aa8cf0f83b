# SPDX-License-Identifier: Apache-2.0
"""Scores of one row by 90-digit decimals, rounded once: what float64 formulas are tested against."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from decimal import Context, Decimal, localcontext

import numpy as np

TINY = 2.0**-126
FAR = 1000.0  # here every score is its limit in float32


def float32(value: float | Decimal) -> float:
    """The nearest float32, with subnormals as 0."""
    with np.errstate(over="ignore"):
        rounded = float(np.float32(float(value)))
    return 0.0 if abs(rounded) < TINY else rounded


def scores(logits: Sequence[float], name: str) -> list[float]:
    if name == "softmax":
        return _softmax(logits)
    return [x if math.isnan(x) else float32(ELEMENTWISE[name](x)) for x in logits]


def _sigmoid(x: float) -> float | Decimal:
    if abs(x) > FAR:
        return 1.0 if x > 0 else 0.0
    with _precisely():
        return 1 / (1 + (-Decimal(x)).exp())


def _sqrtsoftplus(x: float) -> float | Decimal:
    if abs(x) > FAR:
        return math.sqrt(x) if x > 0 else 0.0
    with _precisely():
        return (1 + Decimal(x).exp()).ln().sqrt()


ELEMENTWISE: dict[str, Callable[[float], float | Decimal]] = {
    "identity": float,
    "sigmoid": _sigmoid,
    "sqrtsoftplus": _sqrtsoftplus,
}


def _softmax(logits: Sequence[float]) -> list[float]:
    numbers = [x for x in logits if not math.isnan(x)]
    highest = max(numbers, default=math.nan)

    def share(x: float) -> Decimal:
        if x == highest:  # also where both are infinite
            return Decimal(1)
        return (Decimal(x) - Decimal(highest)).exp() if x - highest > -FAR else Decimal(0)

    with _precisely():
        total = sum(map(share, numbers), Decimal(0))
        return [x if math.isnan(x) else float32(share(x) / total) for x in logits]


def _precisely() -> AbstractContextManager[Context]:
    return localcontext(Context(prec=90))
