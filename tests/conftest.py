# SPDX-License-Identifier: Apache-2.0
"""Options of the suite: where the op tests run (--backend), and the table of acceptance items (--acceptance-table)."""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.backends import BACKENDS, Backend


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--backend", choices=sorted(BACKENDS), default="reference", help="where the op tests run")
    parser.addoption("--acceptance-table", type=Path, metavar="FILE.json", help="write acceptance item -> passed tests")


def pytest_configure(config: pytest.Config) -> None:
    config.addinivalue_line("markers", "acceptance(*items): items of the acceptance lists which this test covers")
    config.addinivalue_line("markers", "needs_kernels: skipped where the ops run the NumPy reference")
    config.addinivalue_line("markers", "many_kernels: a kernel of its own for every case; simt takes every third")
    if config.getoption("--acceptance-table"):
        config.pluginmanager.register(AcceptanceTable(config.getoption("--acceptance-table")))


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    backend = config.getoption("--backend")
    cases: Counter[str] = Counter()
    for item in items:
        op = Path(item.path).stem.removeprefix("test_")
        covered = dict.fromkeys(name for mark in item.iter_markers("acceptance") for name in mark.args)
        item.user_properties.extend(("acceptance", f"{op}: {name}") for name in covered)
        if backend != "gpu" and Path(item.path).parent.name == "gpu":
            item.add_marker(pytest.mark.skip(reason="only with --backend=gpu"))
        if backend == "reference" and item.get_closest_marker("needs_kernels"):
            item.add_marker(pytest.mark.skip(reason="about kernels, which --backend=reference does not run"))
        if backend == "simt" and item.get_closest_marker("many_kernels"):
            function = item.nodeid.partition("[")[0]
            if cases[function] % 3:
                item.add_marker(
                    pytest.mark.skip(reason="g++ takes seconds for each kernel: every third is enough here")
                )
            cases[function] += 1


@pytest.fixture(scope="session")
def backend(request: pytest.FixtureRequest) -> Iterator[Backend]:
    chosen = BACKENDS[request.config.getoption("--backend")]()
    yield chosen
    chosen.close()


class AcceptanceTable:
    """Counts outcomes per acceptance item; reports carry the items, so that it works under pytest-xdist as well."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.counts: dict[str, dict[str, int]] = {}

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        if report.when != "call" and report.outcome == "passed":
            return
        for key, item in report.user_properties:
            if key == "acceptance":
                row = self.counts.setdefault(str(item), {"passed": 0, "failed": 0, "skipped": 0})
                row[report.outcome] += 1

    def pytest_sessionfinish(self, session: pytest.Session) -> None:
        if not hasattr(session.config, "workerinput"):  # the workers of pytest-xdist leave it to their controller
            self.path.write_text(json.dumps(dict(self._rows()), indent=1) + "\n")

    def pytest_terminal_summary(self, terminalreporter: Any) -> None:
        terminalreporter.section("acceptance items: passed tests")
        for item, row in self._rows():
            failed = f"  ({row['failed']} failed)" if row["failed"] else ""
            terminalreporter.line(f"{row['passed']:5}  {item}{failed}")

    def _rows(self) -> list[tuple[str, dict[str, int]]]:
        """Items in alphabetical order, numbers in them by size."""
        return sorted(self.counts.items(), key=lambda pair: [part.zfill(9) for part in re.split(r"(\d+)", pair[0])])
