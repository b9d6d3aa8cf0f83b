# SPDX-License-Identifier: Apache-2.0
"""Record the first minutes with a GPU, for docs/first_minutes_gpu.md.

    python -m tests.gpu.first_minutes --output docs/first_minutes_gpu.md

runs the commands of the page on the GPU at hand, in an empty folder with an empty cache of kernels, and writes them
with what they print.
"""

from __future__ import annotations

import argparse
import datetime
import os
import re
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).parents[2]
TITLE = """# First minutes with a GPU

A recording of a terminal on a machine with an {gpu}, in {month}, made by
`python -m tests.gpu.first_minutes`. Packages were there already; the [quick start](quickstart.md#install) says how to
get them. The cache of compiled kernels was empty.
"""
PROGRAM = """import cupy
import cupy_router

logits = cupy.arange(4 * 256, dtype=cupy.float32).reshape(4, 256) * 37 % 257 / 8
routing = cupy_router.activation_topk(logits, cupy_router.RoutingMethod(256, 6, "softmax"))
"""
PRINTED = ("print(routing.indices[0].tolist())", "print([round(weight, 4) for weight in routing.weights[0].tolist()])")
# Of kernels/routing/weigh.cuh, where scores become weights.
LINE = "numbers.renormalize_min, numbers.scale)"
CHANGED = "numbers.renormalize_min, 2.0f * numbers.scale)"


class Recording:
    """A page, and the folder in which its commands run."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        (folder / "bin").mkdir()
        command = folder / "bin" / "cupy-router"
        program = "import sys; from cupy_router.cli import main; sys.exit(main())"
        command.write_text(f'#!/bin/sh\nexec "{sys.executable}" -c "{program}" "$@"\n')
        (folder / "bin" / "python3").write_text(f'#!/bin/sh\nexec "{sys.executable}" "$@"\n')
        for file in (folder / "bin").iterdir():
            file.chmod(0o755)
        (folder / "work").mkdir()
        self._environment = os.environ | {
            "PATH": f"{folder / 'bin'}:{os.environ['PATH']}",
            "PYTHONPATH": os.pathsep.join([str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])]),
            "CUPY_CACHE_DIR": str(folder / "cache"),
            "COLUMNS": "80",
        }
        self._parts: list[str] = []

    @property
    def text(self) -> str:
        return "\n\n".join(self._parts) + "\n"

    def prose(self, text: str) -> None:
        self._parts.append(text.strip())

    def printed(self, *commands: str) -> str:
        done = subprocess.run(
            ["bash", "-c", "\n".join(commands)], cwd=self._folder / "work", env=self._environment, text=True,
            stdout=subprocess.PIPE, stderr=subprocess.STDOUT, timeout=180,
        )  # fmt: skip
        text = done.stdout.replace(str(self._folder / "work"), "/home/me").replace(str(self._folder), "/home/me")
        return text.replace(str(ROOT), "/home/me/cupy_router").replace(sys.prefix, "/home/me/.venv").rstrip()

    def shell(self, *commands: str) -> None:
        """Run commands, and add them and what they print."""
        shown = "\n".join(commands)
        self._parts += [f"```sh\n{shown}\n```", f"```text\n{self.printed(*commands)}\n```"]

    def program(self, name: str) -> None:
        """Write the program, run it, and add it with what it prints."""
        file = self._folder / "work" / name
        file.write_text("\n".join([PROGRAM, *PRINTED, ""]))
        lines = self.printed(f"python3 {name}").splitlines()
        assert len(lines) == len(PRINTED), lines
        shown = [f"{line}  # {value}" for line, value in zip(PRINTED, lines, strict=True)]
        self._parts.append("\n".join(["```python", PROGRAM, *shown, "```"]))

    def edit(self, name: str, before: str, after: str) -> None:
        file = self._folder / "work" / name
        text = file.read_text()
        assert text.count(before) == 1, before
        file.write_text(text.replace(before, after))


def record(page: Recording, gpu: str, month: str) -> None:
    page.prose(TITLE.format(gpu=gpu, month=month))
    page.prose("## Look")
    page.shell("cupy-router doctor")
    page.prose("## Route\n\nSave as `route.py`:")
    page.program("route.py")
    page.prose("Which kernel was that, and where did it come from?")
    page.shell("CUPY_ROUTER_LOG=1 python3 route.py")
    page.prose("## Measure\n\nFrom the clone, against the time that moving the same bytes takes, and against others:")
    page.shell("python3 -m benchmarks.bench_activation_topk --n 8192")
    page.prose("## Get a server ready\n\nAll kernels of a gate, for every number of tokens, and once more:")
    warmup = "cupy-router warmup --preset deepseek-v4-flash --hidden 4096 --bias --tokens 1 8192"
    page.shell(warmup, warmup)
    page.prose("## Change a kernel")
    page.shell("cupy-router check --copy mine")
    page.prose(f"In `mine/routing/weigh.cuh`, replace `{LINE}` by\n`{CHANGED}`, and run the program with that folder:")
    page.edit("mine/routing/weigh.cuh", LINE, CHANGED)
    page.shell("CUPY_ROUTER_KERNELS=mine python3 route.py")
    page.prose("The experts are the same, the weights are not. A mistake is found without the GPU, too:")
    page.shell("cupy-router check mine/activation_topk.cu")
    page.prose("[Your own kernel](kernels.md) goes on from here, the page [without a GPU](first_minutes.md) before it.")


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m tests.gpu.first_minutes", description=__doc__)
    parser.add_argument("--output", type=Path, required=True, help="the page")
    output = parser.parse_args().output
    import cupy

    gpu = cupy.cuda.runtime.getDeviceProperties(0)["name"].decode()
    with tempfile.TemporaryDirectory() as folder:
        page = Recording(Path(folder).resolve())
        record(page, gpu, f"{datetime.date.today():%B %Y}")
    output.write_text(re.sub(r"[ \t]+$", "", page.text, flags=re.M), "utf-8")


if __name__ == "__main__":
    main()
