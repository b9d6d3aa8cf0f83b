# SPDX-License-Identifier: Apache-2.0
"""Let NVRTC check a text: without CuPy's import, a GPU or a driver. Knows nothing of routing."""

from __future__ import annotations

import ctypes
import os
from functools import cache, lru_cache
from importlib import import_module
from pathlib import Path

from cupy_router import thread_locale

_COMPILATION = 6  # NVRTC_ERROR_COMPILATION: the text is wrong, nothing else
# A return without a value, a variable without one and a missing return are warnings by default, and then undefined
# results. Other warnings would hide the errors.
_OPTIONS = ("-std=c++17", "--device-as-default-execution-space", "--disable-warnings", "--diag-error=117,549,940")

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
    count = ctypes.c_int()
    library.nvrtcGetNumSupportedArchs(ctypes.byref(count))
    architectures = (ctypes.c_int * max(count.value, 1))()
    library.nvrtcGetSupportedArchs(architectures)
    given = [option.encode() for option in (*_OPTIONS, f"-arch=compute_{max(architectures)}")]
    program = ctypes.c_void_p()
    if library.nvrtcCreateProgram(ctypes.byref(program), text.encode(), name.encode(), 0, None, None):
        return None
    try:
        if library.nvrtcCompileProgram(program, len(given), (ctypes.c_char_p * len(given))(*given)) != _COMPILATION:
            return None
        size = ctypes.c_size_t()
        library.nvrtcGetProgramLogSize(program, ctypes.byref(size))
        log = ctypes.create_string_buffer(size.value)
        library.nvrtcGetProgramLog(program, log)
        return log.value.decode(errors="replace").strip()
    finally:
        library.nvrtcDestroyProgram(ctypes.byref(program))


@cache
def _library() -> ctypes.CDLL | None:
    """Return the library that CuPy would use, found as CuPy finds it; None if there is none."""
    try:
        path = Path(import_module("cuda.pathfinder").load_nvidia_dynamic_lib("nvrtc").abs_path)
        for builtins in sorted(path.parent.glob("libnvrtc-builtins.so.*")):
            ctypes.CDLL(str(builtins))  # NVRTC asks for it by name alone, which then finds what is loaded already
        return ctypes.CDLL(str(path))
    except Exception:  # CuPy is not installed, or NVRTC is not; what is raised depends on how
        return None
