# SPDX-License-Identifier: Apache-2.0
"""The texts of the small kernels here: probes, which use every intrinsic, and broken ones. All of them are valid CUDA."""

from __future__ import annotations

import re
from pathlib import Path

PROBES = Path(__file__).with_name("probes")
BROKEN = Path(__file__).with_name("broken")
KERNELS = Path(__file__).parents[2] / "kernels"


def source(name: str) -> str:
    """The text of probes/<name>.cu or broken/<name>.cu, with the headers of kernels/ that it includes."""
    path = next(folder / f"{name}.cu" for folder in (PROBES, BROKEN) if (folder / f"{name}.cu").exists())
    return _expanded(path)


def _expanded(path: Path) -> str:
    lines = [f'#line 1 "{path.name}"']
    for number, line in enumerate(path.read_text().splitlines(), 1):
        include = re.match(r'#include "([\w.]+)"', line)
        lines += [_expanded(KERNELS / include[1]), f'#line {number + 1} "{path.name}"'] if include else [line]
    return "\n".join(lines) + "\n"
