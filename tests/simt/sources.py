# SPDX-License-Identifier: Apache-2.0
"""The small kernels of these tests: probes, which use every intrinsic, and broken ones. All are valid CUDA."""

from __future__ import annotations

import os
import re
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from cupy_router.simt.device import SimtBackend, build_library, launch

PROBES = Path(__file__).with_name("probes")
BROKEN = Path(__file__).with_name("broken")
KERNELS = Path(__file__).parents[2] / "kernels"


def source(name: str) -> str:
    """The text of probes/<name>.cu or broken/<name>.cu, with the headers of kernels/ that it includes."""
    path = next(folder / f"{name}.cu" for folder in (PROBES, BROKEN) if (folder / f"{name}.cu").exists())
    return _expanded(path, set())


def run(backend: SimtBackend, name: str, grid: int | tuple[int, ...], block: int | tuple[int, ...], *args: Any) -> None:
    """Launch probes/<name>.cu or broken/<name>.cu on arrays and NumPy scalars."""
    grid, block = (shape if isinstance(shape, tuple) else (shape,) for shape in (grid, block))
    launch(backend, source(name), name, grid, block, args)


def build_all(jobs: Iterable[tuple[str, str | None]]) -> None:
    """Compile (name, sanitizer) side by side, so that the tests find them in the cache."""
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        list(pool.map(lambda job: build_library(source(job[0]), *job), jobs))


def _expanded(path: Path, seen: set[Path]) -> str:
    """Each header once, as its `#pragma once` has it."""
    lines = [f'#line 1 "{path.name}"']
    for number, line in enumerate(path.read_text().splitlines(), 1):
        include = re.match(r'#include "([\w./]+)"', line)
        if include is None:
            lines.append(line)
        elif (header := KERNELS / include[1]) not in seen:
            seen.add(header)
            lines += [_expanded(header, seen), f'#line {number + 1} "{path.name}"']
        else:
            lines.append("")
    return "\n".join(lines) + "\n"
