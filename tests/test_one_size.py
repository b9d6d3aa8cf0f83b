# SPDX-License-Identifier: Apache-2.0
"""One size of a benchmark from the shell: its command line, its table, and that every benchmark measures what it says.

NumPy stands in for CuPy, and the clock says 1.5 microseconds; calls, the floor and rivals of PyTorch run for real.
"""

from __future__ import annotations

import importlib
import re
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any
from unittest import mock

import numpy as np
import pytest

from benchmarks import one_size, rows
from benchmarks.one_size import OneSize, Request
from benchmarks.rows import OURS, Row

ENVIRONMENT = {"gpu": {"name": "Some GPU", "driver_version": "1.2"}, "commit": "abc", "date": "2026-01-02"}


# -- The command line --------------------------------------------------------------------------------------------------


def nothing(**_: Any) -> list[Row]:
    return []


DECLARED = OneSize({"n": 64, "num_experts": 256, "dtype": ("float32", "bfloat16")}, nothing)


@pytest.mark.parametrize(
    ("line", "size"),
    [
        ("", None),
        ("--n 8", {"n": 8, "num_experts": 256, "dtype": "float32"}),
        ("--num-experts 384 --dtype bfloat16", {"n": 64, "num_experts": 384, "dtype": "bfloat16"}),
    ],
)
def test_options_that_are_given_are_completed(line: str, size: dict[str, Any] | None) -> None:
    assert one_size.parse(DECLARED, line.split()) == Request(size, None, None, False)


def test_files_are_written_where_the_line_says() -> None:
    assert one_size.parse(DECLARED, ["--n", "8", "--json", "a.json"]).json == Path("a.json")
    whole = one_size.parse(DECLARED, ["--quick", "--output", "folder"])
    assert whole == Request(None, None, Path("folder"), True)
    assert one_size.parse(None, ["--quick"]) == Request(None, None, None, True)


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("--n 0", "0 is not positive"),
        ("--n x", "invalid"),
        ("--dtype float64", "invalid choice: 'float64'"),
        ("--n 8 --quick", "for the whole benchmark"),
        ("--n 8 --output folder", "for the whole benchmark"),
        ("--json a.json", "--json is for one size: give one of --n, --num-experts, --dtype too"),
    ],
)
def test_lines_that_cannot_be_meant_are_refused(line: str, message: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stopped:
        one_size.parse(DECLARED, line.split())
    assert stopped.value.code == 2
    assert message in capsys.readouterr().err


def test_the_table_names_what_rows_share_once() -> None:
    cell: Row = {"what": "gpu", "op": "some_op", "n": 64, "dtype": "float32"}
    measured = [cell | {"by": OURS, "us": 2.0, "spread_us": 0.02}, cell | {"by": "floor", "us": 1.5, "spread_us": 0.01}]
    measured.append(cell | {"by": OURS, "method": "plain", "us": 123.4, "spread_us": 1.0})
    lines = one_size.table(measured).splitlines()
    assert lines[0] == "some_op gpu n=64 dtype=float32"
    assert [line.split("  ")[0] for line in lines[1:]] == ["microseconds", OURS, "floor", f"{OURS} method=plain"]
    assert [line.split()[-3:] for line in lines[2:]] == [
        ["2.00", "0.02", "1.00"], ["1.50", "0.01", "0.75"], ["123", "1.00", "61.70"]
    ]  # fmt: skip


# -- The benchmarks ----------------------------------------------------------------------------------------------------


class NumPyAsCuPy(ModuleType):
    """NumPy under CuPy's name, as far as benchmarks use it."""

    def __init__(self) -> None:
        super().__init__("cupy")
        numbers = np.random.default_rng(0)
        self.random = SimpleNamespace(
            standard_normal=lambda shape, dtype: numbers.standard_normal(shape).astype(dtype),
            randint=lambda low, high, shape: numbers.integers(low, high, shape),
        )
        self.RawKernel = mock.MagicMock()

    def __getattr__(self, name: str) -> Any:
        return getattr(np, name)


@pytest.fixture
def bench(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[str, str], None]]:
    """A function that runs a benchmark with a command line, on NumPy; modules are imported anew for it."""
    mine = {name: module for name, module in sys.modules.items() if name.partition(".")[0] == "benchmarks"}
    for name in mine:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "cupy", NumPyAsCuPy())
    harness: Any = importlib.import_module("benchmarks.harness")

    def gpu_row(call: Callable[[int], Any], cell: Row, by: str = OURS, **_: Any) -> Row:
        if by != "floor":
            call(0)
        return {"what": "gpu"} | cell | {"by": by, "us": 1.5, "spread_us": 0.01}

    harness.gpu_row, harness.warm_up, harness.environment = gpu_row, lambda: None, lambda: ENVIRONMENT
    if importlib.util.find_spec("torch"):
        importlib.import_module("benchmarks.rivals").compiled = lambda function: function  # type: ignore[attr-defined]

    def run(name: str, line: str) -> None:
        module: Any = importlib.import_module(f"benchmarks.bench_{name}")
        monkeypatch.setattr(sys, "argv", [name, *line.split()])
        harness.main(name, module.measure, module.ONE_SIZE)

    yield run
    for name in [name for name in sys.modules if name.partition(".")[0] == "benchmarks"]:
        del sys.modules[name]
    sys.modules.update(mine)


LINES = {  # a benchmark that is not here is run with --n 8
    "activation_topk": ["--n 8 --num-experts 60 --top-k 6 --dtype {}", "--n 8"],
    "activation_topk_backward": ["--n 8 --num-experts 60 --top-k 6 --dtype {}"],
    "topk_select": ["--rows 8 --columns 60 --k 6 --dtype {}", "--columns 3000 --cache cold"],
    "hash_router": [
        "--n 8 --num-experts 60 --top-k 6 --dtype {}",
        "--source uniform --n 8",
        "--source products --n 8 --hidden 64",
    ],
    "dense_router": ["--n 8 --num-experts 60 --top-k 6 --hidden 64 --dtype {}"],
    "methods": ["--n 8 --preset deepseek-v3"],
}
FILES = {path.stem.removeprefix("bench_") for path in Path(one_size.__file__).parent.glob("bench_*.py")}
FILES -= {"frameworks", "transformers", "expert_parallel"}  # of one shape, by many ways; of whole models; of ranks
RUNS = [
    (name, line.format(dtype))
    for name in sorted(FILES)
    for line in LINES.get(name, ["--n 8"])
    for dtype in (one_size.FLOATS if "{}" in line else ("",))
]


@pytest.mark.parametrize(("name", "line"), RUNS)
def test_one_size_is_measured_and_printed(
    name: str, line: str, bench: Callable[[str, str], None], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    bench(name, f"{line} --json {tmp_path / 'one.json'}")
    content = rows.load(tmp_path / "one.json")
    assert content["environment"] == ENVIRONMENT
    first, *others = content["rows"]
    assert (first["by"], first["us"]) == (OURS, 1.5)
    sizes = dict(re.findall(r"--([\w-]+) (\S+)", line))
    letters = {"num-experts": "E", "columns": "E", "top-k": "k", "rows": "n", "hidden": "H"}
    assert {letters.get(option, option): value for option, value in sizes.items()}.items() <= {
        key: str(value) for key, value in first.items()
    }.items()
    printed = capsys.readouterr().out
    assert "Some GPU, driver 1.2, NVRTC unknown, commit abc, 2026-01-02\n" in printed
    assert rows.label({key: first[key] for key in ("op", "what")}) in printed
    for row in others:
        assert re.search(rf"^{re.escape(row['by'])} .*1\.50 +0\.01 +1\.00$", printed, re.M)
    wide = "16" not in line  # else rivals may choose otherwise than we do, and are left out
    who = {row["by"] for row in others}
    # Some are beside our own call that does less.
    ours_alone = name in ("methods", "fused_layout", "given_experts", "several_biases")
    assert "floor" in who or ours_alone or (name == "hash_router" and not (wide and first["source"] == "logits"))
    if importlib.util.find_spec("torch") and wide and "uniform" not in line and not ours_alone:
        assert any("orch" in rival for rival in who), printed


def test_a_size_that_cannot_be_is_told_in_a_sentence(bench: Callable[[str, str], None]) -> None:
    with pytest.raises(SystemExit, match=r"activation_topk: .*top_k.*256"):
        bench("activation_topk", "--top-k 300")


def test_nothing_is_written_unless_asked(
    bench: Callable[[str, str], None], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    bench("topk_select", "--rows 8")  # which imports what is replaced below
    harness: Any = sys.modules["benchmarks.harness"]
    saved = mock.Mock()
    monkeypatch.setattr(harness.results, "save", saved)
    monkeypatch.setattr(sys, "argv", ["topk_select"])
    harness.main("topk_select", lambda quick: [{"op": "topk_select", "by": OURS, "us": 1.5}])
    bench("topk_select", "--rows 8")
    saved.assert_not_called()
    monkeypatch.setattr(sys, "argv", ["topk_select", "--output", str(tmp_path)])
    harness.main("topk_select", lambda quick: [{"op": "topk_select", "by": OURS, "us": 1.5}])
    assert saved.call_args.args[0] == tmp_path / "topk_select.json"
