# SPDX-License-Identifier: Apache-2.0
"""Is this checkout slower than another? `python -m benchmarks.compare_trees OTHER_TREE`, on a GPU.

Both are timed in one run, in alternating turns, each a process of its own in the folder of its checkout, with the same
text (turn.py, timing.py) and public API alone. First the host time of eager calls, then time on the GPU by graphs.

A row is the median over all turns of a tree; its spread is the larger of the interquartile range and the range of the
turns' medians. A row became slower if it grew by more than the spreads of both trees together, or if it leaves garbage
that it did not leave before. Exit code 0: nothing became slower; 1: something did; 2: a row could not be compared.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from benchmarks import rows as results
from benchmarks.compare import Change
from benchmarks.rows import OURS, Row

TURNS = {"host": 5, "gpu": 3}
SECONDS = 220.0  # no turn is begun that would end later, once each tree has had two of the kind
_NOT_CELL = {"by", "tree", "turns_us", "verdict"}
_TURN = Path(__file__).with_name("turn.py")


class Tree(NamedTuple):
    """A checkout; `name` is "old" or "new"."""

    name: str
    folder: Path


Turn = dict[str, Any]  # what turn.py writes
Runner = Callable[[Tree, str, bool], Turn]


class Run(NamedTuple):
    """All turns: of each kind, those of each tree in order."""

    turns: dict[str, dict[str, list[Turn]]]
    remarks: list[str]


def run_turn(tree: Tree, kind: str, quick: bool) -> Turn:
    """Time a tree once, in a new process."""
    environment = {name: value for name, value in os.environ.items() if not name.startswith("CUPY_ROUTER_")}
    paths = [str(tree.folder), *filter(None, [environment.get("PYTHONPATH")])]
    environment["PYTHONPATH"] = os.pathsep.join(paths)
    with tempfile.TemporaryDirectory() as folder:
        result = Path(folder) / "turn.json"
        command = [sys.executable, str(_TURN), kind, str(result), *["--quick"] * quick]
        done = subprocess.run(command, cwd=tree.folder, env=environment, capture_output=True, text=True)
        if done.returncode:
            raise SystemExit(f"a turn ({kind}) of the {tree.name} tree failed:\n{done.stderr[-3000:]}")
        turn: Turn = json.loads(result.read_text())
        return turn


def take_turns(
    trees: Sequence[Tree], quick: bool, seconds: float = SECONDS, run: Runner = run_turn, now: Any = time.perf_counter
) -> Run:
    """Old, new, old, new and so on, kind by kind."""
    begin, remarks = now(), []
    turns: dict[str, dict[str, list[Turn]]] = {kind: {tree.name: [] for tree in trees} for kind in TURNS}
    for kind, count in TURNS.items():
        last = 0.0
        for number in range(count):
            start = now()
            if number >= 2 and start - begin + last > seconds:
                remarks.append(f"only {number} of {count} {kind} turns for each tree: {seconds:.0f} s are over")
                break
            for tree in trees:
                turns[kind][tree.name].append(run(tree, kind, quick))
            last = now() - start
    every = [(name, turn) for by_tree in turns.values() for name, found in by_tree.items() for turn in found]
    remarks += dict.fromkeys(f"{name}: left out: {text}" for name, turn in every for text in turn["left_out"])
    if len({turn["not_watching"] for _, turn in every}) > 1:
        remarks.append("kernel files are watched in one tree and not in the other: host times are not comparable")
    return Run(turns, remarks)


def rows_of(turns: Sequence[Turn]) -> dict[results.Key, Row]:
    """A row for each cell that is in all turns of a tree and kind."""
    by_turn = [{results.key(row["cell"]): row for row in turn["rows"]} for turn in turns]
    found = {}
    for key, first in by_turn[0].items():
        same = [rows[key] for rows in by_turn if key in rows]
        if len(same) < len(by_turn):
            continue
        median, spread = results.median_and_spread([row["samples"] for row in same])
        row: Row = first["cell"] | {"by": OURS, "us": round(median, 3), "spread_us": round(spread, 3)}
        row["turns_us"] = [round(statistics.median(row["samples"]), 3) for row in same]
        if "garbage" in first:
            row["garbage"] = max(row["garbage"] for row in same)
        found[key] = row
    return found


def verdict(old: Row, new: Row) -> str:
    """ "slower" or "faster" if by more than both spreads together, else "same"."""
    if Change(old, new).slower:
        return "slower"
    return "faster" if Change(new, old).slower else "same"


def compare(run: Run) -> tuple[list[Row], list[str]]:
    """The rows of both trees, the new ones with their verdict, and remarks on cells that only one tree has."""
    rows, remarks = [], []
    for by_tree in run.turns.values():
        old, new = (rows_of(by_tree[name]) for name in ("old", "new"))
        for key in dict.fromkeys([*old, *new]):
            if key not in old or key not in new:
                there = "old" if key in old else "new"
                remarks.append(f"only the {there} tree has {results.label(dict(key))}")
                continue
            rows.append({"tree": "old"} | old[key])
            rows.append({"tree": "new"} | new[key] | {"verdict": verdict(old[key], new[key])})
    return rows, remarks


def table(rows: Sequence[Row]) -> str:
    """Both trees beside each other."""
    lines = []
    for old, new in zip(rows[::2], rows[1::2], strict=True):
        cell = {name: value for name, value in new.items() if name not in _NOT_CELL}
        figures = (old["us"], new["us"], new["us"] - old["us"], Change(old, new).spread)
        lines.append((results.label(cell), *(f"{value:.3f}" for value in figures), new["verdict"]))
    return results.text_table(("microseconds", "old", "new", "more by", "spreads", "verdict"), lines)


def facts(tree: Tree) -> dict[str, str]:
    """Return what was timed: its commit, or "unknown", and a hash of the package and its kernels."""
    digest = hashlib.sha256()
    for path in sorted(path for part in ("cupy_router", "kernels") for path in (tree.folder / part).rglob("*.*")):
        if path.suffix in {".py", ".cu", ".cuh"}:
            digest.update(f"{path.relative_to(tree.folder).as_posix()}\0".encode() + path.read_bytes())
    of_its_own = _git(tree, "rev-parse", "--show-toplevel") == str(tree.folder)  # not a copy within another checkout
    commit = _git(tree, "describe", "--always", "--dirty") if of_its_own else ""
    return {"commit": commit or "unknown", "sha256": digest.hexdigest()}


def _git(tree: Tree, *command: str) -> str:
    try:
        done = subprocess.run(["git", "-C", str(tree.folder), *command], capture_output=True, text=True)
    except OSError:
        return ""
    return done.stdout.strip()


def environment() -> dict[str, Any]:
    from benchmarks import harness  # which needs CuPy

    return harness.environment()


def main(arguments: Sequence[str] | None = None, run: Runner = run_turn) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("other", type=Path, help="the old checkout; this one is the new one")
    parser.add_argument("--quick", action="store_true", help="fewer rows on the GPU")
    parser.add_argument("--output", type=Path, metavar="FILE", help="write the rows to this file")
    parser.add_argument("--seconds", type=float, default=SECONDS, help="begin no turn that would end later")
    options = parser.parse_args(arguments)
    trees = [Tree("old", options.other.resolve()), Tree("new", _TURN.parents[1])]
    for tree in trees:
        if not (tree.folder / "cupy_router" / "__init__.py").is_file():
            parser.error(f"{tree.folder} is no checkout of cupy_router")
    begin = time.perf_counter()
    found = take_turns(trees, options.quick, options.seconds, run)
    rows, missing = compare(found)
    remarks = [*found.remarks, *missing]
    about = environment() | {"trees": {tree.name: facts(tree) for tree in trees}, "remarks": remarks}
    if options.output is not None:
        results.save(options.output, about, rows)
    print(table(rows), *remarks, results.source(about), sep="\n")
    slower = sum(row.get("verdict") == "slower" for row in rows)
    turns = ", ".join(f"{len(by_tree['old'])} {kind}" for kind, by_tree in found.turns.items())
    seconds = time.perf_counter() - begin
    print(f"{slower} of {len(rows) // 2} rows became slower; turns of each tree: {turns}; {seconds:.0f} s")
    return 1 if slower else 2 if missing or not rows else 0


if __name__ == "__main__":
    raise SystemExit(main())
