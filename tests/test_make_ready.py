# SPDX-License-Identifier: Apache-2.0
"""Kernels built in several threads at once: as if by one, and sooner."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator

import pytest

import cupy_router
from cupy_router import compiler, kernel_build
from cupy_router.check.architectures import OPTIONS
from cupy_router.compiler_options import OPTIONS as COMPILER_OPTIONS
from cupy_router.kernel_plan import Wanted
from cupy_router.make_ready import make_ready
from tests import nvrtc
from tests.recorder import Recorder
from tests.test_launches import fake, recorder

__all__ = ["fake", "recorder"]  # fixtures

TOP_KS = range(1, 9)
WANTED = [Wanted("topk_select", "topk_select", (("TOP_K", k),), ()) for k in TOP_KS]
DEVICE = ("cuda", 0)


@pytest.fixture(autouse=True)
def new_functions(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setattr(kernel_build, "num_threads", lambda: 2)
    compiler.forget()
    yield
    compiler.forget()


def top_k(source: str) -> int:
    return next(k for k in TOP_KS if f"SPECIALISED int TOP_K = {k};" in source)


def test_two_threads_build_at_once(recorder: Recorder, monkeypatch: pytest.MonkeyPatch) -> None:
    both = threading.Barrier(2, timeout=30)
    build = recorder.build
    monkeypatch.setattr(recorder, "build", lambda *text: both.wait() * 0 + build(*text))
    assert len(make_ready(WANTED, DEVICE, lambda *at: None)) == len(WANTED)
    assert make_ready(WANTED, DEVICE, lambda *at: None) == ()


def test_listeners_hear_in_order_in_the_thread_of_the_call(recorder: Recorder, monkeypatch: pytest.MonkeyPatch) -> None:
    build, heard, threads = recorder.build, [], set()

    def slow(source: str, function: str, device: int) -> int:
        time.sleep(0.02 if top_k(source) % 2 else 0)
        return build(source, function, device)

    monkeypatch.setattr(recorder, "build", slow)
    stop = cupy_router.on_compile(lambda one: (heard.append(one), threads.add(threading.get_ident())))
    progress: list[tuple[int, int]] = []
    ready = make_ready(WANTED, DEVICE, lambda *at: progress.append(at))
    stop()
    assert [one.macros for one in heard] == [one.macros for one in WANTED]
    assert list(ready) == heard
    assert threads == {threading.get_ident()}
    assert progress == [(done, len(WANTED)) for done in range(len(WANTED) + 1)]
    assert all(one.milliseconds >= 20 for one in ready[::2])
    for one in WANTED:  # each has its own handle
        function = compiler.compile(one.kernel, one.function, dict(one.macros), DEVICE)
        assert recorder.sources[function.handle - 1] == compiler.expand(one.kernel, one.macros)


def test_an_error_is_that_of_the_first_kernel_that_fails(recorder: Recorder, monkeypatch: pytest.MonkeyPatch) -> None:
    build, tried = recorder.build, []

    def refuse(source: str, function: str, device: int) -> int:
        tried.append(top_k(source))
        if top_k(source) in (3, 5):
            raise compiler.CompileError(f"wrong {top_k(source)}")
        return build(source, function, device)

    monkeypatch.setattr(recorder, "build", refuse)
    heard: list[int] = []
    stop = cupy_router.on_compile(lambda one: heard.append(dict(one.macros)["TOP_K"]))
    with pytest.raises(compiler.CompileError, match="wrong 3"):
        make_ready(WANTED, DEVICE, lambda *at: None)
    stop()
    assert heard == [1, 2]
    assert tried.count(3) == 2, "once more in the thread of the call"
    assert not any(compiler.is_ready(one, DEVICE) for one in WANTED[2:])


def test_a_kernel_that_fails_beside_others_alone_is_built_by_itself(
    recorder: Recorder, monkeypatch: pytest.MonkeyPatch
) -> None:
    build, caller = recorder.build, threading.get_ident()

    def refuse(source: str, function: str, device: int) -> int:
        if threading.get_ident() != caller and top_k(source) == 4:
            raise MemoryError
        return build(source, function, device)

    monkeypatch.setattr(recorder, "build", refuse)
    assert [dict(one.macros)["TOP_K"] for one in make_ready(WANTED, DEVICE, lambda *at: None)] == list(TOP_KS)


def test_a_listener_that_fails_ends_the_warm_up(recorder: Recorder) -> None:
    def listener(_: object) -> None:
        raise LookupError

    stop = cupy_router.on_compile(listener)
    with pytest.raises(LookupError):
        make_ready(WANTED, DEVICE, lambda *at: None)
    stop()
    assert compiler.is_ready(WANTED[0], DEVICE)
    assert not any(compiler.is_ready(one, DEVICE) for one in WANTED[1:])


def test_a_file_that_is_missing(recorder: Recorder) -> None:
    with pytest.raises(compiler.CompileError, match=r"kernel file no_such\.cu is not in"):
        make_ready([*WANTED, Wanted("no_such", "no_such", (), ())], DEVICE, lambda *at: None)


@pytest.mark.slow("compiler")
def test_nvrtc_makes_the_same_machine_code_in_threads() -> None:
    found = list(nvrtc.libraries().values())
    if not found:
        pytest.skip("NVRTC is not here")
    options = (*COMPILER_OPTIONS, *OPTIONS, "-arch=sm_80")
    texts = [(compiler.expand(one.kernel, one.macros), one.function) for one in WANTED]
    for library in found:

        class Compiler(Recorder):
            def __init__(self) -> None:
                super().__init__()
                self.made: dict[str, bytes] = {}

            def build(self, source: str, function: str, device: int) -> int:
                (self.made[source],) = library.compile(source, "kernel.cu", options, "CUBIN")  # noqa: B023  # built within this turn of the loop
                return 1

        alone, together = Compiler(), Compiler()
        for source, function in texts:
            kernel_build.build(alone, source, function, 0)
        with kernel_build.in_threads(together, texts, 0) as build:
            for source, function in texts:
                build(together, source, function, 0)
        assert together.made == alone.made
        assert len(set(alone.made.values())) == len(TOP_KS)


def test_threads_are_as_many_as_the_cpus_of_this_process(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.undo()
    monkeypatch.setattr(kernel_build.os, "sched_getaffinity", lambda process: set(range(3)), raising=False)
    assert kernel_build.num_threads() == 3
    monkeypatch.setattr(kernel_build.os, "sched_getaffinity", lambda process: set(range(64)), raising=False)
    assert kernel_build.num_threads() == kernel_build.MOST_THREADS
    monkeypatch.delattr(kernel_build.os, "sched_getaffinity")
    monkeypatch.setattr(kernel_build.os, "cpu_count", lambda: None)
    assert kernel_build.num_threads() == 1
