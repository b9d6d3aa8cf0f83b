# SPDX-License-Identifier: Apache-2.0
"""Tell listeners that a kernel became ready to launch. One of them is the log of CUPY_ROUTER_LOG=1. No routing here."""

from __future__ import annotations

import hashlib
import os
import re
import sys
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, field

LOG = "CUPY_ROUTER_LOG"  # environment


@dataclass(frozen=True)
class KernelReady:
    """A kernel that was loaded on a device and can be launched there."""

    kernel: str  # file in kernels/, without .cu
    function: str
    macros: tuple[tuple[str, int], ...]
    headers: tuple[tuple[str, str], ...]  # file names and the generated texts that replace them
    device: tuple[str, int]  # kind and number
    compiled: bool  # False: the machine code came from a cache
    milliseconds: float  # to compile, or to read the cache, and to load
    source: str = field(repr=False)  # expanded, as the compiler gets it
    options: tuple[str, ...] = field(default=(), repr=False)  # of the compiler

    @property
    def name(self) -> str:
        """Name of the function in graphs and profiles."""
        return self.function

    @property
    def specialisation(self) -> str:
        """All switches in one line."""
        return " ".join(f"{name}={value}" for name, value in self.switches)

    @property
    def switches(self) -> list[tuple[str, str]]:
        """Name and value of macros and of constants in generated headers; name and short hash of headers of code."""
        found = [(name, str(value)) for name, value in self.macros]
        for header, text in self.headers:
            constants = [(name, " ".join(value.split())) for name, value in _CONSTANT.findall(text)]
            found += constants or [(header, _short_hash(text))]
        return found

    @property
    def key(self) -> str:
        """Short hash of the expanded source: equal if and only if the kernel is the same text."""
        return _short_hash(self.source)


_CONSTANT = re.compile(r"^(?:inline |static )*constexpr \w[\w: ]* (\w+) = ([^;]+);", re.M)

Listener = Callable[[KernelReady], object]


def _short_hash(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()[:10]


def print_line(ready: KernelReady) -> None:
    """Write one line to stderr if CUPY_ROUTER_LOG is set, to anything but 0."""
    if os.environ.get(LOG, "0") in ("", "0"):
        return
    kind, number = ready.device
    how = "compiled" if ready.compiled else "from cache"
    line = f"cupy_router: {ready.function} {how} in {ready.milliseconds:.1f} ms on {kind}:{number} [{ready.key}]"
    with suppress(AttributeError, OSError, ValueError):  # no stderr, a full or closed one: a log fails no call
        sys.stderr.write(f"{line} {ready.specialisation}".rstrip() + "\n")  # one write, so that threads do not mix


listeners: list[Listener] = [print_line]


def announce(ready: KernelReady) -> None:
    """Call every listener, in the order in which they were added."""
    for listener in tuple(listeners):
        listener(ready)


def on_compile(callback: Listener) -> Callable[[], None]:
    """Call a function for each kernel that becomes ready from now on: compiled, or read from the cache folder.

    An engine reports late compiles by this. It is called in the thread of the call that needs the kernel, before its
    launch. What it raises, that call raises.

    Args:
        callback: Takes one argument, which has as attributes the `name` of the kernel, its `specialisation` in one
            line, `compiled` (False: the machine code came from the cache), `milliseconds`, and the `device`, such as
            ("cuda", 0).

    Returns:
        A function that ends the calls.

    Raises:
        TypeError: The callback cannot be called.

    >>> from cupy_router import on_compile
    >>> late = []
    >>> stop = on_compile(lambda kernel: late.append((kernel.name, kernel.compiled, kernel.milliseconds)))
    >>> stop()
    """
    if not callable(callback):
        raise TypeError(f"on_compile: callback must be a function, got {type(callback).__name__}")
    entry = _Entry(callback)
    listeners.append(entry)
    return entry.remove


class _Entry:
    """A listener that is removed by its identity, since a callback may be there twice."""

    def __init__(self, callback: Listener) -> None:
        self._callback = callback

    def __call__(self, ready: KernelReady) -> None:
        self._callback(ready)

    def remove(self) -> None:
        if self in listeners:
            listeners.remove(self)
