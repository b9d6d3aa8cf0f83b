# SPDX-License-Identifier: Apache-2.0
"""Kernels compile in several processes, into CuPy's cache folder; what those do not manage, this process does."""

from __future__ import annotations

import stat
import subprocess
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest

from cupy_router import compiler, kernel_log, make_ready
from cupy_router.kernel_plan import Wanted

WANTED = [Wanted("topk_select", "topk_select", (("TOP_K", k),), ()) for k in range(1, 7)]
TARGET = ("90", ("-arch=sm_90", "cubin"))


class Machine:
    """What this process compiles and loads, with other processes that compile for an H100."""

    def __init__(self, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        self.folder = folder
        self.loaded: list[Wanted] = []
        self.seconds = 0.0  # that a kernel takes here
        monkeypatch.setattr(compiler, "compile", self.compile)
        monkeypatch.setattr(make_ready, "_target", lambda device: TARGET)
        monkeypatch.setenv("CUPY_CACHE_DIR", str(folder))

    def compile(
        self, kernel: str, function: str, macros: Mapping[str, int], device: tuple[str, int], headers: Mapping[str, str]
    ) -> None:
        time.sleep(self.seconds)
        one = Wanted(kernel, function, tuple(macros.items()), tuple(headers.items()))
        self.loaded.append(one)
        kernel_log.announce(kernel_log.KernelReady(*one, device, len(self.loaded) == 1, 1.0, ""))

    def kept(self) -> int:
        return len(list(self.folder.glob("*.cubin")))


@pytest.fixture
def machine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Machine:
    pytest.importorskip("cupy", reason="CuPy is not installed")
    return Machine(tmp_path, monkeypatch)


def ready(workers: int | None) -> tuple[list[Wanted], list[bool], list[tuple[int, int]]]:
    seen: list[tuple[int, int]] = []
    found = make_ready.make_ready(WANTED, ("cuda", 0), lambda *at: seen.append(at), workers)
    return [make_ready._key(one) for one in found], [one.compiled for one in found], seen


ALL = [(done, len(WANTED)) for done in range(len(WANTED) + 1)]


@pytest.mark.slow("process")
def test_other_processes_fill_the_cache_folder(machine: Machine, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(make_ready, "_cpus", lambda: 3)
    machine.seconds = 1.0
    found, compiled, progress = ready(None)
    assert found == WANTED
    assert sorted(machine.loaded) == WANTED
    assert progress == ALL
    assert machine.kept() == sum(compiled) - 1 > 0  # this process compiled the first and keeps none here
    assert compiled[-1]
    taken = machine.loaded[machine.loaded.index(WANTED[-1]) :]
    assert taken == sorted(taken, reverse=True), "they took from the end, and this process loads in their order"


def test_without_other_processes(machine: Machine) -> None:
    assert ready(1) == (WANTED, [True] + [False] * 5, ALL)
    assert machine.loaded == WANTED


def test_none_start_if_all_kernels_are_in_the_folder(machine: Machine, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(make_ready, "_start", lambda: pytest.fail("a process starts"))
    machine.loaded.append(WANTED[0])
    assert ready(4)[1] == [False] * 6


@pytest.mark.parametrize(
    "script",
    [
        "exit 3",
        "echo hello; exit 0",
        "echo 'cupy_router: {}'; exit 1",
        "echo 'cupy_router: {}'; read x; echo 'cupy_router: {'",
    ],
    ids=["no start", "another program", "no reply", "a broken reply"],
)
def test_what_other_processes_do_not_manage_is_compiled_here(
    machine: Machine, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, script: str
) -> None:
    broken = tmp_path / "python"
    broken.write_text(f"#!/bin/sh\n{script}\n")
    broken.chmod(broken.stat().st_mode | stat.S_IXUSR)
    monkeypatch.setattr(sys, "executable", str(broken))
    machine.seconds = 0.05
    found, compiled, progress = ready(3)
    assert (found, compiled, progress) == (WANTED, [True] + [False] * 5, ALL)
    assert sorted(machine.loaded) == WANTED


@pytest.mark.parametrize("error", [OSError("no more processes"), FileNotFoundError("no Python")])
def test_no_process_can_start(machine: Machine, monkeypatch: pytest.MonkeyPatch, error: OSError) -> None:
    def refuse(*_: Any, **__: Any) -> None:
        raise error

    monkeypatch.setattr(subprocess, "Popen", refuse)
    assert ready(3)[0] == machine.loaded == WANTED


def test_a_process_that_hangs_is_ended(machine: Machine, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    started: list[subprocess.Popen[str]] = []

    def start() -> subprocess.Popen[str]:
        script = ["/bin/sh", "-c", "echo 'cupy_router: {}'; exec sleep 600"]
        started.append(subprocess.Popen(script, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True))
        return started[-1]

    monkeypatch.setattr(make_ready, "_start", start)
    monkeypatch.setattr(make_ready, "PATIENCE", 0.2)
    machine.seconds = 0.1
    assert ready(3)[0] == WANTED
    assert sorted(machine.loaded) == WANTED
    assert len(started) == 2
    assert [process.wait(10) for process in started] == [-9, -9]


def test_an_error_here_ends_the_others(machine: Machine, monkeypatch: pytest.MonkeyPatch) -> None:
    started: list[subprocess.Popen[str]] = []

    def start() -> subprocess.Popen[str]:
        started.append(subprocess.Popen(["sleep", "600"], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True))
        return started[-1]

    monkeypatch.setattr(make_ready, "_start", start)

    def stop(done: int, total: int) -> None:
        if done == 2:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        make_ready.make_ready(WANTED, ("cuda", 0), stop, 3)
    assert [process.wait(10) for process in started] == [-9, -9]


def test_without_a_cache_folder_none_start(monkeypatch: pytest.MonkeyPatch) -> None:
    class Kept(compiler.CudaBackend):
        def __init__(self) -> None:
            pass

    monkeypatch.setitem(compiler.BACKENDS, "cuda", Kept())
    monkeypatch.setattr(compiler, "require_cuda", lambda: pytest.fail("it asks CuPy"))
    monkeypatch.setenv("CUPY_CACHE_IN_MEMORY", "1")
    assert make_ready._target(("cuda", 0)) is None
    monkeypatch.delenv("CUPY_CACHE_IN_MEMORY")
    monkeypatch.setattr(sys, "executable", "")
    assert make_ready._target(("cuda", 0)) is None
    assert make_ready._target(("cpu", 0)) is None
