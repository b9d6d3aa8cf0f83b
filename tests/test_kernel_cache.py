# SPDX-License-Identifier: Apache-2.0
"""CuPy's folder of compiled kernels: one that cannot be used costs a warning, never a call."""

from __future__ import annotations

import errno
import os
import re
import subprocess
import sys
import tempfile
import warnings
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import nullcontext
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from cupy_router import cli, compiler, gemm, kernel_cache

ROOT = Path(__file__).parents[1]
KERNEL = 'extern "C" __global__ void one(float* y) {{ y[threadIdx.x] = {value}.0f; }}\n'
WARNING = r"CuPy cannot keep compiled kernels in .*{}.*: this process keeps them in {}; set CUPY_CACHE_DIR to a folder"


@pytest.fixture(autouse=True)
def fresh(monkeypatch: pytest.MonkeyPatch) -> None:
    """Reset the state to that of a new process, and restore it at the end."""
    monkeypatch.setattr(kernel_cache, "_temporary", None)
    for name in (kernel_cache.FOLDER, kernel_cache.IN_MEMORY):
        monkeypatch.setenv(name, os.environ.get(name, ""))  # so that it is restored
        monkeypatch.delenv(name)


# -- Before CuPy is imported -------------------------------------------------------------------------------------------


def run(command: list[str], **environment: str) -> subprocess.CompletedProcess[str]:
    done = subprocess.run(
        [sys.executable, *command], cwd=ROOT, env=os.environ | environment, capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 0, done.stderr
    return done


@pytest.mark.slow("process")
@pytest.mark.parametrize("command", ["info", "demo"])
@pytest.mark.parametrize(
    "environment", [{"CUPY_CACHE_DIR": "{file}/x"}, {"CUPY_CACHE_DIR": "{file}"}, {"HOME": "{file}"}], ids=str
)
def test_commands_with_a_folder_that_cannot_be_used(command: str, environment: dict[str, str], tmp_path: Path) -> None:
    pytest.importorskip("cupy", reason="CuPy is not installed")
    file, temporary = tmp_path / "file", tmp_path / "temporary"
    file.touch()
    temporary.mkdir()
    given = {name: value.format(file=file) for name, value in environment.items()}
    done = run(["-m", "cupy_router", command], TMPDIR=str(temporary), COLUMNS="140", **given)
    assert len(re.findall(WARNING.format("file", f"{re.escape(str(temporary))}.*"), done.stderr)) == 1
    assert "Traceback" not in done.stdout + done.stderr
    if command == "info":
        assert re.search(rf"^  cache +{re.escape(str(temporary))}/cupy_router_kernels-\w+$", done.stdout, re.M)
        assert re.search(r"^  nvrtc +\d", done.stdout, re.M), "CuPy is imported"
    assert not list(temporary.iterdir()), "removed at exit"


def prepare_twice() -> None:
    kernel_cache.prepare()
    kernel_cache.prepare()


@pytest.mark.slow("process")
def test_an_import_of_cupy_that_failed_before(tmp_path: Path) -> None:
    """Many libraries try to import CuPy and go on without it."""
    pytest.importorskip("cupy", reason="CuPy is not installed")
    (tmp_path / "file").touch()
    script = (
        "from contextlib import suppress\n"
        "with suppress(OSError):\n"
        "    import cupy\n"
        "from cupy_router import compiler\n"
        "print(compiler.why_no_cuda())\n"
        "import cupy\n"
        "print(cupy.ndarray.__name__)\n"
    )
    done = run(["-c", script], CUPY_CACHE_DIR=str(tmp_path / "file/cache"))
    why, name = done.stdout.splitlines()
    assert "CuPy is not usable" not in why
    assert name == "ndarray"


@pytest.fixture
def no_cupy(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in [name for name in sys.modules if name.partition(".")[0] == "cupy"]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setattr(kernel_cache, "find_spec", lambda name: object())


@pytest.mark.usefixtures("no_cupy")
@pytest.mark.parametrize("fault", ["no home", "read-only"])
def test_no_home_and_a_read_only_folder(fault: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    if fault == "no home":
        monkeypatch.setattr(os.path, "expanduser", lambda path: path)  # what it does for a user without one
    else:

        def refuse(dir: str) -> Any:
            raise PermissionError(errno.EACCES, "Permission denied", dir)

        monkeypatch.setenv("CUPY_CACHE_DIR", str(tmp_path))
        monkeypatch.setattr(tempfile, "TemporaryFile", refuse)
    with pytest.warns(RuntimeWarning, match=WARNING.format("", ".*cupy_router_kernels-.*")) as caught:
        prepare_twice()
    assert len(caught) == 1
    assert Path(kernel_cache.folder()).is_dir()
    assert not Path("~").exists()


@pytest.mark.usefixtures("no_cupy")
def test_without_a_temporary_place_kernels_stay_in_memory(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def refuse(prefix: str) -> Any:
        raise FileNotFoundError(errno.ENOENT, "No usable temporary directory found")

    monkeypatch.setenv("CUPY_CACHE_DIR", f"{__file__}/x")
    monkeypatch.setattr(tempfile, "mkdtemp", refuse)
    with pytest.warns(RuntimeWarning, match=WARNING.format("", "memory")):
        kernel_cache.prepare()
    assert os.environ[kernel_cache.IN_MEMORY] == "1"
    assert Path(kernel_cache.folder()).is_dir(), "CuPy's import asks for a folder that exists"
    monkeypatch.setattr(compiler, "why_no_cuda", lambda: "there is none.")
    monkeypatch.setitem(sys.modules, "cupy", None)
    assert cli.main(["info"]) == 0
    assert re.search(r"^  cache +in memory$", capsys.readouterr().out, re.M)


@pytest.mark.usefixtures("no_cupy")
def test_a_user_who_chose_memory_is_not_warned(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CUPY_CACHE_DIR", f"{__file__}/x")
    monkeypatch.setenv("CUPY_CACHE_IN_MEMORY", "1")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        kernel_cache.prepare()
    assert Path(kernel_cache.folder()).is_dir()


def test_nothing_is_created_without_cupy(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CUPY_CACHE_DIR", str(tmp_path / "new"))
    monkeypatch.delitem(sys.modules, "cupy", raising=False)
    monkeypatch.setattr(kernel_cache, "find_spec", lambda name: None)
    kernel_cache.prepare()
    assert not (tmp_path / "new").exists()


class Unimportable:
    """Finder of a CuPy whose import raises."""

    def __init__(self, error: BaseException) -> None:
        self.error = error

    def find_spec(self, name: str, path: Any, target: Any = None) -> None:
        if name == "cupy":
            raise self.error


@pytest.mark.parametrize("error", [OSError("disk on fire"), RuntimeError("odd"), AttributeError("half"), KeyError("k")])
def test_any_error_of_the_import_is_a_reason_with_a_remedy(error: Exception, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delitem(sys.modules, "cupy", raising=False)
    monkeypatch.setattr(kernel_cache, "find_spec", lambda name: None)
    monkeypatch.setattr(sys, "meta_path", [Unimportable(error), *sys.meta_path])
    reason = compiler.why_no_cuda.__wrapped__()
    assert reason == (
        f"CuPy is not usable ({type(error).__name__}: {error}): correct this, or install cupy-router[cuda12] or "
        "cupy-router[cuda13]."
    )
    monkeypatch.setattr(compiler, "why_no_cuda", lambda: reason)
    with pytest.raises(RuntimeError, match=r"^CUDA arrays need CuPy, NVRTC and a driver: CuPy is not usable"):
        compiler.require_cuda()
    gemm._library.cache_clear()
    assert "cuBLAS is not usable" in str(gemm.why_no_cublas.__wrapped__())
    gemm._library.cache_clear()


def test_a_folder_named_cupy_is_not_cupy(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "cupy", SimpleNamespace())
    assert "CuPy is not usable (AttributeError: " in str(compiler.why_no_cuda.__wrapped__())


# -- While a process runs, with CuPy's own code ------------------------------------------------------------------------


class _Module:
    """In the place of CuPy's module, which needs a GPU."""

    def load(self, cubin: bytes) -> None:
        assert cubin.startswith(b"\x7fELF")

    def _set_mapping(self, mapping: Any) -> None:
        pass


Build = Callable[[int], bool]  # whether it was compiled


@pytest.fixture
def build(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Build]:
    """Builds a kernel by CudaBackend and by CuPy's code for its cache, in the folder tmp_path/cache."""
    cupy = pytest.importorskip("cupy", reason="CuPy is not installed")
    of_cupy: Any = cupy.cuda.compiler
    try:
        cupy.cuda.nvrtc.getVersion()
        before, make = of_cupy._kernel_cache_backend, of_cupy._compile_module_with_cache
    except Exception as error:
        pytest.skip(f"no NVRTC, or this CuPy has other names for it: {error}")
    monkeypatch.setattr(of_cupy, "function", SimpleNamespace(Module=_Module))
    monkeypatch.setattr(compiler, "relaxed", nullcontext)  # which needs a driver
    monkeypatch.setattr(of_cupy, "_get_arch_for_options_for_nvrtc", lambda arch=None: (f"-arch=sm_{arch}", "cubin"))
    of_cupy._set_kernel_cache_backend(of_cupy._DiskKernelCacheBackend(str(tmp_path / "cache")))
    monkeypatch.setenv("CUPY_CACHE_DIR", str(tmp_path / "cache"))

    class RawKernel:
        kernel = SimpleNamespace(ptr=7)

        def __init__(self, source: str, function: str, options: tuple[str, ...], backend: str) -> None:
            self.source, self.options = source, options

        def compile(self, log_stream: Any) -> None:
            make(self.source, self.options, arch="90", log_stream=log_stream)

    backend = compiler.CudaBackend.__new__(compiler.CudaBackend)
    cuda = SimpleNamespace(Device=lambda device: nullcontext(), compiler=of_cupy)
    backend._cupy, backend._modules = SimpleNamespace(cuda=cuda, RawKernel=RawKernel), {}  # type: ignore[assignment]
    backend._log = compiler._CompilerLog()

    def build(value: int) -> bool:
        assert backend.build(KERNEL.format(value=value), "one", 0) == 7
        return backend.compiled

    yield build
    of_cupy._set_kernel_cache_backend(before)


@pytest.mark.slow("compiler")
@pytest.mark.parametrize("length", [0, 10, 1000])
def test_a_cut_or_empty_file_is_compiled_anew(length: int, build: Build, tmp_path: Path) -> None:
    assert [build(1), build(1)] == [True, False]
    (file,) = (tmp_path / "cache").iterdir()
    whole = file.read_bytes()
    file.write_bytes(whole[:length])
    assert [build(1), build(1)] == [True, False]
    assert file.read_bytes() == whole


def remove(folder: Path) -> None:
    for file in folder.iterdir():
        file.unlink()
    folder.rmdir()


def folder_in_place_of_the_file(folder: Path) -> None:
    (file,) = folder.iterdir()
    file.unlink()
    file.mkdir()


def file_in_place_of_the_folder(folder: Path) -> None:
    remove(folder)
    folder.touch()


@pytest.mark.slow("compiler")
@pytest.mark.parametrize("fault", [remove, folder_in_place_of_the_file, file_in_place_of_the_folder])
def test_a_folder_that_goes_bad_is_replaced_with_one_warning(
    fault: Callable[[Path], None], build: Build, tmp_path: Path
) -> None:
    build(1)
    fault(tmp_path / "cache")
    with pytest.warns(RuntimeWarning, match=WARNING.format("cache", ".*cupy_router_kernels-.*")) as caught:
        assert [build(1), build(1), build(2), build(2)] == [True, False, True, False]
    assert len(caught) == 1
    temporary = Path(kernel_cache.folder())
    assert len(list(temporary.iterdir())) == 2
    remove(temporary)  # as those who clear temporary folders do
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert [build(3), build(3)] == [True, True], "in memory"


def test_threads_that_find_a_folder_unusable_replace_it_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CUPY_CACHE_DIR", str(tmp_path / "cache"))
    with pytest.warns(RuntimeWarning, match=WARNING.format("cache", ".*cupy_router_kernels-.*")):
        kernel_cache.replace(OSError("gone"), str(tmp_path / "cache"))
    temporary = kernel_cache.folder()
    kernel_cache.replace(OSError("gone"), str(tmp_path / "cache"))
    assert kernel_cache.folder() == temporary
    assert os.environ.get(kernel_cache.IN_MEMORY) != "1"


@pytest.mark.slow("compiler")
def test_a_full_disk(build: Build, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*args: Any, **kwargs: Any) -> Any:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(tempfile, "NamedTemporaryFile", full)  # with which CuPy writes
    with pytest.warns(RuntimeWarning, match="No space left on device") as caught:
        assert [build(1), build(1)] == [True, True]
    assert len(caught) == 1
    assert os.environ[kernel_cache.IN_MEMORY] == "1"


@pytest.mark.slow("compiler")
def test_a_cupy_without_the_function_for_folders_keeps_kernels_in_memory(
    build: Build, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import cupy

    with monkeypatch.context() as patch:
        remove(tmp_path / "cache")
        patch.delattr(cupy.cuda.compiler, "_set_kernel_cache_backend")
        with pytest.warns(RuntimeWarning, match=WARNING.format("cache", "memory")):
            assert [build(1), build(1)] == [True, True]


def test_an_error_that_is_not_of_the_cache_is_raised_in_the_end(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "cupy", SimpleNamespace())
    monkeypatch.setenv("CUPY_CACHE_IN_MEMORY", "1")
    with pytest.raises(OSError, match="odd"):
        kernel_cache.replace(OSError("odd"), kernel_cache.folder())


RACE = """
import sys, warnings
warnings.simplefilter("error")
sys.path.insert(0, sys.argv[1])
from cupy_router import compiler, kernel_cache
kernel_cache.prepare()
import cupy
print(kernel_cache.folder())
"""


@pytest.mark.slow("process")
def test_two_processes_begin_with_one_new_folder(tmp_path: Path) -> None:
    pytest.importorskip("cupy", reason="CuPy is not installed")
    folder = tmp_path / "a" / "b"
    with ThreadPoolExecutor(2) as threads:
        begun = [threads.submit(run, ["-c", RACE, str(ROOT)], CUPY_CACHE_DIR=str(folder)) for _ in range(2)]
        assert [done.result().stdout for done in begun] == [f"{folder}\n"] * 2
    assert not list(folder.iterdir())
