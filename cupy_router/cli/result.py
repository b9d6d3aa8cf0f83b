# SPDX-License-Identifier: Apache-2.0
"""Result of one check of ``cupy-router doctor``, and how a check that raises becomes one."""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal, NamedTuple

State = Literal["ok", "note", "fault"]


class Result(NamedTuple):
    """The result of one check.

    state: ``ok``; ``note``: worth knowing, but everything runs; ``fault``: has to be corrected.
    found: one line.
    """

    name: str
    state: State
    found: str
    remedy: str = ""  # one sentence; empty if there is nothing to do


def sentence(error: BaseException) -> str:
    """Return an error as one line without a full stop."""
    return f"{type(error).__name__}: {' '.join(str(error).split())}".rstrip(".: ")


def attempt(name: str, check: Callable[[], Result]) -> Result:
    """Return the result of a check; a fault with the error's sentence if it raises."""
    try:
        return check()
    except Exception as error:  # what a broken installation raises can be anything
        report = "Report this error, together with the output of cupy-router info --json."
        return Result(name, "fault", f"this check failed: {sentence(error)}", report)
