# SPDX-License-Identifier: Apache-2.0
"""The README's two commands, and the examples of docstrings. tests/test_docs.py runs those of README and docs."""

from __future__ import annotations

import doctest
import importlib
import pkgutil
import re
from pathlib import Path

import pytest

import cupy_router
from tests.pages import programs

ROOT = Path(__file__).parents[1]
PATH = ROOT / "README.md"
README = PATH.read_text()
NO_EXAMPLES = re.compile(
    r"\.(__main__|_cupy|_jax|_torch|(torch|jax)(\.\w+)?)$"
)  # modules that run a command or need a framework
MODULES = ["cupy_router"] + [
    module.name
    for module in pkgutil.walk_packages(cupy_router.__path__, "cupy_router.")
    if not NO_EXAMPLES.search(module.name)
]


def test_readme_is_short() -> None:
    assert len(README.splitlines()) < 150
    (program,) = programs(PATH)
    assert len([line for line in program.code.splitlines() if line]) <= 10


def test_readme_has_both_commands_on_one_line_each() -> None:
    commands = re.findall(r"^python3 -m venv \.venv && .*$", README, re.M)
    assert len(commands) == 2
    assert commands[0].endswith("cupy-router demo")
    assert commands[1].endswith("pytest")


def test_ci_runs_the_test_command_of_the_readme() -> None:
    pattern = re.search(r"grep -m 1 -E '(.*)' README.md", (ROOT / ".ci/run").read_text())
    assert pattern is not None
    matches = [line for line in README.splitlines() if re.search(pattern[1], line)]
    assert matches == re.findall(r"^.*/pytest$", README, re.M)


@pytest.mark.parametrize("name", MODULES)
def test_docstring_examples(name: str) -> None:
    if name.startswith("cupy_router.integrations.") and name.rpartition(".")[2] in ("vllm", "sglang"):
        pytest.importorskip(name.rpartition(".")[2], reason="its examples are on the page of engines")
    failures, _ = doctest.testmod(importlib.import_module(name), optionflags=doctest.NORMALIZE_WHITESPACE)
    assert failures == 0


@pytest.mark.parametrize(
    "name", [name for name in cupy_router.__all__ if not hasattr(getattr(cupy_router, name), "_fields")]
)
def test_every_public_function_has_an_example(name: str) -> None:
    found = doctest.DocTestFinder(recurse=False).find(getattr(cupy_router, name), name)
    assert any(example.examples for example in found)
