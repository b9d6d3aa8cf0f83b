# SPDX-License-Identifier: Apache-2.0
"""Collect the kernels that calls would need, without compiling one; imports nothing.

While a thread collects, :func:`cupy_router.compiler.compile` returns functions that cannot be launched.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import NamedTuple


class Wanted(NamedTuple):
    """The arguments of `compiler.compile` but for the device."""

    kernel: str
    function: str
    macros: tuple[tuple[str, int], ...]
    headers: tuple[tuple[str, str], ...]


_thread = threading.local()


@contextmanager
def collecting() -> Iterator[dict[Wanted, None]]:
    """Yield a dict whose keys will be the kernels that this thread asks for, in order."""
    found: dict[Wanted, None] = {}
    _thread.found = found
    try:
        yield found
    finally:
        del _thread.found


def collects() -> bool:
    """Return whether this thread collects."""
    return hasattr(_thread, "found")


def add(kernel: str, function: str, macros: Mapping[str, int], headers: Mapping[str, str]) -> None:
    """Add a kernel."""
    values = tuple((name, int(value)) for name, value in sorted(macros.items()))
    _thread.found[Wanted(kernel, function, values, tuple(sorted(headers.items())))] = None


class Nowhere:
    """The `Backend` of functions that are not compiled."""

    compiled = switches = False

    def build(self, source: str, function: str, device: int) -> int:
        raise AssertionError("a plan compiles nothing")

    def shared_limit(self, device: int) -> int:
        return 227 << 10

    def allow_shared(self, handle: int, device: int, num_bytes: int) -> None:
        pass

    def tensor_map(self, address: int, matrix: object) -> bytes:
        raise AssertionError("a plan launches nothing")

    def use(self, device: int) -> int | None:
        return None

    def launch(self, *arguments: int) -> None:
        raise AssertionError("a plan launches nothing")


NOWHERE = Nowhere()
