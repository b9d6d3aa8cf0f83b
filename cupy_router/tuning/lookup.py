# SPDX-License-Identifier: Apache-2.0
"""Tables by architecture, found by the names of their files."""

from __future__ import annotations

import importlib
import pkgutil
import re
from functools import cache

from cupy_router.tuning.schema import Table

_PACKAGE = __name__.rpartition(".")[0]


def architectures() -> dict[tuple[int, int], str]:
    """Return the names of all tables by compute capability, ascending, such as {(9, 0): "sm_90"}."""
    folders = importlib.import_module(_PACKAGE).__path__
    matches = (re.fullmatch(r"sm_(\d+)(\d)", module.name) for module in pkgutil.iter_modules(folders))
    return dict(sorted(((int(match[1]), int(match[2])), match[0]) for match in matches if match))


@cache
def nearest(capability: tuple[int, int]) -> Table:
    """Return the newest table that is not newer than the GPU; if all are newer, the oldest."""
    known = architectures()
    chosen = max((other for other in known if other <= capability), default=min(known))
    table = importlib.import_module(f"{_PACKAGE}.{known[chosen]}").TABLE
    assert isinstance(table, Table), f"{known[chosen]}.py must define TABLE, a {_PACKAGE}.Table"
    return table
