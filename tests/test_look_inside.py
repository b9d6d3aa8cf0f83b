# SPDX-License-Identifier: Apache-2.0
"""CUPY_ROUTER_LOG and CUPY_ROUTER_DUMP: what they say and write of kernels that become ready, and that nothing else
changes. A recorder stands in for the GPU; machine code comes from the NVRTC that CuPy finds."""

from __future__ import annotations

import os
import re
import subprocess
import sys
import threading
import warnings
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any, ClassVar

import numpy as np
import pytest

from cupy_router import RoutingMethod, activation_topk, compiler, kernel_dump, kernel_log, topk_select
from cupy_router.kernel_log import KernelReady
from tests.recorder import Recorder, recording

ROOT = Path(__file__).parents[1]
KERNEL = 'extern "C" __global__ void {name}(float *x) {{ x[threadIdx.x] = {value}; }}\n'
OPTIONS = compiler.options("")


@pytest.fixture
def recorder() -> Iterator[Recorder]:
    with recording() as recorder:
        yield recorder


@pytest.fixture
def events(monkeypatch: pytest.MonkeyPatch) -> list[KernelReady]:
    found: list[KernelReady] = []
    monkeypatch.setattr(kernel_log, "listeners", [*kernel_log.listeners, found.append])
    return found


def of(source: str, function: str = "one", **fields: Any) -> KernelReady:
    """A kernel that became ready."""
    return replace(KernelReady("file", function, (), (), ("cpu", 0), True, 1.0, source, OPTIONS), **fields)


def select() -> None:
    topk_select(np.zeros((4, 64), np.float32), 4)


# -- Events ------------------------------------------------------------------------------------------------------------


def test_a_kernel_becomes_ready_once(recorder: Recorder, events: list[KernelReady]) -> None:
    select()
    select()
    (ready,) = events
    assert (ready.kernel, ready.device, ready.compiled) == ("topk_select", ("cpu", 0), True)
    assert [ready.source] == recorder.sources
    assert dict(ready.macros) == recorder.launches[0].macros
    assert ready.options == OPTIONS
    assert 0 <= ready.milliseconds < 60_000


def test_a_cached_kernel_says_so(recorder: Recorder, events: list[KernelReady]) -> None:
    recorder.compiled = False
    select()
    assert [ready.compiled for ready in events] == [False]


def test_listeners_run_without_the_lock(recorder: Recorder, monkeypatch: pytest.MonkeyPatch) -> None:
    free: list[bool] = []

    def attempt() -> None:
        free.append(compiler._lock.acquire(timeout=5))
        compiler._lock.release()

    def listener(_: KernelReady) -> None:
        thread = threading.Thread(target=attempt)
        thread.start()
        thread.join()

    monkeypatch.setattr(kernel_log, "listeners", [listener])
    select()
    assert free == [True]


def test_a_kernel_whose_listener_fails_is_ready_all_the_same(
    recorder: Recorder, monkeypatch: pytest.MonkeyPatch
) -> None:
    def listener(_: KernelReady) -> None:
        raise LookupError

    monkeypatch.setattr(kernel_log, "listeners", [listener])
    with pytest.raises(LookupError):
        select()
    select()
    assert len(recorder.sources) == 1


def test_the_key_is_that_of_the_text(recorder: Recorder, events: list[KernelReady]) -> None:
    for score in ("sigmoid", "softmax", "sigmoid"):
        for n in (4, 5):
            activation_topk(np.zeros((n, 64), np.float32), RoutingMethod(64, 4, score))
    assert len({ready.key for ready in events}) == len({ready.source for ready in events}) == 2
    assert all(re.fullmatch("[0-9a-f]{10}", ready.key) for ready in events)


# -- CUPY_ROUTER_LOG ---------------------------------------------------------------------------------------------------


def test_a_line_names_kernel_specialisation_and_origin(
    recorder: Recorder, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("CUPY_ROUTER_LOG", "1")
    select()
    recorder.compiled = False
    topk_select(np.zeros((4, 64), np.float16), 4)
    out, err = capsys.readouterr()
    assert out == ""
    line = r"cupy_router: \w+ (compiled|from cache) in \d+\.\d ms on cpu:0 \[[0-9a-f]{10}\] (\w+=-?\d+ ?)+"
    lines = [re.fullmatch(line, text) for text in err.splitlines()]
    assert [match and match[1] for match in lines] == ["compiled", "from cache"]
    assert "TOP_K=4" in err.splitlines()[0].split()


def test_generated_headers_go_by_their_hash() -> None:
    one, other = (of("", headers=(("score.cuh", text),), macros=(("A", 1),)) for text in "xy")
    assert re.fullmatch(r"A=1 score\.cuh=[0-9a-f]{10}", one.specialisation)
    assert one.specialisation != other.specialisation


def test_constants_of_a_generated_header_go_by_name_and_value() -> None:
    text = """// generated
constexpr int NUM_EXPERTS = 256;  // columns
inline constexpr bool HAS_BIAS = true;
constexpr unsigned long long BIG = 1 +
    2;
"""
    assert of("", headers=(("config.cuh", text),)).specialisation == "NUM_EXPERTS=256 HAS_BIAS=true BIG=1 + 2"


@pytest.mark.parametrize("value", [None, "", "0"])
def test_nothing_is_printed_unless_asked(
    value: str | None, recorder: Recorder, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.delenv("CUPY_ROUTER_LOG", raising=False)
    if value is not None:
        monkeypatch.setenv("CUPY_ROUTER_LOG", value)
    select()
    assert capsys.readouterr() == ("", "")


def test_variables_are_not_read_by_a_call_whose_kernel_is_ready(
    recorder: Recorder, monkeypatch: pytest.MonkeyPatch
) -> None:
    select()

    class Unread(dict[str, str]):
        def get(self, key: str, default: Any = None) -> Any:
            assert key not in ("CUPY_ROUTER_LOG", "CUPY_ROUTER_DUMP")
            return super().get(key, default)

    monkeypatch.setattr(os, "environ", Unread(os.environ))
    select()


class Unwritable:
    """A stderr that is closed or full."""

    def __init__(self, error: Exception) -> None:
        self.error = error

    def write(self, text: str) -> None:
        raise self.error


@pytest.mark.parametrize("stderr", [None, Unwritable(ValueError("closed")), Unwritable(OSError("full"))])
def test_a_log_that_cannot_be_written_fails_no_call(
    stderr: Any, recorder: Recorder, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("CUPY_ROUTER_LOG", "1")
    with monkeypatch.context() as patch:
        patch.setattr(sys, "stderr", stderr)
        select()


# -- Compiled or from cache, by CuPy -----------------------------------------------------------------------------------


class _Module:
    """In the place of CuPy's module, which needs a GPU."""

    loaded: ClassVar[list[bytes]] = []

    def load(self, cubin: bytes) -> None:
        self.loaded.append(cubin)

    def _set_mapping(self, mapping: Any) -> None:
        pass


@pytest.fixture
def build_by_cupy(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[str], tuple[bytes, bool]]:
    """CuPy's own code, with another folder for the user's cache and another module for that of a GPU: from source to
    machine code for sm_90, and whether the log was written."""
    of_cupy: Any = cupy_of_nvrtc().cuda.compiler
    build = getattr(of_cupy, "_compile_module_with_cache", None)
    if build is None or not hasattr(of_cupy, "_kernel_cache_backend"):
        pytest.skip("this CuPy has other names for it; with a GPU another test does the same")
    monkeypatch.setattr(of_cupy, "_kernel_cache_backend", type(of_cupy._kernel_cache_backend)(str(tmp_path)))
    monkeypatch.setattr(of_cupy, "function", SimpleNamespace(Module=_Module))
    monkeypatch.setattr(of_cupy, "_get_arch_for_options_for_nvrtc", lambda arch=None: (f"-arch=sm_{arch}", "cubin"))

    def call(source: str) -> tuple[bytes, bool]:
        log = compiler._CompilerLog()
        build(source, OPTIONS, arch="90", log_stream=log)
        return _Module.loaded.pop(), log.written

    return call


@pytest.mark.slow("compiler")
@pytest.mark.parametrize("in_memory", [False, True])
def test_cupy_writes_the_log_if_and_only_if_it_compiled(
    in_memory: bool, build_by_cupy: Callable[[str], tuple[bytes, bool]], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("CUPY_CACHE_IN_MEMORY", "1" if in_memory else "0")
    found = [build_by_cupy(KERNEL.format(name="one", value=value))[1] for value in (1, 1, 2)]
    assert found == [True, in_memory, True]


_ON_A_GPU = """
import cupy, cupy_router
for dtype in ("float32", "float16", "float32"):
    cupy_router.topk_select(cupy.zeros((4, 64), dtype), 4)
"""


@pytest.mark.backends("gpu")
def test_a_second_process_takes_kernels_from_the_cache(tmp_path: Path) -> None:
    cupy = pytest.importorskip("cupy", reason="CuPy is not installed")
    if not cupy.cuda.is_available():
        pytest.skip("no CUDA device")
    environment = os.environ | {"CUPY_CACHE_DIR": str(tmp_path / "cache"), "CUPY_ROUTER_LOG": "1"}
    environment["CUPY_ROUTER_DUMP"] = str(tmp_path / "dump")
    for how in ("compiled in", "from cache in"):
        done = subprocess.run(
            [sys.executable, "-c", _ON_A_GPU], cwd=ROOT, env=environment, capture_output=True, text=True
        )
        assert done.returncode == 0, done.stderr
        lines = [line for line in done.stderr.splitlines() if line.startswith("cupy_router: ")]
        assert [how in line for line in lines] == [True, True], done.stderr
    suffixes = sorted(path.suffix for path in (tmp_path / "dump").iterdir())
    assert suffixes == sorted([".cu", ".cubin", ".ptx", ".txt"] * 2)


# -- CUPY_ROUTER_DUMP --------------------------------------------------------------------------------------------------


def cupy_of_nvrtc() -> Any:
    """CuPy, if it finds an NVRTC, which needs no GPU."""
    cupy = pytest.importorskip("cupy", reason="CuPy is not installed")
    try:
        cupy.cuda.nvrtc.getVersion()
    except Exception as error:
        pytest.skip(f"NVRTC is not here: {error}")
    return cupy


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def test_a_call_dumps_its_kernel(recorder: Recorder, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = tmp_path / "made" / "here"
    monkeypatch.setenv("CUPY_ROUTER_DUMP", str(folder))
    select()
    first = names(folder)
    assert [re.sub("-[0-9a-f]{10}", "", name) for name in first] == ["topk_select.cu", "topk_select.txt"]
    assert [(folder / first[0]).read_text()] == recorder.sources
    text = (folder / first[1]).read_text()
    assert "code      none: the device is no GPU\n" in text
    assert "switch    TOP_K = 4\n" in text
    topk_select(np.zeros((4, 64), np.float16), 4)
    assert len(names(folder)) == 4


@pytest.mark.slow("compiler")
@pytest.mark.parametrize("architecture", ["sm_80", "sm_90"])
def test_a_dump_holds_what_nvrtc_makes_of_a_kernel(
    architecture: str, recorder: Recorder, events: list[KernelReady], tmp_path: Path
) -> None:
    cupy_of_nvrtc()
    activation_topk(np.zeros((64, 256), np.float32), "deepseek-v4-flash", bias=np.zeros(256, np.float32))
    (ready,) = events
    kernel_dump.dump(ready, tmp_path, architecture)
    stem = f"activation_topk-{ready.key}-{architecture}"
    assert names(tmp_path) == [f"{stem}.{suffix}" for suffix in ("cu", "cubin", "ptx", "txt")]
    assert (tmp_path / f"{stem}.cubin").read_bytes().startswith(b"\x7fELF")
    ptx = (tmp_path / f"{stem}.ptx").read_text()
    assert f".target {architecture}" in ptx
    assert ".entry activation_topk(" in ptx
    text = (tmp_path / f"{stem}.txt").read_text()
    assert re.search(rf"^code +{architecture}, NVRTC \d+\.\d+, -std=c\+\+17 -ftz=true", text, re.M)
    assert re.search(r"^registers +[1-9]\d* per thread$", text, re.M)


@pytest.mark.slow("compiler")
def test_resources_are_those_that_ptxas_names() -> None:
    cupy_of_nvrtc()
    source = """
__device__ void other(float *x) {}
extern "C" __global__ void first(float *x) { x[threadIdx.x] = 1; }
extern "C" __global__ void __launch_bounds__(1024, 2) wanted(const float *x, float *y, int n) {
    __shared__ float shared[100];
    float local[64];
    for (int i = 0; i < 64; ++i) local[i * n % 64] = x[i];
    shared[threadIdx.x % 100] = local[n % 64];
    __syncthreads();
    y[threadIdx.x] = shared[n % 100];
}
extern "C" __global__ void last(float *x) { x[threadIdx.x] = 1; }
"""
    found = kernel_dump.compile_for(source, "wanted", OPTIONS, "sm_90").resources
    assert (found.spills, found.stack, found.shared) == (0, 256, 400)
    assert 8 <= found.registers <= 32
    assert kernel_dump.compile_for(source, "first", OPTIONS, "sm_90").resources.shared == 0


@pytest.mark.slow("compiler")
def test_a_dump_has_the_cubin_that_cupy_loads(build_by_cupy: Callable[[str], tuple[bytes, bool]]) -> None:
    source = compiler.expand("topk_select")
    assert kernel_dump.compile_for(source, "topk_select", OPTIONS, "sm_90").cubin == build_by_cupy(source)[0]


def test_what_does_not_compile_is_told_by_the_text(tmp_path: Path) -> None:
    cupy_of_nvrtc()
    ready = of('#line 7 "kernels/file.cu"\nextern "C" __global__ void one() { wrong; }\n')
    kernel_dump.dump(ready, tmp_path, "sm_90")
    assert {Path(name).suffix for name in names(tmp_path)} == {".cu", ".txt"}
    (text,) = [path.read_text() for path in tmp_path.glob("*.txt")]
    assert 'code      none: kernels/file.cu(7): error: identifier "wrong" is undefined' in text


def test_a_folder_that_cannot_be_made_gives_one_warning(
    recorder: Recorder, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").touch()
    monkeypatch.setenv("CUPY_ROUTER_DUMP", str(tmp_path / "file" / "folder"))
    with pytest.warns(RuntimeWarning, match=r"CUPY_ROUTER_DUMP: kernels are not dumped, .*/file/folder is not usable"):
        select()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        topk_select(np.zeros((4, 64), np.float16), 4)
    assert len(recorder.launches) == 2


def test_files_are_replaced_as_a_whole(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    ready = of("old")
    kernel_dump.dump(ready, tmp_path)
    before = {path: path.read_bytes() for path in tmp_path.iterdir()}

    def fails(self: Path, content: bytes) -> int:
        with self.open("wb") as file:
            file.write(content[:1])
        raise OSError("no space")

    monkeypatch.setattr(Path, "write_bytes", fails)
    monkeypatch.setattr(kernel_dump, "_unusable", set())
    with pytest.warns(RuntimeWarning, match="no space"):
        kernel_dump.dump(ready, tmp_path)
    assert {path: path.read_bytes() for path in tmp_path.iterdir()} == before
