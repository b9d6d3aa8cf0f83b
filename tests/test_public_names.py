# SPDX-License-Identifier: Apache-2.0
"""The names that the package and its subpackages show, and submodules as attributes without an import of their own."""

from __future__ import annotations

import importlib
import re
import subprocess
import sys
from pathlib import Path

import pytest

import cupy_router
from cupy_router.ops import registry

ROOT = Path(__file__).parents[1]


def output_of(code: str, *arguments: str) -> str:
    """What a new process prints, where nothing of the package is imported yet."""
    done = subprocess.run([sys.executable, "-c", code, *arguments], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


def test_dir_is_the_public_names() -> None:
    submodules = {"compiler", "integrations", "jax", "ops", "torch", "typing"}
    assert dir(cupy_router) == sorted({*cupy_router.__all__, "__version__", *submodules})
    assert dir(cupy_router.ops) == sorted(
        registry.OPS.keys() - {"hash_layer", "permute_backward", "unpermute_backward"}
    )
    assert dir(cupy_router.compiler) == ["CompileError"]
    for name in (*cupy_router.__all__, "compiler", "ops"):
        assert getattr(cupy_router, name) is not None
    for name in dir(cupy_router.ops):
        assert getattr(cupy_router.ops, name) is importlib.import_module(f"cupy_router.ops.{name}")


@pytest.mark.parametrize("name", ["torch", "jax"])
def test_dir_of_a_framework_s_package(name: str) -> None:
    pytest.importorskip(name, reason=f"{name} is not installed")
    package = getattr(cupy_router, name)
    assert dir(package) == sorted(getattr(package, "__all__", []))
    for public in dir(package):
        assert getattr(package, public).__doc__


def test_other_names_are_no_attributes() -> None:
    for module in (cupy_router, cupy_router.ops):
        assert not hasattr(module, "nothing")
        with pytest.raises(AttributeError, match=f"module '{module.__name__}' has no attribute 'nothing'"):
            _ = module.nothing


ATTRIBUTES = """
import sys
import cupy_router
dir(cupy_router)
assert not {"torch", "jax", "cupy", "cupy_router.torch", "cupy_router.compiler"} & set(sys.modules)
value = cupy_router
for part in sys.argv[1].split("."):
    value = getattr(value, part)
print(value.__name__)
"""


@pytest.mark.slow("process")
@pytest.mark.parametrize(
    "path",
    ["torch.replace_routers", "torch.load_balance", "jax", "compiler.CompileError", "ops.activation_topk_backward"],
)
def test_submodules_are_attributes(path: str) -> None:
    """As the README and the other documents write them, after nothing but `import cupy_router`."""
    if path.split(".")[0] in ("torch", "jax"):
        pytest.importorskip(path.split(".")[0])
    assert output_of(ATTRIBUTES, path).split(".")[-1] == path.split(".")[-1]


STAR = """
import sys
before = set(dir())
from cupy_router import *
print(*sorted(set(dir()) - before - {"before"}))
assert not {"torch", "jax", "cupy"} & set(sys.modules)
"""


@pytest.mark.slow("process")
def test_import_star_imports_the_functions_and_no_framework() -> None:
    assert output_of(STAR).split() == sorted(cupy_router.__all__)


MISSING = """
import sys
name = sys.argv[1]
sys.modules[name] = None  # as if it were not installed
import cupy_router
assert not hasattr(cupy_router, name)
assert name in dir(cupy_router)
import inspect
inspect.getmembers(cupy_router)
try:
    getattr(cupy_router, name)
except AttributeError as error:
    print(error)
try:
    importlib = __import__("importlib").import_module("cupy_router." + name)
except ImportError:
    print("ImportError")
"""


@pytest.mark.slow("process")
@pytest.mark.parametrize("name", ["torch", "jax"])
def test_a_missing_framework_is_named(name: str) -> None:
    message, kind = output_of(MISSING, name).splitlines()
    assert message.startswith(
        f"cupy_router.{name} cannot be imported: install cupy-router[{name}] for its framework (import of {name} halt"
    )
    assert kind == "ImportError"


BROKEN = """
import sys
name, needed = sys.argv[1:]
sys.modules[needed] = None
import cupy_router
try:
    getattr(cupy_router, name)
except AttributeError as error:
    print(error)
"""


@pytest.mark.slow("process")
@pytest.mark.parametrize(
    ("name", "needed"), [("ops", "cupy_router.ops"), ("compiler", "cupy_router.watch"), ("torch", "ml_dtypes")]
)
def test_what_is_installed_and_broken_is_not_called_missing(name: str, needed: str) -> None:
    message = output_of(BROKEN, name, needed)
    assert message.startswith(f"cupy_router.{name} cannot be imported: ModuleNotFoundError: import of {needed} halted")
    assert "install" not in message


DOCUMENTED = """
import sys
import cupy_router
for path in sys.argv[1:]:
    value = cupy_router
    for part in path.split(".")[1:]:
        value = getattr(value, part, None)
    if value is None:
        print(path)
"""


@pytest.mark.slow("process")
def test_names_that_documents_write_are_attributes() -> None:
    for name in ("torch", "jax"):
        pytest.importorskip(name, reason=f"{name} is not installed")
    texts = [path.read_text() for path in (ROOT / "README.md", *(ROOT / "docs").glob("*.md"))]
    paths = {path for text in texts for path in re.findall(r"\bcupy_router(?:\.\w+)+", text)}
    assert "cupy_router.torch.replace_routers" in paths
    assert output_of(DOCUMENTED, *sorted(paths)) == ""
