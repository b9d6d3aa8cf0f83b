# SPDX-License-Identifier: Apache-2.0
"""Several versions of NVRTC side by side; none needs a GPU, a driver or CuPy."""

from __future__ import annotations

import os
import struct
import sys
from functools import cache
from pathlib import Path

from cupy_router import nvrtc
from cupy_router.check.architectures import ARCHITECTURES as ARCHITECTURES
from cupy_router.check.architectures import OPTIONS
from cupy_router.compiler_options import OPTIONS as COMPILER_OPTIONS
from cupy_router.compiler_options import architecture_option
from cupy_router.nvrtc import Resources, resources

FOLDERS = "CUPY_ROUTER_TEST_NVRTC"  # environment: folders with libraries that are to be tested beside those installed


class Nvrtc(nvrtc.Nvrtc):
    """One NVRTC library."""

    def resources(self, source: str, function: str, architecture: str) -> Resources:
        """Compile to machine code and read what it needs from the log; CompileError with file and line."""
        (log,) = self.compile(source, "kernel.cu", options(source, architecture), "ProgramLog")
        return resources(log.decode(), function)

    def machine_code(self, source: str, function: str, architecture: str) -> tuple[bytes, Resources]:
        """The bytes of the instructions, padding included, and what they need."""
        log, cubin = self.compile(source, "kernel.cu", options(source, architecture), "ProgramLog", "CUBIN")
        return section(cubin, f".text.{function}"), resources(log.decode(), function)


def options(source: str, architecture: str) -> list[str]:
    """What the compiler is given beside the text."""
    return [*COMPILER_OPTIONS, *OPTIONS, architecture_option(source, architecture)]


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
