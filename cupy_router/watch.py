# SPDX-License-Identifier: Apache-2.0
"""Whether files have changed, asked before every call: by inotify where there is one (about 1 us), else by looking.

inotify sees every edit made on this machine before the call that follows it. Edits that reach a network or container
mount from elsewhere it may not see, so the files are looked at as well, twice a second.
"""

from __future__ import annotations

import ctypes
import os
import sys
import time
from pathlib import Path

_EVENTS = 0x2 | 0x8 | 0x40 | 0x80 | 0x100 | 0x200  # modified, closed after writing, moved from or to, created, deleted
_LOOK_SECONDS = 0.5

Stamp = tuple[int, int] | None  # modification time and size; None: there is no such file


def _stamp(path: Path) -> Stamp:
    try:
        status = os.stat(path)
    except OSError:
        return None
    return status.st_mtime_ns, status.st_size


class Watch:
    """A set of paths, which need not exist, and whether any of them has changed since it was added."""

    def __init__(self) -> None:
        self._stamps: dict[Path, Stamp] = {}
        self._folders: set[Path] = set()
        self._look_at = 0.0
        self._libc = None
        self._inotify = -1
        if sys.platform == "linux":
            self._libc = ctypes.CDLL(None, use_errno=True)
            self._inotify = self._libc.inotify_init1(os.O_NONBLOCK | os.O_CLOEXEC)

    def add(self, path: Path) -> None:
        """Watch a path from now on."""
        folder = path.parent
        if self._libc is not None and self._inotify >= 0 and folder not in self._folders:
            self._folders.add(folder)
            if self._libc.inotify_add_watch(self._inotify, os.fsencode(folder), _EVENTS) < 0:
                os.close(self._inotify)  # without a watch on every folder it is of no use
                self._inotify = -1
        self._stamps[path] = _stamp(path)

    def clear(self) -> None:
        """Watch nothing."""
        self._stamps.clear()

    def changed(self) -> bool:
        """Whether a watched file is not what it was when it was added."""
        if self._inotify >= 0:
            now = time.monotonic()
            if now < self._look_at:
                try:
                    os.read(self._inotify, 65536)
                except BlockingIOError:
                    return False
            self._look_at = now + _LOOK_SECONDS
        stamps = list(self._stamps.items())  # other threads may add some meanwhile
        return any(_stamp(path) != stamp for path, stamp in stamps)
