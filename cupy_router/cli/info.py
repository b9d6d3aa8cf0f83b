# SPDX-License-Identifier: Apache-2.0
"""``cupy-router info``: versions, devices and folders, and where the ops would run, for a look or a bug report."""

from __future__ import annotations

import argparse
import json
import os
import platform
import re
from collections.abc import Callable
from importlib import metadata
from pathlib import Path
from typing import Any

import cupy_router
from cupy_router import compiler, gemm, kernel_cache, tuning

from . import terminal


def add_parser(commands: Any) -> None:
    parser = commands.add_parser("info", help="versions, devices, folders, and where the ops run")
    parser.add_argument("--json", action="store_true", help="print the same as JSON")
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    found = facts()
    if args.json:
        print(json.dumps(found, indent=1))
        return 0
    print(f"cupy-router {found.pop('cupy_router')}")
    found["kernels"] = ", before ".join(found["kernels"])
    for name, value in found.items():
        for text in [value] if isinstance(value, str) else value:
            terminal.field(name, text)
    return 0


def facts() -> dict[str, str | list[str]]:
    """Return what the command prints: a list where there may be several."""
    obstacle = compiler.why_no_cuda()
    chosen = [] if obstacle else ask(tables).splitlines()
    return {
        "cupy_router": cupy_router.__version__,
        "backend": f"NumPy reference: {obstacle}" if obstacle else "CUDA kernels; NumPy reference for CPU arrays",
        "device": ask(device_names).splitlines(),
        "tuning": chosen or [f"no usable GPU; tables for {', '.join(tuning.architectures().values())}"],
        "driver": ask(driver_version),
        "nvrtc": ask(nvrtc_version),
        "cublas": cublas_version(),
        "cupy": cupy_packages(),
        # By metadata: importing PyTorch would take seconds.
        **{name: version_of(name) for name in ("torch", "jax", "numpy", "ml_dtypes")},
        "python": f"{platform.python_version()} on {platform.system()} {platform.machine()}",
        "package": str(Path(__file__).parents[1]),
        "kernels": list(map(str, compiler.kernel_folders())),
        "cache": cache_folder(),
    }


def version_of(package: str) -> str:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return "not installed"


def cupy_names() -> list[str]:
    """Return the installed CuPy packages. Each CUDA version has its own, with the same files: two break each other."""
    names = {str(dist.metadata["Name"]).lower() for dist in metadata.distributions()}
    return sorted(name for name in names if re.fullmatch(r"cupy(-cuda\w+|-rocm[\w-]+)?", name))


def cupy_packages() -> str:
    """Return the versions of the installed CuPy packages, with a warning if there are two."""
    found = cupy_names()
    text = ", ".join(f"{version_of(name)} ({name})" for name in found) or "not installed"
    return text + (": these break each other, uninstall them all and install one" if len(found) > 1 else "")


def ask(question: Callable[[Any], str]) -> str:
    """Return CuPy's answer, or why there is none: the other lines help even where CuPy is broken."""
    try:
        import cupy

        return question(cupy)
    except Exception as error:
        return " ".join(f"not available: {error}".split())


def nvrtc_version(cupy: Any) -> str:
    return "{}.{}".format(*cupy.cuda.nvrtc.getVersion())


def cublas_version() -> str:
    """Return the version of cuBLAS, which multiplies many tokens in dense_router, or why there is none."""
    reason = gemm.why_no_cublas()
    return gemm.cublas_version() if reason is None else f"not available, the decode kernel takes any n: {reason}"


def driver_version(cupy: Any) -> str:
    """Return the driver's version, where Linux gives it, and the newest CUDA that it runs."""
    cuda = cupy.cuda.runtime.driverGetVersion()
    if not cuda:
        return "none"
    try:
        module = re.search(r"\d+\.\d+(\.\d+)?", Path("/proc/driver/nvidia/version").read_text())
    except OSError:
        module = None
    return f"{module.group() if module else 'present'}, up to CUDA {cuda // 1000}.{cuda % 1000 // 10}"


def device_names(cupy: Any) -> str:
    """Return one line for each device."""
    lines = []
    for i in range(cupy.cuda.runtime.getDeviceCount()):
        device = cupy.cuda.runtime.getDeviceProperties(i)
        name, memory = device["name"].decode(), device["totalGlobalMem"] / 2**30
        lines.append(f"{i}: {name}, compute capability {device['major']}.{device['minor']}, {memory:.0f} GiB")
    return "\n".join(lines)


def tables(cupy: Any) -> str:
    """Return one line for each device: the table of thresholds from which launches are chosen."""
    known = tuning.architectures()
    lines = []
    for i in range(cupy.cuda.runtime.getDeviceCount()):
        gpu = tuning.Gpu.from_properties(cupy.cuda.runtime.getDeviceProperties(i))
        reason = "" if gpu.capability in known else ", the nearest to sm_{}{}".format(*gpu.capability)
        counts = f"{gpu.multiprocessors} multiprocessors (measured on {gpu.table.multiprocessors})"
        lines.append(f"{i}: table {gpu.table.architecture}{reason}, {counts}")
    return "\n".join(lines)


def cache_folder() -> str:
    """Return where CuPy keeps compiled kernels."""
    return "in memory" if os.environ.get(kernel_cache.IN_MEMORY) == "1" else kernel_cache.folder()
