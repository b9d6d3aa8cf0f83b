# SPDX-License-Identifier: Apache-2.0
"""docs/frameworks.md and docs/framework_tests.md are up to date, and every claim names tests that exist."""

from __future__ import annotations

import ast
from functools import cache
from pathlib import Path

import pytest

from tests import framework_matrix
from tests.framework_matrix import COLUMNS, MATRIX, PARTS, path_and_function

ROOT = Path(__file__).parents[1]
MAY_STAND_ALONE = {"-", "arrays are dense", "not promised", "no", "untested"}


@cache
def functions_of(path: str) -> frozenset[str]:
    file = ROOT / path
    body = ast.parse(file.read_text()).body if file.is_file() else []
    return frozenset(node.name for node in body if isinstance(node, ast.FunctionDef))


def test_every_cell_names_tests_that_exist() -> None:
    missing = []
    for feature, cells in MATRIX.items():
        for column, cell in zip(COLUMNS, cells, strict=True):
            if not cell.tests and cell.said not in MAY_STAND_ALONE:
                missing.append(f"{feature}, {column}: has no test")
            for path, function in map(path_and_function, cell.tests):
                if function not in functions_of(path):
                    missing.append(f"{feature}, {column}: {path} has no {function}")
    assert not missing


@pytest.mark.parametrize("document", PARTS, ids=lambda document: document.name)
def test_a_document_is_up_to_date(document: Path) -> None:
    assert document.read_text() == framework_matrix.updated(document), "run python -m tests.framework_matrix --write"


def test_the_readme_links_to_it() -> None:
    assert "(docs/frameworks.md)" in (ROOT / "README.md").read_text()
