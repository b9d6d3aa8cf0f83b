# SPDX-License-Identifier: Apache-2.0
"""Several versions of NVRTC side by side; none needs a GPU, a driver or CuPy."""

from __future__ import annotations

import os
import re
import struct
import sys
from functools import cache
from pathlib import Path

from cupy_router import nvrtc
from cupy_router.check.architectures import ARCHITECTURES as ARCHITECTURES
from cupy_router.check.architectures import OPTIONS
from cupy_router.nvrtc import Resources

FOLDERS = "CUPY_ROUTER_TEST_NVRTC"  # environment: folders with libraries that are to be tested beside those installed


class Nvrtc(nvrtc.Nvrtc):
    """One NVRTC library."""

    def resources(self, source: str, function: str, architecture: str) -> Resources:
        """Compile to machine code and read what it needs from the log; CompileError with file and line."""
        (log,) = self.compile(source, "kernel.cu", [*OPTIONS, f"-arch={architecture}"], "ProgramLog")
        return parse_log(log.decode(), function, architecture)

    def machine_code(self, source: str, function: str, architecture: str) -> tuple[bytes, Resources]:
        """The bytes of the instructions, padding included, and what they need."""
        options = [*OPTIONS, f"-arch={architecture}"]
        log, cubin = self.compile(source, "kernel.cu", options, "ProgramLog", "CUBIN")
        return section(cubin, f".text.{function}"), parse_log(log.decode(), function, architecture)


def parse_log(log: str, function: str, architecture: str) -> Resources:
    """The lines of ptxas about one kernel; ValueError if it says nothing of it."""
    marks = re.split(r"Compiling entry function '(\w+)' for '(\w+)'", log)
    for name, target, text in zip(marks[1::3], marks[2::3], marks[3::3], strict=True):
        if (name, target) == (function, architecture):
            numbers = {
                what: int(found[1]) if (found := re.search(rf"(\d+) {words}", text)) else None
                for what, words in {
                    "registers": "registers", "stack": "bytes stack frame",
                    "stores": "bytes spill stores", "loads": "bytes spill loads", "shared": "bytes smem",
                }.items()
            }  # fmt: skip
            required = numbers["registers"], numbers["stores"], numbers["loads"], numbers["stack"]
            if None not in required:
                registers, stores, loads, stack = (number or 0 for number in required)
                return Resources(registers, stores + loads, stack, numbers["shared"] or 0)
    raise ValueError(f"the log does not say what {function} needs on {architecture}:\n{log}")


def section(elf: bytes, wanted: str) -> bytes:
    """A section of a 64-bit ELF file; ValueError if it has none of that name."""
    (table,) = struct.unpack_from("<Q", elf, 0x28)
    entry, count, names = struct.unpack_from("<HHH", elf, 0x3A)
    headers = [struct.unpack_from("<IIQQQQ", elf, table + i * entry) for i in range(count)]
    texts = headers[names][4]
    for name, _, _, _, offset, size in headers:
        if elf[texts + name : elf.index(b"\0", texts + name)].decode() == wanted:
            return elf[offset : offset + size]
    raise ValueError(f"the machine code has no section {wanted}")


@cache
def libraries() -> dict[str, Nvrtc]:
    """All NVRTC libraries here, by version: of the installed wheels, and of the folders that the environment names."""
    named = [Path(folder) for folder in os.environ.get(FOLDERS, "").split(os.pathsep) if folder]
    missing = [folder for folder in named if not any(folder.glob("libnvrtc.so.*"))]
    if missing:
        raise FileNotFoundError(f"{FOLDERS} names folders without libnvrtc.so: {', '.join(map(str, missing))}")
    folders = [*named, *(folder for path in sys.path for folder in sorted(Path(path).glob("nvidia/*/lib")))]
    opened = (Nvrtc(library) for folder in folders for library in sorted(folder.glob("libnvrtc.so.*")))
    by_version: dict[str, Nvrtc] = {}
    for library in opened:
        by_version.setdefault(library.version, library)
    return dict(sorted(by_version.items(), key=lambda pair: [int(part) for part in pair[0].split(".")]))
