# SPDX-License-Identifier: Apache-2.0
"""Comparison, plots and tables of benchmark results, on small made-up files. Measuring needs a GPU."""

from __future__ import annotations

import ast
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from benchmarks import compare, kernel_sources, ncu, plot, rows, steps, table
from benchmarks.bars import MODEL_STEPS, bar_16_bit
from benchmarks.rows import OURS, Row
from cupy_router import RoutingMethod, activation_topk, hash_router
from cupy_router.ops.activation_topk_backward import activation_topk_backward
from examples import plot as losses_plot

ROOT = Path(__file__).parents[1]
ENVIRONMENT = {"gpu": {"name": "Some GPU", "driver_version": "1.2"}, "commit": "abc", "date": "2026-01-02"}
CELL = {"what": "gpu", "op": "activation_topk", "E": 256, "k": 6, "dtype": "float32", "cache": "warm"}
ROWS: list[Row] = [
    CELL | {"by": OURS, "n": 1, "us": 2.0, "spread_us": 0.02, "bar_us": 2.0},
    CELL | {"by": OURS, "n": 64, "us": 2.21, "spread_us": 0.03, "bar_us": 2.15},
    CELL | {"by": "floor", "n": 1, "us": 1.25, "spread_us": 0.01},
    CELL | {"by": "floor", "n": 64, "us": 1.5, "spread_us": 0.01},
    CELL | {"by": "PyTorch", "n": 64, "us": 123.4, "spread_us": 0.1},
    {"what": "host", "op": "activation_topk", "E": 256, "by": OURS, "call": "cupy", "us": 14.0, "spread_us": 0.4}
    | {"bar_us": 15.0, "garbage": 0},
]


def written(folder: Path, changed: list[Row] = ROWS, name: str = "activation_topk") -> Path:
    rows.save(folder / f"{name}.json", ENVIRONMENT, changed)
    return folder / f"{name}.json"


def with_change(number: int, **figures: Any) -> list[Row]:
    return [row | figures if i == number else row for i, row in enumerate(ROWS)]


def test_results_are_read_as_they_were_written(tmp_path: Path) -> None:
    assert rows.load(written(tmp_path)) == {"environment": ENVIRONMENT, "rows": ROWS}


@pytest.mark.parametrize(
    ("number", "figures", "code"),
    [
        (0, {}, 0),
        (0, {"us": 2.039}, 0),  # both spreads together are 0.04
        (0, {"us": 2.05}, 1),
        (0, {"us": 2.05, "spread_us": 0.04}, 0),
        (0, {"us": 1.0}, 0),
        (0, {"bar_us": 1.0}, 0),
        (2, {"us": 9.0}, 0),  # a rival
        (5, {"us": 15.0}, 1),
        (5, {"garbage": 3}, 1),
    ],
)
def test_compare_finds_what_became_slower_by_more_than_the_spread(
    number: int, figures: dict[str, Any], code: int, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    old, new = written(tmp_path / "old"), written(tmp_path / "new", with_change(number, **figures))
    assert compare.main([str(old), str(new)]) == code
    assert compare.main([str(old.parent), str(new.parent)]) == code
    said = capsys.readouterr().out
    assert f"{code} of 3 rows became slower" in said
    assert (rows.label(ROWS[number]) in said) == (code == 1)


def test_compare_reports_how_the_floor_moved(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    compare.main([str(written(tmp_path / "old")), str(written(tmp_path / "new", with_change(3, us=3.0)))])
    assert "PyTorch: 1.000 x, floor: 1.500 x" in capsys.readouterr().out


def test_compare_needs_common_rows(tmp_path: Path) -> None:
    other = [row | {"E": 384} for row in ROWS]
    assert compare.main([str(written(tmp_path / "old")), str(written(tmp_path / "new", other))]) == 2


def test_bars_are_met_or_not() -> None:
    words = [line.split()[-3:] for line in rows.bars_table(ROWS).splitlines()]
    assert words == [
        ["measured", "bar", "met"],
        ["2.00", "2.00", "yes"],
        ["2.21", "2.15", "no"],
        ["14.0", "15.0", "yes"],
    ]
    assert not rows.met(ROWS[5] | {"garbage": 1})
    assert rows.bars_table(ROWS[2:5]) == ""


def test_16_bit_rows_are_compared_with_the_float32_row_of_the_run() -> None:
    narrow = CELL | {"by": OURS, "dtype": "float16", "n": 64, "us": 2.0, "spread_us": 0.05}
    others = [narrow | {"n": 1024}, narrow | {"n": 64, "data": "equal"}]
    measured = [dict(row) for row in [*ROWS, narrow, *others]]
    bar_16_bit(measured)
    assert [row.get("bar_us") for row in measured[-3:]] == [2.26, None, None]
    assert measured[:-3] == ROWS


def test_tables_hold_the_figures_and_their_source(tmp_path: Path) -> None:
    written(tmp_path)
    text = tmp_path / "README.md"
    text.write_text(
        "before\n<!-- benchmarks -->\nold\n<!-- /benchmarks -->\nbetween\n<!-- bars -->\n<!-- /bars -->\nafter\n"
    )
    arguments = ["--results", str(tmp_path)]
    assert table.main(arguments, [text]) == 1
    assert "old" in text.read_text()
    assert table.main([*arguments, "--write"], [text]) == 0
    assert table.main(arguments, [text]) == 0
    lines = text.read_text().splitlines()
    assert "| **cupy_router** | 2.00 | 2.21 |" in lines
    assert "| PyTorch, eager |  | 123 |" in lines
    assert "| `activation_topk` from cupy | 14.0 |" in lines
    (run,) = {line for line in lines if line.startswith("Some GPU, driver 1.2, NVRTC unknown, commit abc, 2026-01-02.")}
    assert run.endswith(
        " **Older than the kernels** of `activation_topk`: their code, or a header of theirs, has changed since."
    )
    assert [lines[0], lines[-1], "between" in lines, "old" in lines] == ["before", "after", True, False]
    assert "| activation_topk E=256 k=6 dtype=float32 cache=warm | 2.00 (2.00) | **2.21** (2.15) |" in lines
    assert "| `activation_topk` from cupy | 14.0 (15.0) |" in lines


def test_results_are_as_old_as_the_code_of_their_kernels(tmp_path: Path) -> None:
    """Comments and layout are no code; a header is code of every kernel that includes it."""
    shutil.copytree(kernel_sources.KERNELS, tmp_path, dirs_exist_ok=True)
    recorded = {"kernels": kernel_sources.digests()}

    def after(file: str, old: str, new: str) -> dict[str, list[str]]:
        path, text = tmp_path / file, (kernel_sources.KERNELS / file).read_text()
        assert old in text
        path.write_text(text.replace(old, new, 1))
        now = kernel_sources.digests(tmp_path)
        path.write_text(text)
        names = ("permute", "update_bias", "dense_router", "methods", "host_profile")
        return {name: found for name in names if (found := kernel_sources.changed(name, recorded, now))}

    assert after("permute.cu", "{", "  // a comment\n  {") == {}
    assert after("permute.cu", "{", "{ ;") == {"permute": ["permute"]}
    assert after("activation_topk_wide.cu", "{", "{ ;") == {
        "dense_router": ["activation_topk"], "methods": ["activation_topk"]
    }  # fmt: skip
    assert after("given_experts.cu", "{", "{ ;") == {}, "only its own benchmark times it"
    assert list(after("device/types.cuh", "{", "{ ;")) == ["permute", "update_bias", "dense_router", "methods"]
    unknown = kernel_sources.changed("permute", {}, recorded["kernels"])
    assert unknown == ["permute", "unpermute"]


def test_the_table_of_the_readme_may_not_be_older_than_the_kernels(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    now = kernel_sources.digests()
    monkeypatch.setattr(kernel_sources, "digests", lambda: now | {"activation_topk": "of other code"})
    written: dict[Path, str] = {}
    monkeypatch.setattr(Path, "write_text", lambda path, text: written.update({path: text}))
    readme, others = ROOT / "README.md", [path for path in table.FILES if path != ROOT / "README.md"]
    for arguments in ([], ["--write"]):
        assert table.main(arguments, [readme]) == 1
        assert "README.md is older than the kernels: measure again on a GPU" in capsys.readouterr().out
    assert table.main(["--write"], others) == 0, "these say that they are older"
    assert all(table.OLDER in text for text in written.values())


def test_every_kernel_is_of_an_op_and_results_are_of_ops() -> None:
    assert {kernel_sources.family(path.stem) for path in kernel_sources.KERNELS.glob("*.cu")} == set(
        kernel_sources.FAMILIES
    )
    assert {op for ops in kernel_sources.MEASURED.values() for op in ops} <= kernel_sources.FAMILIES.keys()


STEP = {"what": "step", "model": "glm", "layers": 4, "mode": "decode", "n": 1, "experts": "grouped_mm"}
TURNS = {  # the clock changes in the third turn, for all alike
    steps.OWN: [[1000.0, 1010.0], [1000.0, 990.0], [2000.0, 2000.0]],
    steps.ROUTERS: [[960.0, 960.0], [950.0, 950.0], [1900.0, 1900.0]],
    steps.EXPERTS: [[900.0, 900.0], [850.0, 850.0], [1840.0, 1840.0]],
}


def test_steps_are_compared_with_the_own_code_of_the_same_turn() -> None:
    own, routers, experts = steps.rows_of(TURNS, STEP)
    assert own == STEP | {"by": "transformers", "us": 1005.0, "spread_us": 1005.0}
    assert (routers["by"], routers["swapped"], routers["pairs"]) == (OURS, steps.ROUTERS, [0.955, 0.955, 0.95])
    assert (experts["ratio"], experts["pairs"], experts["bar_ratio"]) == (0.896, [0.896, 0.854, 0.92], 0.9)
    assert "bar_ratio" not in routers
    assert rows.met(experts)
    assert not rows.met(experts | {"ratio": 0.901})


def test_routers_alone_may_not_make_batched_mm_slower() -> None:
    turns = {steps.OWN: [[100.0, 100.0]] * 3, steps.ROUTERS: [[100.0, 100.0], [102.0, 102.0], [104.0, 104.0]]}
    _, row = steps.rows_of(turns, STEP | {"experts": "batched_mm"})
    assert (row["ratio"], row["spread_ratio"], row["bar_ratio"]) == (1.02, 0.04, 1.04)


def test_models_have_a_line_for_each_step() -> None:
    measured = steps.rows_of(TURNS, STEP)
    measured[-1]["ratio"] = 0.91
    lines = table.models({"transformers": {"environment": ENVIRONMENT, "rows": measured}}).splitlines()
    assert lines[2:3] == ["| glm, 4 layers, decode, 1 token | 1.00 | 0.96, 0.95 | 0.90, **0.91** (0.90) |"]
    assert lines[-1].startswith("Some GPU")


def test_every_required_ratio_is_of_a_step_that_is_measured() -> None:
    """The bars of bench_transformers.py name models, modes and numbers of tokens as it does."""
    text = (ROOT / "benchmarks/bench_transformers.py").read_text() + (ROOT / "benchmarks/models.py").read_text()
    for model, mode, swapped in MODEL_STEPS:
        assert f'"{model}"' in text
        assert f'rows("{mode}"' in text
        assert swapped in (steps.ROUTERS, steps.EXPERTS)


def test_cliffs_are_steps_between_neighbouring_sizes() -> None:
    sweep = [CELL | {"by": OURS, "n": 64, "E": E, "us": us} for E, us in ((64, 2.0), (8, 1.9), (72, 3.2))]
    lines = table.cliffs({"activation_topk": {"environment": ENVIRONMENT, "rows": sweep}}).splitlines()[2:4]
    assert [line.split(" | ")[1:] for line in lines] == [
        ["E 64 to 72", "2.00", "3.20", "1.60", "no |"],
        ["E 8 to 64", "1.90", "2.00", "1.05", "yes |"],
    ]


def test_methods_are_listed_with_the_plain_one() -> None:
    cell = {"what": "gpu", "by": OURS, "E": 64, "k": 6, "preset": "some-model"}
    measured = [cell | {"n": n, "us": us, "bar_us": 3.0} for n, us in ((64, 2.5), (8192, 3.5))]
    measured += [cell | {"n": n, "us": 2.0, "method": "plain sqrtsoftplus"} for n in (64, 8192)]
    measured += [{"what": "host", "by": OURS, "part": "compile some-model", "us": 123456}]
    lines = table.methods({"methods": {"environment": ENVIRONMENT, "rows": measured}}).splitlines()
    assert lines[2] == "| some-model (E 64, k 6) | 2.50 | 2.00 | 1.25 | 3.50 | 2.00 | **1.75** | 123 |"


def test_host_profile_has_columns_before_and_after() -> None:
    part = {"what": "host", "part": "current stream", "us": 0.5}
    files = {"host_profile_before": {"rows": [part, part | {"part": "gone", "us": 3.0}]}}
    files["host_profile"] = {"rows": [part | {"us": 0.25}]}
    assert table.host(files).splitlines()[2:] == ["| current stream | 0.50 | 0.25 |", "| gone | 3.00 |  |"]


def test_every_table_can_be_made_without_results() -> None:
    assert {function({}) for function in table.TABLES.values()} == {table.NONE}


def test_tables_in_the_repository_are_those_of_its_results(capsys: pytest.CaptureFixture[str]) -> None:
    assert table.main([]) == 0, capsys.readouterr().out
    found = re.findall(r"<!-- (\w+) -->", (ROOT / "benchmarks/README.md").read_text())
    assert found == [name for name in table.TABLES if name not in ("summary", "benchmarks", "batch_invariance")]


def test_a_file_is_written_only_where_a_command_is_told() -> None:
    """An option for a place to write has no default, so that no command rewrites files of the repository by itself."""
    places = {"--json", "--output"}
    found = set()
    for path in (path for folder in ("benchmarks", "examples", "tests") for path in (ROOT / folder).rglob("*.py")):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute) and node.func.attr == "add_argument":
                names = {argument.value for argument in node.args if isinstance(argument, ast.Constant)}
                if names & places:
                    found.add(path.name)
                    assert "default" not in {keyword.arg for keyword in node.keywords}, f"{path.name}: {names & places}"
    assert found >= {"one_size.py", "compare_trees.py", "compile_methods.py", "ncu.py", "plot.py"}


@pytest.mark.parametrize("command", [plot, losses_plot])
def test_plots_ask_for_a_folder(command: Any, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        command.main([])
    assert "the following arguments are required: --output" in capsys.readouterr().err


@pytest.mark.slow("seconds")
def test_plots_of_the_gpu_at_hand_take_one_command(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    commands: list[list[str]] = []
    monkeypatch.setattr(plot.subprocess, "run", lambda command, check: commands.append(command))
    assert plot.main(["--measure", "--quick", "--results", str(tmp_path / "mine"), "--output", str(tmp_path)]) == 0
    modules = [command[2] for command in commands]
    assert modules == [f"benchmarks.bench_{op}" for op in plot.PANELS]
    for command, module in zip(commands, modules, strict=True):
        assert (ROOT / f"{module.replace('.', '/')}.py").is_file()
        assert command[3:] == ["--output", str(tmp_path / "mine"), "--quick"]


def test_plots_are_reproducible(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib", reason="matplotlib is not installed (it comes with the dev extra)")
    written(tmp_path)
    for folder in ("one", "two"):
        assert plot.main(["--results", str(tmp_path), "--output", str(tmp_path / folder)]) == 0
    drawn = (tmp_path / "one/activation_topk.svg").read_text()
    assert drawn == (tmp_path / "two/activation_topk.svg").read_text()
    assert [path.name for path in (tmp_path / "one").iterdir()] == ["activation_topk.svg"]
    for text in ("floor: memory alone", "PyTorch, eager", "cupy_router", "Some GPU, 2026-01-02, commit abc"):
        assert text in drawn  # a comment holds the text of each label


def test_curves_are_sorted_and_leave_special_data_out() -> None:
    panel = plot.PANELS["activation_topk"][0]
    lines = plot.curves([*reversed(ROWS), ROWS[0] | {"data": "equal"}, ROWS[0] | {"E": 384}], panel)
    assert lines == {OURS: [(1, 2.0), (64, 2.21)], "floor": [(1, 1.25), (64, 1.5)], "PyTorch": [(64, 123.4)]}


def test_counters_of_ncu_are_medians_in_microseconds() -> None:
    names = ["duration_us", "registers", "l2_bytes"]
    heads = ['"ID"', '"Kernel Name"', *(f'"{ncu.METRICS[name]}"' for name in names)]
    launches = ['"0","k","2,500","40","1,024"', '"1","k","2,100","40","1,024"', '"2","k","2,200","40","n/a"']
    text = "\n".join(["==PROF== something", ",".join(heads), '"","","ns","register/thread","byte"', *launches])
    assert ncu.parse(text) == {"duration_us": 2.2, "registers": 40.0, "l2_bytes": 1024.0}
    with pytest.raises(ValueError, match="ERR_NVGPUCTRPERM"):
        ncu.parse("==ERROR== ERR_NVGPUCTRPERM")


@pytest.mark.slow("process")
def test_reading_results_needs_only_python() -> None:
    code = """
import sys
import benchmarks.compare, benchmarks.compare_trees, benchmarks.ncu, benchmarks.one_size
import benchmarks.plot, benchmarks.table
print(*sorted({"cupy", "jax", "matplotlib", "numpy", "torch", "triton"} & set(sys.modules)))
"""
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (0, "\n"), done.stderr


def test_pytorch_gradients_equal_ours() -> None:
    torch = pytest.importorskip("torch", reason="torch is not installed")
    from benchmarks import rivals

    random = np.random.default_rng(1)
    logits, bias, upstream = (random.standard_normal(shape, np.float32) for shape in ((33, 60), 60, (33, 6)))
    method = RoutingMethod(60, 6, "sqrtsoftplus", scale=2.5)
    indices = activation_topk(logits, method, bias=bias).indices
    ours = activation_topk_backward(upstream, indices, logits, method).grad_logits
    gradient = rivals.router_gradient(*map(torch.from_numpy, (logits, bias)), 6, 2.5, torch.from_numpy(upstream))
    for _ in range(2):
        np.testing.assert_allclose(gradient().numpy(), ours, rtol=1e-4, atol=1e-6)


def test_pytorch_rivals_equal_the_ops() -> None:
    torch = pytest.importorskip("torch", reason="torch is not installed")
    from benchmarks import rivals

    random = np.random.default_rng(0)
    logits, bias = (random.standard_normal(shape, np.float32) for shape in ((33, 60), 60))
    method = RoutingMethod(60, 6, "sqrtsoftplus", scale=2.5)
    expert_table = random.integers(0, 60, (100, 6))
    token_ids = random.integers(0, 100, 33)
    x, weight = (random.standard_normal(shape, np.float32) for shape in ((33, 16), (60, 16)))
    tensors = torch.from_numpy(token_ids), torch.from_numpy(expert_table)
    for ours, theirs in (
        (
            activation_topk(logits, method, bias=bias),
            rivals.router(torch.from_numpy(logits), torch.from_numpy(bias), 6, 2.5),
        ),
        (
            hash_router(token_ids, expert_table, method, logits=logits),
            rivals.hash_layer(*tensors, torch.from_numpy(logits), 2.5),
        ),
        (
            hash_router(token_ids, expert_table, method, x=x, weight=weight),
            rivals.hash_layer_products(*tensors, torch.from_numpy(x), torch.from_numpy(weight), 2.5),
        ),
    ):
        np.testing.assert_array_equal(theirs[1].numpy(), ours[1])
        np.testing.assert_allclose(theirs[0].numpy(), ours[0], rtol=1e-4)
