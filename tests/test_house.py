# SPDX-License-Identifier: Apache-2.0
"""The house rules: imports between modules, the form of sources, the parts of an op."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from cupy_router.ops import registry

ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / "cupy_router"
SOURCES = sorted(
    path
    for folder in (".ci", "benchmarks", "cupy_router", "examples", "kernels", "tests")
    for path in (ROOT / folder).rglob("*")
    if path.suffix in {".py", ".cu", ".cuh", ".h", ".hpp", ".cpp", ".sh"} or path == ROOT / ".ci/run"
)
MODULES = [path for path in SOURCES if path.is_relative_to(PACKAGE) and path.suffix == ".py"]
# How a Router calls hash_router, and gradients that are kernels of the op and of its inverse, are not public.
OPS = sorted(registry.OPS.keys() - {"hash_layer", "permute_backward", "unpermute_backward"})

NOTHING = """_hooks watch unique_keys declarations kernel_cache kernel_log kernel_plan thread_locale relaxed
compiler_options checkpoint huggingface_families results typing method_fields"""
# Module or folder of the package -> those that it may import; `results` only names the outputs.
MAY_IMPORT = {
    **{name: set[str]() for name in NOTHING.split()},
    "kernel_build": {"tensor_map"},
    "kernel_dump": {"kernel_log", "nvrtc", "thread_locale"},
    "tensor_map": {"relaxed"},
    "compiler": {
        "compiler_options",
        "declarations",
        "kernel_cache",
        "kernel_build",
        "kernel_dump",
        "kernel_log",
        "kernel_plan",
        "relaxed",
        "tensor_map",
        "thread_locale",
        "watch",
    },
    "huggingface": {"method"},
    "huggingface_configs": {"huggingface_families"},
    "nvrtc": {"declarations", "thread_locale"},
    "simt": {"compiler", "tensor_map"},
    "check": {
        "compiler",
        "compiler_options",
        "declarations",
        "kernel_build",
        "launcher",
        "method",
        "nvrtc",
        "ops",
        "results",
        "score_comparison",
        "score_function",
        "simt",
        "tuning",
    },
    "score_function": {"declarations", "nvrtc", "unique_keys"},
    "score_comparison": {"compiler", "method", "method_fields", "ops", "reference", "score_function"},
    "method": {"_hooks", "huggingface_configs", "method_fields", "score_function", "typing"},
    "launcher": {"compiler", "declarations"},
    "scratch": {"compiler", "relaxed"},
    "tuning": {"compiler"},
    "gemm": {"compiler", "kernel_cache", "launcher", "scratch", "tuning"},
    "arrays": {"_hooks", "compiler"},
    "reference": {"method", "method_fields", "score_function"},
    "ops": {
        "_hooks",
        "arrays",
        "compiler",
        "compiler_options",
        "gemm",
        "kernel_plan",
        "launcher",
        "method",
        "method_fields",
        "reference",
        "results",
        "score_function",
        "scratch",
        "tensor_map",
        "tuning",
    },
    "make_ready": {"compiler", "kernel_build", "kernel_log", "kernel_plan"},
    "warm_up": {"arrays", "compiler", "kernel_log", "kernel_plan", "make_ready", "method", "ops", "tuning"},
    "layer_arrays": {"arrays", "compiler", "ops"},
    "router": {
        "_hooks",
        "arrays",
        "checkpoint",
        "compiler",
        "huggingface",
        "layer_arrays",
        "method",
        "ops",
        "results",
        "typing",
        "unique_keys",
        "warm_up",
    },
    "torch": {"_hooks", "arrays", "huggingface", "method", "method_fields", "ops", "results", "router", "warm_up"},
    "jax": {
        "arrays",
        "compiler",
        "compiler_options",
        "declarations",
        "kernel_log",
        "method",
        "ops",
        "results",
        "router",
        "score_function",
        "thread_locale",
        "tuning",
    },
    "integrations": {"method", "ops", "torch"},
    "__init__": {"_hooks", "method", "ops", "results", "router", "score_comparison", "score_function"},
    "cli": {
        "__init__",
        "check",
        "compiler",
        "declarations",
        "gemm",
        "kernel_cache",
        "kernel_log",
        "method",
        "nvrtc",
        "results",
        "score_function",
        "tuning",
    },
    "__main__": {"cli"},
}
TOP_LEVEL = {path.stem for path in PACKAGE.iterdir()}
FRAMEWORKS = {"cupy", "jax", "torch"}


def module_of(path: Path) -> str:
    return path.relative_to(PACKAGE).parts[0].removesuffix(".py")


def imports(tree: ast.AST, path: Path) -> Iterator[str]:
    """The modules that the statements of a tree import, with their full names."""
    package = ["cupy_router", *path.parent.relative_to(PACKAGE).parts]
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = ".".join(package[: len(package) + 1 - node.level]) if node.level else ""
            module = ".".join(filter(None, (base, node.module)))
            # `from package import name` may import a module or a name of one: both spellings are looked at below.
            yield from (f"{module}.{alias.name}" for alias in node.names)
    yield from strings_that_name_modules(tree)


def strings_that_name_modules(tree: ast.AST) -> Iterator[str]:
    """Modules of the package in strings, by which code could import them; docstrings are for readers."""
    docstrings = {
        id(node.body[0].value)
        for node in ast.walk(tree)
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef)
        and node.body
        and isinstance(node.body[0], ast.Expr)
    }
    for node in ast.walk(tree):
        if isinstance(node, ast.Constant) and isinstance(node.value, str) and id(node) not in docstrings:
            yield from (
                name for name in re.findall(r"cupy_router\.\w+", node.value) if name.partition(".")[2] in TOP_LEVEL
            )


def modules_imported(tree: ast.AST, path: Path) -> set[str]:
    modules = set()
    for name in imports(tree, path):
        first, _, rest = name.partition(".")
        if first == "cupy_router":
            module = rest.split(".")[0]
            modules.add(module if module in TOP_LEVEL else "__init__")
    return modules - {module_of(path)}


def test_modules_import_only_what_they_may() -> None:
    wrong = {}
    for path in MODULES:
        found = modules_imported(ast.parse(path.read_text()), path) - MAY_IMPORT[module_of(path)]
        if found:
            wrong[str(path.relative_to(PACKAGE))] = found
    assert not wrong


@pytest.mark.parametrize(
    ("statement", "modules"),
    [
        ("import cupy_router.ops.topk_select", {"ops"}),
        ("from cupy_router import compiler, RoutingMethod", {"compiler", "__init__"}),
        ("from ..method import RoutingMethod", {"method"}),
        ("from .. import ops", {"ops"}),
        ("from . import order", set()),
        ("def f():\n    from cupy_router.cli.demo import run", {"cli"}),
        ("import numpy", set()),
        ("import_module('cupy_router.torch')", {"torch"}),
        ("import_module(f'cupy_router.arrays.{stem}')", {"arrays"}),
        ("def f():\n    'See cupy_router.torch.'", set()),
    ],
)
def test_the_import_rule_sees_every_spelling(statement: str, modules: set[str]) -> None:
    assert modules_imported(ast.parse(statement), PACKAGE / "reference" / "order.py") == modules


def private_names(path: Path) -> Iterator[str]:
    """Names with an underscore that a module reads from another one; modules of the package may have such names."""
    tree, modules = ast.parse(path.read_text()), set()
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and (node.level or (node.module or "").startswith("cupy_router")):
            folder = PACKAGE.joinpath(*(node.module or "").split(".")[1:])
            for alias in node.names:
                modules.add(alias.asname or alias.name)
                if alias.name.startswith("_") and not (folder / f"{alias.name}.py").is_file():
                    yield alias.name
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name) and node.value.id in modules:
            yield from re.findall(r"^\w+\._(?!_|fields$|replace$|asdict$)\w+$", f"{node.value.id}.{node.attr}")


def test_no_private_name_is_read_across_modules() -> None:
    found = {str(path.relative_to(PACKAGE)): names for path in MODULES if (names := sorted(private_names(path)))}
    assert not found


@pytest.mark.parametrize(("oracle", "known"), [("oracle", {"cupy_router.RoutingMethod"}), ("oracle_layout", set())])
def test_oracles_do_not_know_the_reference(oracle: str, known: set[str]) -> None:
    path = ROOT / f"tests/{oracle}.py"
    found = {name for name in imports(ast.parse(path.read_text()), PACKAGE / path.name) if "." in name}
    assert {name for name in found if name.partition(".")[0] == "cupy_router"} == known


def test_frameworks_are_imported_inside_functions_or_in_their_own_module() -> None:
    wrong = {}
    for path in MODULES:
        at_import = [node for node in ast.parse(path.read_text()).body if isinstance(node, ast.Import | ast.ImportFrom)]
        found = {name.split(".")[0] for node in at_import for name in imports(node, path)} & FRAMEWORKS
        found -= {path.stem.removeprefix("_") if module_of(path) == "arrays" else module_of(path)}
        found -= {"torch"} if module_of(path) == "integrations" else set()  # of engines that are made of it
        if found:
            wrong[str(path.relative_to(PACKAGE))] = found
    assert not wrong


@pytest.mark.slow("process")
def test_no_public_name_and_no_command_imports_a_framework() -> None:
    code = """
import sys
import cupy_router
[getattr(cupy_router, name) for name in cupy_router.__all__]
import cupy_router.cli
print(*sorted({"cupy", "jax", "torch"} & set(sys.modules)))
"""
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (0, "\n"), done.stderr


def readers(text: str) -> Iterator[tuple[str, str]]:
    """Each line of a kernel file, and who reads it: "gpu" after #ifdef __CUDACC__, "cpu" after its #else, or "both"."""
    stack = ["both"]
    for line in text.splitlines():
        directive = "".join(line.split())
        if directive.startswith("#if"):
            stack.append("gpu" if directive == "#ifdef__CUDACC__" else stack[-1])
        elif directive.startswith("#else") and stack[-2:] == ["both", "gpu"]:
            stack[-1] = "cpu"
        elif directive.startswith("#endif"):
            stack.pop()
        yield line, stack[-1]


def test_readers_follow_nested_conditions() -> None:
    text = """both
#ifdef __CUDACC__
gpu
#if __CUDA_ARCH__ >= 800
gpu
#else
gpu
#endif
#else  // a twin
cpu
#endif
both"""
    assert [line == reader for line, reader in readers(text) if not line.startswith("#")] == [True] * 6


KERNELS = ROOT / "kernels"
KERNEL_FILES = {path.relative_to(KERNELS).as_posix(): path for path in sorted(KERNELS.rglob("*.cu*"))}

# Folder of kernels/ -> the folders of which it may include headers, besides its own. "" is that of the kernels.
MAY_INCLUDE = {
    "device": set(),
    "layout": {"device"},
    "select": {"device"},
    "rows": {"device"},
    "long_rows": {"device", "select"},
    "routing": {"device", "layout", "select"},
    "gate": {"device", "layout", "select", "routing"},
    "": {"device", "rows", "layout", "select", "long_rows", "routing", "gate"},
}


def included(path: Path) -> set[str]:
    """The headers of kernels/ that a kernel file includes by itself."""
    return set(re.findall(r'^\s*#\s*include\s+"(.*)"', path.read_text(), re.M))


@pytest.mark.parametrize("name", KERNEL_FILES)
def test_kernel_files_include_only_headers_of_the_layers_below(name: str) -> None:
    folder = name.rpartition("/")[0]
    assert name.endswith(".cuh" if folder else ".cu"), "headers lie in folders, kernels do not"
    for header in included(KERNEL_FILES[name]):
        assert header in KERNEL_FILES, f"paths are relative to kernels/: {header}"
        assert header.rpartition("/")[0] in MAY_INCLUDE[folder] | {folder}, f"{name} knows {header}"


@pytest.mark.parametrize("name", KERNEL_FILES)
def test_kernel_files_have_ptx_with_twins_and_nothing_of_the_system(name: str) -> None:
    for line, reader in readers(KERNEL_FILES[name].read_text()):
        if re.match(r"\s*#\s*include\s+<", line):
            assert reader == "cpu", f"only a C++ twin, which the GPU never sees, may use the standard library: {line}"
        assert not re.match(r"\s*#\s*(ifndef|undef)\b", line) or "MMA" in line, "constants are SPECIALISED"
        if re.search(r"\basm\b", line.partition("//")[0]):
            assert name.endswith(".cuh"), "PTX lives in headers"
            assert reader == "gpu", f"no C++ twin: {line}"


def test_every_header_is_read_by_a_kernel() -> None:
    reached, todo = set(), [name for name in KERNEL_FILES if name.endswith(".cu")]
    while todo:
        name = todo.pop()
        if name not in reached:
            reached.add(name)
            todo += included(KERNEL_FILES[name])
    assert reached == KERNEL_FILES.keys()


def test_the_readme_of_the_kernels_lists_every_header() -> None:
    listed = re.findall(r"^\| `([\w/.]+)` \| \S", (KERNELS / "README.md").read_text(), re.M)
    assert len(listed) == len(set(listed))
    assert {name for name in KERNEL_FILES if name.endswith(".cuh")} <= set(listed) <= KERNEL_FILES.keys()
    others = {path.name for path in KERNELS.rglob("*") if path.is_file()} - {Path(name).name for name in KERNEL_FILES}
    assert others == {"README.md"}


def test_one_op_is_one_kernel_one_op_file_one_reference_one_test_one_benchmark() -> None:
    files = ("cupy_router/ops/{}.py", "cupy_router/reference/{}.py", "tests/test_{}.py")
    parts = [part.format(op) for op in OPS for part in files]
    parts += [f"benchmarks/bench_{op}.py" for op in OPS if op != "unpermute"]  # which permute's benchmark measures too
    assert not [part for part in parts if not (ROOT / part).is_file()]
    assert not [op for op in OPS if not list(KERNELS.glob(f"{op}*.cu"))]


def test_every_op_is_known_here() -> None:
    assert [path.stem for path in sorted((PACKAGE / "ops").glob("[a-z]*.py"))] == sorted([*OPS, "registry"])


def test_sources_start_with_a_licence_line() -> None:
    def first_line(path: Path) -> str:
        lines = path.read_text().splitlines()
        return next((line for line in lines if not line.startswith("#!")), "")

    comments = {path: "#" if path.suffix in {".py", ".sh", ""} else "//" for path in SOURCES}
    wrong = [
        str(path.relative_to(ROOT))
        for path, comment in comments.items()
        if first_line(path) != f"{comment} SPDX-License-Identifier: Apache-2.0"
    ]
    assert not wrong


def test_sources_have_at_most_400_lines() -> None:
    lengths = {str(path.relative_to(ROOT)): len(path.read_text().splitlines()) for path in SOURCES}
    assert not {name: length for name, length in lengths.items() if length > 400}, "more than one idea?"
