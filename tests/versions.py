# SPDX-License-Identifier: Apache-2.0
"""Run the README's commands with the lowest or the newest releases of all dependencies.

    python3.12 -m tests.versions newest [--output docs/versions.json]

runs both commands in a copy of the checkout, on the Python that runs this, and prints versions and results. The set
`lowest` has the floors of pyproject.toml. `--output` adds the run to a file, in place of an earlier one of the same
Python and set. Needs uv on the PATH, for the choice of versions, and 10 GB of disk.

    python -m tests.versions --write

generates the tables of docs/versions.md and the versions that `cupy-router doctor` knows from docs/versions.json.
"""

from __future__ import annotations

import argparse
import datetime
import json
import os
import platform
import re
import shutil
import subprocess
import sys
import tempfile
import tomllib
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
RUNS, DOCUMENT = ROOT / "docs" / "versions.json", ROOT / "docs" / "versions.md"
TRIED = ROOT / "cupy_router" / "data" / "tried_versions.json"
GPU_RUN = ROOT / "benchmarks" / "results" / "gpu_tests.json"
RESOLUTIONS = {"lowest": "lowest-direct", "newest": "highest"}
COLUMNS = ("torch", "jax", "transformers", "cupy", "numpy", "ml_dtypes")

Run = dict[str, Any]


# -- A run -------------------------------------------------------------------------------------------------------------


def commands() -> tuple[str, str]:
    """Return the README's commands: install and route, install and test."""
    demo, test = re.findall(r"^python3 -m venv \.venv && .*$", (ROOT / "README.md").read_text("utf-8"), re.M)
    return demo, test


def extras() -> list[str]:
    """Return the extras of the test command."""
    (found,) = re.findall(r"'\.\[(.*)\]'", commands()[1])
    return str(found).split(",")


def normalized(name: str) -> str:
    return re.sub(r"[-_.]+", "-", name).lower()


def declared() -> list[str]:
    """Return what the test command asks for in pyproject.toml."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))["project"]
    optional = project["optional-dependencies"]
    return [*project["dependencies"], *(text for extra in extras() for text in optional[extra])]


def floors() -> dict[str, str]:
    """Return the lowest version of each dependency that the test command installs."""
    found = [re.findall(r"^([\w-]+)>=([\w.]+)", text) for text in declared()]
    return {normalized(name): floor for ((name, floor),) in found}


def resolved(which: str, folder: Path) -> Path:
    """Write the exact versions of a set to a file of constraints."""
    path = folder / "constraints.txt"
    command = ["uv", "pip", "compile", "pyproject.toml", "--resolution", RESOLUTIONS[which], "--no-annotate"]
    command += ["--python-version", platform.python_version(), *(f"--extra={extra}" for extra in extras())]
    subprocess.run([*command, "--quiet", "--output-file", path], cwd=ROOT, check=True)
    return path


def take(which: str) -> Run:
    """Run both commands on this Python, in an environment for each; CalledProcessError if one fails."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        checkout = folder / "checkout"
        ignored = shutil.ignore_patterns(".git", ".venv", "__pycache__", ".*_cache")
        shutil.copytree(ROOT, checkout, ignore=ignored)
        environment = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}
        environment |= {"PIP_CONSTRAINT": str(resolved(which, folder)), "PIP_DISABLE_PIP_VERSION_CHECK": "1"}
        environment["PYTEST_ADDOPTS"] = "--ignore=tests/test_versions.py"  # which is about the result of this run
        printed = []
        for command in commands():
            shutil.rmtree(checkout / ".venv", ignore_errors=True)
            line = command.replace("python3", sys.executable, 1)
            print(f"== {which}: {line}", flush=True)
            done = subprocess.run(
                line, shell=True, cwd=checkout, env=environment, stdout=subprocess.PIPE, text=True, encoding="utf-8"
            )
            print(done.stdout, flush=True)
            done.check_returncode()
            printed.append(done.stdout)
        pip = [checkout / ".venv/bin/python", "-m", "pip", "list", "--format", "json"]
        listed = json.loads(subprocess.run(pip, env=environment, capture_output=True, check=True).stdout)
    (summary,) = re.findall(r"^=*\s*(\d+ passed.*?) in ", printed[1], re.M)
    names = {*floors(), "jaxlib"}
    return {
        "python": platform.python_version(),
        "set": which,
        "demo": "ok" if "FAILED" not in printed[0] else "failed",
        "tests": re.sub(r", \d+ (deselected|warnings?)", "", summary),
        "date": datetime.datetime.now(datetime.UTC).strftime("%Y-%m-%d"),
        "system": f"{platform.system()} {platform.machine()}, {'-'.join(platform.libc_ver())}",
        "versions": {name: row["version"] for row in listed if (name := normalized(row["name"])) in names},
    }


def minor(version: str) -> tuple[int, ...]:
    """Return major and minor release of a Python."""
    return tuple(map(int, version.split(".")[:2]))


def with_run(runs: Sequence[Run], run: Run) -> list[Run]:
    """Return the runs with a new one in the place of that of the same Python and set."""
    others = [old for old in runs if (minor(old["python"]), old["set"]) != (minor(run["python"]), run["set"])]
    return sorted([*others, run], key=lambda one: (one["set"], minor(one["python"])))


# -- The document ------------------------------------------------------------------------------------------------------


def load(path: Path = RUNS) -> dict[str, Any]:
    content: dict[str, Any] = json.loads(path.read_text("utf-8"))
    return content


def gpu_environment() -> dict[str, Any]:
    """Return what the results of the tests on a GPU say of their machine."""
    about: dict[str, Any] = load(GPU_RUN)["environment"]
    return about


def version_of(versions: dict[str, str], column: str) -> str:
    names = ("cupy-cuda12x", "cupy-cuda13x") if column == "cupy" else (normalized(column),)
    return next((versions[name] for name in names if name in versions), "")


def cells() -> Iterator[list[str]]:
    """The rows of the table: one for each run, then the GPU's."""
    for run in load()["runs"]:
        versions = run["versions"]
        yield [
            f"{run['set']}, {run['date']}", run["python"], *(version_of(versions, column) for column in COLUMNS),
            versions["nvidia-cuda-nvrtc-cu12"], run["tests"],
        ]  # fmt: skip
    about = gpu_environment()
    yield [
        f"{about['gpu']['name']}, {about['date']}", about["python"],
        *(version_of(about["versions"], column) for column in COLUMNS), about["nvrtc"], "`--backend=gpu`",
    ]  # fmt: skip


def table() -> str:
    """Return the table as Markdown."""
    heads = ["run", "Python", "PyTorch", "JAX", "transformers", "CuPy", "NumPy", "ml_dtypes", "NVRTC", "tests"]
    lines = [heads, ["---"] * len(heads), *cells()]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def tried() -> str:
    """Return the versions of each column that passed, as JSON for the package."""
    rows = [run["versions"] | {"python": run["python"]} for run in load()["runs"]]
    about = gpu_environment()
    rows.append(about["versions"] | {"python": about["python"]})
    found = {name: {version_of(row, name).partition("+")[0] for row in rows} - {""} for name in COLUMNS}
    found["python"] = {".".join(map(str, minor(row["python"]))) for row in rows}
    ascending = {
        name: sorted(found[name], key=lambda version: [*map(int, re.findall(r"\d+", version))]) for name in found
    }
    return json.dumps(ascending, indent=1) + "\n"


BEGIN, END = "<!-- versions -->", "<!-- /versions -->"


def updated(text: str) -> str:
    """Return the document with a current table."""
    head, _, rest = text.partition(BEGIN)
    return f"{head}{BEGIN}\n\n{table()}\n\n{END}{rest.partition(END)[2]}"


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("set", nargs="?", choices=RESOLUTIONS)
    parser.add_argument("--output", type=Path, help="add the run to this file")
    parser.add_argument("--write", action="store_true", help="generate docs/versions.md and the package's list")
    options = parser.parse_args(arguments)
    if options.set is not None:
        run = take(options.set)
        print(json.dumps(run, indent=1))
        if options.output is not None:
            content = load(options.output) if options.output.is_file() else {"runs": []}
            content["runs"] = with_run(content["runs"], run)
            options.output.write_text(json.dumps(content, indent=1) + "\n", "utf-8")
    if options.write:
        DOCUMENT.write_text(updated(DOCUMENT.read_text("utf-8")), "utf-8")
        TRIED.write_text(tried(), "utf-8")


if __name__ == "__main__":
    main()
