# SPDX-License-Identifier: Apache-2.0
"""A device made of g++: kernels compiled for the CPU, each CUDA thread a fiber, see include/cuda_cpu.h.

`compiler.BACKENDS["cpu"] = SimtBackend()` makes the ops run their kernels on NumPy arrays.
"""

from __future__ import annotations

import contextlib
import ctypes
import hashlib
import os
import platform
import re
import shutil
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Sequence
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np

from cupy_router import tensor_map
from cupy_router.compiler import CompileError

SCHEDULES = ("round_robin", "reversed", "shuffled", "run_ahead")
SANITIZERS = ("address", "thread")

_INCLUDE = Path(__file__).with_name("include")
_FLAGS = (
    "-std=c++17 -O1 -fPIC -shared -fvisibility=hidden -fno-gnu-unique -w "
    "-ffp-contract=off "  # as written; the GPU contracts to FMA where it likes, so floats are compared with a tolerance
    "-fdata-sections -Wl,-T,shared.ld "  # see _SHARED
    "-fno-strict-aliasing "  # kernels read float rows as uint4, which CUDA compilers allow
    "-fcf-protection=none"  # a fiber starts by a return
).split()
_SANITIZER_FLAGS = {
    None: [],
    "address": "-g1 -fsanitize=address,undefined -fno-sanitize=object-size -fno-sanitize-recover=all "
    "-fsanitize-sections=simt_shared".split(),
    "thread": "-g1 -fsanitize=thread".split(),
}
# All __shared__ variables in one place. g++ forgets the section of those in templates, but knows them as zeroed static
# variables within functions, of which the runtime has none.
_SHARED = """
SECTIONS {
    simt_shared : { HIDDEN(simt_shared_begin = .); *(simt_shared) *(.bss._ZZ*) HIDDEN(simt_shared_end = .); }
} INSERT AFTER .data;
"""
_LAUNCH = """
}}  // namespace: everything above has internal linkage, so that shared variables of templates may lie in one section
static const unsigned simt_cluster[3] = {{{cluster}}}, simt_bounds[] = {{{bounds}}};
extern "C" __attribute__((visibility("default"))) const char* simt_launch(
    simt::Geometry* simt_g, unsigned simt_order, unsigned long long simt_seed, double simt_limit, void** simt_args) {{
    for (int i = 0; i < 3; ++i) simt_g->cluster[i] = simt_cluster[i] ? simt_cluster[i] : 1;
    simt_g->max_threads = simt_bounds[0];
    return simt::run({function}, *simt_g, (simt::Schedule)simt_order, simt_seed, simt_limit, simt_args);
}}
"""
_KEPT_SECONDS = 14 * 24 * 3600
_lock = threading.Lock()  # one launch at a time: a library has one set of shared variables and one scheduler


class KernelFault(RuntimeError):
    """A kernel did what must not be. `name` is the kind of fault, the message says which threads, masks and lines."""

    def __init__(self, function: str, report: str) -> None:
        super().__init__(f"{function}: {report}")
        self.name = re.split(r" in block|:|$", report.splitlines()[0], maxsplit=1)[0]


@cache
def why_not() -> str | None:
    """Why kernels cannot run on this machine's CPU; None if they can."""
    if sys.platform != "linux" or platform.machine() != "x86_64":
        return f"kernels run on the CPU of x86-64 Linux only, this is {sys.platform} on {platform.machine()}"
    if shutil.which(_compiler()) is None:
        return f"{_compiler()} is missing: kernels run on the CPU by way of g++ (set CXX to name another)"
    return None


def sanitizer_library(sanitizer: str) -> str:
    """The run-time library that a process has to preload to run kernels under this sanitizer."""
    name = {"address": "libasan.so", "thread": "libtsan.so"}[sanitizer]
    return _output(_compiler(), f"-print-file-name={name}").strip()


class SimtBackend:
    """The `Backend` of cupy_router.compiler whose device is the CPU.

    `schedule`, `seed` and `time_limit` (CPU seconds a launch) may be changed between launches. `sanitizer` is None,
    "address" (and undefined behaviour) or "thread"; the process has to preload its library: see sanitized.py.
    """

    compiled = True  # or found among the libraries of earlier runs, which nobody asks for here
    switches = False

    def __init__(
        self, schedule: str = "run_ahead", seed: int = 0, sanitizer: str | None = None, time_limit: float = 60.0
    ) -> None:
        reason = why_not()
        if reason is not None:
            raise RuntimeError(reason)
        if sanitizer is not None and sanitizer_library(sanitizer) not in os.environ.get("LD_PRELOAD", ""):
            raise RuntimeError(f"sanitizer={sanitizer!r} needs LD_PRELOAD={sanitizer_library(sanitizer)}")
        self.schedule = schedule
        self.seed = seed
        self.sanitizer = sanitizer
        self.time_limit = time_limit
        self._kernels: list[tuple[str, ctypes._NamedFuncPointer]] = []

    def build(self, source: str, function: str, device: int = 0) -> int:
        library = ctypes.CDLL(str(build_library(source, function, self.sanitizer)))
        entry = library.simt_launch
        entry.restype = ctypes.c_char_p
        entry.argtypes = [ctypes.c_void_p, ctypes.c_uint, ctypes.c_ulonglong, ctypes.c_double, ctypes.c_void_p]
        with _lock:
            self._kernels.append((function, entry))
            return len(self._kernels)

    def launch(
        self, handle: int, gx: int, gy: int, gz: int, bx: int, by: int, bz: int,
        shared_bytes: int, stream: int, kernel_params: int, extra: int,
    ) -> None:  # fmt: skip
        function, entry = self._kernels[handle - 1]
        geometry = (ctypes.c_uint * 11)(gx, gy, gz, bx, by, bz, 1, 1, 1, 0, shared_bytes)
        with _lock:
            report = entry(geometry, SCHEDULES.index(self.schedule), self.seed, self.time_limit, kernel_params)
        if report is not None:
            raise KernelFault(function, report.decode())

    def shared_limit(self, device: int) -> int:
        return 227 * 1024

    def allow_shared(self, handle: int, device: int, num_bytes: int) -> None:
        if num_bytes > self.shared_limit(device):
            raise ValueError(f"a block may have at most 227 KB of shared memory, got {num_bytes} bytes")

    tensor_map = staticmethod(tensor_map.for_cpu)

    def use(self, device: int) -> int | None:
        return None


def launch(
    backend: SimtBackend, source: str, function: str, grid: Sequence[int], block: Sequence[int], args: Sequence[Any]
) -> tuple[Any, ...]:
    """Build and launch a kernel by itself; gives `args` back, with arrays as the kernel left them.

    Arrays go as pointers, scalars as NumPy scalars of the parameter's own type.
    """
    values = [
        ctypes.c_void_p(arg.ctypes.data)
        if isinstance(arg, np.ndarray)
        else np.ctypeslib.as_ctypes_type(arg.dtype)(arg.item())
        for arg in args
    ]
    pointers = (ctypes.c_void_p * len(values))(*(ctypes.addressof(value) for value in values))
    gx, gy, gz = (*grid, 1, 1)[:3]
    bx, by, bz = (*block, 1, 1)[:3]
    handle = backend.build(source, function, 0)
    backend.launch(handle, gx, gy, gz, bx, by, bz, 0, 0, ctypes.addressof(pointers), 0)
    return tuple(args)


def build_library(source: str, function: str, sanitizer: str | None = None) -> Path:
    """The shared library of one kernel, compiled unless an earlier run left it in the cache."""
    flags = [*_FLAGS, *_SANITIZER_FLAGS[sanitizer]]
    text = _cpu_source(source, function)
    key = hashlib.sha256(repr((text, flags, _SHARED, _compiler_and_headers())).encode()).hexdigest()[:32]
    folder = cache_folder()
    library = folder / f"{function}-{sanitizer or 'plain'}-{key}.so"
    if library.exists():
        os.utime(library)
        return library
    folder.mkdir(parents=True, exist_ok=True)
    old_files = (path for kind in ("so", "gch", "log") for path in folder.glob(f"*.{kind}"))
    for old in old_files:  # of kernels that have been edited since
        with contextlib.suppress(FileNotFoundError):
            if time.time() - old.stat().st_mtime > _KEPT_SECONDS:
                old.unlink()
    with tempfile.TemporaryDirectory(dir=folder) as work:
        header = _compiled_header(flags, sanitizer)
        (Path(work) / "kernel.cpp").write_text(f'#include "{header}"\n{text}')
        (Path(work) / "shared.ld").write_text(_SHARED)
        command = [_compiler(), *flags, f"-fdebug-prefix-map={work}=.", "kernel.cpp", "-o", "kernel.so"]
        done = subprocess.run(command, cwd=work, env=_clean_environment(), capture_output=True, text=True)
        if done.returncode:
            raise CompileError(f"{' '.join(command)}\n{done.stderr.strip()}")
        os.replace(Path(work) / "kernel.so", library)
    return library


def _compiled_header(flags: list[str], sanitizer: str | None) -> Path:
    """A header that includes the runtime, beside what g++ makes of it: half of a kernel's compilation would be that.

    A compiler that does not know such a file reads the header.
    """
    key = hashlib.sha256(repr((flags, _compiler_and_headers(), str(_INCLUDE))).encode()).hexdigest()[:32]
    header = cache_folder() / f"runtime-{sanitizer or 'plain'}-{key}.h"
    compiled = header.with_name(f"{header.name}.gch")
    if compiled.exists():
        os.utime(compiled)
        return header
    with tempfile.TemporaryDirectory(dir=header.parent) as work:
        made = Path(work) / header.name
        made.write_text(f'#include "{_INCLUDE / "cuda_cpu.h"}"\n')
        kept = [flag for flag in flags if flag != "-shared" and not flag.startswith("-Wl,")]
        command = [_compiler(), *kept, "-x", "c++-header", made.name, "-o", compiled.name]
        subprocess.run(command, cwd=work, env=_clean_environment(), capture_output=True, check=True)
        os.replace(made, header)
        os.replace(Path(work) / compiled.name, compiled)
    return header


def cache_folder() -> Path:
    """Where compiled kernels are kept: CUPY_ROUTER_SIMT_CACHE, or a folder in the user's cache."""
    chosen = os.environ.get("CUPY_ROUTER_SIMT_CACHE")
    user = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(chosen) if chosen else Path(user) / "cupy_router" / "simt"


def _cpu_source(source: str, function: str) -> str:
    """The kernel's text behind that of the runtime, with an entry that knows the kernel's type and attributes."""
    found = re.search(rf'extern\s+"C"\s+__global__([^;{{}}"]*?)\b{function}\s*\(', re.sub(r"//[^\n]*", "", source))
    if found is None:
        raise CompileError(f'there is no extern "C" __global__ void {function}(...)')
    cluster = _arguments(found[1], "__cluster_dims__")
    launch = _LAUNCH.format(function=function, cluster=cluster, bounds=_arguments(found[1], "__launch_bounds__") or "0")
    return f'namespace {{\n#line 1 "{function}.cu"\n{source}\n{launch}'


def _arguments(declaration: str, attribute: str) -> str:
    """What stands in the parentheses of an attribute, "" without it."""
    start = declaration.find(attribute)
    if start < 0:
        return ""
    start = declaration.index("(", start) + 1
    depth, end = 1, start
    while depth:
        depth += {"(": 1, ")": -1}.get(declaration[end], 0)
        end += 1
    return declaration[start : end - 1]


def _compiler() -> str:
    return os.environ.get("CXX", "g++")


def _clean_environment() -> dict[str, str]:
    return {name: value for name, value in os.environ.items() if name != "LD_PRELOAD"}


@cache
def _output(*command: str) -> str:
    return subprocess.run(command, env=_clean_environment(), capture_output=True, text=True, check=True).stdout


def _compiler_and_headers() -> str:
    headers = [path.read_text() for path in sorted(_INCLUDE.glob("*.h"))]
    return _output(_compiler(), "--version") + "".join(headers)
