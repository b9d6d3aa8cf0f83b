# SPDX-License-Identifier: Apache-2.0
"""The scripts for a GPU, as far as they can be tested without one: their calls and their verdicts."""

from __future__ import annotations

import json
import stat
import sys
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests.backends import Backend
from tests.fuzz.case import Case, check, wanted
from tests.gpu import sanitize, soak
from tests.gpu.variants import cases
from tests.recorder import Launch, recording

CASES = cases()


def launches() -> list[Launch]:
    with recording() as recorder:
        for case in CASES:
            sanitize.call_exactly(case, Backend())
    return recorder.launches


# -- The calls ---------------------------------------------------------------------------------------------------------


@pytest.mark.slow("seconds")
def test_the_calls_are_right_on_this_backend() -> None:
    """With NumPy arrays in place of GPU arrays; all else is as on a GPU."""
    assert sanitize.make_calls(Backend(), CASES) == len(CASES) == len({repr(case) for case in CASES}) > 150


def test_a_wrong_call_is_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    def swapped(case: Case, backend: Any) -> tuple[np.ndarray, np.ndarray]:
        first, indices = wanted(case)
        return first, indices[:, ::-1]

    monkeypatch.setattr(sanitize, "call_exactly", swapped)
    with pytest.raises(AssertionError):
        sanitize.make_calls(Backend(), CASES)


@pytest.mark.slow("seconds")
def test_every_variant_is_called() -> None:
    made = launches()
    seen = [(launch.function, launch.macros, launch.arguments) for launch in made]
    assert len(seen) >= len(CASES)  # layouts may take several
    files = {path.stem for path in (Path(__file__).parents[1] / "kernels").glob("*.cu")}
    assert files - {launch.kernel for launch in made} == {"to_float32", "slice_counts", "update_bias"}

    def called(function: str, **macros: int) -> bool:
        return any(name == function and macros.items() <= those.items() for name, those, _ in seen)

    for name in ("counts", "offsets", "ends", "order", "positions", "block_experts", "row_experts"):
        for flag in range(2):
            assert called("expert_layout", **{f"LAYOUT_{name.upper()}": flag})
            assert called("expert_layout_shares_place", **{f"LAYOUT_{name.upper()}": flag})
    for size, bytes_of_load in product((1, 2, 4, 8), (0, 4, 8)):
        assert called("expert_layout", ID_BYTES=size)
        assert called("expert_layout", LAYOUT_LOAD_BYTES=bytes_of_load)
    for dtype, flag in product(range(3), range(2)):
        assert called("permute", DTYPE=dtype, DENSE=flag, WEIGHTED=1)
        assert called("permute", DTYPE=dtype, HAS_DOTS=1, HAS_RESIDUAL_DOTS=flag)
        assert called("unpermute", DTYPE=dtype, DENSE=flag, WEIGHTED=flag)
        assert called("unpermute", DTYPE=dtype, HAS_RESIDUAL=flag)
        assert called("unpermute", DTYPE=dtype, HAS_DOTS=1, HAS_SUMS=flag)
    assert called("activation_topk_backward")
    assert called("activation_topk_backward_wide")
    for flag in range(2):
        assert called("hash_router", SOURCE=1, DENSE=flag, HAS_NUM_VALID=flag)
        assert called("activation_topk", HAS_NUM_VALID=flag)
        assert called("dense_router_decode", DENSE=flag, HAS_NUM_VALID=flag)
    for dtype, flag in product(range(3), range(2)):
        assert called("topk_select", DTYPE=dtype, ALIGNED=flag)
        assert called("topk_select", DTYPE=dtype, WHOLE_ROWS=flag)
        assert called("topk_select_long", DTYPE=dtype, SPLIT=flag)
        assert called("topk_select_long", DTYPE=dtype, BLOCKS=1 + flag)
        assert called("topk_select_many", DTYPE=dtype, SORTS=flag)
        assert called("topk_select_held", DTYPE=dtype, SORTS=flag)
        assert called("topk_select_large", DTYPE=dtype)
        assert called("topk_select", DTYPE=dtype, DENSE=flag)
        assert called("topk_select", DTYPE=dtype, HAS_LENGTHS=1, HAS_STARTS=flag)
        assert called("activation_topk", DTYPE=dtype, DENSE=flag)
        assert called("activation_topk", DTYPE=dtype, INTERLEAVED=1, NUM_GROUPS=8)
        for function in ("activation_topk", "topk_select"):
            assert called(function, DTYPE=dtype, INTERLEAVED=flag, LANES=32)
            assert called(function, DTYPE=dtype, INTERLEAVED=1, ALIGNED=flag)
            assert called(function, DTYPE=dtype, INTERLEAVED=1, LANES=(8, 16)[flag])
        assert called("activation_topk", DTYPE=dtype, INTERLEAVED=1, HAS_BIAS=flag)
        assert called("topk_select", DTYPE=dtype, INTERLEAVED=1, WHOLE_ROWS=flag)
        for score in range(4):
            assert called("activation_topk", DTYPE=dtype, ALIGNED=flag, SCORE=score)
            assert called("activation_topk", HAS_BIAS=flag, RENORMALIZE=1, SCORE=score)
            assert called("activation_topk_wide", DTYPE=dtype, SCORE=score)
            assert called("hash_router", DTYPE=dtype, SCORE=score, SOURCE=1)
            assert called("hash_router", SOURCE=2, SCORE=score, ALIGNED=flag)
            assert called("dense_router_decode", SCORE=score, TENSOR_CORES=flag)
        assert called("dense_router_decode", ALIGNED=flag)
    for steps in ({"GROUP_TOP2": 1}, {"SCORE_AFTER_TOPK": 1}, {"SHARED_LOGITS": 1}, {"HAS_LOGIT_BIAS": 1}):
        assert called("activation_topk", **steps)
        assert called("dense_router_decode", **steps)
    for steps in ({"RESULT_DTYPE": 1}, {"RESULT_DTYPE": 2}, {"INDEX_BYTES": 8}, {"LOGIT_CAPPED": 1}, {"SCORE": 4}):
        assert called("activation_topk", **steps)
    for steps in ({"GROUP_TOP2": 1}, {"SHARED_LOGITS": 1}, {"RESULT_DTYPE": 2}):
        assert called("activation_topk_wide", **steps)
    for token_id_bytes, table_bytes in product((4, 8), repeat=2):
        assert called("hash_router", SOURCE=0, TOKEN_ID_BYTES=token_id_bytes, TABLE_BYTES=table_bytes)
    for lanes in (2, 4, 8, 16, 32):
        assert called("topk_select", LANES=lanes)
    for function, macros in (
        ("topk_select_long", {"SPLIT": 0}),
        ("topk_select_long", {"SPLIT": 1}),
        ("topk_select_large", {}),
    ):
        given = [those for name, used, those in seen if name == function and macros.items() <= used.items()]
        for option in ("lengths", "starts", "index_map", "values", "sorted", "map_stride"):
            assert {bool(arguments[option]) for arguments in given} == {False, True}
    for name in ("lengths", "starts", "num_valid", "bias"):
        assert {bool(arguments[name]) for _, _, arguments in seen if name in arguments} == {False, True}
    assert {(launch.grid[0] > 1, launch.block[0]) for launch in launches()} > {(True, 32), (True, 256), (True, 512)}


# -- compute-sanitizer -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "errors"),
    [
        ("========= COMPUTE-SANITIZER\ncalls made: 5\n========= ERROR SUMMARY: 0 errors\n", 0),
        ("========= Invalid __global__ read of size 4 bytes\n========= ERROR SUMMARY: 12 errors\n", 12),
        ("========= ERROR SUMMARY: 1 error\n", 1),
        ("========= RACECHECK SUMMARY: 0 hazards displayed (0 errors, 0 warnings)\n", 0),
        ("========= RACECHECK SUMMARY: 1 hazard displayed (0 errors, 1 warning)\n", 1),
        ("========= ERROR SUMMARY: 2 errors\n========= ERROR SUMMARY: 3 errors\n", 5),
        ("========= Error: Target application terminated before first instrumented API call\n", None),
        ("", None),
    ],
)
def test_summaries_are_read(text: str, errors: int | None) -> None:
    assert sanitize.errors_in(text) == errors


FAKE = """#!{python}
import sys
tool, planted = sys.argv[2], "--planted" in sys.argv
last = sys.argv[-2:] == ["--first", "2"]
errors = {errors_planted} if planted else {errors_ours} * last
print("calls made: 7")
print(f"========= RACECHECK SUMMARY: {{errors}} hazards displayed" if tool == "racecheck" else
      f"========= ERROR SUMMARY: {{errors}} errors")
sys.exit({status} * last if not planted else 1)
"""


def fake_sanitizer(folder: Path, errors_planted: int = 3, errors_ours: int = 0, status: int = 0) -> None:
    command = folder / "compute-sanitizer"
    numbers = {"errors_planted": errors_planted, "errors_ours": errors_ours, "status": status}
    command.write_text(FAKE.format(python=sys.executable, **numbers))
    command.chmod(command.stat().st_mode | stat.S_IXUSR)


@pytest.mark.slow("process")
@pytest.mark.parametrize("tool", sanitize.TOOLS)
@pytest.mark.parametrize(
    ("behaviour", "ok"),
    [
        ({}, True),
        ({"errors_planted": 0}, False),  # blind
        ({"errors_ours": 2}, False),
        ({"status": 1}, False),  # a wrong result, or a crash
    ],
)
def test_a_tool_must_find_its_fault_and_nothing_else(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, tool: str, behaviour: dict[str, int], ok: bool
) -> None:
    fake_sanitizer(tmp_path, **behaviour)
    monkeypatch.setenv("PATH", str(tmp_path))
    row = sanitize.report(tool, every=1, jobs=3, timeout=30)
    assert (row["tool"], row["calls"], row["ok"]) == (tool, 3 * 7, ok)
    assert row["errors"] == behaviour.get("errors_ours", 0)


def test_only_some_cases_are_run(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    made: list[str] = []
    monkeypatch.setattr(sanitize, "ExactBackend", lambda: None)
    monkeypatch.setattr(sanitize, "make_calls", lambda _, chosen: made.extend(map(repr, chosen)) or len(made))
    assert sanitize.main(["--calls", "1", "--only", "held rows"]) == 0
    assert 0 < len(made) < len(CASES)
    assert all("held rows" in case for case in made)
    assert capsys.readouterr().out == f"calls made: {len(made)}\n"


def test_jobs_share_the_calls(monkeypatch: pytest.MonkeyPatch) -> None:
    made: list[int] = []

    def run_tool(command: list[str], timeout: float) -> dict[str, Any]:
        step, first = int(command[-3]), int(command[-1])
        made.extend(range(50)[first::step])
        return {"errors": 0, "calls": 1, "exit": 0, "seconds": 0.0, "text": ""}

    monkeypatch.setattr(sanitize, "run_tool", run_tool)
    sanitize.run_jobs(["tool"], every=3, jobs=4, timeout=1)
    assert sorted(made) == list(range(0, 50, 3))


@pytest.mark.slow("process")
def test_a_tool_that_takes_too_long_is_not_clean() -> None:
    command = [sys.executable, "-uc", "import time; print('calls made: 4'); time.sleep(60)"]
    found = sanitize.run_tool(command, timeout=1.0)
    assert (found["calls"], found["errors"], found["exit"]) == (4, None, -1)


def test_the_command_is_found_or_reported_missing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", "")
    monkeypatch.setattr(sanitize, "_FOLDERS", (str(tmp_path / "none"), str(tmp_path)))
    with pytest.raises(SystemExit, match="compute-sanitizer is neither on the PATH nor in"):
        sanitize.find_sanitizer()
    fake_sanitizer(tmp_path)
    assert sanitize.find_sanitizer() == str(tmp_path / "compute-sanitizer")


def test_every_tool_has_its_fault() -> None:
    assert list(sanitize.PLANTED) == list(sanitize.TOOLS) == ["memcheck", "racecheck", "initcheck", "synccheck"]


# -- The soak ----------------------------------------------------------------------------------------------------------

FEW = [case for case in CASES if not (case.as_of_rows or case.plan)][::20]


def test_a_soak_compares_every_result() -> None:
    figures = soak.Soak(soak.Host(), FEW, threads=3, streams=2, calls=12).run()
    assert figures.pop("seconds") >= 0
    assert figures == {
        "threads": 3, "streams": 2, "calls_per_stream": 12, "calls": 72, "cases": len(FEW),
        "different_bytes": 0, "memory_growth": 0, "failures": [], "ok": True,
    }  # fmt: skip
    json.dumps(figures)


def test_every_stream_sees_every_case_before_memory_is_read(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[tuple[int, int]] = []
    monkeypatch.setattr(soak.Soak, "_call", lambda self, at, turn, stream, counter: seen.append((at, id(counter))))
    warm: list[int] = []
    ours = soak.Soak(soak.Host(), FEW, threads=2, streams=3, calls=200)

    def used_bytes() -> int:
        warm.append(len(set(seen)))
        return 0

    monkeypatch.setattr(ours.device, "used_bytes", used_bytes)
    ours.run()
    assert warm[0] == 2 * 3 * len(FEW)
    assert len(seen) == 2 * 3 * 200


@pytest.mark.slow("seconds", every=2)
@pytest.mark.parametrize("turn", [5, 50])
def test_a_soak_finds_a_difference(monkeypatch: pytest.MonkeyPatch, turn: int) -> None:
    """One wrong bit of one result of one call is found."""
    whole = soak.Soak._call

    def call(self: soak.Soak, at: int, now: int, stream: Any, counter: Any) -> None:
        if now == turn and counter is self.streams[1][0][1]:
            first = self.first[at][0].copy()
            first.view(np.uint8).reshape(-1)[-1] ^= 1
            self.device.count_differences(first, self.first[at][0], counter)
        whole(self, at, now, stream, counter)

    monkeypatch.setattr(soak.Soak, "_call", call)
    figures = soak.Soak(soak.Host(), FEW, threads=2, streams=2, calls=60).run()
    assert (figures["different_bytes"], figures["ok"]) == (1, False)


@pytest.mark.slow("seconds")
def test_a_soak_reports_errors_and_growth(monkeypatch: pytest.MonkeyPatch) -> None:
    ours = soak.Soak(soak.Host(), FEW, threads=2, streams=2, calls=5)
    monkeypatch.setattr(ours, "ops", [lambda **_: 1 / 0] * len(FEW))
    figures = ours.run()
    assert not figures["ok"]
    assert sorted(figures["failures"]) == [f"thread {n}: ZeroDivisionError: division by zero" for n in (0, 1)]

    ours = soak.Soak(soak.Host(), FEW, threads=2, streams=2, calls=50)
    used = iter([0, soak.MEMORY_SLACK + 1])
    monkeypatch.setattr(ours.device, "used_bytes", lambda: next(used))
    assert not ours.run()["ok"]


def test_a_soak_starts_only_from_right_results(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(soak, "check", lambda case, got: check(case, (got[0] + 1, got[1])))
    with pytest.raises(AssertionError):
        soak.Soak(soak.Host(), FEW, threads=1, streams=1, calls=1)


def test_the_soak_mixes_all_ops_and_the_sizes_in_use() -> None:
    mixed = soak.mixed_cases()
    assert {case.op for case in mixed} == {case.op for case in CASES} > {"topk_select", "expert_layout", "permute"}
    assert max(case.shape[0] for case in mixed) == 10_000
    assert not any(case.as_of_rows or case.plan for case in mixed)
