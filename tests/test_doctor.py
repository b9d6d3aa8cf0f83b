# SPDX-License-Identifier: Apache-2.0
"""``cupy-router doctor`` on machines and installations that are simulated, one fault each; no GPU."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from cupy_router import cli, compiler, gemm, kernel_log, nvrtc
from cupy_router.cli import checks, doctor, info, kernel_check, versions
from cupy_router.cli.result import Result, attempt
from tests.simulated_machine import H200, P100, V100, Machine, examine, simulated


@pytest.fixture
def machine(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[Machine]:
    with simulated(monkeypatch, tmp_path) as found:
        yield found


def test_all_is_well(machine: Machine, capsys: pytest.CaptureFixture[str]) -> None:
    code, found, results = examine(capsys)
    assert (code, found["faults"], found["summary"]) == (0, 0, "Kernels run.")
    assert results["gpu"].found == "0: NVIDIA H200, compute capability 9.0, 140 GiB"
    assert results["headers"].found == str(machine.headers)
    assert results["kernel"].found == "activation_topk loaded, launched on cuda:0, equal to the reference"


def test_the_printed_form(machine: Machine, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["doctor"]) == 0
    printed = capsys.readouterr().out
    assert "  ok    cublas        12.9.1\n" in printed
    assert printed.endswith("\nKernels run.\n")
    machine.cupy.driver = 11080
    assert cli.main(["doctor"]) == 1
    printed = capsys.readouterr().out
    assert "  FAULT driver        " in printed
    assert "\n                      Install an NVIDIA driver of CUDA 12 or later.\n" in printed
    assert printed.endswith("\nKernels run, but there is something to correct: 1 fault.\n")


def test_no_card_is_no_fault(machine: Machine, capsys: pytest.CaptureFixture[str]) -> None:
    machine.no_card()
    code, found, results = examine(capsys)
    assert (code, found["faults"]) == (1, 0)
    assert found["summary"].startswith("No kernel runs, as there is no GPU. The installation has no fault")
    assert results["gpu"].state == results["driver"].state == results["kernel"].state == "note"
    assert "install" not in json.dumps(found["checks"]).lower()
    assert results["kernel"].found == "activation_topk compiles; not launched, as there is no GPU"


def test_cards_are_those_of_nvidia_that_compute(machine: Machine) -> None:
    machine.no_card()  # which leaves the audio function of one
    assert not checks.has_card()
    machine.card(vendor="0x1002")
    assert not checks.has_card()
    machine.card()
    assert checks.has_card()


def test_neither_card_nor_cupy_is_no_fault(machine: Machine, capsys: pytest.CaptureFixture[str]) -> None:
    machine.no_card()
    machine.no_cupy()
    code, found, results = examine(capsys)
    assert (code, found["faults"]) == (1, 0)
    assert results["cupy"] == Result("cupy", "note", "not installed; only needed with a GPU")
    assert results["nvrtc"].found == results["cublas"].found == "not looked for, as CuPy does not work"
    assert results["kernel"].found.startswith("not compiled, as there is no usable NVRTC")


def hide_devices(machine: Machine) -> None:
    machine.patch.setenv("CUDA_VISIBLE_DEVICES", "-1")
    machine.cupy.devices = []


def old_driver(machine: Machine) -> None:
    machine.cupy.driver = 11080


def newer_cupy(machine: Machine) -> None:
    machine.cupy.toolkit = 13000


def old_gpu(machine: Machine) -> None:
    machine.cupy.devices = [P100]


def gpu_that_nvrtc_left(machine: Machine) -> None:
    machine.cupy.devices, machine.cupy.archs = [V100], [75, 90, 120]


def two_cupys(machine: Machine) -> None:
    machine.patch.setattr(info, "cupy_names", lambda: ["cupy-cuda12x", "cupy-cuda13x"])


def broken_cupy(machine: Machine) -> None:
    def fail() -> Any:
        raise ImportError("libnvrtc.so.12: cannot open\nshared object file")

    machine.patch.setattr(checks, "load_cupy", fail)
    machine.patch.setattr(compiler, "why_no_cuda", lambda: "CuPy is not usable.")


def no_nvrtc(machine: Machine) -> None:
    def fail() -> Any:
        raise RuntimeError("CuPy failed to load libnvrtc.so.12")

    machine.cupy.cuda.nvrtc.getVersion = fail


def no_headers(machine: Machine) -> None:
    machine.patch.setattr(sys.modules["cuda.pathfinder"], "find_nvidia_header_directory", lambda name: None)


def empty_headers(machine: Machine) -> None:
    (machine.headers / "cuda_fp16.h").unlink()


FAULTS: list[tuple[Callable[[Machine], None], str, str, str]] = [
    (hide_devices, "gpu", "CUDA_VISIBLE_DEVICES='-1' hides all GPUs", "Unset CUDA_VISIBLE_DEVICES, "),
    (Machine.no_driver, "driver", "none", "Install an NVIDIA driver of CUDA 12 or later."),
    (Machine.no_libcuda, "driver", "libcuda is not visible", "Start the container with access to the GPU, "),
    (old_driver, "driver", "up to CUDA 11.8", "Install an NVIDIA driver of CUDA 12 or later."),
    (newer_cupy, "driver", "too old for CuPy's CUDA 13", "or install cupy-router[cuda12] in place of"),
    (old_gpu, "gpu", "Tesla P100: the kernels need compute capability 7.0", "use a newer one."),
    (gpu_that_nvrtc_left, "nvrtc", "compiles for sm_75 and later, which leaves out Tesla V100", "cupy-router[cuda12]"),
    (
        two_cupys,
        "cupy",
        "cupy-cuda12x and cupy-cuda13x are installed",
        "Run pip uninstall -y cupy-cuda12x cupy-cuda13x, then install one",
    ),
    (Machine.no_cupy, "cupy", "not installed", "Install cupy-router[cuda12] or cupy-router[cuda13]."),
    (broken_cupy, "cupy", "cannot open shared object file)", "Run pip uninstall -y cupy-cuda12x, then install"),
    (no_nvrtc, "nvrtc", "cannot be used (RuntimeError: CuPy failed to load", "which bring it."),
    (no_headers, "headers", "CuPy finds no CUDA headers", "which bring them."),
    (empty_headers, "headers", "cuda_fp16.h is not in ", "which bring them."),
]


@pytest.mark.parametrize(("fault", "name", "found", "remedy"), FAULTS, ids=[fault[0].__name__ for fault in FAULTS])
def test_each_fault_is_found_and_has_a_remedy(
    fault: Callable[[Machine], None], name: str, found: str, remedy: str, machine: Machine,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    fault(machine)
    code, content, results = examine(capsys)
    assert code == 1
    assert results[name].state == "fault"
    assert found in results[name].found
    assert remedy in results[name].remedy
    # Besides, only what follows from the fault: a GPU that cannot be used, and a kernel that does not run.
    assert {one for one in results if results[one].state == "fault"} <= {name, "gpu", "kernel"}
    if not content["kernels_run"]:
        assert content["summary"].startswith("No kernel runs: ")


# -- The kernel --------------------------------------------------------------------------------------------------------


def swap_experts(array: np.ndarray) -> np.ndarray:
    if array.dtype == np.int32:
        array[7, :2] = array[7, 1::-1].copy()
    return array


def change_a_weight(array: np.ndarray) -> np.ndarray:
    if array.dtype == np.float32:
        array[7, 2] *= 1.001
    return array


def lose_a_weight(array: np.ndarray) -> np.ndarray:
    if array.dtype == np.float32:
        array[7, 2] = np.nan
    return array


@pytest.mark.parametrize(
    ("spoil", "found"),
    [(swap_experts, "2 of 512 experts"), (change_a_weight, "weights"), (lose_a_weight, "weights")],
)
def test_a_kernel_with_wrong_results(
    spoil: Callable[[np.ndarray], np.ndarray], found: str, machine: Machine, capsys: pytest.CaptureFixture[str]
) -> None:
    machine.cupy.spoil = spoil
    code, content, results = examine(capsys)
    assert (code, content["summary"]) == (1, "No kernel runs: 1 fault.")
    assert results["kernel"].found.startswith(f"cuda:0: {found}")
    assert results["kernel"].remedy.startswith(f"Remove {machine.cache}, ")
    machine.patch.setenv("CUPY_ROUTER_KERNELS", str(compiler.kernel_folders()[0]))
    assert kernel_check.kernel().remedy == "Correct the kernel, or unset CUPY_ROUTER_KERNELS."


@pytest.mark.parametrize(
    ("error", "remedy"),
    [
        (compiler.CompileError("kernels/activation_topk.cu(7): error"), "Install cupy-router again; "),
        (RuntimeError("cudaErrorMemoryAllocation: out of memory"), "Free memory on the GPU: "),
    ],
)
def test_a_kernel_that_fails(error: Exception, remedy: str, machine: Machine) -> None:
    def fail(array: np.ndarray) -> np.ndarray:
        raise error

    machine.patch.setattr(machine.cupy, "asarray", fail)
    listeners = list(kernel_log.listeners)
    result = kernel_check.kernel()
    assert (result.state, result.found) == ("fault", f"activation_topk fails: {type(error).__name__}: {error}")
    assert result.remedy.startswith(remedy)
    assert kernel_log.listeners == listeners


def test_the_kernel_runs_on_every_gpu_and_tells_how_long_it_was_compiled(machine: Machine) -> None:
    machine.cupy.devices = [H200, H200]
    seen: list[int] = []

    def device(i: int) -> nullcontext[None]:
        seen.append(i)
        one = kernel_log.KernelReady("k", "k", (), (), ("cuda", i), i == 0, 20.0, "")
        [listener(one) for listener in kernel_log.listeners[2:]]
        return nullcontext()

    machine.cupy.cuda.Device = device
    found = "activation_topk compiled in 40 ms, launched on cuda:0 to cuda:1, equal to the reference"
    assert kernel_check.kernel() == Result("kernel", "ok", found)
    assert seen == [0, 1]


def test_a_kernel_that_does_not_compile_without_a_gpu(machine: Machine) -> None:
    machine.no_card()
    machine.patch.setattr(nvrtc, "errors", lambda text, name: f"{name}(7): error: no semicolon\n1 error")
    result = kernel_check.kernel()
    assert result.found == "activation_topk does not compile: activation_topk.cu(7): error: no semicolon"
    assert result.state == "fault"


def test_scores_of_the_problem_differ_by_more_than_rounding() -> None:
    logits, method = kernel_check.problem()
    scores = np.sort(1 / (1 + np.exp(-logits.astype(np.float64))), axis=1)[:, -method.top_k - 1 :]
    assert np.diff(scores, axis=1).min() > 100 * kernel_check.TOLERANCE
    assert len({row.tobytes() for row in logits}) == len(logits)


# -- Versions, and checks that raise -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("version", "state", "found"),
    [
        ("2.15.0", "ok", "2.15.0, which was tried"),
        ("2.15.0+cu130", "ok", "2.15.0+cu130, which was tried"),
        ("2.15.3", "ok", "2.15.3, within what was tried: 2.4.0, 2.15.0"),
        ("2.9.1", "ok", "2.9.1, within what was tried: 2.4.0, 2.15.0"),
        ("2.16.0rc1", "note", "2.16.0rc1, newer than the newest that was tried, 2.15.0"),
        ("2.3.1", "note", "2.3.1, older than the lowest that was tried, 2.4.0"),
    ],
)
def test_versions_are_compared_with_those_tried(
    version: str, state: str, found: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(versions, "tried", lambda: {"torch": ["2.4.0", "2.15.0"]})
    monkeypatch.setattr(versions.metadata, "version", lambda name: version)
    result = versions.package("torch")
    assert (result.state, result.found) == (state, found)
    assert bool(result.remedy) == (state == "note")


def test_a_framework_that_is_not_installed_is_no_fault(monkeypatch: pytest.MonkeyPatch) -> None:
    def missing(name: str) -> str:
        raise versions.metadata.PackageNotFoundError(name)

    monkeypatch.setattr(versions.metadata, "version", missing)
    assert versions.package("jax") == Result("jax", "ok", "not installed")


def test_without_cublas_the_kernels_still_run(machine: Machine, capsys: pytest.CaptureFixture[str]) -> None:
    machine.patch.setattr(gemm, "why_no_cublas", lambda: "cuBLAS is not usable (no: file): install it.")
    code, _, results = examine(capsys)
    assert code == 0
    assert results["cublas"].found.startswith("cuBLAS is not usable (no: file); dense_router takes its decode kernel")


@pytest.mark.parametrize("name", list(doctor.CHECKS))
def test_a_check_that_raises_is_a_fault(name: str, machine: Machine, capsys: pytest.CaptureFixture[str]) -> None:
    def fail() -> Result:
        raise OSError("line one\nline two.")

    machine.patch.setitem(doctor.CHECKS, name, fail)
    code, _, results = examine(capsys)
    assert code == 1
    assert results[name].state == "fault"
    assert results[name].found == "this check failed: OSError: line one line two"
    assert attempt(name, fail) == results[name]


def test_info_as_json(machine: Machine, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["info", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert {name for name, value in found.items() if isinstance(value, list)} == {"device", "tuning", "kernels"}
    assert found["device"] == ["0: NVIDIA H200, compute capability 9.0, 140 GiB"]
    assert cli.main(["info"]) == 0
    printed = capsys.readouterr().out
    for name in found.keys() - {"cupy_router"}:
        assert f"\n  {name:<10}" in printed


# -- This machine ------------------------------------------------------------------------------------------------------


@pytest.mark.slow("process")
def test_doctor_of_this_machine(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    environment = os.environ | {"CUPY_CACHE_DIR": str(tmp_path / "file")}
    command = [sys.executable, "-m", "cupy_router", "doctor"]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=120)
    assert done.stderr == ""
    assert "this check failed" not in done.stdout
    assert "  note  cache " in done.stdout
    assert done.returncode == (1 if compiler.why_no_cuda() else 0)


@pytest.mark.backends("gpu")
def test_doctor_of_this_machines_gpu() -> None:
    assert kernel_check.kernel().state == "ok"
    assert checks.gpu().state == checks.driver().state == checks.nvrtc().state == "ok"
