# SPDX-License-Identifier: Apache-2.0
"""A device of the CPU that compiles late: first it only notes what ops ask for, then it executes."""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, cast

from cupy_router import compiler
from cupy_router.ops import _cached
from cupy_router.simt import device

_FILES = re.compile(r'^#line 1 "kernels/([\w./]+)"$', re.M)


@dataclass(frozen=True)
class Kernel:
    """A kernel as it is compiled: function and expanded text."""

    function: str
    source: str

    @property
    def files(self) -> tuple[str, ...]:
        """The kernel files in it, such as "topk_select.cu" and "device/types.cuh"; the first has the kernel."""
        return tuple(_FILES.findall(self.source))


class LateBackend(device.SimtBackend):
    """While `kernels` is a list, what is built is appended to it and nothing is launched.

    Calls are cached with their handles, so one backend serves both phases.
    """

    kernels: list[Kernel] | None = None

    def __init__(self) -> None:
        if device.why_not() is None:  # otherwise it only notes
            super().__init__()
        self._asked: list[Kernel] = []
        self._handles: dict[int, int] = {}

    def build(self, source: str, function: str, index: int = 0) -> int:
        self._asked.append(Kernel(function, source))
        return len(self._asked)

    def launch(self, handle: int, *launch: Any) -> None:
        kernel = self._asked[handle - 1]
        if self.kernels is not None:
            if kernel not in self.kernels:
                self.kernels.append(kernel)
            return
        if handle not in self._handles:
            self._handles[handle] = super().build(kernel.source, kernel.function)
        super().launch(self._handles[handle], *launch)


@contextmanager
def executing() -> Iterator[LateBackend]:
    """Let calls on arrays in CPU memory run kernels, without any that was compiled before or is kept afterwards."""
    before = compiler.BACKENDS.get("cpu")
    backend = LateBackend()
    _forget()
    compiler.BACKENDS["cpu"] = cast(compiler.Backend, backend)
    try:
        yield backend
    finally:
        del compiler.BACKENDS["cpu"]
        if before is not None:
            compiler.BACKENDS["cpu"] = before
        _forget()


def _forget() -> None:
    compiler.forget()
    _cached.forget()
