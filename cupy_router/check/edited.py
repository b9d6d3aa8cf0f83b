# SPDX-License-Identifier: Apache-2.0
"""Edited copies of kernel files: which file of kernels/ each is, and what was changed in it."""

from __future__ import annotations

import difflib
import os
import re
import shutil
from collections.abc import Iterable, Mapping
from functools import cache
from pathlib import Path
from typing import NamedTuple

from cupy_router import compiler

KERNELS = "CUPY_ROUTER_KERNELS"  # environment: the folder whose files take the place of the installed ones
_INCLUDE = re.compile(r'^\s*#\s*include\s+"([\w./]+)"', re.M)


class Change(NamedTuple):
    """A place where a copy differs from the installed file: line of the copy, old and new text."""

    path: Path
    line: int
    old: str
    new: str


def installed() -> Path:
    """Return the folder of the installed kernels, or that of the checkout."""
    return compiler.kernel_folders()[-1]


@cache
def names() -> tuple[str, ...]:
    """Return the paths of all kernel files below their folder, such as "device/types.cuh"."""
    return tuple(sorted(path.relative_to(installed()).as_posix() for path in installed().rglob("*.cu*")))


def name_of(path: Path) -> str:
    """Return which kernel file a copy is, by the end of its path; ValueError if there is none of that name."""
    whole = path.resolve().as_posix()
    found = [name for name in names() if whole.endswith(f"/{name}")]
    found = found or [name for name in names() if Path(name).name == path.name]
    if len(found) == 1:
        return found[0]
    close = difflib.get_close_matches(path.name, {Path(name).name for name in names()}, 1)
    hint = f"; {close[0]} is one" if close else ""
    raise ValueError(f"{path}: no kernel file has this name, and a copy has to keep its name{hint}")


def copies(path: Path) -> dict[str, Path]:
    """Return the kernel files that a file or folder brings: itself, and others that lie beside it as in kernels/."""
    if path.is_dir():
        root, found = path, dict[str, Path]()
    else:
        name = name_of(path)
        root, found = path.resolve(), {name: path}
        for _ in Path(name).parts:
            root = root.parent
        if (root / name).resolve() != path.resolve():  # alone, not in a folder as in kernels/
            return found
    found = {name: root / name for name in names() if (root / name).is_file()} | found
    todo = list(found.values())
    while todo:  # headers of their own
        for header in _INCLUDE.findall(todo.pop().read_text("utf-8")):
            if header not in found and (root / header).is_file():
                found[header] = root / header
                todo.append(root / header)
    return found


def put_in_place(files: Mapping[str, Path], folder: Path) -> None:
    """Let the ops read these files, and those of CUPY_ROUTER_KERNELS, by way of copies in a folder."""
    before = os.environ.get(KERNELS)
    for name, path in {**(copies(Path(before)) if before and Path(before).is_dir() else {}), **files}.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(path, folder / name)
    os.environ[KERNELS] = str(folder)


def changes(files: Mapping[str, Path]) -> dict[str, list[Change]]:
    """Return what differs from the installed files, by name; files without a difference are left out."""
    found = {}
    for name, path in files.items():
        own = installed() / name
        old = own.read_text("utf-8").splitlines() if own.is_file() else []
        new = path.read_text("utf-8").splitlines()
        steps = difflib.SequenceMatcher(None, old, new, autojunk=False).get_opcodes()
        made = [
            Change(path, b + 1, " ".join(" ".join(old[a:a_end]).split()), " ".join(" ".join(new[b:b_end]).split()))
            for kind, a, a_end, b, b_end in steps
            if kind != "equal"
        ]
        if made:
            found[name] = made
    return found


def readers(files: Iterable[str]) -> str:
    """Return the names of kernel files as text, the first few."""
    listed = list(files)
    return ", ".join(listed[:4]) + (f" and {len(listed) - 4} more" if len(listed) > 4 else "")
