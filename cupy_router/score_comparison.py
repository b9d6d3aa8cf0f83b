# SPDX-License-Identifier: Apache-2.0
"""Compare the two halves of a ScoreFunction, CUDA and NumPy, and its derivative with differences of the score."""

from __future__ import annotations

from numbers import Real
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from cupy_router import compiler
from cupy_router.method import RoutingMethod
from cupy_router.method_fields import FLOAT32_TINY
from cupy_router.ops.activation_topk import activation_topk
from cupy_router.reference.scoring import custom_score, flush
from cupy_router.score_function import ScoreFunction

_ROUNDING = 1e-6  # what a float32 formula such as sigmoid(x) - 0.5 loses where it crosses 0, of its values nearby
_UNDERFLOW = FLOAT32_TINY**0.5  # what sqrt(log1p(exp(x))) loses when the exponential is subnormal
_SLOPE_TOLERANCE = 1e-3


class ScoreComparison(NamedTuple):
    """Result of :func:`compare_score` for a score whose parts agree."""

    num_values: int  # x at which CUDA and NumPy were compared, for the score and for its derivative
    num_slopes: int  # x at which the derivative was compared with differences of the score; 0 without a derivative
    max_error: float  # greatest difference between CUDA and NumPy above 1.1e-19, relative to |NumPy| here or nearby


def compare_score(score: ScoreFunction, *, tolerance: float = 1e-4) -> ScoreComparison:
    """Compare ``cuda`` with ``numpy`` on a GPU, and the derivative with central differences of ``numpy``.

    The x are some thousand float32: evenly from -20 to 20, of every magnitude and sign, infinities, NaN, zeros and
    subnormals. CUDA and NumPy may differ by ``tolerance * |NumPy|``, so that small scores count as much as large ones,
    as they do once weights are renormalised. Two things are allowed besides. Where a score crosses 0, float32 loses
    digits: 1e-6 of the lesser of ``|NumPy|`` at x - 0.5 and x + 0.5. Where a step of the formula is subnormal, it
    becomes 0: 1.1e-19, the root of the smallest normal float32. CUDA may take a subnormal x for 0. A formula that
    loses small scores otherwise, such as ``logf(1.0f + expf(x))`` far below 0, differs: write it with ``log1pf``.

    Differences for the derivative are left out where left and right ones disagree, as at a kink. This is a sample: it
    finds a wrong formula, not every wrong x.

    Args:
        score: The score. Its derivative, if it has one, is compared in the same way.
        tolerance: Relative tolerance of the comparison with NumPy, finite and not negative.

    Raises:
        TypeError: ``score`` is no ScoreFunction, or ``tolerance`` no number.
        ValueError: ``tolerance`` is negative or not finite, the halves differ, or the derivative is not that of the
            score. The message names the first x.
        RuntimeError: There is no GPU.
        cupy_router.compiler.CompileError: ``cuda`` does not compile.

    >>> from cupy_router import ScoreFunction
    >>> softsign = ScoreFunction("softsign", cuda="x / (1.0f + fabsf(x))", numpy=lambda x: x / (1 + abs(x)))
    >>> compare_score(softsign)  # doctest: +SKIP
    ScoreComparison(num_values=2714, num_slopes=0, max_error=8.9e-08)
    """
    if not isinstance(score, ScoreFunction):
        raise TypeError(f"compare_score: score must be a ScoreFunction, got {type(score).__name__}")
    if isinstance(tolerance, bool) or not isinstance(tolerance, Real):
        raise TypeError(f"compare_score: tolerance is {tolerance!r}, but must be a number")
    if not 0 <= tolerance < np.inf:
        raise ValueError(f"compare_score: tolerance is {tolerance!r}, but must be finite and not negative")
    x = _grid()
    error, num_slopes = _compare_values(score, x, tolerance), 0
    if score.derivative is not None:
        error = max(error, _compare_values(score.derivative, x, tolerance))
        num_slopes = _compare_slopes(score, score.derivative)
    return ScoreComparison(len(x) * (1 if score.derivative is None else 2), num_slopes, error)


def _grid() -> NDArray[np.float32]:
    """Return the x: those that users think of come first, because the first that differs is named."""
    powers = np.arange(-149, 128, dtype=np.float64)
    magnitudes = np.concatenate([factor * 2.0**powers for factor in (1.0, 1.37)]).astype(np.float32)
    special = np.array([0.0, -0.0, np.inf, -np.inf, np.nan], np.float32)
    even = np.linspace(-20.0, 20.0, 1601)
    return np.concatenate(
        [even[np.argsort(abs(even), kind="stable")].astype(np.float32), magnitudes, -magnitudes, special]
    )


def _compare_values(score: ScoreFunction, x: NDArray[np.float32], tolerance: float) -> float:
    """Return the greatest error, or raise the first x at which CUDA and NumPy differ."""
    found = _by_kernel(score, x).astype(np.float64)
    expected, at_zero = (_by_numpy(score, given) for given in (x, flush(x)))
    nearby = _nearby(score, x)
    with np.errstate(all="ignore"):
        wrong = ~(_agree(found, expected, nearby, tolerance) | _agree(found, at_zero, nearby, tolerance))
        differences = np.abs(found - expected)
        errors = np.where(differences > _UNDERFLOW, differences / np.maximum(np.abs(expected), nearby), 0.0)
    if wrong.any():
        first = int(np.argmax(wrong))
        raise ValueError(
            f"compare_score: {score!r} is {found[first]:.9g} by CUDA and {expected[first]:.9g} by NumPy at x = "
            f"{x[first]:.9g}, and differs at {wrong.sum()} of {len(x)} x"
        )
    return float(errors[np.isfinite(errors)].max(initial=0.0))


def _agree(found: Any, expected: Any, nearby: Any, tolerance: float) -> Any:
    close = np.abs(found - expected) <= tolerance * np.abs(expected) + _ROUNDING * nearby + _UNDERFLOW
    return (found == expected) | close | (np.isnan(found) & np.isnan(expected))


def _nearby(score: ScoreFunction, x: NDArray[Any]) -> NDArray[np.float64]:
    """Return the size of what cancels at x, if something does: the lesser of the scores on both sides.

    The lesser one, because a pole or a cliff on one side says nothing of the formula at x.
    """
    with np.errstate(all="ignore"):
        left, right = (np.abs(custom_score(score, x.astype(np.float64) + side)) for side in (-0.5, 0.5))
        size = np.minimum(left, right).astype(np.float64)
    return np.where(np.isfinite(size), size, 0.0)


def _by_numpy(score: ScoreFunction, x: NDArray[np.float32]) -> NDArray[np.float64]:
    with np.errstate(all="ignore"):
        return custom_score(score, x.astype(np.float64)).astype(np.float32).astype(np.float64)


def _by_kernel(score: ScoreFunction, x: NDArray[np.float32]) -> NDArray[np.float32]:
    """Return the scores as the weights of one expert."""
    logits, method = x.reshape(-1, 1), RoutingMethod(1, 1, score, renormalize=False)
    if compiler.backend("cpu") is not None:  # in tests, which run kernels on the CPU
        return np.asarray(activation_topk(logits, method).weights).reshape(-1)
    reason = compiler.why_no_cuda()
    if reason is not None:
        raise RuntimeError(f"compare_score: {score!r} is compared on a GPU, and {reason}")
    cupy = compiler.require_cuda()
    weights: NDArray[np.float32] = cupy.asnumpy(activation_topk(cupy.asarray(logits), method).weights)
    return weights.reshape(-1)


def _compare_slopes(score: ScoreFunction, derivative: ScoreFunction) -> int:
    """Return how many derivatives agree with central differences, or raise the first x at which they do not."""
    magnitudes = np.geomspace(1e-3, 1e3, 121)
    x = np.concatenate([np.linspace(-20.0, 20.0, 801), magnitudes, -magnitudes])
    nearby = _nearby(score, x)
    step = 1e-5 * np.maximum(np.abs(x), 1e-1)
    with np.errstate(all="ignore"):
        left, here, right = (custom_score(score, x + sign * step).astype(np.float64) for sign in (-1, 0, 1))
        slopes, claimed = (right - left) / (2 * step), custom_score(derivative, x).astype(np.float64)
        allowed = _SLOPE_TOLERANCE * np.abs(slopes) + _ROUNDING * np.maximum(np.abs(here), nearby)
        smooth = np.abs(right - 2 * here + left) / step <= allowed
        compared = np.isfinite(slopes) & smooth
        wrong = compared & ~(np.abs(claimed - slopes) <= allowed)
    if wrong.any():
        first = int(np.argmax(wrong))
        raise ValueError(
            f"compare_score: {derivative!r} is {claimed[first]:.6g} at x = {x[first]:.6g}, where {score!r} has the "
            f"slope {slopes[first]:.6g}, and differs at {wrong.sum()} of {compared.sum()} x"
        )
    return int(compared.sum())
