# SPDX-License-Identifier: Apache-2.0
"""Check the folder of compiled kernels: it has to be writable for this user, and for nobody else.

Whoever can write there can put machine code in place of a kernel, which the next process loads and runs.
"""

from __future__ import annotations

import os
import stat
from collections.abc import Iterator
from pathlib import Path

from cupy_router import kernel_cache

from .result import Result


def cache() -> Result:
    """Run before CuPy is imported, which may replace a folder that cannot be used."""
    if os.environ.get(kernel_cache.IN_MEMORY) == "1":
        found = f"in memory, as {kernel_cache.IN_MEMORY}=1 asks: every process compiles its kernels again"
        return Result("cache", "note", found, f"Unset {kernel_cache.IN_MEMORY} to keep compiled kernels.")
    folder = kernel_cache.folder()
    try:
        kernel_cache.try_folder()
    except OSError as error:
        found = f"{folder} cannot be used ({error}): every process compiles its kernels again"
        return Result("cache", "note", found, f"Set {kernel_cache.FOLDER} to a folder that can be written.")
    problems = list(open_to_others(Path(folder)))
    if problems:
        where, how, remedy = problems[0]
        loaded = "it" if Path(where) == Path(folder).resolve() else folder
        return Result("cache", "fault", f"{where} {how}, and kernels are loaded from {loaded}", remedy)
    return Result("cache", "ok", folder)


def open_to_others(folder: Path) -> Iterator[tuple[str, str, str]]:
    """Yield folder, reason and remedy for each way in which another user could replace what is in the folder."""
    if not hasattr(os, "getuid"):  # Windows, whose access lists this does not read
        return
    folder = folder.resolve()
    for path in (folder, *folder.parents):
        status = path.stat()
        if status.st_uid not in (0, os.getuid()):
            remedy = f"Set {kernel_cache.FOLDER} to a folder of your own."
            yield str(path), f"belongs to another user ({status.st_uid})", remedy
        elif is_writable_for_others(status) and (path == folder or not status.st_mode & stat.S_ISVTX):
            yield str(path), "can be written by other users", f"Run chmod go-w '{path}', or set {kernel_cache.FOLDER}."


def is_writable_for_others(status: os.stat_result) -> bool:
    by_group = bool(status.st_mode & stat.S_IWGRP) and not is_private_group(status.st_gid)
    return by_group or bool(status.st_mode & stat.S_IWOTH)


def is_private_group(number: int) -> bool:
    """Return whether a group has one user, as the groups named like their user have on many systems."""
    import grp
    import pwd

    try:
        group, user = grp.getgrgid(number), pwd.getpwuid(os.getuid())
    except KeyError:
        return False
    return group.gr_gid == user.pw_gid and set(group.gr_mem) <= {user.pw_name} and group.gr_name == user.pw_name
