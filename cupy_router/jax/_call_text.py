# SPDX-License-Identifier: Apache-2.0
"""A call without its arrays, as text: an attribute of the custom call in XLA.

The text has the same meaning in every process, so a process that loads a compiled program (from JAX's compilation cache
or `jax.export`) runs the same call.
"""

from __future__ import annotations

import json
from functools import lru_cache
from typing import Any, NamedTuple

from cupy_router.ops._op import Op


class CallText(NamedTuple):
    """Options of an op, positions of the inputs that are given, and num_valid as an int (-1: all rows)."""

    options: Any
    given: tuple[int, ...]
    number: int


def encode(options: Any, given: tuple[int, ...], number: int) -> str:
    """Return the text of a call."""
    return f'{{"options": {options.text}, "given": {list(given)}, "num_valid": {number}}}'


@lru_cache(maxsize=4096)
def decode(op: Op, text: bytes | str) -> CallText:
    """Return the call that a text describes."""
    fields = json.loads(text)
    return CallText(op.options_of(json.dumps(fields["options"])), tuple(fields["given"]), fields["num_valid"])
