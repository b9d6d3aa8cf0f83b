# SPDX-License-Identifier: Apache-2.0
"""docs/frameworks.md is up to date, and what it says is backed by tests that exist."""

from __future__ import annotations

import ast
from functools import cache
from pathlib import Path

import pytest

from tests import framework_matrix
from tests.framework_matrix import COLUMNS, DOCUMENT, MATRIX, path_and_function

ROOT = Path(__file__).parents[1]
CLAIMS = [
    (feature, column, cell) for feature, cells in MATRIX.items() for column, cell in zip(COLUMNS, cells, strict=True)
]
MAY_STAND_ALONE = {"-", "arrays are dense", "not promised", "no", "untested"}


@cache
def functions_of(path: str) -> frozenset[str]:
    return frozenset(
        node.name for node in ast.parse((ROOT / path).read_text()).body if isinstance(node, ast.FunctionDef)
    )


@pytest.mark.parametrize(("feature", "column", "cell"), CLAIMS, ids=[f"{f}-{c}" for f, c, _ in CLAIMS])
def test_a_claim_names_tests_that_exist(feature: str, column: str, cell: framework_matrix.Cell) -> None:
    assert cell.tests or cell.said in MAY_STAND_ALONE, f"{feature} of {column} has no test"
    for test in cell.tests:
        path, function = path_and_function(test)
        assert (ROOT / path).is_file(), path
        assert function in functions_of(path), f"{path} has no {function}"


def test_the_document_is_up_to_date() -> None:
    text = DOCUMENT.read_text()
    assert text == framework_matrix.updated(text), "run python -m tests.framework_matrix --write"


def test_the_readme_leads_there() -> None:
    assert "(docs/frameworks.md)" in (ROOT / "README.md").read_text()
