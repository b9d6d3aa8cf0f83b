# SPDX-License-Identifier: Apache-2.0
"""Compare installed versions with those that were tried, for ``cupy-router doctor``."""

from __future__ import annotations

import json
import platform
import re
from functools import cache
from importlib import metadata, resources

from .result import Result

PACKAGES = ("numpy", "ml_dtypes", "torch", "jax", "transformers")


@cache
def tried() -> dict[str, list[str]]:
    """Return the versions of each package with which the tests passed, ascending; Python's are major and minor."""
    found: dict[str, list[str]] = json.loads(
        (resources.files("cupy_router") / "data" / "tried_versions.json").read_text("utf-8")
    )
    return found


def release(version: str) -> tuple[int, ...]:
    """Return the first two numbers of a version.

    >>> release("2.13.0+cpu")
    (2, 13)
    """
    return tuple(map(int, re.findall(r"\d+", version)[:2]))


def compare(name: str, version: str, found: str) -> Result:
    """Return a note if a version is outside the range that was tried."""
    known = tried()[name]
    if version.partition("+")[0] in known:
        return Result(name, "ok", f"{found}, which was tried")
    lowest, newest = known[0], known[-1]
    if release(version) < release(lowest):
        remedy = f"Install {name} {lowest} or later if something does not work."
        return Result(name, "note", f"{found}, older than the lowest that was tried, {lowest}", remedy)
    if release(version) > release(newest):
        remedy = f"Install {name} {newest} if something does not work."
        return Result(name, "note", f"{found}, newer than the newest that was tried, {newest}", remedy)
    return Result(name, "ok", f"{found}, within what was tried: {', '.join(known)}")


def package(name: str) -> Result:
    """Check a package by its metadata: importing PyTorch would take seconds."""
    try:
        version = metadata.version(name)
    except metadata.PackageNotFoundError:
        return Result(name, "ok", "not installed")
    return compare(name, version, version)


def python() -> Result:
    version = platform.python_version()
    return compare("python", ".".join(version.split(".")[:2]), version)
