# SPDX-License-Identifier: Apache-2.0
"""Results as data: JSON in, rows out. Needs nothing but Python, so that results can be looked at anywhere.

A file of results is {"environment": {...}, "rows": [...]}. A row says what was measured and gives the figures:

    what        "gpu": time on the GPU. "host": time that a call takes on the host
    op, by      the op, and who ran it: "cupy_router", "floor" (memory traffic alone), or a rival
    n, E, k     rows (tokens), columns (experts), selected columns
                on the host (call, part) a library is named that the call is of
    us          the median in microseconds; spread_us: see harness.py
    bar_us      the time that an issue asks for, if one does
    garbage     objects that 100 calls left to the cycle collector

and what else tells rows apart: dtype, cache, source, data, call, part.
"""

from __future__ import annotations

import json
import statistics
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

RESULTS = Path(__file__).parent / "results"
OURS = "cupy_router"
_WORDS = ("op", "what", "by", "call", "part")
FIGURES = frozenset({"us", "spread_us", "bar_us", "garbage"})

Row = dict[str, Any]
Key = tuple[tuple[str, Any], ...]


def load(path: Path) -> dict[str, Any]:
    """The content of a file of results."""
    content: dict[str, Any] = json.loads(path.read_text())
    return content


def save(path: Path, environment: dict[str, Any], rows: Iterable[Row]) -> None:
    """Write a file of results, a row on each line."""
    lines = ",\n  ".join(map(json.dumps, rows))
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(f'{{\n "environment": {json.dumps(environment)},\n "rows": [\n  {lines}\n ]\n}}\n')


def key(row: Row) -> Key:
    """What was measured: all but the figures."""
    return tuple(sorted((name, value) for name, value in row.items() if name not in FIGURES))


def select(rows: Iterable[Row], **wanted: Any) -> list[Row]:
    """The rows whose entries are the wanted ones; None: which have no such entry."""
    return [row for row in rows if all(row.get(name) == value for name, value in wanted.items())]


def label(row: Row) -> str:
    """A row in words, without its figures."""
    words = [str(row[name]) for name in _WORDS if name in row]
    rest = (f"{name}={value}" for name, value in row.items() if name not in FIGURES and name not in _WORDS)
    return " ".join([*words, *rest])


def met(row: Row) -> bool:
    """Whether a row with a bar stays within it and leaves no garbage."""
    return bool(row["us"] <= row["bar_us"]) and not row.get("garbage")


def median_and_spread(rounds: list[list[float]]) -> tuple[float, float]:
    """Median of all samples; the spread is the larger of their interquartile range and the range of the medians."""
    low, median, high = statistics.quantiles([time for times in rounds for time in times], n=4)
    medians = [statistics.median(times) for times in rounds]
    return median, max(high - low, max(medians) - min(medians))


def source(environment: dict[str, Any]) -> str:
    """Where figures are from."""
    gpu, versions = environment.get("gpu", {}), environment.get("versions", {})
    parts = [
        *([gpu["name"], f"driver {gpu.get('driver_version', 'unknown')}"] if gpu.get("name") else ["no GPU"]),
        f"NVRTC {environment.get('nvrtc', 'unknown')}",
        *(f"{name} {version}" for name, version in versions.items() if name in ("torch", "triton")),
        f"commit {environment.get('commit', 'unknown')}",
        str(environment.get("date", "no date")),
    ]
    return ", ".join(parts)


def microseconds(value: float) -> str:
    """About three digits."""
    return f"{value:.2f}" if value < 10 else f"{value:.1f}" if value < 100 else f"{value:.0f}"


def text_table(heads: Sequence[str], lines: Iterable[Sequence[str]]) -> str:
    """Columns aligned for a terminal: the first to the left, the others to the right."""
    table = [list(heads), *map(list, lines)]
    widths = [max(map(len, column)) for column in zip(*table, strict=True)]
    return "\n".join(
        "  ".join([line[0].ljust(widths[0]), *map(str.rjust, line[1:], widths[1:])]).rstrip() for line in table
    )


def markdown_table(heads: Sequence[str], lines: Iterable[Sequence[str]]) -> str:
    """The same as Markdown."""
    rule = ["---", *["---:"] * (len(heads) - 1)]
    return "\n".join(f"| {' | '.join(line)} |" for line in [heads, rule, *lines])


def bars_table(rows: Iterable[Row]) -> str:
    """Measured beside the bar for every row that has one; empty if none has."""
    barred = [row for row in rows if "bar_us" in row]
    lines = [
        (label(row), microseconds(row["us"]), microseconds(row["bar_us"]), "yes" if met(row) else "no")
        for row in barred
    ]
    return text_table(("microseconds", "measured", "bar", "met"), lines) if lines else ""
