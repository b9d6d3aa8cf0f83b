# SPDX-License-Identifier: Apache-2.0
"""What type checkers find in tests/types, and that the types say what the code does."""

from __future__ import annotations

import ast
import inspect
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any, get_args

import pytest

import cupy_router
from cupy_router import method, typing
from cupy_router.method_fields import INDEX_DTYPES
from cupy_router.ops import _given, _layout, dense_router, topk_select

ROOT = Path(__file__).parents[1]
STUB = ast.parse((ROOT / "cupy_router" / "__init__.pyi").read_text())
MISTAKES, CORRECT = (ROOT / "tests" / "types" / name for name in ("mistakes.py", "correct.py"))


@pytest.mark.slow("process")
@pytest.mark.backends("reference")
@pytest.mark.parametrize("checker", ["mypy", "basedpyright"])
def test_type_checkers_find_mistakes_and_nothing_else(checker: str, tmp_path: Path) -> None:
    """Both are strict. basedpyright is pyright with its JavaScript in the wheel, so that it runs without a network."""
    program = shutil.which(checker, path=str(Path(sys.executable).parent)) or shutil.which(checker)
    if program is None:
        pytest.skip(f"{checker} is not installed")
    options = (
        ["--strict", "--follow-imports", "silent", "--cache-dir", str(tmp_path)]
        if checker == "mypy"
        else ["--pythonpath", sys.executable]
    )
    if checker == "mypy":
        (tmp_path / "mypy.ini").write_text("[mypy]\n")
        options += ["--config-file", str(tmp_path / "mypy.ini")]
    done = subprocess.run([program, *options, str(MISTAKES), str(CORRECT)], cwd=ROOT, capture_output=True, text=True)
    found = re.findall(r"(\w+)\.py:(\d+):.*\berror\b", done.stdout)
    assert {name for name, _ in found} == {"mistakes"}, done.stdout + done.stderr
    functions = [node for node in ast.parse(MISTAKES.read_text()).body if isinstance(node, ast.FunctionDef)]
    lines = {int(line) for _, line in found}
    missed = [f.name for f in functions if lines.isdisjoint(range(f.lineno, f.end_lineno + 1))]  # type: ignore[operator]
    assert len(functions) == 10
    assert missed == [], done.stdout


@pytest.mark.parametrize(
    ("literal", "values"),
    [
        (typing.Preset, cupy_router.presets()),
        (typing.Score, method.SCORES),
        (typing.BiasTarget, method.BIAS_TARGETS),
        (typing.GroupScore, method.GROUP_SCORES),
        (typing.WeightDtype, method.WEIGHT_DTYPES),
        (typing.IndexDtype, INDEX_DTYPES),
        (typing.Order, topk_select.ORDERS),
        (typing.Unset, (_given.ROUTE, _given.EMPTY)),
        (typing.Path, dense_router.PATHS),
        (typing.LayoutArray, _layout.ARRAYS),
    ],
    ids=lambda value: "" if not hasattr(value, "__args__") else value.__args__[0],
)
def test_literals_are_what_is_allowed(literal: Any, values: Any) -> None:
    assert get_args(literal) == tuple(values)


def names_of(node: ast.FunctionDef) -> tuple[list[str], set[str]]:
    """Return the parameters of an overload, and those that only keywords give, with those of its options."""
    assert isinstance(node.args.kwarg, ast.arg)
    options = re.fullmatch(r"Unpack\[_types\.(\w+)\]", ast.unparse(node.args.kwarg.annotation or node))
    assert options is not None
    keywords = {argument.arg for argument in node.args.kwonlyargs}
    return [argument.arg for argument in node.args.args], keywords | getattr(typing, options[1]).__annotations__.keys()


def test_overloads_have_the_parameters_of_the_functions() -> None:
    (router,) = [node for node in STUB.body if isinstance(node, ast.ClassDef)]
    given = {"layout", "return_logits"}  # by some overloads, others have its default
    for node in [*STUB.body, *router.body]:
        if not isinstance(node, ast.FunctionDef):
            continue
        function: Any = cupy_router.Router.__call__ if node.name == "__call__" else getattr(cupy_router, node.name)
        parameters = inspect.signature(function).parameters.values()
        positional, keywords = names_of(node)
        assert positional == [p.name for p in parameters if p.kind is p.POSITIONAL_OR_KEYWORD], node.name
        assert keywords | given >= {p.name for p in parameters if p.kind is p.KEYWORD_ONLY} >= keywords, node.name


def test_the_stub_has_the_public_names() -> None:
    (names,) = [node.value for node in STUB.body if isinstance(node, ast.Assign) and "__all__" in ast.unparse(node)]
    assert ast.literal_eval(names) == cupy_router.__all__
    imported = [alias.name for node in STUB.body if isinstance(node, ast.ImportFrom) for alias in node.names]
    defined = {node.name for node in STUB.body if isinstance(node, ast.FunctionDef | ast.ClassDef)}
    assert defined | set(imported) >= set(cupy_router.__all__)


def test_results_are_plain_named_tuples() -> None:
    """With a second base class, PyTorch 2.4 would take them for leaves of a tree."""
    for name in ("Routing", "TopK", "ExpertLayout", "RoutingWithLogits", "RoutingPlan", "RoutingPlanWithLogits"):
        assert getattr(cupy_router, name).__bases__ == (tuple,)


@pytest.mark.slow("process")
@pytest.mark.backends("reference")
def test_types_are_not_imported_at_run_time() -> None:
    code = "import sys, cupy_router as c; c.Router, c.topk_select; print('cupy_router.typing' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout == "False\n"
