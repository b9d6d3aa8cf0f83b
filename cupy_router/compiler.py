# SPDX-License-Identifier: Apache-2.0
"""Kernel file + headers + constants -> compiled function, cached; knows nothing of routing.

A kernel's text is expanded first. `#include "device/types.cuh"` is replaced by the file, with `#line` marks so that
errors point at `kernels/device/types.cuh(line)`. Constants get their values. So the text contains headers and
constants. It is the key of CuPy's disk cache, from which other processes load the compiled kernel.
"""

from __future__ import annotations

import os
import re
import threading
import warnings
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from types import MappingProxyType, ModuleType
from typing import Any

from cupy_router import kernel_cache, kernel_dump, kernel_log, kernel_plan, tensor_map, thread_locale
from cupy_router.compiler_options import options as options
from cupy_router.declarations import CompileError as CompileError
from cupy_router.declarations import Signature as Signature
from cupy_router.declarations import signature_in, with_constants
from cupy_router.kernel_build import Backend as Backend
from cupy_router.kernel_build import Build, build
from cupy_router.relaxed import relaxed
from cupy_router.watch import Watch

Macros = tuple[tuple[str, int], ...]
Headers = tuple[tuple[str, str], ...]

_INCLUDE = re.compile(r'^\s*#\s*include\s+"([\w./]+)"')


class _CompilerLog(threading.local):
    """File that records whether anything was written in this thread, even an empty text."""

    written = False

    def write(self, text: str) -> None:
        self.written = True


class CudaBackend:
    """CuPy's RawKernel and NVRTC."""

    def __init__(self) -> None:
        cupy = require_cuda()
        self._cupy = cupy
        self._modules: dict[int, Any] = {}
        self._log = _CompilerLog()
        self._thread = threading.local()
        self.switches = cupy.cuda.runtime.getDeviceCount() > 1
        self.launch = cupy.cuda.driver.launchKernel

    @thread_locale.kept()
    def build(self, source: str, function: str, device: int) -> int:
        cupy, folder = self._cupy, kernel_cache.folder()
        with cupy.cuda.Device(device), relaxed():
            kernel = cupy.RawKernel(source, function, options(source), "nvrtc")
            # CuPy writes the compiler's log if and only if the compiler ran, even an empty one. This is public API, and
            # right where a look at the cache folder is not: another process writes there, a file is damaged, or
            # CUPY_CACHE_IN_MEMORY is set. One log serves all builds: CuPy keeps modules by source and log.
            self._log.written = False
            try:
                kernel.compile(log_stream=self._log)
                handle = int(kernel.kernel.ptr)
            except cupy.cuda.compiler.CompileException as error:
                raise CompileError(str(error).strip()) from None
            except OSError as error:  # of CuPy's cache: removed, full, not to be written, a folder instead of a file
                kernel_cache.replace(error, folder)
                return self.build(source, function, device)
        self._modules[handle] = kernel
        return handle

    @property
    def compiled(self) -> bool:
        """True if the last `build` of this thread ran the compiler; see `Backend`."""
        return self._log.written

    def shared_limit(self, device: int) -> int:
        return int(self._cupy.cuda.Device(device).attributes["MaxSharedMemoryPerBlockOptin"])

    def allow_shared(self, handle: int, device: int, num_bytes: int) -> None:
        limit = self.shared_limit(device)
        if num_bytes > limit:
            raise ValueError(
                f"a block may have at most {limit} bytes of shared memory on cuda:{device}, got {num_bytes}"
            )
        with self._cupy.cuda.Device(device), relaxed():
            self._modules[handle].max_dynamic_shared_size_bytes = num_bytes

    tensor_map = staticmethod(tensor_map.encode)

    def use(self, device: int) -> int | None:
        if not self.switches and hasattr(self._thread, "ready"):
            return None
        runtime = self._cupy.cuda.runtime
        current: int = runtime.getDevice()
        if current == device and hasattr(self._thread, "ready"):
            return None
        runtime.setDevice(device)  # also gives a new thread its context
        self._thread.ready = True
        return current if current != device else None


BACKENDS: dict[str, Backend] = {}
_backend_of_parent: Backend | None = None  # if it had used CUDA before it forked this process
_is_forked = False


def _after_fork() -> None:
    """In the child, forget what belongs to the parent's CUDA, so that every call asks :func:`why_no_cuda` again."""
    global _backend_of_parent, _is_forked, _lock
    _is_forked = True
    _lock = threading.RLock()  # another thread of the parent may have held it
    why_no_cuda.cache_clear()
    if "cuda" in BACKENDS:
        _backend_of_parent = BACKENDS.pop("cuda")  # kept, since its modules cannot be unloaded here
        _functions.clear()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_after_fork)

FORKED = (
    "CUDA does not work in a process that was forked after CUDA had been used: start this process by multiprocessing's "
    "method 'spawn', or fork it before CUDA is used."
)


def is_of_a_fork(error: Exception) -> bool:
    """Return True for the error that CUDA raises in every call after a fork, by way of any framework."""
    text = str(error)
    return _is_forked and "initialization error" in text and "cuda" in text.lower()


def backend(kind: str) -> Backend | None:
    """Return the backend of a kind of device; None if it runs no kernels (CPU memory, except in tests)."""
    found = BACKENDS.get(kind)
    if found is None and kind == "cuda":
        found = kernel_plan.NOWHERE if kernel_plan.collects() else BACKENDS.setdefault(kind, CudaBackend())
    return found


@cache
def why_no_cuda() -> str | None:
    """Return the reason why CUDA kernels cannot run, with the remedy; None if they can."""
    if _backend_of_parent is not None:
        return FORKED
    install = "install cupy-router[cuda12] or cupy-router[cuda13]"
    kernel_cache.prepare()
    try:
        import cupy

        runtime = cupy.cuda.runtime
    except ImportError as error:
        return f"CuPy is not usable ({error}): {install}."
    except Exception as error:  # an import can raise anything
        return f"CuPy is not usable ({type(error).__name__}: {error}): correct this, or {install}."
    try:
        count = runtime.getDeviceCount()
    except runtime.CUDARuntimeError as error:
        if is_of_a_fork(error):
            return FORKED
        return f"no CUDA device or driver is usable ({error}): for a GPU, install an NVIDIA driver of CUDA 12 or later."
    if count == 0:
        return "no CUDA device is visible: check nvidia-smi and CUDA_VISIBLE_DEVICES."
    try:
        cupy.cuda.nvrtc.getVersion()
    except Exception as error:  # what is raised depends on how the library is missing
        return f"NVRTC is not usable ({error}): {install}, which bring it."
    return None


def no_cuda(reason: str) -> RuntimeError:
    """Return the error of a call that needs CUDA, for a reason of :func:`why_no_cuda`."""
    return RuntimeError(f"CUDA arrays need CuPy, NVRTC and a driver: {reason}")


def require_cuda() -> ModuleType:
    """Return the module CuPy; RuntimeError with the remedy if it does not work."""
    reason = why_no_cuda()
    if reason is not None:
        raise no_cuda(reason)
    import cupy

    return cupy  # type: ignore[no-any-return]  # CuPy has no type information


# -- Kernel files ------------------------------------------------------------------------------------------------------


def kernel_folders() -> list[Path]:
    """Return the folders to search for a kernel file: CUPY_ROUTER_KERNELS, then that of the package or the checkout.

    All have the same paths, such as `topk_select.cu` and `device/types.cuh`.
    """
    override = os.environ.get("CUPY_ROUTER_KERNELS")
    return [Path(override), _OWN] if override else [_OWN]


_reported: set[str] = set()


def _report_override(override: Path) -> None:
    """Warn once if the folder does not exist, and of each file in it that no kernel reads."""
    if not override.is_dir():
        problems = [f"there is no folder {override}"]
    else:
        files = [path for path in sorted(override.rglob("*")) if path.suffix in (".cu", ".cuh")]
        included = {
            match[1]
            for path in files
            for line in path.read_text(encoding="utf-8").splitlines()
            if (match := _INCLUDE.match(line))
        }
        unread = [name for path in files if (name := path.relative_to(override).as_posix()) not in included]
        own = {path.name: path.relative_to(_OWN).as_posix() for path in _OWN.rglob("*.cu*")}
        problems = [
            f"no kernel reads {name} of {override}" + (f", but {own[leaf]}" if (leaf := Path(name).name) in own else "")
            for name in unread
            if not (_OWN / name).is_file()
        ]
    for problem in problems:
        if problem not in _reported:
            _reported.add(problem)
            warnings.warn(f"CUPY_ROUTER_KERNELS: {problem}", stacklevel=3)


_PACKAGE = Path(__file__).parent
_INSTALLED = (_PACKAGE / "kernels").is_dir()
_OWN = _PACKAGE / "kernels" if _INSTALLED else _PACKAGE.parent / "kernels"

# While a process runs, kernel files of a checkout or of CUPY_ROUTER_KERNELS may change; those of an installed wheel do
# not.
WATCHING = not _INSTALLED or "CUPY_ROUTER_KERNELS" in os.environ

_watch = Watch()
_watched_override = os.environ.get("CUPY_ROUTER_KERNELS")
_lock = threading.RLock()


def changed() -> bool:
    """Return whether a kernel file has changed since it was read; if so, forget all functions. Ask only if WATCHING."""
    if os.environ.get("CUPY_ROUTER_KERNELS") == _watched_override and not _watch.changed():
        return False
    forget()
    return True


def forget() -> None:
    """Forget all texts and compiled functions. Calls that ops have cached keep theirs."""
    global _watched_override
    with _lock:
        _watched_override = os.environ.get("CUPY_ROUTER_KERNELS")
        for known in (_watch, _functions, _texts):
            known.clear()


def _read(name: str) -> tuple[str, Path]:
    """Return the text and the path of a kernel file, and watch every path at which it could appear."""
    for folder in kernel_folders():
        path = folder / name
        _watch.add(path)
        if path.is_file():
            return path.read_text(encoding="utf-8"), path
    raise CompileError(f"kernel file {name} is not in {' or '.join(map(str, kernel_folders()))}")


def _lines(name: str, headers: Mapping[str, str], seen: set[str]) -> Iterator[str]:
    seen.add(name)
    yield f'#line 1 "kernels/{name}"'
    if name in headers:
        yield headers[name]  # a caller's text as it was checked: no other ends of lines, no includes
        return
    text = _read(name)[0]
    for number, line in enumerate(text.splitlines(), 1):
        include = _INCLUDE.match(line)
        if include is None:
            yield line
        elif include[1] not in seen:
            yield from _lines(include[1], headers, seen)
            yield f'#line {number + 1} "kernels/{name}"'
        else:
            yield ""


_texts: dict[tuple[str, Headers], str] = {}


def expand(kernel: str, macros: Macros | Mapping[str, int] = (), headers: Headers = ()) -> str:
    """Return the text of kernels/<kernel>.cu with its headers and the values of its constants, complete for a compiler.

    `headers` are texts that replace kernel files. CompileError for a constant that no file declares.
    """
    with _lock:
        text = _texts.get((kernel, headers))
        if text is None:
            if len(folders := kernel_folders()) > 1:
                _report_override(folders[0])
            lines = _lines(f"{kernel}.cu", dict(headers), set())
            text = _texts[kernel, headers] = "\n".join(lines) + "\n"
    text, unknown = with_constants(text, dict(macros))
    if unknown:
        raise CompileError(f"kernels/{kernel}.cu has no constant {', '.join(unknown)}")
    return text


# -- Compiled functions ------------------------------------------------------------------------------------------------

kernel_log.listeners.append(kernel_dump.dump_if_asked)


def signature(kernel: str, function: str) -> Signature:
    """Return the parameters of `extern "C" __global__ void function(...)` in kernels/<kernel>.cu."""
    found = signature_in(expand(kernel), function)
    if found is None:
        raise CompileError(f'kernels/{kernel}.cu has no extern "C" __global__ void {function}(...)')
    return found


@dataclass(frozen=True)
class Function:
    """A compiled kernel on one device."""

    handle: int
    signature: Signature
    backend: Backend
    device: int


_functions: dict[tuple[str, str, Macros, Headers, str, int], Function] = {}


def is_ready(wanted: kernel_plan.Wanted, device: tuple[str, int]) -> bool:
    """Return whether :func:`compile` has this function already."""
    return (*wanted, *device) in _functions


def compile(
    kernel: str,
    function: str,
    macros: Mapping[str, int],
    device: tuple[str, int],
    headers: Mapping[str, str] = MappingProxyType({}),
    build: Build = build,
) -> Function:
    """Return the function of kernels/<kernel>.cu for these macros, headers and device, built once per process."""
    if kernel_plan.collects():
        kernel_plan.add(kernel, function, macros, headers)
        return Function(0, signature(kernel, function), kernel_plan.NOWHERE, device[1])
    key = (kernel, function, tuple(sorted(macros.items())), tuple(sorted(headers.items())), *device)
    if (found := _functions.get(key)) is not None:
        return found
    with _lock:
        if (found := _functions.get(key)) is not None:
            return found
        where = backend(device[0])
        assert where is not None, "ops ask for a backend before they ask for a kernel"
        source = expand(kernel, key[2], key[3])
        handle, compiled, milliseconds = build(where, source, function, device[1])
        found = _functions[key] = Function(handle, signature(kernel, function), where, device[1])
        ready = kernel_log.KernelReady(*key[:4], device, compiled, milliseconds, source, options(source))
    kernel_log.announce(ready)  # after the lock is free: a listener may wait for another thread
    return found


def __dir__() -> list[str]:
    return ["CompileError"]
