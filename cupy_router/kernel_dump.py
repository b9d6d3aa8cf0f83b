# SPDX-License-Identifier: Apache-2.0
"""Write what became of a kernel into a folder, for CUPY_ROUTER_DUMP=folder: source, PTX, cubin, resources.

The kernel is compiled once more for that, with the same options: what is launched stays as it is. Needs NVRTC by way of
CuPy, but no GPU if an architecture is given.
"""

from __future__ import annotations

import os
import threading
import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from cupy_router import thread_locale
from cupy_router.kernel_log import KernelReady
from cupy_router.nvrtc import Resources, resources

DUMP = "CUPY_ROUTER_DUMP"  # environment

# The options that CuPy adds besides the architecture; then those that make ptxas report registers and memory.
_CUPY_OPTIONS = ("-ftz=true", "--device-as-default-execution-space")
_LOG_OPTION, _NO_CACHE = "--ptxas-options=-v", "--no-cache"

_unusable: set[Path] = set()  # folders that a warning has named


@dataclass(frozen=True)
class MachineCode:
    """A kernel compiled for one architecture."""

    architecture: str
    nvrtc: str
    ptx: bytes
    cubin: bytes
    resources: Resources


def dump_if_asked(ready: KernelReady) -> None:
    """Listen to kernels: dump each into the folder that CUPY_ROUTER_DUMP names, if it is set."""
    folder = os.environ.get(DUMP)
    if folder:
        dump(ready, Path(folder))


def dump(ready: KernelReady, folder: Path, architecture: str | None = None) -> None:
    """Write <function>-<hash>-<architecture>.cu, .ptx, .cubin and .txt; the hash is that of the log line.

    `architecture` is such as "sm_90"; None means that of the device. If the device is no GPU, only .cu and .txt are
    written. A folder that cannot be used is named by one warning; nothing is raised.
    """
    folder = folder.absolute()
    if folder in _unusable:
        return
    files: dict[str, bytes] = {"cu": ready.source.encode()}
    why = "the device is no GPU"
    code = None
    try:
        architecture = architecture or _architecture(ready.device)
        if architecture is not None:
            code = compile_for(ready.source, ready.function, ready.options, architecture)
            files |= {"ptx": code.ptx, "cubin": code.cubin}
    except Exception as error:  # NVRTC raises many kinds; a look at a kernel must not fail the call
        why = " ".join(str(error).split())
    files["txt"] = _summary(ready, code, why).encode()
    stem = "-".join(filter(None, (ready.function, ready.key, architecture)))
    try:
        folder.mkdir(parents=True, exist_ok=True)
        for suffix, content in files.items():
            _write(folder / f"{stem}.{suffix}", content)
    except OSError as error:
        _unusable.add(folder)
        warnings.warn(f"{DUMP}: kernels are not dumped, {folder} is not usable: {error}", RuntimeWarning, stacklevel=2)


def compile_for(source: str, function: str, options: tuple[str, ...], architecture: str) -> MachineCode:
    """Compile by NVRTC for an architecture such as "sm_90"; RuntimeError with the compiler's log if that fails."""
    nvrtc = _nvrtc()
    given = (*options, *_CUPY_OPTIONS, f"-arch={architecture}")
    _, ptx, cubin = _compile(nvrtc, source, given)
    # Compiled apart, since cubins of CUDA 13 hold the options; and again, since code from NVRTC's cache has no log.
    try:
        log, _, _ = _compile(nvrtc, source, (*given, _LOG_OPTION, _NO_CACHE))
    except RuntimeError:  # an NVRTC without this option has no cache
        log, _, _ = _compile(nvrtc, source, (*given, _LOG_OPTION))
    version = ".".join(map(str, nvrtc.getVersion()))
    return MachineCode(architecture, version, ptx, cubin, resources(log, function))


@thread_locale.kept()
def _compile(nvrtc: Any, source: str, options: tuple[str, ...]) -> tuple[str, bytes, bytes]:
    """Log, PTX and cubin."""
    program = nvrtc.createProgram(source, "kernel.cu", (), ())
    try:
        nvrtc.compileProgram(program, options)
        return nvrtc.getProgramLog(program), bytes(nvrtc.getPTX(program)).rstrip(b"\0"), bytes(nvrtc.getCUBIN(program))
    except nvrtc.NVRTCError:
        raise RuntimeError(nvrtc.getProgramLog(program)) from None
    finally:
        nvrtc.destroyProgram(program)


def _nvrtc() -> Any:
    import cupy

    return cupy.cuda.nvrtc


def _architecture(device: tuple[str, int]) -> str | None:
    """That for which CuPy compiles: of the GPU, or the newest that NVRTC knows."""
    kind, number = device
    if kind != "cuda":
        return None
    import cupy

    capability = int(cupy.cuda.Device(number).compute_capability)
    return f"sm_{min(capability, max(_nvrtc().getSupportedArchs()))}"


def _summary(ready: KernelReady, code: MachineCode | None, why: str) -> str:
    how = "compiled" if ready.compiled else "from cache"
    fields: list[tuple[str, object]] = [
        ("kernel", f"kernels/{ready.kernel}.cu"),
        ("function", ready.function),
        ("device", "{}:{}".format(*ready.device)),
        ("ready", f"{how} in {ready.milliseconds:.1f} ms"),
    ]
    if code is None:
        fields.append(("code", f"none: {why}"))
    else:
        needs = code.resources
        fields += [
            ("code", f"{code.architecture}, NVRTC {code.nvrtc}, {' '.join((*ready.options, *_CUPY_OPTIONS))}"),
            ("registers", f"{needs.registers} per thread"),
            ("spills", f"{needs.spills} bytes per thread, stores and loads"),
            ("stack", f"{needs.stack} bytes per thread"),
            ("shared", f"{needs.shared} bytes per block, without what a launch adds"),
        ]
    fields += [("switch", f"{name} = {value}") for name, value in ready.switches]
    return "".join(f"{name:<10}{value}\n" for name, value in fields)


def _write(path: Path, content: bytes) -> None:
    """Replace a file as a whole, so that nobody reads a part of it."""
    partial = path.with_name(f".{path.name}.{os.getpid()}.{threading.get_ident()}")
    try:
        partial.write_bytes(content)
        partial.replace(path)
    finally:
        partial.unlink(missing_ok=True)
