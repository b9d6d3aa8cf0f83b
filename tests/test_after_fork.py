# SPDX-License-Identifier: Apache-2.0
"""After a fork of a process that had used CUDA: one sentence in place of CUDA's own errors; the CPU works on."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from cupy_router import compiler, topk_select
from cupy_router.arrays import FRAMEWORKS
from tests.recorder import recording
from tests.test_launches import Array, Fake

SENTENCE = "CUDA does not work in a process that was forked after CUDA had been used: start this process by multiproc"

pytestmark = pytest.mark.skipif(not hasattr(os, "fork"), reason="there is no fork here")


class InitializationError(RuntimeError):
    """Error of CUDA after a fork, as CuPy raises it."""

    def __init__(self) -> None:
        super().__init__("cudaErrorInitializationError: initialization error")


# Code of the parent before the fork and of the child after it; a recorder stands in for the GPU.
FORK = """
import os, sys, threading
import numpy as np
import cupy_router
from cupy_router import RoutingMethod, compiler
from cupy_router.arrays import FRAMEWORKS
from tests.recorder import recording
from tests.test_launches import Array, Fake

FRAMEWORKS[Array] = Fake()
scores, host = Array(1 << 20, (4, 64)), np.eye(3, 8, dtype=np.float32)

def child(*calls):
    sys.stdout.flush()
    if os.fork():
        os.wait()
        return
    for call in calls:
        try:
            print(type(call()).__name__)
        except Exception as error:
            print(type(error).__name__, error)
    sys.stdout.flush()
    os._exit(0)

def on_gpu():
    return cupy_router.topk_select(scores, 2)

def other_on_gpu():
    return cupy_router.activation_topk(scores, RoutingMethod(64, 2))

def on_stream():
    return cupy_router.topk_select(scores, 2, stream=5)

def into():
    return cupy_router.topk_select(scores, 2, out=out)

def on_cpu():
    return cupy_router.topk_select(host, 2)

out = cupy_router.TopK(Array(1 << 22, (4, 2)), Array(1 << 23, (4, 2), "int32"))
"""


def printed(script: str) -> list[str]:
    root = Path(__file__).parents[1]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join([str(root), *sys.path])}
    done = subprocess.run(
        [sys.executable, "-W", "ignore::DeprecationWarning", "-c", FORK + script],
        cwd=root,
        env=environment,
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert (done.returncode, done.stderr) == (0, "")
    return done.stdout.splitlines()


@pytest.mark.slow("process")
def test_a_child_of_a_process_that_used_cuda() -> None:
    lines = printed(
        "with recording('cuda'):\n"
        "    on_gpu(), into(), other_on_gpu(), on_cpu()\n"
        "    child(on_gpu, on_gpu, into, other_on_gpu, on_stream,\n"
        "        on_cpu, compiler.why_no_cuda, lambda: child(on_gpu))\n"
        "    print(type(on_gpu()).__name__)\n"
    )
    *raised, cpu, why, grandchild, nothing, parent = lines
    assert (cpu, why, nothing, parent) == ("TopK", "str", "NoneType", "TopK")
    assert len(raised) == 5
    for line in (*raised, grandchild):
        assert line.startswith(f"RuntimeError CUDA arrays need CuPy, NVRTC and a driver: {SENTENCE}"), line
        assert "'spawn'" in line


@pytest.mark.slow("process")
def test_a_process_that_has_not_used_cuda_may_fork() -> None:
    lines = printed(
        "on_cpu()\n"
        "def begin():\n"
        "    with recording('cuda'):\n"
        "        return on_gpu()\n"
        "child(on_cpu, begin, lambda: child(on_cpu))\n"
    )
    assert lines == ["TopK", "TopK", "TopK", "NoneType"]


@pytest.mark.slow("process")
@pytest.mark.parametrize("module", ["compiler", "kernel_cache"])
def test_a_lock_that_another_thread_held_does_not_stop_the_child(module: str) -> None:
    lines = printed(
        "from cupy_router import kernel_cache\n"
        "held = threading.Event()\n"
        "def hold():\n"
        f"    with {module}._lock:\n"
        "        held.set()\n"
        "        threading.Event().wait()\n"
        "threading.Thread(target=hold, daemon=True).start()\n"
        "held.wait()\n"
        "child(lambda: compiler.expand('topk_select'), kernel_cache.prepare)\n"
    )
    assert lines == ["str", "NoneType"]


@pytest.mark.slow("process")
def test_children_share_no_keys_but_those_of_their_parent() -> None:
    """A compiled program of one child must not find another score, or Router, under its key in a sibling."""
    lines = printed(
        "from cupy_router import Router, ScoreFunction, method\n"
        "before = RoutingMethod(4, 2, ScoreFunction('before', cuda='x', numpy=abs))\n"
        "def keys():\n"
        "    assert method.from_text(before.text) == before\n"
        "    own = ScoreFunction('own', cuda='-x', numpy=abs)\n"
        "    raise ValueError(own.key, Router(RoutingMethod(3, 2), weight=host).key)\n"
        "child(keys)\n"
        "child(keys)\n"
        "child(keys)\n"
    )
    assert len(lines) == len(set(lines)) == 3
    found = [key for line in lines for key in re.findall("'(.*?)'", line)]
    assert len(found) == len(set(found)) == 6


@pytest.mark.parametrize("where", ["launch", "on_stream", "current_stream", "allocator"])
def test_an_error_of_a_fork_is_translated_wherever_it_is_raised(where: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The parent may have used CUDA by way of another library, so that nothing here knows of it."""

    def fail(*args: Any) -> Any:
        raise InitializationError

    fake = Fake()
    monkeypatch.setitem(FRAMEWORKS, Array, fake)
    monkeypatch.setattr(compiler, "_is_forked", True)
    if where != "launch":
        monkeypatch.setattr(fake, where, fail)
    with recording("cuda") as recorder:
        recorder.failure = InitializationError() if where == "launch" else None
        with pytest.raises(RuntimeError, match=f"driver: {SENTENCE}") as caught:
            topk_select(Array(1 << 20, (4, 64)), 2, stream=5 if where == "on_stream" else None)
    assert isinstance(caught.value.__cause__, InitializationError)


@pytest.mark.parametrize(
    ("forked", "failure"),
    [
        (True, RuntimeError("out of luck")),
        (True, RuntimeError("a cache, initialization error")),
        (False, InitializationError()),
    ],
)
def test_other_errors_of_a_launch_stay_as_they_are(
    forked: bool, failure: RuntimeError, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(FRAMEWORKS, Array, Fake())
    monkeypatch.setattr(compiler, "_is_forked", forked)
    with recording("cuda") as recorder:
        recorder.failure = failure
        with pytest.raises(RuntimeError) as caught:
            topk_select(Array(1 << 20, (4, 64)), 2)
    assert caught.value is failure


def test_a_child_that_is_the_first_to_call(monkeypatch: pytest.MonkeyPatch) -> None:
    """CuPy's first question to the driver fails."""

    def fail() -> int:
        raise InitializationError

    runtime = SimpleNamespace(getDeviceCount=fail, CUDARuntimeError=InitializationError)
    monkeypatch.setitem(sys.modules, "cupy", SimpleNamespace(cuda=SimpleNamespace(runtime=runtime)))
    for forked, said in ((True, SENTENCE), (False, "no CUDA device or driver is usable (cudaErrorInit")):
        monkeypatch.setattr(compiler, "_is_forked", forked)
        reason = compiler.why_no_cuda.__wrapped__()
        assert reason is not None
        assert reason.startswith(said)
