# SPDX-License-Identifier: Apache-2.0
"""A score that the caller wrote: CUDA for the kernels, NumPy for the reference."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import KW_ONLY, dataclass
from typing import Any

_COMMENT = re.compile(r"//[^\n]*|/\*.*?\*/", re.S)


@dataclass(frozen=True)
class ScoreFunction:
    """A score of a logit of your own, for ``RoutingMethod(score=...)``; every logit is scored by itself.

    Args:
        name: what errors and the repr call it: letters, digits, ``_``, ``-`` and ``.``.
        cuda: CUDA C++ of the float ``x``: an expression such as ``"tanhf(x)"``, or a function body with ``return``. It
            is compiled into the kernels with flush-to-zero; the functions of CUDA's device library can be called.
        numpy: the same for the reference: a function of a float64 array that returns an array of its shape.
        derivative: how the score grows with x, as a ScoreFunction of its own; only gradients need it.

    Results count as float32 scores: NaN ranks lowest, subnormals become 0. That both say the same is the caller's
    promise. Functions are equal if all their fields are.

    Raises:
        TypeError: a field has the wrong type.
        ValueError: ``name`` has other characters, or ``cuda`` is empty.
        cupy_router.compiler.CompileError: at the first call on a GPU, naming the line of ``cuda`` that is wrong.

    >>> import numpy as np
    >>> from cupy_router import RoutingMethod, ScoreFunction, activation_topk
    >>> softsign = ScoreFunction("softsign", cuda="x / (1.0f + fabsf(x))", numpy=lambda x: x / (1 + abs(x)))
    >>> activation_topk(np.array([[0, 1, 3]], np.float32), RoutingMethod(3, 2, softsign, renormalize=False))
    Routing(weights=array([[0.75, 0.5 ]], dtype=float32), indices=array([[2, 1]], dtype=int32))

    With gradients:

    >>> slope = ScoreFunction("slope", cuda="1.0f / x", numpy=lambda x: 1 / x)
    >>> logarithm = ScoreFunction("logarithm", cuda="logf(x)", numpy=np.log, derivative=slope)
    """

    name: str
    _: KW_ONLY
    cuda: str
    numpy: Callable[[Any], Any]
    derivative: ScoreFunction | None = None

    def __post_init__(self) -> None:
        for field in ("name", "cuda"):
            value = getattr(self, field)
            if not isinstance(value, str):
                raise TypeError(f"ScoreFunction: {field} is {value!r}, but must be a str")
        if not callable(self.numpy):
            raise TypeError(f"ScoreFunction: numpy is {self.numpy!r}, but must be a function of a float64 array")
        if not isinstance(self.derivative, ScoreFunction | None):
            raise TypeError(f"ScoreFunction: derivative is {self.derivative!r}, but must be a ScoreFunction or None")
        if not re.fullmatch(r"[\w.-]+", self.name, re.ASCII):
            raise ValueError(f"ScoreFunction: name is {self.name!r}, but must be of letters, digits, _, - and .")
        if not self.cuda.strip():
            raise ValueError("ScoreFunction: cuda is empty, but must be an expression or a function body of x")

    def __repr__(self) -> str:
        return f"ScoreFunction({self.name!r})"

    @property
    def header(self) -> str:
        """What takes the place of kernels/routing/score_function.cuh."""
        return self.defined_as("score_function")

    def defined_as(self, function: str) -> str:
        """CUDA C++ that defines it under this name."""
        is_body = re.search(r"\breturn\b", _COMMENT.sub(" ", self.cuda)) is not None
        before, after = ("", "") if is_body else ("return (", ");")
        return (
            f"__device__ __forceinline__ float {function}(float x) {{ {before}\n"
            f'#line 1 "ScoreFunction {self.name}"\n{self.cuda}\n{after} }}\n'
        )
