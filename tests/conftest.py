# SPDX-License-Identifier: Apache-2.0
"""Which tests run, and where: --backend, and --all for the slow ones. CONTRIBUTING.md lists what to run when."""

from __future__ import annotations

import gc
import os
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.backends import BACKENDS, Backend

MARKERS = (
    "acceptance(*items): items of the acceptance lists which this test covers",
    "backends(*names): runs only with these --backend",
    "needs_kernels: runs only where the ops run kernels, not the NumPy reference",
    "many_kernels: compiles a kernel for every case; with --backend=simt every third case runs",
    "slow(reason, every=None): left out without --all, but for every so many cases; reason is one of SLOW",
)
SLOW = ("compiler", "process", "seconds")  # runs g++ or NVRTC; starts a process; computes for long
COMPILING = {"simt", "test_compile.py"}  # folders and files whose tests compile kernels
LEFT_OUT = pytest.StashKey[Counter[str]]()
COVERS = pytest.StashKey[dict[str, set[str]]]()  # items of the acceptance lists, by test
TESTS_PER_DOT = 50

os.environ.setdefault("OMP_NUM_THREADS", "1")  # PyTorch's threads cost small tensors more than they save


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--backend", choices=sorted(BACKENDS), default="reference", help="where the op tests run")
    parser.addoption("--all", action="store_true", help="run the slow tests too; implied by a --backend with kernels")
    parser.addoption("--only-slow", action="store_true", help="run only what is left out without --all")


@pytest.hookimpl(trylast=True)
def pytest_configure(config: pytest.Config) -> None:
    for marker in MARKERS:
        config.addinivalue_line("markers", marker)
    config.stash[LEFT_OUT], config.stash[COVERS] = Counter(), {}
    reporter = config.pluginmanager.get_plugin("terminalreporter")
    if reporter is not None and config.option.verbose == 0:
        reporter.showfspath = False


# -- Selection ---------------------------------------------------------------------------------------------------------


@pytest.hookimpl(trylast=True)
def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Deselect, among what -k and -m selected, tests of other backends, and slow tests unless they are asked for."""
    backend, cases = config.getoption("--backend"), Counter[tuple[str, str]]()
    everything = config.getoption("--all") or backend != "reference"
    only_slow = config.getoption("--only-slow")
    kept, dropped = [], []
    for item in items:
        if not runs_on(item, backend, cases):
            dropped.append(item)
            continue
        reason = slow_reason(item, cases)
        wanted = reason is not None if only_slow else everything or reason is None
        (kept if wanted else dropped).append(item)
        if not wanted and reason is not None:
            config.stash[LEFT_OUT][reason] += 1
    if dropped:
        config.hook.pytest_deselected(items=dropped)
        items[:] = kept
    for item in items:
        covered = {name for marker in item.iter_markers("acceptance") for name in marker.args}
        if covered:
            config.stash[COVERS][item.nodeid] = covered
    if hasattr(config, "workeroutput"):  # a worker of pytest-xdist, whose controller collects nothing
        config.workeroutput["left_out"] = dict(config.stash[LEFT_OUT])


def pytest_collection_finish() -> None:
    """Exclude imported and collected objects from later garbage collections: they live to the end."""
    gc.collect()
    gc.freeze()


def runs_on(item: pytest.Item, backend: str, cases: Counter[tuple[str, str]]) -> bool:
    if backend != "gpu" and Path(item.path).parent.name == "gpu":
        return False
    if backend == "reference" and item.get_closest_marker("needs_kernels"):
        return False
    if backend == "simt" and item.get_closest_marker("many_kernels"):
        return number_of(item, "many_kernels", cases) % 3 == 0
    named = item.get_closest_marker("backends")
    return named is None or backend in named.args


def slow_reason(item: pytest.Item, cases: Counter[tuple[str, str]]) -> str | None:
    """Return why a test is slow, or None if it is fast or one of the cases that always run."""
    for marker in item.iter_markers("slow"):
        (reason,), every = marker.args, marker.kwargs.get("every")
        assert reason in SLOW, f"{item.nodeid}: {reason} is none of {SLOW}"
        if every is None or number_of(item, "slow", cases) % every:
            return str(reason)
    return "compiler" if COMPILING & {Path(item.path).name, Path(item.path).parent.name} else None


def number_of(item: pytest.Item, purpose: str, cases: Counter[tuple[str, str]]) -> int:
    """Return the number of this case among those of its test function."""
    key = item.nodeid.partition("[")[0], purpose
    cases[key] += 1
    return cases[key] - 1


@pytest.hookimpl(optionalhook=True)
def pytest_testnodedown(node: Any) -> None:
    """All workers of pytest-xdist collect the same."""
    found = getattr(node, "workeroutput", {}).get("left_out", {})
    node.config.stash[LEFT_OUT] = Counter(found)


# -- Output ------------------------------------------------------------------------------------------------------------


def pytest_report_teststatus(report: Any, config: pytest.Config) -> tuple[str, str, str] | None:
    """Print one dot for many passed tests, unless -v or -q asks for more or less."""
    if config.option.verbose != 0 or report.when != "call" or not report.passed or hasattr(report, "wasxfail"):
        return None
    reporter = config.pluginmanager.get_plugin("terminalreporter")
    dot = reporter is not None and len(reporter.stats.get("passed", ())) % TESTS_PER_DOT == 0
    return ("passed", ".", "PASSED") if dot else ("passed", "", "")


@pytest.hookimpl(wrapper=True, tryfirst=True)
def pytest_terminal_summary(terminalreporter: Any, config: pytest.Config) -> Iterator[None]:
    """Print how many slow tests were left out, last before pytest's own closing line."""
    yield
    left_out = config.stash[LEFT_OUT]
    if left_out.total():
        reasons = ", ".join(f"{reason} {count}" for reason, count in sorted(left_out.items()))
        ran = any(terminalreporter.stats.get(outcome) for outcome in ("passed", "failed", "error", "skipped"))
        start = "" if ran or config.option.collectonly else "All that was selected is slow. "
        terminalreporter.line(
            f"{start}Left out: {left_out.total()} slow tests ({reasons}); pytest --all runs them too."
        )

    if "acceptance" in config.option.markexpr and config.stash[COVERS]:
        terminalreporter.line(acceptance(terminalreporter.stats, config.stash[COVERS]))


def acceptance(stats: dict[str, list[Any]], covers: dict[str, set[str]]) -> str:
    """Return how many items of the acceptance lists have passed, have failed, or were skipped by all of their tests."""
    seen: dict[str, set[str]] = {
        outcome: {name for report in stats.get(outcome, ()) for name in covers.get(getattr(report, "nodeid", ""), ())}
        for outcome in ("passed", "failed", "error", "skipped")
    }
    failed = seen["failed"] | seen["error"]
    passed, skipped = seen["passed"] - failed, seen["skipped"] - seen["passed"] - failed
    return f"Acceptance: {len(passed)} items passed, {len(failed)} failed, {len(skipped)} only skipped"


@pytest.fixture(scope="session")
def backend(request: pytest.FixtureRequest) -> Iterator[Backend]:
    chosen = BACKENDS[request.config.getoption("--backend")]()
    yield chosen
    chosen.close()


@pytest.fixture
def jax_on_the_cpu() -> Iterator[None]:
    """Make arrays of JAX in CPU memory, also where there is a GPU."""
    jax = pytest.importorskip("jax", reason="JAX is not installed")
    with jax.default_device(jax.devices("cpu")[0]):
        yield
