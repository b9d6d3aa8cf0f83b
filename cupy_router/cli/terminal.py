# SPDX-License-Identifier: Apache-2.0
"""Print text on terminals of any width and encoding."""

from __future__ import annotations

import shutil
import sys
import textwrap
from collections.abc import Sequence

BLOCKS = " ▁▂▃▄▅▆▇█"
ASCII = " .:|#"


def width() -> int:
    """Return the number of columns to use: those of the terminal, from 40 to 140, or 80 without a terminal."""
    return min(max(shutil.get_terminal_size().columns, 40), 140)


def field(name: str, text: str, columns: int = 10) -> None:
    """Print a name, padded to `columns`, and a text, whose further lines are indented to begin below it."""
    lines = textwrap.wrap(text, width() - 2 - columns, break_long_words=False, break_on_hyphens=False)  # whole paths
    for i, line in enumerate(lines or [""]):
        print(f"  {'' if i else name:<{columns}}{line}")


def alphabet() -> str:
    """Return the characters of bars, from empty to full, that the terminal can show."""
    try:
        BLOCKS.encode(getattr(sys.stdout, "encoding", None) or "ascii")
    except UnicodeEncodeError:
        return ASCII
    return BLOCKS


def columns(values: Sequence[float], height: int, top: float, levels: str = BLOCKS) -> list[str]:
    """Return lines with one vertical bar per value, ``height`` lines tall for a value of ``top``, top line first.

    A value above 0 gets at least the smallest bar.

    >>> for line in columns([0, 1, 4, 8], height=2, top=8, levels=ASCII):
    ...     print(repr(line))
    '   #'
    ' .##'
    """
    full = len(levels) - 1
    filled = [max(round(value / top * height * full), value > 0) for value in values]
    return ["".join(levels[min(max(f - line * full, 0), full)] for f in filled) for line in reversed(range(height))]
