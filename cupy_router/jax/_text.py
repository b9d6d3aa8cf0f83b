# SPDX-License-Identifier: Apache-2.0
"""What is no array of a call, as text: it travels through XLA as an attribute of the custom call.

The text says all, so that compiled programs which another process loads (JAX's compilation cache, `jax.export`) mean
the same there. Only a method with a score of the caller's own is known by a number, behind a mark of this process.
"""

from __future__ import annotations

import json
import uuid
from collections.abc import Hashable
from dataclasses import fields
from typing import Any, NamedTuple

from cupy_router import method as methods
from cupy_router.method import RoutingMethod

_PROCESS = uuid.uuid4().hex


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
    if not isinstance(options, RoutingMethod):
        return options
    if not isinstance(options.score, str):
        return {"process": _PROCESS, "number": options.number}
    values = ((field, getattr(options, field.name)) for field in fields(options))
    return {field.name: value for field, value in values if value != field.default}


def _decode(said: Any) -> Any:
    if isinstance(said, list):
        return tuple(_decode(option) for option in said)
    if not isinstance(said, dict):
        return said
    if "process" not in said:
        return RoutingMethod(**said)
    if said["process"] != _PROCESS:
        raise RuntimeError("a compiled call with a ScoreFunction runs only in the process that traced it")
    return methods.numbered[said["number"]]
