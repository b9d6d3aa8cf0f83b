# SPDX-License-Identifier: Apache-2.0
"""The ops one row at a time in plain Python, the functions of real numbers by 90-digit decimals."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from decimal import Context, Decimal, localcontext

import numpy as np

from cupy_router.method import RoutingMethod

TINY = 2.0**-126
FAR = 1000.0  # here every score is its limit in float32


def float32(value: float | Decimal) -> float:
    """The nearest float32, with subnormals as 0."""
    with np.errstate(over="ignore"):
        rounded = float(np.float32(float(value)))
    return 0.0 if abs(rounded) < TINY else rounded


def best(values: Sequence[float], k: int) -> list[int]:
    """Indices of the k best: NaN behind everything, descending value, lower index first."""
    return sorted(range(len(values)), key=lambda i: (math.isnan(values[i]), -values[i], i))[:k]


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


def weigh(chosen: Sequence[float], method: RoutingMethod) -> list[float]:
    weights = _renormalize(chosen, method) if method.renormalize else chosen
    return [float32(weight * method.scale) for weight in weights]


def _renormalize(chosen: Sequence[float], method: RoutingMethod) -> list[float]:
    numbers = [s for s in chosen if not math.isnan(s)]
    if math.inf in numbers:
        return [0.0 if math.isfinite(s) else math.nan for s in chosen]
    total = 0.0
    for s in numbers:  # one by one: where terms cancel, the order of summation shows
        total += s
    divisor = total + method.renormalize_eps if method.renormalize_min is None else max(total, method.renormalize_min)
    if total and divisor:
        return [s if math.isnan(s) else s / divisor for s in chosen]
    return [0.0 if math.isfinite(s) else math.nan for s in chosen]  # -inf, where renormalize_min makes the divisor 0


def route(
    logits: Sequence[float], method: RoutingMethod, bias: Sequence[float] | None = None
) -> tuple[list[float], list[int]]:
    """Weights and indices of one token."""
    row = scores(logits, method.score)
    selection = row if bias is None else [float32(s + float32(b)) for s, b in zip(row, bias, strict=True)]
    indices = best(selection, method.top_k)
    return weigh([row[i] for i in indices], method), indices
