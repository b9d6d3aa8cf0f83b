# SPDX-License-Identifier: Apache-2.0
"""Keys that no other process has, also none that was forked from this one. Graphs carry them in place of objects."""

from __future__ import annotations

import itertools
import os
import uuid

_process = uuid.uuid4().hex
_numbers = itertools.count()


def new_key() -> str:
    return f"{_process} {next(_numbers)}"


def _renew() -> None:
    global _process
    _process = uuid.uuid4().hex


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_renew)
