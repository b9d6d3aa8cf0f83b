# SPDX-License-Identifier: Apache-2.0
"""compile_commands.json, by which clangd and other tools read the kernels: as C++, with the headers of the executor."""

from __future__ import annotations

import json
from pathlib import Path

from cupy_router import simt
from cupy_router.check import edited

INCLUDE = Path(simt.__file__).with_name("include")


def commands(folder: Path) -> list[dict[str, object]]:
    """Return an entry for each kernel file in a folder, or for each installed one if it has none."""
    own = edited.installed()
    files = [folder / name for name in edited.names() if (folder / name).is_file()] or [own / n for n in edited.names()]
    return [
        {
            "directory": str(folder.resolve()),
            "file": str(path.resolve()),
            "arguments": [
                "g++", "-std=c++17", "-x", "c++", "-fsyntax-only", "-w", "-I", str(folder.resolve()), "-I", str(own),
                "-include", str(INCLUDE / "editor.h"), str(path.resolve()),
            ],
        }
        for path in files
    ]  # fmt: skip


def write(folder: Path) -> Path:
    """Write the file into a folder, which is made if need be, and return its path."""
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / "compile_commands.json"
    path.write_text(json.dumps(commands(folder), indent=1) + "\n", "utf-8")
    return path
