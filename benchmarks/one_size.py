# SPDX-License-Identifier: Apache-2.0
"""One size of a benchmark from the shell: a benchmark declares its options, and these become its command line.

    OneSize({"n": 64, "num_experts": 256, "dtype": ("float32", "bfloat16")}, one_size)

makes `--n 64 --num-experts 256 --dtype float32`, each optional, and calls `one_size(n=64, num_experts=256,
dtype="float32")`. Needs nothing but Python.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from benchmarks import rows as results
from benchmarks.rows import Row, microseconds

FLOATS = ("float32", "bfloat16", "float16")

Option = int | tuple[str, ...]  # default of a positive number; or allowed words, the default first


class OneSize(NamedTuple):
    """Options of one size, and the function that measures it: our row, the floor, rivals."""

    options: Mapping[str, Option]
    measure: Callable[..., list[Row]]


class Request(NamedTuple):
    """A parsed command line; `size` is None for the whole benchmark."""

    size: dict[str, Any] | None
    json: Path | None
    output: Path | None
    quick: bool


def parse(declared: OneSize | None, arguments: Sequence[str] | None = None) -> Request:
    """Read the command line of a benchmark. Options left out have their defaults once one of them is given."""
    parser = argparse.ArgumentParser(argument_default=argparse.SUPPRESS)
    parser.add_argument("--output", type=Path, help="write the rows of the whole benchmark into this folder")
    parser.add_argument("--quick", action="store_true", help="only the cells that have a bar")
    options = declared.options if declared is not None else {}
    defaults = {name: option if isinstance(option, int) else option[0] for name, option in options.items()}
    if options:
        one = parser.add_argument_group("one size, which is printed and not written")
        one.add_argument("--json", type=Path, metavar="FILE", help="also write its rows to this file")
        for name, option in options.items():
            kind: dict[str, Any] = (
                {"type": _positive, "metavar": "N"} if isinstance(option, int) else {"choices": option}
            )
            one.add_argument(_flag(name), help=f"default: {defaults[name]}", **kind)
    given = vars(parser.parse_args(arguments))
    size = {name: given.pop(name) for name in options if name in given}
    if size and ("quick" in given or "output" in given):
        parser.error("--quick and --output are for the whole benchmark, not for one size")
    if "json" in given and not size:
        parser.error(f"--json is for one size: give one of {', '.join(map(_flag, options))} too")
    return Request(
        defaults | size if size else None,
        given.get("json"),
        given.get("output"),
        given.get("quick", False),
    )


def table(rows: Sequence[Row]) -> str:
    """Return a line of what all rows share, then a table of the time, spread and ratio to ours of each row."""
    names = list(dict.fromkeys(name for row in rows for name in row if name not in results.FIGURES | {"by"}))
    common = {name: rows[0].get(name) for name in names if len({row.get(name) for row in rows}) == 1}
    ours = rows[0]["us"]
    lines = []
    for row in rows:
        own = {name: row[name] for name in names if name in row and name not in common}
        who = " ".join([row["by"], *(f"{name}={value}" for name, value in own.items())])
        lines.append((who, microseconds(row["us"]), f"{row['spread_us']:.2f}", f"{row['us'] / ours:.2f}"))
    heads = ("microseconds", "time", "spread", f"of {rows[0]['by']}")
    return f"{results.label(common)}\n{results.text_table(heads, lines)}"


def _flag(name: str) -> str:
    return f"--{name.replace('_', '-')}"


def _positive(text: str) -> int:
    number = int(text)
    if number < 1:
        raise argparse.ArgumentTypeError(f"{text} is not positive")
    return number
