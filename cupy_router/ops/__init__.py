# SPDX-License-Identifier: Apache-2.0
"""The ops, one file each: declaration, checks, choice of the kernel, call of the reference."""

from __future__ import annotations

import importlib
import pkgutil
from types import ModuleType

_FILES = sorted(module.name for module in pkgutil.iter_modules(__path__) if not module.name.startswith("_"))


def __getattr__(name: str) -> ModuleType:
    if name not in _FILES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return importlib.import_module(f"{__name__}.{name}")


def __dir__() -> list[str]:
    return [name for name in _FILES if name != "registry"]
