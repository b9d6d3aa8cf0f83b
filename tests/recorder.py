# SPDX-License-Identifier: Apache-2.0
"""A backend that compiles and launches nothing: it records launches and reads arguments as the driver would."""

from __future__ import annotations

import ctypes
import re
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

from cupy_router import compiler

_DEFINE = re.compile(r"#define (\w+) (-?\d+)$")
_FILE = re.compile(r'#line 1 "kernels/(\w+)\.cu"')
_TYPES: dict[str, Any] = {
    "*": ctypes.c_uint64,
    "int": ctypes.c_int32,
    "long long": ctypes.c_int64,
    "float": ctypes.c_float,
}


@dataclass(frozen=True)
class Launch:
    """One launch; `arguments` by the names of the kernel's parameters, read with their C types."""

    kernel: str
    function: str
    macros: dict[str, int]
    grid: tuple[int, int, int]
    block: tuple[int, int, int]
    shared_bytes: int
    stream: int
    device: int
    arguments: dict[str, Any]
    addresses: tuple[int, ...] = field(repr=False)


class Recorder:
    """A `Backend` of cupy_router.compiler. `patience`: seconds that a launch waits before it reads its arguments."""

    compiled = True

    def __init__(self, patience: float = 0.0) -> None:
        self.patience = patience
        self.sources: list[str] = []
        self.launches: list[Launch] = []
        self.shared: list[tuple[int, int, int]] = []  # calls of allow_shared
        self.used: list[int] = []  # devices made current, in order
        self.failure: Exception | None = None  # raised by every launch
        self._built: list[tuple[str, int]] = []
        self._thread = threading.local()

    def build(self, source: str, function: str, device: int) -> int:
        self.sources.append(source)
        self._built.append((function, device))
        return len(self._built)

    def shared_limit(self, device: int) -> int:
        return 227 * 1024

    def allow_shared(self, handle: int, device: int, num_bytes: int) -> None:
        self.shared.append((handle, device, num_bytes))

    @property
    def current(self) -> int:
        """Device that is current in this thread."""
        device: int = getattr(self._thread, "device", 0)
        return device

    def use(self, device: int) -> int | None:
        previous = self.current
        if device == previous:
            return None
        self.used.append(device)
        self._thread.device = device
        return previous

    def launch(
        self, handle: int, gx: int, gy: int, gz: int, bx: int, by: int, bz: int,
        shared_bytes: int, stream: int, kernel_params: int, extra: int,
    ) -> None:  # fmt: skip
        if self.failure is not None:
            raise self.failure
        function, device = self._built[handle - 1]
        assert device == self.current, "a kernel is launched on the device that it was compiled for"
        assert extra == 0
        source = self.sources[handle - 1]
        parameters = declared(source, function)
        time.sleep(self.patience)
        addresses = tuple((ctypes.c_void_p * len(parameters)).from_address(kernel_params))
        values = [_TYPES[kind].from_address(at).value for (_, kind), at in zip(parameters, addresses, strict=True)]
        self.launches.append(
            Launch(
                kernel=next(match[1] for line in source.splitlines() if (match := _FILE.match(line))),
                function=function,
                macros={match[1]: int(match[2]) for line in head(source) if (match := _DEFINE.match(line))},
                grid=(gx, gy, gz),
                block=(bx, by, bz),
                shared_bytes=shared_bytes,
                stream=stream,
                device=device,
                arguments=dict(zip((name for name, _ in parameters), values, strict=True)),
                addresses=addresses,
            )
        )


def head(source: str) -> list[str]:
    """Return the lines above the kernel file, which have the macros."""
    return source.partition("#line")[0].splitlines()


def declared(source: str, function: str) -> list[tuple[str, str]]:
    """Return names and C types ("*": pointer) of a kernel's parameters, without the parser of cupy_router."""
    text = re.sub(r"//.*|\bconst\b|__restrict__", " ", source)
    start = re.search(rf"\bvoid\b[^;{{}}]*?\b{function}\s*\(", text)
    assert start is not None, f"no kernel {function}"
    parameters = []
    for parameter in text[start.end() : text.index(")", start.end())].split(","):
        *kind, name = parameter.replace("*", " * ").split()
        parameters.append((name, "*" if "*" in kind else " ".join(kind)))
    return parameters


@contextmanager
def recording(kind: str = "cpu", patience: float = 0.0) -> Iterator[Recorder]:
    """Context in which ops on arrays of this kind of device use a recorder, and nothing compiled before."""
    recorder = Recorder(patience)
    before = compiler.BACKENDS.get(kind), compiler._functions
    compiler.BACKENDS[kind], compiler._functions = recorder, {}
    try:
        yield recorder
    finally:
        compiler._functions = before[1]
        if before[0] is None:
            del compiler.BACKENDS[kind]
        else:
            compiler.BACKENDS[kind] = before[0]
