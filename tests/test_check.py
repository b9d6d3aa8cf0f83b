# SPDX-License-Identifier: Apache-2.0
"""``cupy-router check``: planted faults are named by file and line, and what could not be checked is said."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest

from cupy_router import ScoreFunction, cli, compiler, nvrtc
from cupy_router.check import architectures, cases, clangd, comparison, edited, execution
from cupy_router.check.backend import LateBackend
from cupy_router.simt import device
from tests.nvrtc import libraries

KERNELS = compiler.kernel_folders()[-1]
needs_compilers = pytest.mark.skipif(
    device.why_not() is not None or not libraries(), reason="there is no g++ or no NVRTC here"
)

RIGHT = ScoreFunction("right", cuda="x / (1.0f + fabsf(x))", numpy=lambda x: x / (1 + abs(x)))
WRONG = ScoreFunction("wrong", cuda="1.0001f * x / (1.0f + fabsf(x))", numpy=lambda x: x / (1 + abs(x)))


@pytest.fixture(autouse=True)
def _environment(monkeypatch: pytest.MonkeyPatch) -> None:
    """The command sets it for the rest of its process."""
    monkeypatch.setenv(edited.KERNELS, "")
    monkeypatch.delenv(edited.KERNELS)


def check(capsys: pytest.CaptureFixture[str], *arguments: object) -> tuple[int, str]:
    code = cli.main(["check", *map(str, arguments)])
    printed = capsys.readouterr()
    return code, printed.out + printed.err


def copy_of(name: str, folder: Path, old: str, new: str) -> tuple[Path, int]:
    """Copy a kernel file and replace a text that it has; return the copy and the line."""
    text = (KERNELS / name).read_text()
    path = folder / name
    path.parent.mkdir(parents=True, exist_ok=True)
    assert old in text
    path.write_text(text.replace(old, new, 1))
    return path, text[: text.index(old)].count("\n") + 1


# -- Planted faults ----------------------------------------------------------------------------------------------------


@needs_compilers
@pytest.mark.slow("compiler")
def test_a_factor_is_named_with_the_result_and_the_changed_line(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path, line = copy_of("update_bias.cu", tmp_path, "updated[e] - mean", "1.0001f * (updated[e] - mean)")
    code, printed = check(capsys, path)
    assert code == 1
    assert "FAULT update_bias, centred\n      result[0] is " in printed
    assert "60 of 60 differ, all by the factor 1.0001" in printed
    assert f"{path}:{line}: for (int64_t e" in printed


@needs_compilers
@pytest.mark.slow("compiler")
def test_a_missing_barrier_is_named_by_file_and_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    old = "slots[threadIdx.x] = 0;\n    __syncthreads();"
    path, line = copy_of("topk_select_long.cu", tmp_path, old, "slots[threadIdx.x] = 0;\n")
    code, printed = check(capsys, path)
    assert code == 1
    assert f"data race at {path}:{line - 1} and " in printed
    assert (
        f"{path}:{line + 1}: \n          was: __syncthreads();" in printed or f"{path}:{line + 1}: removed" in printed
    )


@needs_compilers
@pytest.mark.slow("compiler")
@pytest.mark.parametrize(
    ("name", "old", "op"),
    [
        ("permute.cu", "                __syncthreads();\n", "permute, a block for each row"),
        ("rows/dots.cuh", "if (WARPS > 1) __syncthreads();", "unpermute, gradients, a block for each row"),
        (
            "activation_topk_backward_wide.cu", "        __syncthreads();  // orders",
            "activation_topk_backward, softmax of 1500 experts",
        ),
        (
            "gate/route_by_gate.cuh", "__syncthreads();\n            route_tokens(first, min(count - first, STRIDE",
            "dense_router, decode path in bfloat16",
        ),
    ],
)  # fmt: skip
def test_barriers_that_only_some_calls_need_are_missed(
    name: str, old: str, op: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path, _ = copy_of(name, tmp_path, old, old.replace("__syncthreads();", ";"))
    code, printed = check(capsys, path)
    assert code == 1
    assert f"FAULT {op}" in printed
    assert "data race at " in printed


@needs_compilers
@pytest.mark.slow("compiler")
def test_a_misspelt_name_is_named_by_file_and_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path, line = copy_of("update_bias.cu", tmp_path, "own_total += ", "own_totl += ")
    code, printed = check(capsys, path)
    assert code == 1
    assert f'{path}({line}): error: identifier "own_totl" is undefined' in printed
    assert "executed" not in printed


@needs_compilers
@pytest.mark.slow("compiler")
def test_a_kernel_that_ends_its_process_is_a_fault(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    dies = "if (!CENTER) return;\n#ifndef __CUDACC__\n    __builtin_trap();\n#endif"
    path, _ = copy_of("update_bias.cu", tmp_path, "if (!CENTER) return;", dies)
    code, printed = check(capsys, path)
    assert code == 1
    assert f"FAULT update_bias, centred\n      {execution.DIED}" in printed
    assert "a sanitizer did not finish" in printed


@needs_compilers
@pytest.mark.slow("compiler")
def test_all_is_well_in_both_forms(capsys: pytest.CaptureFixture[str]) -> None:
    code, printed = check(capsys, "update_bias")
    assert (code, "equal to the reference\nAll is well." in printed) == (0, True)
    code, printed = check(capsys, "update_bias", "--json")
    found = json.loads(printed)
    assert (code, found["ok"], found["faults"], found["not_checked"]) == (0, True, [], [])
    assert {kernel["architecture"] for kernel in found["kernels"]} == set(architectures.ARCHITECTURES)


@needs_compilers
@pytest.mark.slow("compiler")
def test_scores(capsys: pytest.CaptureFixture[str]) -> None:
    code, printed = check(capsys, "--score", f"{__name__}:RIGHT")
    assert code == 0
    assert "agrees with its NumPy function at 2714 x" in printed
    code, printed = check(capsys, "--score", f"{__name__}:WRONG")
    assert code == 1
    assert "by CUDA and" in printed


# -- What is missing ---------------------------------------------------------------------------------------------------


def test_without_compilers_nothing_is_well(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(device, "why_not", lambda: "g++ is missing")
    monkeypatch.setattr(nvrtc, "find", lambda: None)
    code, printed = check(capsys, "update_bias")
    assert code == 1
    assert "NOT CHECKED: nothing was compiled for GPUs, as there is no NVRTC: install " in printed
    assert "NOT CHECKED: no kernel was executed: g++ is missing." in printed
    assert "All is well" not in printed


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["topk"], "topk is neither a file nor an op; ops are activation_topk, "),
        ([__file__], "no kernel file has this name"),
        (["--score", "json:loads"], "this is a function, but must be a ScoreFunction"),
        (["--score", "json:nothing"], "module 'json' has no attribute 'nothing'"),
        (["--score", "no_such_module:x"], "No module named 'no_such_module'"),
    ],
)
def test_a_wrong_command_line(arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    code, printed = check(capsys, *arguments)
    assert code == 2
    assert message in printed


def test_a_constant_that_nobody_declares_is_told_without_a_compiler(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(nvrtc, "find", lambda: None)
    path, _ = copy_of("update_bias.cu", tmp_path, "SPECIALISED bool CENTER", "SPECIALISED bool CENTRE")
    code, printed = check(capsys, path)
    assert code == 1
    assert f"{path} has no constant CENTER" in printed


# -- Cases -------------------------------------------------------------------------------------------------------------


def test_the_cases_reach_every_kernel_and_every_header(monkeypatch: pytest.MonkeyPatch) -> None:
    backend = LateBackend()
    backend.kernels = []
    monkeypatch.setitem(compiler.BACKENDS, "cpu", backend)
    for number in range(len(cases.CASES)):
        cases.run_case(number)
    reached = {name for kernel in backend.kernels for name in kernel.files}
    assert reached >= set(edited.names()) - {"routing/score_function.cuh", "routing/score_function_gradient.cuh"}
    assert set(architectures.OLDEST) <= {kernel.function for kernel in backend.kernels}


@pytest.mark.parametrize(("name", "found"), [("routing/weigh.cuh", "routing/weigh.cuh"), ("weigh.cuh",) * 2])
def test_copies_alone_and_in_their_folder(name: str, found: str, tmp_path: Path) -> None:
    path = tmp_path / name
    path.parent.mkdir(exist_ok=True)
    path.write_text('#include "routing/own.cuh"\n')
    (path.parent / "own.cuh").write_text("")
    (tmp_path / "permute.cu").write_text("")
    copies = edited.copies(path)
    alone = {"routing/weigh.cuh": path}
    assert copies == (alone if name == "weigh.cuh" else alone | {
        "permute.cu": tmp_path / "permute.cu", "routing/own.cuh": tmp_path / "routing/own.cuh"
    })  # fmt: skip


def test_only_what_differs_is_a_change(tmp_path: Path) -> None:
    shutil.copytree(KERNELS, tmp_path, dirs_exist_ok=True)
    path, line = copy_of("device/warp.cuh", tmp_path, "#pragma once", "#pragma  once  // mine")
    assert edited.changes(edited.copies(tmp_path)) == {
        "device/warp.cuh": [edited.Change(path, line, "#pragma once", "#pragma once // mine")]
    }


@pytest.mark.parametrize(
    ("found", "expected", "text"),
    [
        (np.array([1, 3]), np.array([1, 2]), "x[1] is 3, not 2; 1 of 2 differ"),
        (np.float32([1, 3, np.nan]), np.float32([1, 2, np.nan]), "x[1] is 3, not 2; 1 of 3 differ, by at most 1"),
        (np.float32([1.0001, 3.0003]), np.float32([1, 3]), "2 of 2 differ, all by the factor 1.0001"),
        (np.float32([np.nan, 3]), np.float32([1, 3]), "1 of them NaN"),
        (np.float32([1.000001, 1e-9]), np.float32([1, 0]), None),
        (np.array([1.004], ml_dtypes.bfloat16), np.array([1], ml_dtypes.bfloat16), None),
        (np.array([1.016], ml_dtypes.bfloat16), np.array([1], ml_dtypes.bfloat16), "1 of 1 differ"),
    ],
)
def test_differences(found: Any, expected: Any, text: str | None) -> None:
    told = comparison.difference({"x": found}, {"x": expected})
    assert told is None if text is None else text in str(told)


# -- Editors, imports --------------------------------------------------------------------------------------------------


@pytest.mark.slow("compiler")
@pytest.mark.skipif(device.why_not() is not None, reason="there is no g++ here")
@pytest.mark.parametrize("name", ["topk_select_long.cu", "gate/gemm_mma.cuh"])
def test_editors_read_kernels_by_the_written_commands(name: str, tmp_path: Path) -> None:
    assert cli.main(["check", "--copy", str(tmp_path / "mine"), "--compile-commands", str(tmp_path / "mine")]) == 0
    entries = json.loads((tmp_path / "mine" / "compile_commands.json").read_text())
    assert [Path(entry["file"]) for entry in entries] == [tmp_path / "mine" / name for name in edited.names()]
    (entry,) = (entry for entry in entries if entry["file"].endswith(f"/{name}"))
    done = subprocess.run(entry["arguments"], cwd=entry["directory"], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert Path(str(clangd.commands(tmp_path)[0]["file"])).is_relative_to(KERNELS)


@pytest.mark.slow("process")
def test_neither_the_package_nor_the_command_line_imports_the_executor() -> None:
    code = "import sys, cupy_router, cupy_router.cli; print([m for m in sys.modules if 'simt' in m or '.check.' in m])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=os.environ)
    assert (done.returncode, done.stdout) == (0, "[]\n"), done.stderr
