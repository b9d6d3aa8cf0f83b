# SPDX-License-Identifier: Apache-2.0
"""What pyproject.toml declares, what the documents say and which versions were tried agree."""

from __future__ import annotations

import re
import tomllib
from pathlib import Path
from typing import Any

import pytest
from packaging.requirements import Requirement
from packaging.version import Version

from cupy_router.cli import versions as cli_versions
from tests import versions

ROOT = Path(__file__).parents[1]
PYPROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))
PROJECT = PYPROJECT["project"]
LOWEST = re.fullmatch(r">=(3\.\d+)", PROJECT["requires-python"])[1]  # type: ignore[index]
RUNS = versions.load()["runs"]
DECLARED = [Requirement(text) for text in versions.declared()]


def test_one_python_is_the_lowest_everywhere() -> None:
    assert f"You need Python {LOWEST} or later" in (ROOT / "README.md").read_text("utf-8")
    assert PYPROJECT["tool"]["ruff"]["target-version"] == f"py{LOWEST.replace('.', '')}"
    assert f"--python-version {LOWEST} --resolution lowest-direct" in (ROOT / ".ci/run").read_text("utf-8")


def test_every_declared_python_was_tried() -> None:
    listed = [text.rpartition(" ")[2] for text in PROJECT["classifiers"] if re.search(r"Python :: 3\.\d", text)]
    assert listed[0] == LOWEST
    floors = versions.floors()
    frameworks = f"PyTorch from {floors['torch']}, JAX from {floors['jax']}, CuPy from {floors['cupy-cuda12x']}"
    assert f"- Python {LOWEST} to {listed[-1]}, {frameworks}" in (ROOT / "README.md").read_text("utf-8")
    pythons = [run["python"] for run in RUNS] + [versions.gpu_environment()["python"]]
    tried = {".".join(python.split(".")[:2]) for python in pythons}
    assert tried == set(listed)


def test_every_dependency_has_a_floor_which_was_tried() -> None:
    """After a change of a floor: `python3.11 -m tests.versions lowest --output docs/versions.json`, then `--write`."""
    floors = versions.floors()
    assert floors.keys() == {versions.normalized(one.name) for one in DECLARED}
    (run,) = (run for run in RUNS if run["set"] == "lowest")
    assert run["python"].startswith(f"{LOWEST}.")
    for name, floor in floors.items():
        tried, lowest = Version(run["versions"][name]), Version(floor)
        assert tried.release[: len(lowest.release)] == lowest.release, f"{name} {tried}: the floor is {floor}"


@pytest.mark.parametrize("run", RUNS, ids=lambda run: f"{run['set']}-{run['python']}")
def test_what_was_tried_is_allowed_and_passed(run: dict[str, Any]) -> None:
    for one in DECLARED:
        assert one.specifier.contains(run["versions"][versions.normalized(one.name)]), one
    assert run["demo"] == "ok"
    assert re.fullmatch(r"\d{4,} passed, \d+ skipped(, \d+ xfailed)?", run["tests"])


def test_the_table_is_that_of_the_runs() -> None:
    text = versions.DOCUMENT.read_text("utf-8")
    assert text == versions.updated(text), "run python -m tests.versions --write"
    assert "(docs/versions.md)" in (ROOT / "README.md").read_text("utf-8")


def test_the_package_knows_the_versions_of_the_runs() -> None:
    assert versions.TRIED.read_text("utf-8") == versions.tried(), "run python -m tests.versions --write"
    assert {*cli_versions.PACKAGES, "cupy", "python"} == cli_versions.tried().keys()


def test_a_run_takes_the_place_of_the_one_before() -> None:
    def run(python: str, which: str, date: str) -> versions.Run:
        return {"python": python, "set": which, "date": date}

    runs = [run("3.13.0", "newest", "1"), run("3.9.1", "newest", "1"), run("3.9.1", "lowest", "1")]
    sorted_runs = versions.with_run(runs, run("3.13.2", "newest", "2"))
    assert [(one["set"], one["python"], one["date"]) for one in sorted_runs] == [
        ("lowest", "3.9.1", "1"), ("newest", "3.9.1", "1"), ("newest", "3.13.2", "2")
    ]  # fmt: skip
