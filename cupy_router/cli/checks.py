# SPDX-License-Identifier: Apache-2.0
"""Checks of GPU, driver and CUDA libraries for ``cupy-router doctor``."""

from __future__ import annotations

import os
from importlib import import_module
from pathlib import Path
from typing import Any

from cupy_router import gemm, kernel_cache

from . import info, versions
from .result import Result, sentence

INSTALL = "cupy-router[cuda12] or cupy-router[cuda13]"
LOWEST_CAPABILITY = (7, 0)  # the kernels need the independent threads of Volta
LOWEST_CUDA = 12

# Linux lists cards on the PCI bus even without a driver, and the driver in containers that may not use it.
PCI = Path("/sys/bus/pci/devices")
DRIVER = Path("/proc/driver/nvidia")


def load_cupy() -> Any:
    kernel_cache.prepare()
    import cupy

    return cupy


def has_cupy() -> bool:
    try:
        load_cupy()
    except Exception:
        return False
    return True


def driver_and_runtime() -> tuple[int, int]:
    """Return the newest CUDA that the driver runs and the CUDA of CuPy, such as 12040; 0 for none."""
    try:
        runtime = load_cupy().cuda.runtime
        return int(runtime.driverGetVersion()), int(runtime.runtimeGetVersion())
    except Exception:
        return 0, 0


def has_card() -> bool:
    """Return whether there is an NVIDIA GPU, usable or not; False where the system does not list cards."""
    return any(map(is_nvidia_gpu, PCI.glob("*"))) or any(DRIVER.glob("gpus/*")) or num_devices() > 0


def num_devices() -> int:
    try:
        return int(load_cupy().cuda.runtime.getDeviceCount())
    except Exception:
        return 0


def is_nvidia_gpu(device: Path) -> bool:
    try:
        vendor, kind = ((device / name).read_text().strip() for name in ("vendor", "class"))
    except OSError:
        return False
    return vendor == "0x10de" and kind.startswith("0x03")  # display controllers; the card's audio is 0x04


# -- Checks ------------------------------------------------------------------------------------------------------------


def gpu() -> Result:
    try:
        cupy, obstacle = load_cupy(), "CUDA counts no device"
        lines = info.device_names(cupy).splitlines()
    except Exception as error:
        lines, obstacle = [], sentence(error)
    if lines:
        old = [name for name, capability in capabilities(cupy) if capability < LOWEST_CAPABILITY]
        if old:
            found = f"{', '.join(old)}: the kernels need compute capability {'{}.{}'.format(*LOWEST_CAPABILITY)}"
            return Result("gpu", "fault", found, "Leave this GPU out of CUDA_VISIBLE_DEVICES, or use a newer one.")
        return Result("gpu", "ok", "; ".join(lines))
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    if visible is not None and driver_and_runtime()[0]:
        found = f"CUDA_VISIBLE_DEVICES={visible!r} hides all GPUs"
        return Result("gpu", "fault", found, "Unset CUDA_VISIBLE_DEVICES, or set it to the number of a GPU.")
    if not has_card():
        return Result("gpu", "note", "none found in this machine: arrays on the CPU run the NumPy reference")
    found = f"there is an NVIDIA card, but CUDA cannot use it ({obstacle})"
    return Result("gpu", "fault", found, "Correct the driver and CuPy first, until nvidia-smi lists the card.")


def capabilities(cupy: Any) -> list[tuple[str, tuple[int, int]]]:
    """Return name and compute capability of each device."""
    runtime = cupy.cuda.runtime
    devices = [runtime.getDeviceProperties(i) for i in range(runtime.getDeviceCount())]
    return [(device["name"].decode(), (device["major"], device["minor"])) for device in devices]


def driver() -> Result:
    cuda, runtime = driver_and_runtime()
    newer = f"Install an NVIDIA driver of CUDA {max(runtime // 1000, LOWEST_CUDA)} or later"
    if cuda:
        found = info.driver_version(load_cupy())
        if cuda // 1000 < LOWEST_CUDA:
            return Result("driver", "fault", found, f"{newer}.")
        if cuda // 1000 < runtime // 1000:
            other = f"install cupy-router[cuda{cuda // 1000}] in place of the present CuPy"
            return Result(
                "driver", "fault", f"{found}, too old for CuPy's CUDA {runtime // 1000}", f"{newer}, or {other}."
            )
        return Result("driver", "ok", found)
    if not has_card():
        return Result("driver", "note", "none, and none is needed without a GPU")
    if not (DRIVER / "version").is_file():
        return Result("driver", "fault", "none", f"{newer}.")
    if not has_cupy():
        return Result("driver", "note", "loaded; its CUDA version is known when CuPy works")
    found = "loaded by the system, but its library libcuda is not visible here"
    return Result("driver", "fault", found, "Start the container with access to the GPU, as by docker run --gpus all.")


def cupy() -> Result:
    names, text = info.cupy_names(), info.cupy_packages()
    if len(names) > 1:
        remedy = f"Run pip uninstall -y {' '.join(names)}, then install one of {INSTALL}."
        return Result("cupy", "fault", f"{' and '.join(names)} are installed, and break each other", remedy)
    try:
        version = str(load_cupy().__version__)
    except Exception as error:
        if isinstance(error, ModuleNotFoundError) and error.name == "cupy" and not names:
            if has_card():
                return Result("cupy", "fault", "not installed", f"Install {INSTALL}.")
            return Result("cupy", "note", "not installed; only needed with a GPU")
        remedy = f"Run pip uninstall -y {' '.join(names)}, then install {INSTALL}." if names else f"Install {INSTALL}."
        return Result("cupy", "fault", f"{text} cannot be imported ({sentence(error)})", remedy)
    return versions.compare("cupy", version, text if names else version)


def nvrtc() -> Result:
    if not has_cupy():
        return without_cupy("nvrtc")
    cupy = load_cupy()
    try:
        version, lowest = info.nvrtc_version(cupy), min(cupy.cuda.nvrtc.getSupportedArchs())
    except Exception as error:  # what is raised depends on how the library is missing
        return Result("nvrtc", "fault", f"cannot be used ({sentence(error)})", f"Install {INSTALL}, which bring it.")
    try:
        too_old = [name for name, (major, minor) in capabilities(cupy) if 10 * major + minor < lowest]
    except Exception:  # without a device there is nothing to compare
        too_old = []
    if too_old:
        found = f"{version} compiles for sm_{lowest} and later, which leaves out {', '.join(too_old)}"
        return Result("nvrtc", "fault", found, "Install cupy-router[cuda12] in place of cupy-router[cuda13].")
    return Result("nvrtc", "ok", version)


def headers() -> Result:
    if not has_cupy():
        return without_cupy("headers")
    folder = import_module("cuda.pathfinder").find_nvidia_header_directory("cudart")
    if folder is None or not (Path(folder) / "cuda_fp16.h").is_file():
        found = "CuPy finds no CUDA headers" if folder is None else f"cuda_fp16.h is not in {folder}"
        return Result("headers", "fault", found, f"Install {INSTALL}, which bring them.")
    return Result("headers", "ok", str(folder))


def cublas() -> Result:
    if not has_cupy():
        return without_cupy("cublas")
    if (reason := gemm.why_no_cublas()) is None:
        return Result("cublas", "ok", gemm.cublas_version())
    found = (
        f"{reason.rpartition(': ')[0]}; dense_router takes its decode kernel for any number of tokens, which is slower"
    )
    return Result("cublas", "note", found, f"Install {INSTALL}, which bring it.")


def without_cupy(name: str) -> Result:
    return Result(name, "note", "not looked for, as CuPy does not work")
