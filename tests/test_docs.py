# SPDX-License-Identifier: Apache-2.0
"""README and pages of docs/: every program prints what it says, commands and links lead to what exists.

.ci/run builds the site, which finds pages that no list contains.
"""

from __future__ import annotations

import argparse
import ast
import contextlib
import importlib.util
import io
import re
import shlex
import tomllib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

import cupy_router
from cupy_router import cli
from tests.frameworks import transformers_with_models
from tests.pages import FENCE, PAGES, ROOT, Program, anchors, between, blocks, programs, prose

LINKED = (
    *PAGES,
    *(
        ROOT / name
        for name in ("CONTRIBUTING.md", "CHANGELOG.md", "SECURITY.md", "kernels/README.md", "benchmarks/README.md")
    ),
)
QUICK_START = ROOT / "docs" / "quickstart.md"
LANGUAGES = {"python", "sh", "text", "", "{toctree}"}
PROGRAMS = [program for page in PAGES for program in programs(page)]
COMMANDS = [
    pytest.param(line, id=f"{block.page.stem}-{block.line + number}")
    for page in PAGES
    for block in blocks(page)
    if block.language == "sh"
    for number, line in enumerate(block.text.replace("\\\n", " ").splitlines())
]


# -- Programs ----------------------------------------------------------------------------------------------------------


def case(program: Program) -> Any:
    marks = [pytest.mark.backends("gpu")] if "cupy" in program.packages() else []
    if program.packages() & {"equinox", "flax"}:
        marks.append(pytest.mark.slow("seconds"))  # their imports
    return pytest.param(program, id=f"{program.page.stem}-{program.number}", marks=marks)


@pytest.mark.parametrize("program", [case(program) for program in PROGRAMS])
def test_a_program_prints_what_its_comments_say(
    program: Program, tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch
) -> None:
    with _engines(program):
        for package in program.packages():
            pytest.importorskip(package, reason=f"{package} is not installed")
        if "transformers" in program.packages():
            transformers_with_models()
        folder = tmp_path_factory.getbasetemp() / program.page.stem  # programs of a page may read each other's files
        folder.mkdir(exist_ok=True)
        monkeypatch.chdir(folder)
        printed = io.StringIO()
        with contextlib.redirect_stdout(printed):
            exec(compile(program.code, str(program.page.relative_to(ROOT)), "exec"), {"__name__": "__main__"})
    assert printed.getvalue().splitlines() == program.expected()


@contextlib.contextmanager
def _engines(program: Program) -> Iterator[None]:
    """Stand in for the engines that a program imports integrations for."""
    if "cupy_router.integrations" not in program.code:
        yield
        return
    pytest.importorskip("torch", reason="PyTorch is not installed")
    from tests import engine_stubs

    with engine_stubs.vllm(), engine_stubs.sglang(engine_stubs.SGLang()):
        yield


@pytest.mark.parametrize("program", PROGRAMS, ids=lambda program: f"{program.page.stem}-{program.number}")
def test_every_print_says_what_it_prints(program: Program) -> None:
    assert program.prints() == len(program.expected())


def demo() -> str:
    """Return what the demo prints on the CPU, in 80 columns."""
    terminal = io.TextIOWrapper(io.BytesIO(), "utf-8")
    with pytest.MonkeyPatch.context() as patch, contextlib.redirect_stdout(terminal):
        patch.setenv("COLUMNS", "80")
        assert cli.main(["demo", "--device", "cpu"]) == 0
    printed: bytes = terminal.buffer.getvalue()  # type: ignore[attr-defined]
    return f"```text\n{printed.decode().strip()}\n```"


def test_the_demo_of_the_quick_start_is_that_of_the_command() -> None:
    """Except for the last bits of weights."""
    page, now = (re.sub(r"\d\.\de-08", "", text) for text in (between(QUICK_START, "demo"), demo()))
    assert page == now, "run python -m tests.test_docs"


def test_fences_have_known_languages_and_are_closed() -> None:
    for page in PAGES:
        assert {block.language for block in blocks(page)} <= LANGUAGES, page.name
        assert "```" not in FENCE.sub("", page.read_text("utf-8")), f"{page.name}: a fence is open"


# -- Commands ----------------------------------------------------------------------------------------------------------


class Parsed(Exception):
    """The command line is right."""


@pytest.mark.parametrize("line", COMMANDS)
def test_a_command_names_what_exists(line: str, monkeypatch: pytest.MonkeyPatch) -> None:
    parse = argparse.ArgumentParser.parse_args

    def only_parse(parser: argparse.ArgumentParser, arguments: Any) -> None:
        parse(parser, arguments)
        raise Parsed

    monkeypatch.setattr(argparse.ArgumentParser, "parse_args", only_parse)
    for command in line.partition("  #")[0].split(" && "):
        words = [word for word in shlex.split(command) if not re.fullmatch(r"[A-Z_]+=.*", word)]
        program, arguments = words[0].rpartition("/")[2], words[1:]
        if program == "cupy-router":
            with pytest.raises(Parsed):
                cli.main(arguments)
        elif "-m" in arguments and arguments[arguments.index("-m") + 1] != "venv":
            module, *options = arguments[arguments.index("-m") + 1 :]
            spec = importlib.util.find_spec(module)
            assert spec is not None, module
            assert spec.origin is not None
            assert_options(options, Path(spec.origin).parent)
        elif program == "pytest":
            assert all((ROOT / word.partition("::")[0]).exists() for word in arguments if word.startswith("tests/"))
            assert_options(arguments, ROOT / "tests")
        elif program == "pip":
            extras = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))["project"]["optional-dependencies"]
            named = [name for word in arguments for found in re.findall(r"\[(.*)\]", word) for name in found.split(",")]
            assert set(named) <= set(extras)
        else:
            assert program in ("python3", "git", "cd", "sphinx-build"), f"no test knows {program}"


def assert_options(words: list[str], folder: Path) -> None:
    """Check that the files of a folder know the long options of a command."""
    text = "".join(path.read_text("utf-8") for path in folder.glob("*.py"))
    for name in (word.partition("=")[0].removeprefix("--") for word in words if word.startswith("--")):
        assert f'"--{name}"' in text or f'"{name.replace("-", "_")}"' in text, f"--{name}"


# -- Links and names ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("page", LINKED, ids=lambda page: page.relative_to(ROOT).as_posix())
def test_links_lead_to_files_and_headings(page: Path) -> None:
    for link in re.findall(r"\]\(([^)\s]+)\)", prose(page)):
        if not re.match(r"https?:|mailto:", link):
            name, _, anchor = link.partition("#")
            target = (page.parent / name).resolve() if name else page
            assert target.exists(), link
            assert not anchor or anchor in anchors(target), link


def string_patterns() -> list[re.Pattern[str]]:
    """Return the texts of the package that are long enough to be known by, with any value in their places."""
    found = []
    for path in (ROOT / "cupy_router").rglob("*.py"):
        nodes = list(ast.walk(ast.parse(path.read_text("utf-8"))))
        inner = {id(part) for node in nodes if isinstance(node, ast.JoinedStr) for part in node.values}
        for node in nodes:
            if isinstance(node, ast.JoinedStr) or (isinstance(node, ast.Constant) and id(node) not in inner):
                parts = node.values if isinstance(node, ast.JoinedStr) else [node]
                texts = [str(part.value).lstrip(": ") if isinstance(part, ast.Constant) else None for part in parts]
                if sum(len(text) for text in texts if text) >= 15:
                    found.append(re.compile("".join(".*" if text is None else re.escape(text) for text in texts)))
    return found


def test_the_sentences_of_troubleshooting_are_those_of_the_code() -> None:
    page = (ROOT / "docs/troubleshooting.md").read_text("utf-8")
    sentences, patterns = re.findall(r"^- `(.+)`$", page, re.M), string_patterns()
    assert len(sentences) >= 30
    for sentence in sentences:
        # An error may begin with the name of the function, and a reason may end another sentence.
        short = re.sub(r"^[\w.]+: ", "", sentence)
        assert any(pattern.fullmatch(text) for pattern in patterns for text in (sentence, short)), sentence


def test_the_table_of_environment_variables_has_those_that_are_read() -> None:
    read = re.compile(r"""environ(?:\.get\(|\.setdefault\(|\[)"(\w+)"|"((?:CUPY_ROUTER|CUPY_CACHE)_[A-Z_]+[A-Z])\"""")
    other = {"GLOO_SOCKET_IFNAME", "LD_PRELOAD", "LOCAL_RANK", "NPROC", "OMP_NUM_THREADS", "PYTHONPATH"}  # of others
    found = {
        name
        for folder in ("cupy_router", "benchmarks", "examples", "tests")
        for path in (ROOT / folder).rglob("*.py")
        for names in read.findall(path.read_text("utf-8"))
        for name in names
        if name
    }
    listed = re.findall(r"^\| `(\w+)` \|", (ROOT / "docs/environment.md").read_text("utf-8"), re.M)
    assert sorted(listed) == sorted(found - other)


def test_the_api_page_has_every_public_name() -> None:
    text = (ROOT / "docs/api.rst").read_text("utf-8")
    names = {f"cupy_router.{name}" for name in cupy_router.__all__}
    for package in ("torch", "jax"):
        source = (ROOT / f"cupy_router/{package}/__init__.py").read_text("utf-8")
        listed = re.search(r"^__all__ = \[(.*?)\]", source, re.M | re.S)
        assert listed is not None
        names |= {f"cupy_router.{package}.{name}" for name in re.findall(r'"(\w+)"', listed[1])}
    assert set(re.findall(r"^\.\. auto\w+:: (\S+)$", text, re.M)) == names


if __name__ == "__main__":  # writes what the demo prints
    head, begin, rest = QUICK_START.read_text("utf-8").partition("<!-- demo -->")
    QUICK_START.write_text(f"{head}{begin}\n\n{demo()}\n\n<!-- /demo -->{rest.partition('<!-- /demo -->')[2]}", "utf-8")
