# SPDX-License-Identifier: Apache-2.0
"""Find what became slower: `python -m benchmarks.compare old.json new.json`, or two folders of such files.

A row is slower if its time grew by more than the sum of both spreads, or if it leaves more garbage than before. Exit
code 0: nothing became slower; 1: something did; 2: there was nothing to compare. Compare runs of one machine and day.
The floor and the rivals do not depend on our code, so their changes show how much the machine differs.
"""

from __future__ import annotations

import argparse
import statistics
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

from benchmarks import rows as results
from benchmarks.rows import OURS, Row


class Change(NamedTuple):
    """One of our rows in both runs."""

    old: Row
    new: Row

    @property
    def spread(self) -> float:
        return float(self.old.get("spread_us", 0.0)) + float(self.new.get("spread_us", 0.0))

    @property
    def slower(self) -> bool:
        more_garbage = self.new.get("garbage", 0) > self.old.get("garbage", 0)
        return bool(self.new["us"] - self.old["us"] > self.spread) or more_garbage


def changes(old: Sequence[Row], new: Sequence[Row]) -> tuple[list[Change], list[str]]:
    """Return our rows in both runs, and the median change of each rival as text."""
    before = {results.key(row): row for row in old if "us" in row}
    pairs = [Change(before[key], row) for row in new if "us" in row and (key := results.key(row)) in before]
    ratios: dict[str, list[float]] = {}
    for pair in pairs:
        if pair.new["by"] != OURS:
            ratios.setdefault(pair.new["by"], []).append(pair.new["us"] / pair.old["us"])
    lines = [f"{by}: {statistics.median(times):.3f} x" for by, times in sorted(ratios.items())]
    return [pair for pair in pairs if pair.new["by"] == OURS], lines


def pairs_of_files(old: Path, new: Path) -> Iterator[tuple[Path, Path]]:
    """Return the two files, or pairs of files with the same name in two folders."""
    if not old.is_dir():
        yield old, new
        return
    for path in sorted(old.glob("*.json")):
        if (new / path.name).is_file():
            yield path, new / path.name


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("old", type=Path)
    parser.add_argument("new", type=Path)
    options = parser.parse_args(arguments)
    compared = slower = 0
    for old_path, new_path in pairs_of_files(options.old, options.new):
        old, new = results.load(old_path), results.load(new_path)
        if old["environment"].get("gpu") != new["environment"].get("gpu"):
            print(f"{new_path.name}: not the same GPU, driver or clocks")
        ours, rivals = changes(old["rows"], new["rows"])
        worse = [change for change in ours if change.slower]
        lines = [
            (results.label(c.new), f"{c.old['us']:.3f}", f"{c.new['us']:.3f}", f"{c.spread:.3f}",
             f"{c.old.get('garbage', 0)} -> {c.new.get('garbage', 0)}")
            for c in worse
        ]  # fmt: skip
        if lines:
            print(results.text_table(("slower, in microseconds", "old", "new", "spread", "garbage"), lines))
        print(f"{new_path.name}: {len(worse)} of {len(ours)} rows became slower")
        if rivals:
            print(f"{new_path.name}: not ours, median of new / old: {', '.join(rivals)}")
        compared += len(ours)
        slower += len(worse)
    if not compared:
        print("the two have no rows in common")
        return 2
    return 1 if slower else 0


if __name__ == "__main__":
    raise SystemExit(main())
