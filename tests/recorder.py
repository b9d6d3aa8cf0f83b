# SPDX-License-Identifier: Apache-2.0
"""A backend that compiles and launches nothing: it records requests and reads what the driver would read."""

from __future__ import annotations

import ctypes
import re
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import lru_cache
from typing import Any

from cupy_router import compiler, declarations, tensor_map

_FILE = re.compile(r'#line 1 "kernels/(\w+)\.cu"')
_TYPES: dict[str, Any] = {
    "*": ctypes.c_uint64,
    "int": ctypes.c_int32,
    "long long": ctypes.c_int64,
    "float": ctypes.c_float,
    "TensorMap": ctypes.c_char * tensor_map.BYTES,
}


@dataclass(frozen=True)
class Launch:
    """One launch; `arguments` by the names and C types in the kernel's own text."""

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
    """A `Backend` of cupy_router.compiler. `patience` is how long a launch waits before it reads its arguments."""

    compiled = True
    switches = True

    def __init__(self, patience: float = 0.0) -> None:
        self.patience = patience
        self.sources: list[str] = []
        self.launches: list[Launch] = []
        self.shared: list[tuple[int, int, int]] = []  # calls of allow_shared
        self.used: list[int] = []  # devices made current, in order
        self.failure: Exception | None = None  # raised by every launch
        self._built: list[tuple[str, int]] = []
        self._thread = threading.local()
        self._lock = threading.Lock()

    def build(self, source: str, function: str, device: int) -> int:
        with self._lock:
            self.sources.append(source)
            self._built.append((function, device))
            return len(self._built)

    def shared_limit(self, device: int) -> int:
        return 227 * 1024

    def allow_shared(self, handle: int, device: int, num_bytes: int) -> None:
        self.shared.append((handle, device, num_bytes))

    @property
    def current(self) -> int:
        """The device that is current in this thread."""
        device: int = getattr(self._thread, "device", 0)
        return device

    tensor_map = staticmethod(tensor_map.for_cpu)

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
        arguments: dict[str, Any] = {}
        for (name, kind), at in zip(parameters, addresses, strict=True):
            arguments |= {name: _TYPES[kind].from_address(at).value} if kind in _TYPES else members(source, kind, at)
        self.launches.append(
            Launch(
                kernel=next(match[1] for line in source.splitlines() if (match := _FILE.match(line))),
                function=function,
                macros=declarations.constants(source),
                grid=(gx, gy, gz),
                block=(bx, by, bz),
                shared_bytes=shared_bytes,
                stream=stream,
                device=device,
                arguments=arguments,
                addresses=addresses,
            )
        )


@lru_cache(maxsize=64)
def declared(source: str, function: str) -> list[tuple[str, str]]:
    """Return names and C types ("*": pointer) of a kernel's parameters, by another parser than cupy_router's."""
    text = re.sub(r"//.*|\bconst\b|__restrict__|__grid_constant__", " ", source)
    start = re.search(rf"\bvoid\b[^;{{}}]*?\b{function}\s*\(", text)
    assert start is not None, f"no kernel {function}"
    parameters = []
    for parameter in text[start.end() : text.index(")", start.end())].split(","):
        *kind, name = parameter.replace("*", " * ").split()
        parameters.append((name, "*" if "*" in kind else " ".join(kind)))
    return parameters


def members(source: str, kind: str, address: int) -> dict[str, float]:
    """The floats of a struct."""
    text = re.sub(r"//.*", " ", source)
    names = re.findall(r"float (\w+);", text[text.index(f"struct {kind} {{") :].partition("}")[0])
    return dict(zip(names, (ctypes.c_float * len(names)).from_address(address), strict=True))


@contextmanager
def recording(kind: str = "cpu", patience: float = 0.0) -> Iterator[Recorder]:
    """Send ops on this kind of device to a recorder, without anything compiled before."""
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
