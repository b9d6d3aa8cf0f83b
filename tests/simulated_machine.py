# SPDX-License-Identifier: Apache-2.0
"""A machine and an installation of CUDA that are simulated, for the tests of ``cupy-router doctor``."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import numpy as np
import pytest

from cupy_router import cli, compiler, gemm, kernel_cache, nvrtc
from cupy_router.cli import cache_check, checks, doctor, info
from cupy_router.cli.result import Result

H200 = {
    "name": b"NVIDIA H200", "major": 9, "minor": 0, "totalGlobalMem": 150 * 10**9, "multiProcessorCount": 132,
    "sharedMemPerBlockOptin": 232448, "l2CacheSize": 52428800,
}  # fmt: skip
V100, P100 = H200 | {"name": b"Tesla V100", "major": 7}, H200 | {"name": b"Tesla P100", "major": 6}


class FakeCupy(ModuleType):
    """CuPy with some devices, or with none; arrays are NumPy's, so the ops run the reference."""

    class CUDARuntimeError(RuntimeError):
        pass

    def __init__(self) -> None:
        super().__init__("cupy")
        self.__version__ = "14.2.0"
        self.devices: list[dict[str, Any]] = [H200]
        self.driver, self.toolkit, self.archs = 12090, 12090, [50, 75, 90, 120]
        self.spoil: Callable[[np.ndarray], np.ndarray] = lambda array: array
        runtime = SimpleNamespace(
            CUDARuntimeError=self.CUDARuntimeError,
            driverGetVersion=lambda: self.driver,
            runtimeGetVersion=lambda: self.toolkit,
            getDeviceCount=self.count,
            getDeviceProperties=lambda i: self.devices[i],
        )
        compiler = SimpleNamespace(getVersion=lambda: (12, 9), getSupportedArchs=lambda: self.archs)
        self.cuda = SimpleNamespace(runtime=runtime, nvrtc=compiler, Device=nullcontext)

    def count(self) -> int:
        if not self.devices:
            raise self.CUDARuntimeError("cudaErrorNoDevice: no CUDA-capable device is detected")
        return len(self.devices)

    def asarray(self, array: np.ndarray) -> np.ndarray:
        return array

    def asnumpy(self, array: np.ndarray) -> np.ndarray:
        return self.spoil(array.copy())


class Machine:
    """A machine with one GPU and a complete installation, which each test breaks in one way."""

    def __init__(self, patch: pytest.MonkeyPatch, folder: Path) -> None:
        self.patch, self.pci, self.proc = patch, folder / "pci", folder / "nvidia"
        self.cupy, self.cache, self.headers = FakeCupy(), folder / "cache", folder / "include"
        self.headers.mkdir()
        (self.headers / "cuda_fp16.h").touch()
        self.card()
        self.proc.mkdir()
        (self.proc / "version").write_text("NVRM version: NVIDIA UNIX Open Kernel Module  575.51.03\n")
        patch.setattr(checks, "PCI", self.pci)
        patch.setattr(checks, "DRIVER", self.proc)
        patch.setitem(sys.modules, "cupy", self.cupy)
        finder = SimpleNamespace(find_nvidia_header_directory=lambda name: self.headers)
        patch.setitem(sys.modules, "cuda.pathfinder", finder)
        patch.setattr(gemm, "why_no_cublas", lambda: None)
        patch.setattr(gemm, "cublas_version", lambda: "12.9.1")
        patch.setattr(nvrtc, "errors", lambda text, name: None)
        patch.setattr(info, "cupy_names", lambda: ["cupy-cuda12x"])
        patch.setattr(info, "version_of", lambda name: "14.2.0")
        for name in (kernel_cache.IN_MEMORY, "CUDA_VISIBLE_DEVICES", "CUPY_ROUTER_KERNELS"):
            patch.delenv(name, raising=False)
        patch.setenv(kernel_cache.FOLDER, str(self.cache))
        self.cache.mkdir(mode=0o700)
        patch.setattr(cache_check, "open_to_others", lambda folder: iter(()))  # of all parents; tested below

    def card(self, vendor: str = "0x10de", kind: str = "0x030200") -> None:
        device = self.pci / "0000:01:00.0"
        device.mkdir(parents=True, exist_ok=True)
        (device / "vendor").write_text(f"{vendor}\n")
        (device / "class").write_text(f"{kind}\n")

    def no_card(self) -> None:
        self.card(kind="0x040300")  # the audio function of a card is no GPU
        self.no_driver()
        self.cupy.devices = []

    def no_driver(self) -> None:
        (self.proc / "version").unlink()
        self.no_libcuda()

    def no_libcuda(self) -> None:
        self.cupy.driver, self.cupy.devices = 0, []

    def no_cupy(self) -> None:
        self.patch.setitem(sys.modules, "cupy", None)
        self.patch.setattr(info, "cupy_names", list)


@contextmanager
def simulated(monkeypatch: pytest.MonkeyPatch, folder: Path) -> Iterator[Machine]:
    asked = compiler.why_no_cuda  # which a test may replace
    asked.cache_clear()
    yield Machine(monkeypatch, folder)
    asked.cache_clear()


def examine(capsys: pytest.CaptureFixture[str]) -> tuple[int, dict[str, Any], dict[str, Result]]:
    """Return exit code, JSON and results by name, after a look at the form of all of them."""
    code = cli.main(["doctor", "--json"])
    printed = capsys.readouterr()
    found = json.loads(printed.out)
    assert printed.err == ""
    assert found.keys() == {"cupy_router", "kernels_run", "faults", "summary", "checks"}
    results = {check["name"]: Result(**check) for check in found["checks"]}
    assert list(results) == list(doctor.CHECKS)
    for one in results.values():
        assert one.state in ("ok", "note", "fault")
        assert one.found
        assert "\n" not in one.found + one.remedy
        assert one.remedy.endswith(".") if one.state == "fault" else one.state == "note" or not one.remedy
    assert found["faults"] == sum(one.state == "fault" for one in results.values())
    assert found["kernels_run"] == (results["kernel"].state == "ok")
    assert code == (0 if found["kernels_run"] and not found["faults"] else 1)
    return code, found, results
