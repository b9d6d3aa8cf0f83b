# SPDX-License-Identifier: Apache-2.0
"""Compare the machine code of every kernel specialisation in use with that of a commit. Needs NVRTC, no GPU.

    python -m tests.machine_code COMMIT                                      the same bytes on sm_90?
    python -m tests.machine_code COMMIT --growth 1 --architectures all       at most 1 % more of anything?

Each tree lists its specialisations in a separate process, in the order in which its ops ask for them. They are paired
by that order, so macros may have other names. The bytes of the `.text` sections are compared, including padding. With
--growth, registers, spilled bytes and instructions (16 bytes each since sm_70) are compared.
"""

from __future__ import annotations

import argparse
import hashlib
import io
import json
import multiprocessing
import os
import pickle
import subprocess
import sys
import tarfile
import tempfile
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import NamedTuple

from tests import nvrtc
from tests.nvrtc import ARCHITECTURES, Resources

ROOT = Path(__file__).parents[1]
INSTRUCTION = 16

# Runs in either tree. The second branch is for commits from before `in_order_of_use`.
_LIST = """
import json, sys
from tests import specialisations as uses
if hasattr(uses, "in_order_of_use"):
    found = uses.in_order_of_use()
else:
    used = uses._largest(uses._presets, uses._benchmarks, uses._besides)
    both = used | {key: sizes for key, sizes in uses._largest(uses._corners).items() if key not in used}
    found = [uses.Specialisation(*key, *sizes, key not in used) for key, sizes in both.items()]
json.dump([[str(one), one.function, one.architectures, one.source] for one in found], sys.stdout)
"""


class Listed(NamedTuple):
    """A specialisation in the list of a tree."""

    title: str
    function: str
    architectures: Sequence[str]
    source: str


class Code(NamedTuple):
    """Hash and number of instructions, and their resources."""

    digest: str
    instructions: int
    needs: Resources


def listed(tree: Path) -> list[Listed]:
    environment = {name: value for name, value in os.environ.items() if name != "CUPY_ROUTER_KERNELS"}
    done = subprocess.run(
        [sys.executable, "-c", _LIST],
        cwd=tree, env=environment | {"PYTHONPATH": str(tree)}, stdout=subprocess.PIPE, text=True, check=True,
    )  # fmt: skip
    return [Listed(*one) for one in json.loads(done.stdout)]


def extract(commit: str, folder: Path) -> None:
    """Extract the files of a commit."""
    archive = subprocess.run(["git", "archive", commit], cwd=ROOT, capture_output=True, check=True).stdout
    with tarfile.open(fileobj=io.BytesIO(archive)) as files:
        files.extractall(folder, filter="data")


def compile_all(library: Path, jobs: Sequence[tuple[str, str, str]], cache: Path | None) -> list[Code]:
    """Compile each (source, function, architecture) in processes, because NVRTC compiles one program at a time."""
    todo = [(str(library), *job, cache) for job in jobs]
    with ProcessPoolExecutor(os.cpu_count(), multiprocessing.get_context("spawn")) as pool:
        return list(pool.map(_code, todo, chunksize=4))


_opened: dict[str, nvrtc.Nvrtc] = {}


def _code(job: tuple[str, str, str, str, Path | None]) -> Code:
    path, source, function, architecture, cache = job
    key = hashlib.sha256(repr(job[:4]).encode()).hexdigest()
    kept = cache and cache / key
    if kept and kept.exists():
        return Code(*pickle.loads(kept.read_bytes()))
    if path not in _opened:
        _opened[path] = nvrtc.Nvrtc(Path(path))
    text, needs = _opened[path].machine_code(source, function, architecture)
    found = Code(hashlib.sha256(text).hexdigest(), len(text) // INSTRUCTION, needs)
    if kept:
        kept.write_bytes(pickle.dumps(tuple(found)))
    return found


def growth(before: Code, now: Code, percent: float) -> list[str]:
    """Return what grew by more than a percentage, such as "registers 40 -> 48"."""
    pairs = {
        "registers": (before.needs.registers, now.needs.registers),
        "spills": (before.needs.spills, now.needs.spills),
        "instructions": (before.instructions, now.instructions),
    }
    return [f"{name} {old} -> {new}" for name, (old, new) in pairs.items() if new > old * (1 + percent / 100)]


def main() -> int:
    parser = argparse.ArgumentParser(
        prog="python -m tests.machine_code", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("commit", help="whose machine code to compare with")
    parser.add_argument("--architectures", nargs="+", default=["sm_90"], help="such as sm_80 sm_90, or all")
    parser.add_argument("--growth", type=float, metavar="PERCENT", help="allow other code that needs no more than this")
    parser.add_argument("--cache", type=Path, help="folder in which to keep what was compiled")
    options = parser.parse_args()
    wanted = ARCHITECTURES if options.architectures == ["all"] else options.architectures
    if options.cache:
        options.cache.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as folder:
        extract(options.commit, Path(folder))
        before, now = listed(Path(folder)), listed(ROOT)
    if [one.function for one in before] != [one.function for one in now]:
        print("the trees do not launch the same kernels in the same order")
        return 1
    pairs = [(old, new, each) for old, new in zip(before, now, strict=True) for each in wanted]
    pairs = [(old, new, each) for old, new, each in pairs if each in new.architectures]
    jobs = [(one.source, one.function, each) for old, new, each in pairs for one in (old, new)]
    failed = 0
    for version, library in nvrtc.libraries().items():
        codes = compile_all(library.path, jobs, options.cache)
        same = total = more = 0
        for (_, new, each), old_code, new_code in zip(pairs, codes[::2], codes[1::2], strict=True):
            is_same = old_code.digest == new_code.digest
            same, total, more = same + is_same, total + old_code.instructions, more + new_code.instructions
            grown = growth(old_code, new_code, options.growth) if options.growth is not None else []
            if grown or (options.growth is None and not is_same):
                failed += 1
                what = ", ".join(grown) or f"instructions {old_code.instructions} -> {new_code.instructions}"
                print(f"    {each:8} {new.title}: {what}")
        print(f"NVRTC {version}, {' '.join(wanted)}: {len(pairs)} kernels, {same} the same to the byte;", end=" ")
        print(f"instructions {total} -> {more} ({100 * (more / total - 1):+.2f} %)")
    return int(failed > 0)


if __name__ == "__main__":
    sys.exit(main())
