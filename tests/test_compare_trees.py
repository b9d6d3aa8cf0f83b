# SPDX-License-Identifier: Apache-2.0
"""Two checkouts timed in turns: the order of turns, the verdict, the file, and that a turn times the tree it is for.

No GPU: turns are made up, or the calls run on NumPy under CuPy's name.
"""

from __future__ import annotations

import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest import mock

import pytest

from benchmarks import compare_trees, rows, turn
from benchmarks.compare_trees import Tree, Turn
from tests.test_one_size import NumPyAsCuPy

ROOT = Path(__file__).parents[1]
ENVIRONMENT = {"gpu": {"name": "Some GPU", "driver_version": "1.2"}, "commit": "abc", "date": "2026-01-02"}
CELLS = {"host": {"what": "host", "op": "some_op", "call": "torch"}, "gpu": {"what": "gpu", "op": "some_op", "n": 64}}


def made_up(kind: str, us: float, **fields: Any) -> Turn:
    """A turn with one row, whose samples lie within 0.02 microseconds."""
    row = {"cell": CELLS[kind], "samples": [us - 0.01, us, us + 0.01]} | ({"garbage": 0} if kind == "host" else {})
    return {"not_watching": True, "rows": [row], "left_out": []} | fields


class Runner:
    """Takes turns that are made up: times by tree and kind, in the order in which they are asked for."""

    def __init__(self, **us: float) -> None:
        self.us, self.asked, self.now, self.seconds = us, list[tuple[str, str]](), 0.0, 1.0

    def __call__(self, tree: Tree, kind: str, quick: bool) -> Turn:
        self.asked.append((tree.name, kind))
        self.now += self.seconds
        return made_up(kind, self.us.get(f"{tree.name}_{kind}", 2.0))


TREES = [Tree("old", ROOT), Tree("new", ROOT)]


def test_trees_take_turns() -> None:
    runner = Runner()
    run = compare_trees.take_turns(TREES, False, run=runner)
    assert runner.asked == [("old", "host"), ("new", "host")] * 5 + [("old", "gpu"), ("new", "gpu")] * 3
    assert {kind: {name: len(turns) for name, turns in found.items()} for kind, found in run.turns.items()} == {
        "host": {"old": 5, "new": 5},
        "gpu": {"old": 3, "new": 3},
    }
    assert run.remarks == []


def test_no_turn_begins_that_would_end_too_late() -> None:
    runner = Runner()
    runner.seconds = 10.0
    run = compare_trees.take_turns(TREES, False, 100.0, runner, lambda: runner.now)
    assert [len(run.turns[kind]["new"]) for kind in ("host", "gpu")] == [5, 2]
    assert run.remarks == ["only 2 of 3 gpu turns for each tree: 100 s are over"]


def test_remarks_name_what_was_left_out_and_watched_files() -> None:
    def run(tree: Tree, kind: str, quick: bool) -> Turn:
        return made_up(kind, 2.0, left_out=["host, torch: gone"] * (kind == "host"), not_watching=tree.name == "new")

    remarks = compare_trees.take_turns(TREES, False, run=run).remarks
    assert remarks[:2] == ["old: left out: host, torch: gone", "new: left out: host, torch: gone"]
    assert "watched in one tree" in remarks[2]


@pytest.fixture
def compared(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Callable[..., tuple[int, dict[str, Any]]]:
    """A function that runs the command with a runner: its exit code and the file that it wrote."""
    monkeypatch.setattr(compare_trees, "environment", lambda: dict(ENVIRONMENT))

    def run(runner: compare_trees.Runner) -> tuple[int, dict[str, Any]]:
        code = compare_trees.main([str(ROOT), "--output", str(tmp_path / "a.json")], runner)
        return code, rows.load(tmp_path / "a.json")

    return run


def test_nothing_is_written_unless_asked(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(compare_trees, "environment", lambda: dict(ENVIRONMENT))
    monkeypatch.setattr(rows, "save", mock.Mock(side_effect=AssertionError))
    assert compare_trees.main([str(ROOT)], Runner()) == 0


@pytest.mark.slow("process")
@pytest.mark.parametrize(
    ("us", "code", "verdicts"),
    [
        ({}, 0, ["same", "same"]),
        ({"new_host": 2.03}, 0, ["same", "same"]),  # both spreads together are 0.04
        ({"new_host": 2.05}, 1, ["slower", "same"]),
        ({"new_gpu": 2.5}, 1, ["same", "slower"]),
        ({"new_host": 1.9}, 0, ["faster", "same"]),
    ],
)
def test_a_verdict_for_each_row(
    us: dict[str, float], code: int, verdicts: list[str], compared: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    found, content = compared(Runner(**us))
    assert found == code
    assert [(row["tree"], row["what"]) for row in content["rows"]] == [
        (tree, kind) for kind in ("host", "gpu") for tree in ("old", "new")
    ]
    assert [row["verdict"] for row in content["rows"][1::2]] == verdicts
    assert [len(row["turns_us"]) for row in content["rows"]] == [5, 5, 3, 3]
    printed = capsys.readouterr().out
    assert [line.split()[-1] for line in printed.splitlines()[1:3]] == verdicts
    assert f"{verdicts.count('slower')} of 2 rows became slower; turns of each tree: 5 host, 3 gpu" in printed


@pytest.mark.slow("process")
def test_the_file_says_what_was_timed_where(compared: Any) -> None:
    environment = compared(Runner())[1]["environment"]
    assert environment.items() >= ENVIRONMENT.items()
    assert set(environment["trees"]) == {"old", "new"}
    assert re.fullmatch("[0-9a-f]{64}", environment["trees"]["new"]["sha256"])
    assert environment["trees"]["old"] == environment["trees"]["new"]  # of one folder here
    assert environment["remarks"] == []


@pytest.mark.slow("process")
def test_a_copy_within_a_checkout_has_no_commit_of_its_own(tmp_path: Path) -> None:
    git = ["git", "-c", "user.name=a", "-c", "user.email=a@b", "-C", str(tmp_path)]
    for command in (["init", "-q"], ["commit", "-q", "--allow-empty", "-m", "empty"]):
        subprocess.run([*git, *command], check=True)
    inner = tree_of(tmp_path / "inner")
    outer = Tree("new", tmp_path.resolve())
    assert re.fullmatch("[0-9a-f]{7,}", compare_trees.facts(outer)["commit"])
    assert compare_trees.facts(inner)["commit"] == "unknown"
    assert compare_trees.facts(inner)["sha256"] != compare_trees.facts(outer)["sha256"]


@pytest.mark.slow("process")
def test_more_garbage_is_slower(compared: Any) -> None:
    def run(tree: Tree, kind: str, quick: bool) -> Turn:
        found = made_up(kind, 2.0)
        if (tree.name, kind) == ("new", "host"):
            found["rows"][0]["garbage"] = 100
        return found

    assert compared(run)[0] == 1


@pytest.mark.slow("process")
def test_turns_that_differ_widen_the_spread(compared: Any) -> None:
    host = iter([2.0, 2.2, 2.1, 2.0, 2.0, 2.2, 2.1, 2.0, 2.0, 2.2])  # old, new, old, new and so on
    code, content = compared(lambda tree, kind, quick: made_up(kind, next(host, 2.0)))
    old, new = content["rows"][:2]
    assert [old["turns_us"], new["turns_us"]] == [[2.0, 2.1, 2.0, 2.1, 2.0], [2.2, 2.0, 2.2, 2.0, 2.2]]
    assert new["us"] - old["us"] > 0.15
    assert old["spread_us"] >= 0.1
    assert new["spread_us"] >= 0.2
    assert (code, new["verdict"]) == (0, "same")


@pytest.mark.slow("process")
def test_rows_of_one_tree_alone_are_named(compared: Any) -> None:
    def run(tree: Tree, kind: str, quick: bool) -> Turn:
        return made_up(kind, 2.0) | ({"rows": []} if (tree.name, kind) == ("new", "gpu") else {})

    code, content = compared(run)
    assert code == 2
    assert content["environment"]["remarks"] == ["only the old tree has some_op gpu n=64"]


def test_another_tree_has_to_be_a_checkout(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        compare_trees.main([str(tmp_path)])
    assert "is no checkout of cupy_router" in capsys.readouterr().err


# -- A turn ------------------------------------------------------------------------------------------------------------


@pytest.fixture
def on_numpy(monkeypatch: pytest.MonkeyPatch) -> Any:
    """NumPy for CuPy, tensors on the CPU, sizes of a few rows; a clock that makes each call once."""
    monkeypatch.setitem(sys.modules, "cupy", NumPyAsCuPy())
    sizes = {"ACTIVATION_TOPK": (1, 16), "HASH_ROUTER": (1, 8), "BACKWARD": (8,), "VOCAB_SIZE": 100, "COLD_FROM": 16}
    sizes |= {"TOPK_SELECT": ((2, 256, 8), (2, 3000, 512)), "DENSE_ROUTER": (("decode", 4), ("prefill", 128))}
    for name, size in sizes.items():
        monkeypatch.setattr(turn, name, (size, size) if isinstance(size, tuple) else size)
    monkeypatch.setattr(turn, "PRESETS", {"deepseek-v4-flash": 64, "deepseek-v4-pro": 64})
    torch: Any = pytest.importorskip("torch", reason="torch is not installed")
    randn = torch.randn
    monkeypatch.setattr(torch, "randn", lambda *shape, device, **options: randn(*shape, **options))
    monkeypatch.setattr(torch.cuda, "current_stream", lambda: 0)
    calls: list[Any] = []

    def graph_rounds(call: Callable[[int], Any], rotation: int, **options: Any) -> list[list[float]]:
        calls.append(call(rotation - 1))
        return [[1.0, 2.0]] * options["rounds"]

    def host_rounds(actions: dict[Any, Callable[[], Any]]) -> dict[Any, list[list[float]]]:
        calls.extend(action() for action in actions.values())
        return {name: [[1.0, 2.0]] for name in actions}

    return SimpleNamespace(
        graph_rounds=graph_rounds,
        host_rounds=host_rounds,
        garbage=lambda action: 0,
        cold_inputs=lambda make, num_bytes: [make(), make()],
        calls=calls,
    )


def test_a_turn_on_the_gpu_has_every_op(on_numpy: Any) -> None:
    left_out: list[str] = []
    found = turn.gpu_rows(on_numpy, True, left_out)
    assert left_out == []
    assert len(found) == len(on_numpy.calls) == 4 + 2 + 4 + 4 + 2
    assert len({rows.key(row["cell"]) for row in found}) == len(found)
    assert {row["cell"]["op"] for row in found} == {
        "activation_topk", "topk_select", "hash_router", "dense_router", "activation_topk_backward",
    }  # fmt: skip
    assert all(row["samples"] == [1.0, 2.0] * turn.ROUNDS for row in found)


def test_a_turn_on_the_host_has_both_frameworks_with_and_without_out(on_numpy: Any) -> None:
    left_out: list[str] = []
    found = turn.host_rows(on_numpy, left_out)
    assert left_out == []
    calls = {"torch", "torch, out=", "cupy", "cupy, out="}
    ops = {"activation_topk", "topk_select", "hash_router", "dense_router"}
    assert {(row["cell"]["op"], row["cell"]["call"]) for row in found} == {(op, call) for op in ops for call in calls}
    assert len(on_numpy.calls) == 16


def test_what_a_turn_cannot_time_is_left_out_with_a_reason(on_numpy: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    def fails(array: Any) -> Any:
        raise ImportError("no such thing\nand more")

    monkeypatch.setitem(turn.CONVERTERS, "torch", fails)
    left_out: list[str] = []
    assert len(turn.host_rows(on_numpy, left_out)) == 8
    assert left_out == ["host, torch: ImportError: no such thing"]


def test_sizes_of_a_quick_turn_are_among_those_of_a_whole_one() -> None:
    tables = (turn.ACTIVATION_TOPK, turn.TOPK_SELECT, turn.HASH_ROUTER, turn.DENSE_ROUTER, turn.BACKWARD)
    for whole, quick in tables:
        assert set(quick) < set(whole)


CUPY = """
import numpy as np
float32, int32 = np.float32, np.int32
class random:
    standard_normal = staticmethod(lambda shape, dtype: np.zeros(shape, dtype))
    randint = staticmethod(lambda low, high, shape: np.zeros(shape, np.int32))
class cuda:
    class Device:
        def synchronize(self): pass
    class get_current_stream:
        def synchronize(self): pass
def zeros(shape, dtype): return np.zeros(8, dtype)
"""
PACKAGE = """
import os
from types import SimpleNamespace as Result
assert "CUPY_ROUTER_LOG" not in os.environ
def presets(): return {"deepseek-v4-flash": Result(num_experts=8, top_k=2)}
def activation_topk(logits, method, *, bias=None, out=None): return out or Result()
def topk_select(scores, k, *, out=None): return out or Result()
def hash_router(token_ids, table, method, *, logits=None, out=None): return out or Result()
def dense_router(x, weight, method, *, bias=None, path=None, out=None): return out or Result()
"""


def tree_of(folder: Path, package: str = PACKAGE) -> Tree:
    """A checkout whose ops do nothing, beside a CuPy that is NumPy."""
    files = {
        "cupy_router/__init__.py": package,
        "cupy_router/compiler.py": "WATCHING = True\n",
        "cupy/__init__.py": CUPY,
        "torch.py": "raise ImportError('no torch here')\n",
    }
    for name, text in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(text)
    return Tree("old", folder.resolve())


@pytest.mark.slow("process")
def test_a_turn_times_the_tree_it_is_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CUPY_ROUTER_LOG", "1")
    found = compare_trees.run_turn(tree_of(tmp_path), "host", True)
    assert found["not_watching"]
    times = {row["cell"]["call"]: row["samples"] for row in found["rows"] if row["cell"]["op"] == "topk_select"}
    assert {call: len(samples) for call, samples in times.items()} == {"cupy": 200, "cupy, out=": 200}
    assert found["left_out"] == ["host, torch: ImportError: no torch here"]
    assert len(compare_trees.rows_of([found, found])) == len(found["rows"])


@pytest.mark.slow("process")
def test_a_turn_of_another_package_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PYTHONPATH", str(tree_of(tmp_path / "inner").folder))
    (tmp_path / "empty").mkdir()
    with pytest.raises(SystemExit, match=r"was to be timed, but .*inner/cupy_router/__init__\.py was imported"):
        compare_trees.run_turn(Tree("old", tmp_path / "empty"), "gpu", True)


@pytest.mark.slow("process")
def test_a_turn_that_fails_ends_the_run_with_its_message(tmp_path: Path) -> None:
    with pytest.raises(SystemExit, match=r"(?s)a turn \(gpu\) of the old tree failed:.*no ops here"):
        compare_trees.run_turn(tree_of(tmp_path, "raise ImportError('no ops here')"), "gpu", True)
