# SPDX-License-Identifier: Apache-2.0
"""``cupy-router demo`` and ``cupy-router info``, as seen in a terminal."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import numpy as np
import pytest

import cupy_router
from cupy_router import cli, compiler, gemm
from cupy_router.cli import demo, info, load_plot, terminal


def run(*args: str, **env: str) -> subprocess.CompletedProcess[bytes]:
    return subprocess.run([sys.executable, "-m", "cupy_router", *args], capture_output=True, env={**os.environ, **env})


def test_demo_shows_tokens_words_and_load_and_its_checks_pass(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["demo", "--device", "cpu"]) == 0
    printed = capsys.readouterr().out
    assert "the NumPy reference: as --device cpu asks" in printed
    tokens = re.findall(r"^  (\S+) +((?:\d+ 0\.\d\d *){6})$", printed, re.M)
    assert len(tokens) == 12 + 2  # activation_topk's dozen, and hash_router's two "we"
    assert tokens[-1][1].split()[::2] == tokens[-2][1].split()[::2]  # the same token id, the same experts
    for _, pairs in tokens:
        assert sum(map(float, pairs.split()[1::2])) == pytest.approx(1, abs=0.03)
    assert re.search(r"^ +0   .*executable, run, running, executing", printed, re.M)
    assert "421 tokens, 4.4 times the mean of 96" in printed
    assert printed.count("  ok  ") == 4
    assert "FAILED" not in printed


def test_demo_plots_the_load(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    pytest.importorskip("matplotlib", reason="matplotlib is not installed")
    files = [tmp_path / f"{name}.svg" for name in "ab"]
    for file in files:
        assert cli.main(["demo", "--device", "cpu", "--plot", str(file)]) == 0
    assert f"Wrote {file}" in capsys.readouterr().out
    assert files[0].read_bytes() == files[1].read_bytes()
    for bad in ("load.xyz", "missing/load.png"):
        assert cli.main(["demo", "--device", "cpu", "--plot", str(tmp_path / bad)]) == 1
        (line,) = capsys.readouterr().err.splitlines()
        assert line.startswith(f"cupy-router demo: --plot {tmp_path / bad}: ")
    monkeypatch.setattr(load_plot, "find_spec", lambda name: None)
    assert cli.main(["demo", "--plot", str(tmp_path / "c.svg")]) == 1
    printed = capsys.readouterr()
    assert (printed.out, printed.err) == ("", "cupy-router demo: --plot needs matplotlib: pip install matplotlib\n")


def test_the_picture_counts_every_pair() -> None:
    indices = np.random.default_rng(0).permuted(np.tile(np.arange(8), (37, 1)), axis=1)[:, :3]
    counts = load_plot.tokens_by_experts(indices, 8)
    size = load_plot.TOKENS_PER_LINE
    want = [[(indices[start : start + size] == expert).sum() for expert in range(8)] for start in (0, 16, 32)]
    assert counts.tolist() == want
    assert load_plot.entropy(np.full(128, 7)) == 7
    assert load_plot.entropy(np.array([0, 3])) == 0


def test_demo_tells_where_it_runs_and_why(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(compiler, "why_no_cuda", lambda: "the GPU is on holiday.")
    assert cli.main(["demo"]) == 0
    assert "the NumPy reference: the GPU is on holiday." in capsys.readouterr().out
    assert cli.main(["demo", "--device", "cuda"]) == 1
    printed = capsys.readouterr()
    assert (printed.out, printed.err) == ("", "cupy-router demo: the GPU is on holiday.\n")


class FakeCupy(ModuleType):
    """The part of CuPy that the command line uses, as on an H100; arrays are NumPy's, and transfers are counted."""

    def __init__(self) -> None:
        super().__init__("cupy")
        self.to_device = self.to_host = 0
        h100 = {
            "name": b"NVIDIA H100 80GB HBM3", "major": 9, "minor": 0, "totalGlobalMem": 85 * 10**9,
            "multiProcessorCount": 132, "sharedMemPerBlockOptin": 232448, "l2CacheSize": 52428800,
        }  # fmt: skip
        runtime = SimpleNamespace(
            driverGetVersion=lambda: 13010, getDeviceCount=lambda: 1, getDeviceProperties=lambda device: h100
        )
        nvrtc = SimpleNamespace(getVersion=lambda: (12, 9))
        self.cuda = SimpleNamespace(runtime=runtime, nvrtc=nvrtc, Device=lambda: SimpleNamespace(id=0))

    def asarray(self, array: np.ndarray) -> np.ndarray:
        self.to_device += 1
        return array

    def asnumpy(self, array: np.ndarray) -> np.ndarray:
        self.to_host += 1
        return array


def test_demo_and_info_with_a_gpu(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    cupy = FakeCupy()
    monkeypatch.setitem(sys.modules, "cupy", cupy)
    monkeypatch.setattr(compiler, "why_no_cuda", lambda: None)
    monkeypatch.setattr(gemm, "why_no_cublas", lambda: "no library.")
    assert cli.main(["demo"]) == 0
    assert "runs on   NVIDIA H100 80GB HBM3, by the CUDA kernels" in capsys.readouterr().out
    assert (cupy.to_device, cupy.to_host) == (3, 6)  # token ids, table and logits; three results of two arrays
    assert cli.main(["info"]) == 0
    printed = capsys.readouterr().out
    assert "  backend   CUDA kernels; NumPy reference for CPU arrays\n" in printed
    assert "  device    0: NVIDIA H100 80GB HBM3, compute capability 9.0, 79 GiB\n" in printed
    assert "  tuning    0: table sm_90, 132 multiprocessors (measured on 132)\n" in printed
    assert "  cublas    not available, the decode kernel takes any n: no library.\n" in printed
    assert re.search(r"^  driver    .*, up to CUDA 13\.1\n  nvrtc     12\.9$", printed, re.M)


@pytest.mark.backends("gpu")
def test_demo_on_this_machines_gpu(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["demo", "--device", "cuda"]) == 0
    assert "by the CUDA kernels" in capsys.readouterr().out


def swap_two_experts(routing: Any) -> Any:
    routing.indices[7, :2] = routing.indices[7, 1::-1].copy()
    return routing


def spoil_a_weight(routing: Any) -> Any:
    routing.weights[7, 2] *= 1.001
    return routing


def lose_a_weight(routing: Any) -> Any:
    routing.weights[7, 2] = np.nan
    return routing


def swap_two_columns(top: Any) -> Any:
    top.indices[7, :2] = top.indices[7, 1::-1].copy()
    return top


def round_a_value(top: Any) -> Any:
    top.values[7, 2] = np.nextafter(top.values[7, 2], np.float32(0))
    return top


@pytest.mark.slow("seconds", every=7)
@pytest.mark.parametrize(
    ("op", "fault"),
    [
        ("hash_router", swap_two_experts),
        ("hash_router", spoil_a_weight),
        ("topk_select", swap_two_columns),
        ("topk_select", round_a_value),
        ("activation_topk", swap_two_experts),
        ("activation_topk", spoil_a_weight),
        ("activation_topk", lose_a_weight),
    ],
)
def test_demo_finds_wrong_results(
    op: str, fault: Callable[[Any], Any], capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    right = getattr(cupy_router, op)
    monkeypatch.setattr(cupy_router, op, lambda *args, **kwargs: fault(right(*args, **kwargs)))
    assert cli.main(["demo", "--device", "cpu"]) == 1
    printed = capsys.readouterr().out
    assert re.findall(r"FAILED +(\w+)", printed) == [op]
    assert printed.count("  ok  ") == 3


def test_hash_table_has_six_different_experts_for_every_token_id() -> None:
    table = demo.hash_table()
    assert (table.shape, table.dtype) == ((30_522, 6), np.int32)
    assert table.min() == 0
    assert table.max() == 127
    assert np.all(np.diff(np.sort(table, axis=1), axis=1) > 0)
    assert np.array_equal(table, demo.hash_table())


def test_info_names_versions_folders_and_backend(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["info"]) == 0
    printed = capsys.readouterr().out
    rows = dict(re.findall(r"^  (\w+) +(\S.*)$", printed, re.M))
    assert printed.startswith("cupy-router ")
    assert rows["numpy"] == np.__version__
    assert rows["python"].startswith(f"{sys.version_info.major}.{sys.version_info.minor}.")
    assert {"backend", "driver", "nvrtc", "cupy", "torch", "jax", "package", "kernels", "cache"} <= set(rows)
    assert rows["backend"].startswith("NumPy reference: " if compiler.why_no_cuda() else "CUDA kernels")


def test_info_works_when_cupy_fails(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "cupy", None)  # what an import finds then is an ImportError
    monkeypatch.setattr(compiler, "why_no_cuda", lambda: "CuPy is not installed.")
    assert cli.main(["info"]) == 0
    printed = capsys.readouterr().out
    assert "NumPy reference: CuPy is not installed." in printed
    assert re.search(r"^  tuning +no usable GPU; tables for .*sm_90", printed, re.M)
    assert re.search(r"^  nvrtc +not available: .*cupy", printed, re.M)


@pytest.mark.slow("process")
def test_info_imports_no_framework_for_its_version() -> None:
    code = (
        "import sys; from cupy_router import cli; code = cli.main(['info'])\n"
        "sys.exit(code or bool({'torch', 'jax'} & set(sys.modules)))"
    )
    assert subprocess.run([sys.executable, "-c", code], capture_output=True).returncode == 0


class FakeDistribution:
    def __init__(self, name: str) -> None:
        self.metadata = {"Name": name}


@pytest.mark.parametrize(
    ("installed", "said"),
    [
        ([], "not installed"),
        (["cupy_router", "cupy-router"], "not installed"),
        (["cupy-cuda12x"], r"14\.2\.0 \(cupy-cuda12x\)"),
        (["cupy-cuda13x", "cupy-cuda12x"], r".*\(cupy-cuda12x\), .*\(cupy-cuda13x\): these break each other, .*"),
    ],
)
def test_info_warns_of_two_cupys(installed: list[str], said: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(info.metadata, "distributions", lambda: map(FakeDistribution, installed))
    monkeypatch.setattr(info.metadata, "version", lambda name: "14.2.0")
    assert re.fullmatch(said, info.cupy_packages())


def test_no_command_lists_the_commands(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main([]) == 2
    shown = capsys.readouterr().err
    assert all(f"\n    {command} " in shown for command in ("demo", "info", "doctor", "check", "warmup"))


@pytest.mark.parametrize("args", [["frobnicate"], ["demo", "--device", "abacus"]])
def test_a_wrong_command_line_exits_with_2(args: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stopped:
        cli.main(args)
    assert stopped.value.code == 2
    assert "usage: cupy-router" in capsys.readouterr().err


@pytest.mark.slow("process")
def test_demo_in_a_narrow_ascii_terminal() -> None:
    done = run("demo", "--device", "cpu", COLUMNS="20", PYTHONIOENCODING="ascii", PYTHONUTF8="0")
    assert done.returncode == 0, done.stderr
    lines = done.stdout.decode("ascii").splitlines()
    assert [line for line in lines if re.fullmatch(r"   421  ?[ .:|#]+", line)]


@pytest.mark.slow("process")
def test_demo_in_a_wide_utf8_terminal() -> None:
    done = run("demo", "--device", "cpu", COLUMNS="300", PYTHONIOENCODING="utf-8")
    assert done.returncode == 0, done.stderr
    bars = [line for line in done.stdout.decode().splitlines() if re.search("[▁▂▃▄▅▆▇█]", line)]
    assert len(bars) == 5
    assert max(map(len, bars)) == 7 + 128


@pytest.mark.slow("process")
@pytest.mark.parametrize("command", ["demo", "info"])
def test_a_closed_pipe_gives_no_traceback(command: str) -> None:
    with subprocess.Popen(
        [sys.executable, "-m", "cupy_router", command], stdout=subprocess.PIPE, stderr=subprocess.PIPE
    ) as process:
        assert process.stdout is not None
        process.stdout.close()
        assert process.stderr is not None
        errors = process.stderr.read()
    assert process.returncode == 1
    assert errors == b""


@pytest.mark.slow("process")
def test_info_escapes_what_the_terminal_cannot_show() -> None:
    done = run("info", CUPY_CACHE_DIR="/tmp/größe", PYTHONIOENCODING="ascii", PYTHONUTF8="0")
    assert done.returncode == 0, done.stderr
    assert b"gr??e" in done.stdout


def test_columns_show_every_value_above_zero() -> None:
    lines = terminal.columns([0, 0.001, 50, 100], height=2, top=100)
    assert lines == ["   █", " ▁██"]
