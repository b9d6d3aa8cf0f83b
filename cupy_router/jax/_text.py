# SPDX-License-Identifier: Apache-2.0
"""What is no array of a call, as text: it travels through XLA as an attribute of the custom call.

The text says all, so that compiled programs which another process loads (JAX's compilation cache, `jax.export`) mean
the same there.
"""

from __future__ import annotations

import json
from collections.abc import Hashable
from typing import Any, NamedTuple

from cupy_router.method import RoutingMethod, from_text


class Text(NamedTuple):
    """Options of an op, which of its inputs are given, by position, and num_valid as an int (-1: all rows)."""

    options: Hashable
    given: tuple[int, ...]
    number: int


def encode(text: Text) -> str:
    return json.dumps({"options": _encode(text.options), "given": text.given, "num_valid": text.number})


def decode(text: bytes | str) -> Text:
    said = json.loads(text)
    return Text(_decode(said["options"]), tuple(said["given"]), said["num_valid"])


def _encode(options: Any) -> Any:
    if isinstance(options, tuple):
        return [_encode(option) for option in options]
    return json.loads(options.text) if isinstance(options, RoutingMethod) else options


def _decode(said: Any) -> Any:
    if isinstance(said, list):
        return tuple(_decode(option) for option in said)
    return from_text(json.dumps(said)) if isinstance(said, dict) else said
