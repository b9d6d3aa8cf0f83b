# SPDX-License-Identifier: Apache-2.0
"""Random calls against the reference: kernels executed by the CPU (--backend=simt), under sanitizers, or on a GPU.

A failing case is shrunk, written to cases/ and a test from then on. For longer runs:

    CUPY_ROUTER_FUZZ_CASES     how many cases (2,160)
    CUPY_ROUTER_FUZZ_KERNELS   over how many compiled kernels (72)
    CUPY_ROUTER_FUZZ_SEED      which kernels and cases (0); the same seed gives the same ones
"""

from __future__ import annotations

import os
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from pathlib import Path
from typing import Any

import hypothesis
import numpy as np
import pytest
from hypothesis import HealthCheck, Phase

from cupy_router import RoutingMethod, compiler
from cupy_router.ops.topk_select import ORDERS
from cupy_router.simt.device import SCHEDULES, build_library
from cupy_router.simt.sanitized import Call, call_sanitized, why_not_sanitized
from tests.backends import Backend
from tests.canvas import Canvas
from tests.fuzz import case as case_module
from tests.fuzz.case import FOLDER, Case, arguments, check, load, run, save
from tests.fuzz.layout_strategies import LayoutSetting, layout_cases, layout_settings
from tests.fuzz.settings import Setting, settings
from tests.fuzz.strategies import cases as router_cases
from tests.recorder import recording

CASES = int(os.environ.get("CUPY_ROUTER_FUZZ_CASES", "2160"))
KERNELS = int(os.environ.get("CUPY_ROUTER_FUZZ_KERNELS", "72"))
SEED = int(os.environ.get("CUPY_ROUTER_FUZZ_SEED", "0"))

AnySetting = Setting | LayoutSetting
LAYOUTS = layout_settings(SEED, max(5, KERNELS // 4))
SETTINGS: list[AnySetting] = [*settings(SEED, KERNELS), *LAYOUTS]
SANITIZED = [*SETTINGS[:KERNELS][:: max(1, KERNELS // 20)][:20], *LAYOUTS[:10]]
GROUP = 5  # settings that share a sanitized process, whose start takes seconds
HOST = Backend()  # NumPy arrays


def cases(setting: AnySetting, max_rows: int = 40) -> hypothesis.strategies.SearchStrategy[Case]:
    """Draw calls that compile this setting's kernels and no others; layouts have a fixed number of rows."""
    return layout_cases(setting) if isinstance(setting, LayoutSetting) else router_cases(setting, max_rows)


def configured(max_examples: int, *phases: Phase) -> hypothesis.settings:
    """Return settings without hypothesis' own database: failing cases are files in the repository."""
    return hypothesis.settings(
        max_examples=max_examples, phases=phases, database=None, deadline=None, report_multiple_bugs=False,
        suppress_health_check=list(HealthCheck),
    )  # fmt: skip


def free_path(op: str) -> Path:
    """Return a path in cases/ that does not exist yet."""
    number = 1
    while (FOLDER / f"{op}_{number}.json").exists():
        number += 1
    return FOLDER / f"{op}_{number}.json"


def prove(case: Case, backend: Backend) -> None:
    """Run a case and check its results."""
    if backend.name == "simt":
        simt: Any = compiler.BACKENDS["cpu"]
        simt.schedule, simt.seed = case.schedule, len(case.arrays)
    check(case, run(case, backend))


# -- Kernels that the cases need ---------------------------------------------------------------------------------------


@cache
def kernels(setting: AnySetting) -> dict[str, str]:
    """Return sources by function for the smallest case that launches a kernel."""
    quiet = configured(1000, Phase.generate, Phase.shrink)
    smallest = hypothesis.find(cases(setting), lambda case: case.shape[0] > 0, settings=quiet)
    with recording() as recorder:
        run(smallest, HOST)
    return {launch.function: source for launch, source in zip(recorder.launches, recorder.sources, strict=True)}


def build(wanted: list[AnySetting], sanitizer: str | None) -> None:
    """Compile for the CPU in parallel what is not cached."""
    texts = [(source, function) for setting in wanted for function, source in kernels(setting).items()]
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        list(pool.map(lambda pair: build_library(pair[0], pair[1], sanitizer), texts))


@pytest.fixture(scope="module")
def built(backend: Backend) -> None:
    if backend.name == "simt" and "PYTEST_XDIST_WORKER" not in os.environ:  # workers compile side by side as it is
        build(SETTINGS, None)


@pytest.fixture
def path() -> Callable[[str], Path]:
    """Return the path for a failing case: one file per test, which shrinking overwrites."""
    chosen: dict[str, Path] = {}
    return lambda op: chosen.setdefault(op, free_path(op))


# -- Fuzzing -----------------------------------------------------------------------------------------------------------


@pytest.mark.needs_kernels
@pytest.mark.parametrize("setting", SETTINGS, ids=str)
def test_cases(setting: AnySetting, backend: Backend, built: None, path: Callable[[str], Path]) -> None:
    fatal = False

    @hypothesis.seed(SEED)
    @configured(-(-CASES // len(SETTINGS)), Phase.generate, Phase.shrink)
    @hypothesis.given(cases(setting))
    def proves(case: Case) -> None:
        nonlocal fatal
        try:
            prove(case, backend)
        except Exception as error:
            if not fatal:
                save(case, path(case.op))
            # After an illegal access every call on the GPU fails: only the first one says something.
            fatal = type(error).__name__ in ("CUDARuntimeError", "CUDADriverError")
            raise

    try:
        proves()
    except Exception as error:
        raise AssertionError(f"{type(error).__name__}; the case was saved as {path(setting.op)}") from error


@pytest.mark.needs_kernels
@pytest.mark.parametrize("path", sorted(FOLDER.glob("*.json")), ids=lambda path: path.stem)
def test_saved_cases(path: Path, backend: Backend) -> None:
    prove(load(path), backend)


@pytest.mark.backends("simt")
@pytest.mark.parametrize("group", range(0, len(SANITIZED), GROUP))
@pytest.mark.parametrize(("sanitizer", "count", "max_rows"), [("address", 12, 20), ("thread", 4, 3)])
def test_sanitized_cases(
    sanitizer: str, count: int, max_rows: int, group: int, backend: Backend, path: Callable[[str], Path]
) -> None:
    """Arrays have memory of exactly their size; ThreadSanitizer sees each CUDA thread as a thread, which is slow."""
    reason = why_not_sanitized(sanitizer)
    if reason is not None:
        pytest.skip(reason)
    chosen = [setting for setting in SANITIZED[group : group + GROUP] if setting.rows <= max_rows]
    build(chosen, sanitizer)
    todo = [case for setting in chosen for case in drawn(setting, count, max_rows)]
    schedule = SCHEDULES[group // GROUP % len(SCHEDULES)]
    report = call_sanitized([call(case) for case in todo], sanitizer=sanitizer, schedule=schedule, seed=group)
    for number, case in enumerate(todo):
        try:
            assert number < len(report.results), f"{report.fault}: {report.text}"
            check(case, report.results[number])
        except AssertionError as error:
            save(case, path(case.op))
            raise AssertionError(f"{case}: the case was saved as {path(case.op)}") from error
    assert report.fault is None, report.text


def drawn(setting: AnySetting, count: int, max_rows: int) -> list[Case]:
    found: list[Case] = []

    @hypothesis.seed(SEED)
    @configured(count, Phase.generate)
    @hypothesis.given(cases(setting, max_rows))
    def collect(case: Case) -> None:
        found.append(case)

    collect()
    return found


def call(case: Case) -> Call:
    """Return the call for another process; results go into strided arrays if the case has them."""
    given = arguments(case, HOST)
    if case.out_padding >= 0:
        arrays = (Canvas(shape, case.out_padding, dtype, HOST).array for shape, dtype in case.results)
        given["out"] = case.kind(*arrays)
    return Call("tests.fuzz.case:call", (case.op, case.as_of_rows, case.plan), given)


# -- The fuzzer itself -------------------------------------------------------------------------------------------------


def test_settings_are_distinct_and_repeatable() -> None:
    found = settings(5, 60)
    assert found == settings(5, 60)
    assert found != settings(6, 60)
    assert len(set(found)) == len({str(setting) for setting in found}) == 60
    assert {setting.op for setting in found} == {"topk_select", "activation_topk", "hash_router", "dense_router"}


@pytest.mark.slow("seconds", every=11)
@pytest.mark.parametrize("setting", SANITIZED, ids=str)
def test_each_setting_uses_the_same_kernels(setting: AnySetting) -> None:
    """Many cases need only few compiled kernels."""
    with recording() as recorder:
        for case in drawn(setting, 30, 40):
            run(case, HOST)
    assert recorder.launches
    if not isinstance(setting, LayoutSetting) and setting.plan:  # kernels of some plans are compiled for each order
        assert {launch.function for launch in recorder.launches} == {*kernels(setting)}
        assert len(recorder.sources) <= len(ORDERS)
        return
    assert {*recorder.sources} == {*kernels(setting).values()}
    several = isinstance(setting, LayoutSetting) or (setting.op == "hash_router" and setting.logits_dtype)
    assert len(recorder.sources) == (len(kernels(setting)) if several else 1)


@pytest.mark.slow("seconds", every=6)
@pytest.mark.parametrize("setting", SANITIZED, ids=str)
def test_the_reference_passes_and_a_saved_case_is_read_back(setting: AnySetting, tmp_path: Path) -> None:
    for case in drawn(setting, 3, 10):
        check(case, case_module.wanted(case))
        save(case, tmp_path / "kept.json")
        kept = load(tmp_path / "kept.json")
        assert repr(kept) == repr(case)
        for name, array in case.arrays.items():
            assert (kept.arrays[name].dtype, kept.arrays[name].tobytes()) == (array.dtype, array.tobytes())


LOGITS = np.array([[1, 2, 3, 4], [5, 6, 8, 7]], np.float32)
PLANTED = {
    "topk_select": Case("topk_select", {"scores": LOGITS}, None, {"k": 2}),
    "activation_topk": Case("activation_topk", {"logits": LOGITS}, RoutingMethod(4, 2)),
    "dense_router": Case("dense_router", {"x": LOGITS, "weight": np.eye(4, dtype=np.float32)}, RoutingMethod(4, 2)),
    "dense_router with logits": Case(
        "dense_router", {"x": LOGITS, "weight": np.eye(4, dtype=np.float32)}, RoutingMethod(4, 2),
        {"return_logits": True},
    ),
    "hash_router": Case(
        "hash_router",
        {"token_ids": np.array([0, 1]), "table": np.array([[1, 2], [3, 0]]), "logits": LOGITS},
        RoutingMethod(4, 2),
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", PLANTED.values(), ids=PLANTED)
@pytest.mark.parametrize("row", [0, 1])
def test_a_wrong_result_is_found(case: Case, row: int) -> None:
    good = case_module.wanted(case)
    check(case, good)
    for place, array in enumerate(good):
        bad = tuple(other.copy() for other in good)
        bad[place][row] = array[row, ::-1] if array.dtype.kind == "i" else array[row] * np.float32(1.00001)
        with pytest.raises(AssertionError):
            check(case, bad)


@pytest.mark.parametrize("setting", LAYOUTS[:5], ids=str)
def test_a_wrong_entry_of_a_layout_is_found(setting: LayoutSetting) -> None:
    for case in drawn(setting, 3, 40):
        good = case_module.wanted(case)
        check(case, good)
        for place, array in enumerate(good):
            if array.size:
                bad = [other.copy() for other in good]
                bad[place].flat[-1] = 123
                with pytest.raises(AssertionError):
                    check(case, tuple(bad))


@pytest.mark.parametrize("at", [(0, -1), (0, 2), (1, 2), (1, 4)])
def test_a_write_outside_a_result_is_found(at: tuple[int, int]) -> None:
    canvas = Canvas((2, 2), 2, np.float32, HOST)
    canvas.array[...] = 1
    assert canvas.is_clean()
    row, column = at
    canvas.memory[Canvas.BEFORE + row * canvas.stride + column] = 0
    assert not canvas.is_clean()


def test_case_files_are_never_overwritten(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tests.fuzz.test_fuzz.FOLDER", tmp_path)
    for number in (1, 2, 3):
        assert free_path("topk_select") == tmp_path / f"topk_select_{number}.json"
        save(PLANTED["topk_select"], free_path("topk_select"))
    assert free_path("hash_router").name == "hash_router_1.json"
