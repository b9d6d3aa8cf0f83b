# SPDX-License-Identifier: Apache-2.0
"""Results as data: read and write JSON files of rows. Needs only Python, so that results can be read anywhere.

A file of results is {"environment": {...}, "rows": [...]}. A row describes a measurement and has its figures:

    what        "gpu": time on the GPU. "host": time of a call on the host. "step": time of a step of a model, until the
                GPU is idle
    op, by      the op, and the implementation: "cupy_router", "floor" (memory traffic alone), or a rival
    n, E, k     rows (tokens), columns (experts), selected columns
    call, part  on the host: the library or the part of a call that was measured
    us          the median in microseconds; spread_us: see harness.py
    bar_us      required time, if there is one
    ratio       time as a multiple of torch.relu in the same run; of a step, of the model's own code in the same turns
    pairs       the ratio of each turn. spread_ratio: their interquartile range
    bar_ratio   required ratio, if there is one
    garbage     number of objects that 100 calls left to the cycle collector

Further entries that distinguish rows: dtype, cache, source, data.
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
FIGURES = frozenset({"us", "spread_us", "bar_us", "ratio", "spread_ratio", "bar_ratio", "pairs", "garbage"})

Row = dict[str, Any]
Key = tuple[tuple[str, Any], ...]


def load(path: Path) -> dict[str, Any]:
    """Return the content of a file of results."""
    content: dict[str, Any] = json.loads(path.read_text())
    return content


def save(path: Path, environment: dict[str, Any], rows: Iterable[Row]) -> None:
    """Write a file of results, a row on each line."""
    lines = ",\n  ".join(map(json.dumps, rows))
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(f'{{\n "environment": {json.dumps(environment)},\n "rows": [\n  {lines}\n ]\n}}\n')


def key(row: Row) -> Key:
    """Return the identity of a row: all entries except the figures."""
    return tuple(sorted((name, value) for name, value in row.items() if name not in FIGURES))


def select(rows: Iterable[Row], **wanted: Any) -> list[Row]:
    """Return the rows with these entries; None selects rows without the entry."""
    return [row for row in rows if all(row.get(name) == value for name, value in wanted.items())]


def label(row: Row) -> str:
    """Return a row as text, without its figures."""
    words = [str(row[name]) for name in _WORDS if name in row]
    rest = (f"{name}={value}" for name, value in row.items() if name not in FIGURES and name not in _WORDS)
    return " ".join([*words, *rest])


def met(row: Row) -> bool:
    """Return whether a row with a bar stays within it and leaves no garbage."""
    within = row["ratio"] <= row["bar_ratio"] if "bar_ratio" in row else row["us"] <= row["bar_us"]
    return bool(within) and not row.get("garbage")


def median_and_spread(rounds: list[list[float]]) -> tuple[float, float]:
    """Return the median and the spread, the larger of the interquartile range and the range of the rounds' medians."""
    low, median, high = statistics.quantiles([time for times in rounds for time in times], n=4)
    medians = [statistics.median(times) for times in rounds]
    return median, max(high - low, max(medians) - min(medians))


def source(environment: dict[str, Any]) -> str:
    """Return the GPU, versions, commit and date of an environment as text."""
    gpu, versions = environment.get("gpu", {}), environment.get("versions", {})
    parts = [
        *([gpu["name"], f"driver {gpu.get('driver_version', 'unknown')}"] if gpu.get("name") else ["no GPU"]),
        f"NVRTC {environment.get('nvrtc', 'unknown')}",
        *(f"{name} {version}" for name, version in versions.items() if name in ("torch", "triton", "transformers")),
        f"commit {environment.get('commit', 'unknown')}",
        str(environment.get("date", "no date")),
    ]
    return ", ".join(parts)


def microseconds(value: float) -> str:
    """Format a number with about three digits."""
    return f"{value:.2f}" if value < 10 else f"{value:.1f}" if value < 100 else f"{value:.0f}"


def text_table(heads: Sequence[str], lines: Iterable[Sequence[str]]) -> str:
    """Format a table for a terminal: the first column aligned left, the others right."""
    table = [list(heads), *map(list, lines)]
    widths = [max(map(len, column)) for column in zip(*table, strict=True)]
    return "\n".join(
        "  ".join([line[0].ljust(widths[0]), *map(str.rjust, line[1:], widths[1:])]).rstrip() for line in table
    )


def markdown_table(heads: Sequence[str], lines: Iterable[Sequence[str]]) -> str:
    """Format a table as Markdown."""
    rule = ["---", *["---:"] * (len(heads) - 1)]
    return "\n".join(f"| {' | '.join(line)} |" for line in [heads, rule, *lines])


def bars_table(rows: Iterable[Row]) -> str:
    """Format the measured time and the bar of every row that has one; empty if none has."""
    barred = [row for row in rows if "bar_us" in row]
    lines = [
        (label(row), microseconds(row["us"]), microseconds(row["bar_us"]), "yes" if met(row) else "no")
        for row in barred
    ]
    return text_table(("microseconds", "measured", "bar", "met"), lines) if lines else ""
