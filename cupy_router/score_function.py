# SPDX-License-Identifier: Apache-2.0
"""ScoreFunction: a custom score, as CUDA for the kernels and as NumPy for the reference."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import KW_ONLY, dataclass, fields
from typing import Any, ClassVar

from cupy_router import nvrtc
from cupy_router.declarations import CompileError
from cupy_router.unique_keys import new_key

# Each ScoreFunction of this process by its key, because a function has no text. Equal ones have the same key.
_scores: dict[str, ScoreFunction] = {}
_keys: dict[ScoreFunction, str] = {}

_COMMENT = re.compile(r"//[^\n]*|/\*.*?\*/", re.S)
# What matters for the place of a text in the kernels; comments, numbers, strings and characters only hide it.
_TOKEN = re.compile(
    r"//(?:\\\n|[^\n])*|/\*.*?\*/|\d[\w.']*|\"(?:\\.|[^\"\\\n])*\"|'(?:\\.|[^'\\\n])*'"
    r"|(?P<found>[()\[\]{}]|<%|%>|/\*|^[ \t]*#[ \t]*\w+)",
    re.S | re.M,
)
_CLOSES = {")": "(", "]": "[", "}": "{", "%>": "<%"}
_DIRECTIVES = {"if", "ifdef", "ifndef", "elif", "else", "endif", "pragma"}


@dataclass(frozen=True)
class ScoreFunction:
    """Define an elementwise score of logits, for ``RoutingMethod(score=...)``.

    Args:
        name: Name in errors and in the repr, of letters, digits, ``_``, ``-`` and ``.``.
        cuda: CUDA C++ in terms of the float ``x``: an expression such as ``"tanhf(x)"``, or a function body with
            ``return``. It is compiled into the kernels, with flush-to-zero, and may call CUDA's device functions.
        numpy: The same score for the reference: a function of a float64 array that returns an array of that shape.
        derivative: Derivative of the score with respect to x, as another ScoreFunction. Only gradients need it.

    Results are float32 scores: NaN ranks lowest, subnormals become 0. The caller ensures that ``cuda`` and ``numpy``
    agree; :func:`cupy_router.compare_score` compares them on a GPU. Two ScoreFunctions are equal if all their fields
    are equal.

    Raises:
        TypeError: A field has the wrong type.
        ValueError: ``name`` has other characters, or ``cuda`` is empty.
        cupy_router.compiler.CompileError: ``cuda`` is not CUDA C++, with the line that is wrong. Its brackets are
            checked here, and all of it if NVRTC is installed. Otherwise the first call on a GPU raises it.

    >>> import numpy as np
    >>> from cupy_router import RoutingMethod, ScoreFunction, activation_topk
    >>> softsign = ScoreFunction("softsign", cuda="x / (1.0f + fabsf(x))", numpy=lambda x: x / (1 + abs(x)))
    >>> activation_topk(np.array([[0, 1, 3]], np.float32), RoutingMethod(3, 2, softsign, renormalize=False))
    Routing(weights=array([[0.75, 0.5 ]], dtype=float32), indices=array([[2, 1]], dtype=int32))

    With gradients:

    >>> inverse = ScoreFunction("inverse", cuda="1.0f / x", numpy=lambda x: 1 / x)
    >>> logarithm = ScoreFunction("logarithm", cuda="logf(x)", numpy=np.log, derivative=inverse)
    """

    name: str
    _: KW_ONLY
    cuda: str
    numpy: Callable[[Any], Any]
    derivative: ScoreFunction | None = None

    key: ClassVar[str]  # not a field, see `score_of_key`

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
        self._check_place()
        log = nvrtc.errors(self.header)
        if log is not None:
            raise CompileError(log)
        self._enter()

    def _enter(self) -> None:
        object.__setattr__(self, "key", _keys.setdefault(self, new_key()))
        _scores[self.key] = self

    # Numbers differ between processes, so pickles and copies carry only the fields.
    def __getstate__(self) -> dict[str, Any]:
        return {field.name: getattr(self, field.name) for field in fields(self)}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._enter()

    def _check_place(self) -> None:
        """Raise what would reach beyond the place of the text in the kernels, where it might compile all the same."""
        open_ones: list[tuple[str, int]] = []
        for match in _TOKEN.finditer(self.cuda):
            token = "".join((match["found"] or "").split())
            if token in _CLOSES:
                if not open_ones or open_ones.pop()[0] != _CLOSES[token]:
                    raise self._error(match.start(), f'"{token}" closes nothing')
            elif token.startswith("#"):
                if token[1:] not in _DIRECTIVES:
                    raise self._error(match.start(), f'"{token}" would change the kernel around the score')
            elif token:
                open_ones.append((token, match.start()))
        if open_ones:
            raise self._error(open_ones[0][1], f'"{open_ones[0][0]}" is not closed')

    def _error(self, position: int, message: str) -> CompileError:
        line = self.cuda.count("\n", 0, position) + 1
        return CompileError(f"ScoreFunction {self.name}({line}): error: {message}")

    def __repr__(self) -> str:
        return f"ScoreFunction({self.name!r})"

    @property
    def header(self) -> str:
        """Text that replaces the header routing/score_function.cuh of the kernels."""
        return self.defined_as("score_function")

    def defined_as(self, function: str) -> str:
        """Return CUDA C++ that defines the score as a device function of this name."""
        is_body = re.search(r"\breturn\b", _COMMENT.sub(" ", self.cuda)) is not None
        before, after = ("", "") if is_body else ("return (", ");")
        return (
            f"__device__ __forceinline__ float {function}(float x) {{ {before}\n"
            f'#line 1 "ScoreFunction {self.name}"\n{self.cuda}\n{after} }}\n'
        )


def score_of_key(key: str) -> ScoreFunction:
    """Return the ScoreFunction of a `key`, which a graph carries."""
    found = _scores.get(key)
    if found is None:
        raise RuntimeError(
            "a compiled call with a ScoreFunction runs only in the process that traced it, and where the ScoreFunction "
            "was made outside of the traced function"
        )
    return found
