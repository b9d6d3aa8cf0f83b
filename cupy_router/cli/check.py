# SPDX-License-Identifier: Apache-2.0
"""``cupy-router check``: compile kernels for all architectures and compare them with the reference, without a GPU."""

from __future__ import annotations

import argparse
import importlib
import json
import os
import shutil
import sys
import tempfile
import time
from dataclasses import asdict
from pathlib import Path
from typing import Any

from cupy_router.score_function import ScoreFunction

from . import terminal

MOST_FAULTS, MOST_CHANGES = 4, 5  # that are shown

ABOUT = """Compile kernels for every GPU architecture, execute them on the CPU, and compare the results with the NumPy
reference. Needs no GPU: NVRTC compiles for GPUs, g++ for the CPU."""
CODE = "Exit code: 0 if everything was compiled and executed and is right, else 1; 2 for a wrong command line."


def add_parser(commands: Any) -> None:
    parser = commands.add_parser(
        "check", help="compile and check kernels without a GPU", description=ABOUT, epilog=CODE
    )
    parser.add_argument(
        "target", nargs="*", metavar="OP | FILE | FOLDER",
        help="an op, an edited copy of a kernel file or header (all calls that read it), or a folder of such copies; "
        "nothing: all ops",
    )  # fmt: skip
    parser.add_argument("--score", metavar="MODULE:NAME", help="check a ScoreFunction of a module instead")
    parser.add_argument("--sanitize", action="store_true", help="run every call under sanitizers, which takes longer")
    parser.add_argument("--copy", type=Path, metavar="FOLDER", help="only copy the kernel files, to edit them there")
    parser.add_argument(
        "--compile-commands", type=Path, metavar="FOLDER",
        help="only write compile_commands.json for clangd, about the kernel files in FOLDER or else the installed ones",
    )  # fmt: skip
    parser.add_argument("--json", action="store_true", help="print the result as JSON")
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Return 0 if everything was checked and is right."""
    try:
        if args.copy or args.compile_commands:
            return prepare(args.copy, args.compile_commands)
        if args.score:
            return check_score(args.score, args.json)
        with tempfile.TemporaryDirectory(prefix="cupy-router-") as folder:
            return check_kernels(args.target, Path(folder), args.sanitize, args.json)
    except UsageError as error:
        print(f"cupy-router check: {error}", file=sys.stderr)
        return 2


class UsageError(Exception):
    """The command line names something that is not there."""


def prepare(copy: Path | None, commands: Path | None) -> int:
    from cupy_router.check import clangd, edited

    if copy is not None:
        if copy.exists() and any(copy.iterdir()):
            raise UsageError(f"{copy} is not empty")
        shutil.copytree(edited.installed(), copy, dirs_exist_ok=True)
        print(f"{copy}: {len(edited.names())} kernel files. Check them: cupy-router check {copy}")
        print(f"Run them: CUPY_ROUTER_KERNELS={copy.resolve()}")
    if commands is not None:
        print(clangd.write(commands))
    return 0


# -- Kernels -----------------------------------------------------------------------------------------------------------


def check_kernels(targets: list[str], folder: Path, sanitize: bool, as_json: bool) -> int:
    from cupy_router.check import edited, runner
    from cupy_router.check.cases import CASES, OPS

    begin = time.perf_counter()
    files: dict[str, Path] = {}  # that take the place of installed ones
    named: set[str] = set()  # kernel files whose readers are checked
    ops = [target for target in targets if target in OPS]
    for target in targets:
        if target in OPS:
            continue
        path = Path(target)
        if not path.exists():
            raise UsageError(f"{target} is neither a file nor an op; ops are {', '.join(OPS)}")
        try:
            found = edited.copies(path)
            named |= set(edited.changes(found)) if path.is_dir() else {edited.name_of(path)}
        except ValueError as error:
            raise UsageError(str(error)) from None
        if path.is_dir() and not found:
            raise UsageError(f"{target} has no kernel file; kernels lie there as in {edited.installed()}")
        files |= found
    if not targets and edited.KERNELS in os.environ:
        files = edited.copies(Path(os.environ[edited.KERNELS]))
        named = set(edited.changes(files))
    changes = edited.changes(files)
    if targets and not ops and not named:
        print("No file differs from the installed kernels.")
        return 0
    if files:
        edited.put_in_place(files, folder)
    numbers = [i for i, case in enumerate(CASES) if not ops or case.op in ops]
    only = frozenset(named)
    most = len(CASES) if sanitize else runner.MOST_SANITIZED if named or changes else 0
    outcome = runner.check(numbers, only, most)
    shown = {f"kernels/{name}": str(path) for name, path in files.items()}
    if as_json:
        print(json.dumps(as_data(outcome, changes, shown), indent=1))
    else:
        show(outcome, changes, shown, time.perf_counter() - begin)
    return 0 if outcome.is_good else 1


def with_paths(text: str, shown: dict[str, str]) -> str:
    """Return a text in which edited files have their own paths."""
    for name in sorted(shown, key=len, reverse=True):
        text = text.replace(name, shown[name])
    return text


def show(outcome: Any, changes: Any, shown: dict[str, str], seconds: float) -> None:
    rows: dict[str, list[Any]] = {}
    for (file, _), needs in outcome.needs.items():
        rows.setdefault(file, []).extend(needs)
    for file, needs in rows.items():
        registers = sorted({need.registers for need in needs})
        spills, shared = max(need.spills for need in needs), max(need.shared for need in needs)
        span = f"{registers[0]}-{registers[-1]}" if len(registers) > 1 else str(registers[0])
        terminal.field(file, f"registers {span}, spills {spills} B, shared {shared} B", 34)
    for note in outcome.notes:
        print(f"  {note}")
    texts: dict[tuple[str, str], list[str]] = {}
    for fault in outcome.faults:
        texts.setdefault((fault.op, fault.title), []).append(fault.text)
    for op, title in list(texts)[:MOST_FAULTS]:
        print(f"FAULT {', '.join(filter(None, (op, title)))}")
        for line in with_paths("\n".join(texts[op, title]), shown).splitlines():
            print(f"      {line}")
    if more := list(texts)[MOST_FAULTS:]:
        print(f"      and {len(more)} more, in {', '.join(dict.fromkeys(op for op, _ in more))}")
    if outcome.faults and changes:
        print("Changed against the installed kernels:")
        made = [change for of_file in changes.values() for change in of_file]
        for change in made[:MOST_CHANGES]:
            print(f"      {change.path}:{change.line}: {change.new or 'removed'}")
            if change.old:
                print(f"          was: {change.old}")
        if len(made) > MOST_CHANGES:
            print(f"      and {len(made) - MOST_CHANGES} more")
    for gap in outcome.gaps:
        print(f"NOT CHECKED: {gap}.")
    counted = "1 fault" if len(outcome.faults) == 1 else f"{len(outcome.faults)} faults"
    verdict = "All is well." if outcome.is_good else f"Not all is well: {counted}."
    if not outcome.faults and outcome.gaps:
        verdict = "Nothing wrong was found, but not all was checked."
    print(f"{verdict} ({seconds:.1f} s)")


def as_data(outcome: Any, changes: Any, shown: dict[str, str]) -> dict[str, Any]:
    return {
        "ok": outcome.is_good,
        "faults": [{**asdict(fault), "text": with_paths(fault.text, shown)} for fault in outcome.faults],
        "not_checked": outcome.gaps,
        "notes": outcome.notes,
        "kernels": [
            {"file": file, "architecture": name, **asdict(need)}
            for (file, name), needs in outcome.needs.items()
            for need in needs
        ],
        "changes": [
            {**change._asdict(), "path": str(change.path)} for of_file in changes.values() for change in of_file
        ],
    }


# -- Scores ------------------------------------------------------------------------------------------------------------


def load_score(name: str) -> ScoreFunction:
    """Return a ScoreFunction by "module:name"; the module may lie in the current folder."""
    module, _, attribute = name.partition(":")
    sys.path.insert(0, os.getcwd())
    try:
        score = getattr(importlib.import_module(module), attribute)
    except (ImportError, AttributeError) as error:
        raise UsageError(f"--score {name}: {error}") from None
    if not isinstance(score, ScoreFunction):
        raise UsageError(f"--score {name}: this is a {type(score).__name__}, but must be a ScoreFunction")
    return score


def check_score(name: str, as_json: bool) -> int:
    from cupy_router.check.score import check
    from cupy_router.declarations import CompileError

    begin = time.perf_counter()
    try:
        outcome = check(load_score(name))
    except CompileError as error:  # of the module, which makes the score
        from cupy_router.check.runner import Fault, Outcome

        outcome = Outcome([Fault("", name, "\n".join(str(error).splitlines()[:3]))])
    if as_json:
        print(json.dumps(as_data(outcome, {}, {}), indent=1))
    else:
        show(outcome, {}, {}, time.perf_counter() - begin)
    return 0 if outcome.is_good else 1
