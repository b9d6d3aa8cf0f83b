# SPDX-License-Identifier: Apache-2.0
"""NVRTC by ctypes: without CuPy's import, a GPU or a driver. Knows nothing of routing."""

from __future__ import annotations

import ctypes
import os
import re
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache, cached_property, lru_cache
from importlib import import_module
from pathlib import Path

from cupy_router import thread_locale
from cupy_router.declarations import CompileError

_COMPILATION = 6  # NVRTC_ERROR_COMPILATION: the text is wrong, nothing else
# A return without a value, a variable without one and a missing return are warnings by default, and then undefined
# results. Other warnings would hide the errors.
_OPTIONS = ("-std=c++17", "--device-as-default-execution-space", "--disable-warnings", "--diag-error=117,549,940")

_NEEDS = ("registers", "bytes stack frame", "bytes spill stores", "bytes spill loads")  # in a log of ptxas


@dataclass(frozen=True)
class Resources:
    """What ptxas reports: registers, spilled bytes and stack bytes of a thread, static shared bytes of a block."""

    registers: int
    spills: int
    stack: int
    shared: int


class Nvrtc:
    """One NVRTC library, which several threads may use at once."""

    def __init__(self, library: Path) -> None:
        self.path = library
        for builtins in sorted(library.parent.glob("libnvrtc-builtins.so.*")):
            ctypes.CDLL(str(builtins))  # NVRTC asks for it by name alone, which then finds what is loaded already
        self._library = ctypes.CDLL(str(library))
        self._library.nvrtcGetErrorString.restype = ctypes.c_char_p

    @cached_property
    def version(self) -> str:
        """Such as "12.9.86": what the library writes into PTX, since nvrtcVersion leaves out the last part."""
        (ptx,) = self.compile('extern "C" __global__ void empty() {}', "empty.cu", ["-arch=compute_75"], "PTX")
        found = re.search(r"Cuda compilation tools, release [\d.]+, V([\d.]+)", ptx.decode())
        assert found is not None, ptx
        return found[1]

    @property
    def architectures(self) -> list[int]:
        """The compute capabilities that it compiles for, such as 90."""
        count = ctypes.c_int()
        self._check(self._library.nvrtcGetNumSupportedArchs(ctypes.byref(count)))
        found = (ctypes.c_int * max(count.value, 1))()
        self._check(self._library.nvrtcGetSupportedArchs(found))
        return list(found)[: count.value]

    @thread_locale.kept()
    def compile(self, text: str, name: str, options: Sequence[str], *wanted: str) -> list[bytes]:
        """Return what is wanted of "ProgramLog", "PTX" and "CUBIN"; CompileError with the log, which uses the name."""
        program = ctypes.c_void_p()
        create = self._library.nvrtcCreateProgram
        self._check(create(ctypes.byref(program), text.encode(), name.encode(), 0, None, None))
        try:
            encoded = (ctypes.c_char_p * len(options))(*(option.encode() for option in options))
            status = self._library.nvrtcCompileProgram(program, len(options), encoded)
            if status == _COMPILATION:
                raise CompileError(self._read(program, "ProgramLog").decode(errors="replace").strip())
            self._check(status)
            return [self._read(program, what) for what in wanted]
        finally:
            self._library.nvrtcDestroyProgram(ctypes.byref(program))

    def _read(self, program: ctypes.c_void_p, what: str) -> bytes:
        size = ctypes.c_size_t()
        self._check(getattr(self._library, f"nvrtcGet{what}Size")(program, ctypes.byref(size)))
        found = ctypes.create_string_buffer(size.value)
        self._check(getattr(self._library, f"nvrtcGet{what}")(program, found))
        return found.raw if what == "CUBIN" else found.value  # texts end with a zero byte

    def _check(self, status: int) -> None:
        if status:
            raise RuntimeError(f"{self.path}: {self._library.nvrtcGetErrorString(status).decode()}")


def resources(log: str, function: str) -> Resources:
    """Return what a log of ptxas says of one kernel; RuntimeError if it does not say all of it."""
    found = re.search(rf"Compiling entry function '{function}'(.*?)(?=Compiling entry function|\Z)", log, re.S)
    said = {words: re.search(rf"(\d+) {words}", found[1] if found else "") for words in _NEEDS}
    if None in said.values():
        raise RuntimeError(f"ptxas does not say what {function} needs: {log}")
    registers, stack, stores, loads = (int(match[1]) for match in said.values() if match)
    shared = re.search(r"(\d+) bytes smem", found[1] if found else "")  # left out if there is none
    return Resources(registers, stores + loads, stack, int(shared[1]) if shared else 0)


def find() -> Path | None:
    """Return the library that CuPy would use, found as CuPy finds it, or that of an NVRTC wheel; None without one."""
    try:
        return Path(import_module("cuda.pathfinder").load_nvidia_dynamic_lib("nvrtc").abs_path)
    except Exception:  # CuPy is not installed, or NVRTC is not; what is raised depends on how
        wheels = (folder for path in sys.path for folder in sorted(Path(path).glob("nvidia/*/lib")))
        return next((library for folder in wheels for library in folder.glob("libnvrtc.so.*")), None)


# -- The check of a text -----------------------------------------------------------------------------------------------

_used = False
_used_by_parent = False


def _after_fork() -> None:
    """In the child, leave NVRTC alone: a thread of the parent may have held its locks, which nobody frees here."""
    global _used_by_parent
    _used_by_parent = _used


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_after_fork)


@lru_cache(maxsize=256)
@thread_locale.kept()
def errors(text: str, name: str) -> str | None:
    """Return the compiler's lines if it refuses a text for the newest architecture that it knows.

    None if it accepts the text, if there is no NVRTC, or if this process was forked after a first call. The lines call
    the text by its name. The first call loads NVRTC, which takes some tenths of a second. Later ones take hundredths.
    """
    global _used
    if _used_by_parent:
        return None
    _used = True
    library = _library()
    if library is None:
        return None
    try:
        library.compile(text, name, [*_OPTIONS, f"-arch=compute_{max(library.architectures)}"])
    except CompileError as error:
        return str(error)
    except RuntimeError:  # of NVRTC itself, not of the text
        return None
    return None


@cache
def _library() -> Nvrtc | None:
    try:
        found = find()
        return None if found is None else Nvrtc(found)
    except OSError:
        return None
