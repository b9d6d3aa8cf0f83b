# SPDX-License-Identifier: Apache-2.0
"""Machine code of every kernel specialisation in use, here and in a commit. Needs NVRTC, no GPU.

    python -m tests.machine_code COMMIT                                      the same bytes on sm_90?
    python -m tests.machine_code COMMIT --growth 1 --architectures all       at most 1 % more of anything?

Each tree lists its specialisations in a process of its own, in the order in which its ops ask for them. By that order
they are paired, so constants may have other names. Compared are the bytes of the `.text` sections; with --growth
registers, spilled bytes and instructions.
"""

from __future__ import annotations

import argparse
import hashlib
import io
import json
import os
import pickle
import subprocess
import sys
import tarfile
import tempfile
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

from cupy_router import kernel_build
from tests import nvrtc
from tests.nvrtc import ARCHITECTURES, Resources

ROOT = Path(__file__).parents[1]
INSTRUCTION = 16  # bytes, since sm_70
_NO_OP = b"\x18\x79"

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
def sources(one):
    return {each: one.source(each) if callable(one.source) else one.source for each in one.architectures}
json.dump([[str(one), one.function, sources(one)] for one in found], sys.stdout)
"""


class Listed(NamedTuple):
    """A specialisation as its tree describes it."""

    title: str
    function: str
    sources: dict[str, str]  # by architecture


class Code(NamedTuple):
    """Hash of the bytes, number of instructions, and what they need."""

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
    """The files of a commit."""
    archive = subprocess.run(["git", "archive", commit], cwd=ROOT, capture_output=True, check=True).stdout
    with tarfile.open(fileobj=io.BytesIO(archive)) as files:
        files.extractall(folder, filter="data")


def compile_all(library: nvrtc.Nvrtc, jobs: Sequence[tuple[str, str, str]], cache: Path | None) -> list[Code]:
    """(source, function, architecture) each, in threads."""

    def code(job: tuple[str, str, str]) -> Code:
        key = hashlib.sha256(repr((str(library.path), *job)).encode()).hexdigest()
        kept = cache and cache / key
        if kept and kept.exists():
            return Code(*pickle.loads(kept.read_bytes()))
        text, needs = library.machine_code(*job)
        found = Code(hashlib.sha256(text).hexdigest(), count(text), needs)
        if kept:
            kept.write_bytes(pickle.dumps(tuple(found)))
        return found

    with ThreadPoolExecutor(kernel_build.num_threads()) as pool:
        return list(pool.map(code, jobs))


def count(text: bytes) -> int:
    """Instructions of a `.text` section, without the no-ops that pad it."""
    end = len(text)
    while text[end - INSTRUCTION : end].startswith(_NO_OP):
        end -= INSTRUCTION
    return end // INSTRUCTION


def growth(before: Code, now: Code, percent: float) -> list[str]:
    """What is more by more than so many per cent, such as "registers 40 -> 48"."""
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
    if len(before) != len(now):
        print(f"{len(before)} specialisations there, {len(now)} here")
        return 1
    renamed = {(old.function, new.function) for old, new in zip(before, now, strict=True)}
    for old_name, new_name in sorted(pair for pair in renamed if pair[0] != pair[1]):
        print(f"    {old_name} is paired with {new_name}")
    pairs = [(old, new, each) for old, new in zip(before, now, strict=True) for each in wanted]
    pairs = [(old, new, each) for old, new, each in pairs if each in new.sources]
    jobs = [(one.sources[each], one.function, each) for old, new, each in pairs for one in (old, new)]
    failed = 0
    for version, library in nvrtc.libraries().items():
        codes = compile_all(library, jobs, options.cache)
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
