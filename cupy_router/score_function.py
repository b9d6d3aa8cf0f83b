# SPDX-License-Identifier: Apache-2.0
"""ScoreFunction: a custom score, as CUDA for the kernels and as NumPy for the reference."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from dataclasses import KW_ONLY, dataclass, fields
from itertools import accumulate
from typing import Any, ClassVar

from cupy_router import nvrtc
from cupy_router.declarations import CompileError
from cupy_router.unique_keys import new_key

# Each ScoreFunction of this process by its key, because a function has no text. Equal ones have the same key.
_scores: dict[str, ScoreFunction] = {}
_keys: dict[ScoreFunction, str] = {}

_SPLICE = re.compile(r"\\\r?\n")  # the compiler joins these lines before anything else
# Comments, numbers, strings and characters hide what stands in them; a word may be the prefix of a string or character.
_TOKEN = re.compile(
    r"//[^\n]*|/\*.*?\*/|\.?\d(?:[eEpP][+-]|'?\w|\.)*|\"(?:\\[^\n]|[^\"\\\n])*\"|'(?:\\[^\n]|[^'\\\n])*'"
    r"|(?P<found>(?:u8|[uUL])?R\"|[^\W\d]\w*|[()\[\]{}\"'#]|<%|%>|%:|/\*)",
    re.S,
)
_CLOSES = {")": "(", "]": "[", "}": "{", "%>": "<%"}
_UNREADABLE = re.compile("[\0\ud800-\udfff]")


@dataclass(frozen=True)
class ScoreFunction:
    """Define an elementwise score of logits, for ``RoutingMethod(score=...)``.

    Args:
        name: Name in errors and in the repr, of letters, digits, ``_``, ``-`` and ``.``.
        cuda: CUDA C++ in terms of the float ``x``: an expression such as ``"tanhf(x)"``, or a function body with
            ``return``. It is compiled into the kernels, with flush-to-zero, and may call CUDA's device functions and
            nothing else: no functions of the kernels, no preprocessor directives (``_Pragma("unroll")`` is none).
        numpy: The same score for the reference: a hashable function of a float64 array that returns an array of that
            shape.
        derivative: Derivative of the score with respect to x, as another ScoreFunction. Only gradients need it.

    Results are float32 scores: NaN ranks lowest, subnormals become 0. The caller ensures that ``cuda`` and ``numpy``
    agree; :func:`cupy_router.compare_score` compares them on a GPU. Two ScoreFunctions are equal if all their fields
    are equal.

    Raises:
        TypeError: A field has the wrong type.
        ValueError: ``name`` has other characters, or ``cuda`` is empty or has characters that no compiler reads.
        cupy_router.compiler.CompileError: ``cuda`` is not CUDA C++, with the line that is wrong. Its brackets are
            checked here, and all of it if NVRTC is installed. Otherwise, and in a process that was forked after that
            check, the first call on a GPU raises it.

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
        try:
            hash(self.numpy)
        except TypeError:
            raise TypeError(
                f"ScoreFunction: numpy is {self.numpy!r}, which has no hash, but must be hashable"
            ) from None
        if not isinstance(self.derivative, ScoreFunction | None):
            raise TypeError(f"ScoreFunction: derivative is {self.derivative!r}, but must be a ScoreFunction or None")
        if not re.fullmatch(r"[\w.-]+", self.name, re.ASCII):
            raise ValueError(f"ScoreFunction: name is {self.name!r}, but must be of letters, digits, _, - and .")
        if not self.cuda.strip():
            raise ValueError("ScoreFunction: cuda is empty, but must be an expression or a function body of x")
        unreadable = _UNREADABLE.search(self.cuda)
        if unreadable is not None:
            raise ValueError(
                f"ScoreFunction: cuda has {unreadable[0]!r}, but must be text without zero bytes and surrogates"
            )
        self._check_place()
        log = nvrtc.errors(self.header, f"ScoreFunction {self.name}")
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
        for token, line in self._tokens():
            if token in _CLOSES:
                if not open_ones or open_ones.pop()[0] != _CLOSES[token]:
                    raise self._error(line, f'"{token}" closes nothing')
            elif token in ("#", "%:"):  # in C++ they begin directives and nothing else
                raise self._error(
                    line, f'"{token}" begins a preprocessor directive, which would change the kernel around the score'
                )
            elif token.endswith('R"'):
                raise self._error(line, "a raw string is not allowed: write an ordinary one")
            elif token in ('"', "'", "/*"):
                raise self._error(line, f"{token} is not closed")
            elif token in _CLOSES.values():
                open_ones.append((token, line))
        if open_ones:
            raise self._error(open_ones[0][1], f'"{open_ones[0][0]}" is not closed')

    def _tokens(self) -> Iterator[tuple[str, int]]:
        """Yield the words, the brackets and what else may change the kernels, each with its line."""
        pieces = _SPLICE.split(self.cuda)
        joins = list(accumulate(map(len, pieces[:-1])))
        text = "".join(pieces)
        for match in _TOKEN.finditer(text):
            if match["found"] is not None:
                start = match.start()
                yield match["found"], 1 + text.count("\n", 0, start) + sum(join <= start for join in joins)

    def _error(self, line: int, message: str) -> CompileError:
        return CompileError(f"ScoreFunction {self.name}({line}): error: {message}")

    def __repr__(self) -> str:
        return f"ScoreFunction({self.name!r})"

    @property
    def header(self) -> str:
        """Text that replaces the header routing/score_function.cuh of the kernels."""
        return self.defined_as("score_function")

    def defined_as(self, function: str) -> str:
        """Return CUDA C++ that defines the score as a device function of this name."""
        is_body = any(token == "return" for token, _ in self._tokens())
        before, after = ("", "") if is_body else ("return (", ");")
        line = f'#line 1 "ScoreFunction {self.name}"\n'
        return (
            f"{line}__device__ __forceinline__ float {function}(float x) {{ {before}\n{line}{self.cuda}\n{after} }}\n"
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
