# SPDX-License-Identifier: Apache-2.0
"""What every kernel specialisation in use needs on every architecture: tables in tests/resources/ that may not grow.

    python -m tests.resource_gate            compare with the tables, as tests/test_compile.py does
    python -m tests.resource_gate --update   write the tables of the NVRTC versions that are installed
    ... --all                                compile all, not only what changed since the tables were written

A table holds the numbers of one exact version of NVRTC, since another one allocates registers differently. What presets
and benchmarks use may neither spill registers nor have a stack, which even --update refuses; corners just may not grow.

Each row has a seal: a digest of everything that the compiler was given (its version, its options, the text with all
headers) and of the numbers in the row. The same input gives the same machine code, so a row whose seal fits is not
compiled again. Some of these are nevertheless, others in each run, and must have exactly the numbers of the table.
"""

from __future__ import annotations

import argparse
import hashlib
import random
import sys
from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from pathlib import Path

from cupy_router import kernel_build
from tests import nvrtc
from tests.nvrtc import ARCHITECTURES, Resources
from tests.specialisations import CORNER, Specialisation, specialisations

FOLDER = Path(__file__).with_name("resources")
NEW, OLD = "new", "old"
UPDATE = "python -m tests.resource_gate --update"
REPEATED = 24  # rows of each table that are compiled in every run, though their seals fit


@dataclass(frozen=True)
class Multiprocessor:
    """What the warps on one multiprocessor share, from the CUDA programming guide: compute capabilities, limits."""

    warps: int
    blocks: int
    shared_kilobytes: int
    shared_step: int = 128  # bytes, in which shared memory is given out
    shared_reserved: int = 1024  # bytes of each block that the system takes


MULTIPROCESSORS = {
    "sm_75": Multiprocessor(32, 16, 64, shared_step=256, shared_reserved=0),
    "sm_80": Multiprocessor(64, 32, 164),
    "sm_86": Multiprocessor(48, 16, 100),
    "sm_90": Multiprocessor(64, 32, 228),
    "sm_100": Multiprocessor(64, 32, 228),
    "sm_120": Multiprocessor(48, 24, 100),
}
# NVRTC 12.9 and 13.0 compile every specialisation to the same needs here, so that only one of them is asked.
_OLDER, _SAME_IN_BOTH = "12.9.86", ("sm_75", "sm_80", "sm_86", "sm_90")
_PARTITIONS, _PARTITION_REGISTERS, _REGISTER_STEP = 4, 16384, 256  # of every architecture above


def occupancy(architecture: str, block: int, registers: int, shared: int) -> int:
    """Per cent of the warps of a multiprocessor that blocks of this kind can fill."""
    limits = MULTIPROCESSORS[architecture]
    warps = -(-block // 32)
    warp_registers = max(1, -(-registers * 32 // _REGISTER_STEP)) * _REGISTER_STEP
    block_shared = -(-(shared + limits.shared_reserved) // limits.shared_step) * limits.shared_step
    blocks = min(
        limits.blocks,
        limits.warps // warps,
        _PARTITION_REGISTERS // warp_registers * _PARTITIONS // warps,
        limits.shared_kilobytes * 1024 // block_shared if block_shared else limits.blocks,
    )
    return 100 * blocks * warps // limits.warps


@dataclass(frozen=True)
class Row:
    """One line of a table. All numbers but the occupancy may only fall, the occupancy may only rise."""

    registers: int
    spills: int
    stack: int
    shared: int
    occupancy: int
    seal: str = field(default="", compare=False)

    @classmethod
    def of(cls, specialisation: Specialisation, architecture: str, needs: Resources) -> Row:
        shared = needs.shared + specialisation.shared_bytes
        filled = occupancy(architecture, specialisation.block, needs.registers, shared)
        return cls(needs.registers, needs.spills, needs.stack, shared, filled)

    def worse_than(self, before: Row) -> list[str]:
        """What is worse now, such as "registers 40 -> 48"."""
        return [
            f"{name} {old} -> {new}"
            for name in _WIDTHS
            for old, new in [(getattr(before, name), getattr(self, name))]
            if (new < old if name == "occupancy" else new > old)
        ]


Table = dict[tuple[str, str], Row]  # (specialisation, architecture) -> what it needs


def measure(version: str, wanted: Sequence[Specialisation], known: Table) -> tuple[Table, int]:
    """What one NVRTC makes of everything, and how many rows of it are neither known nor unchanged since.

    RuntimeError if a row that is compiled again has other numbers, which its seal should exclude.
    """
    skipped = () if version != _OLDER else _SAME_IN_BOTH
    pairs = [(one, architecture) for one in wanted for architecture in one.architectures if architecture not in skipped]
    keys = {(str(one), architecture): (one, architecture) for one, architecture in pairs}
    found = {key: row for key in keys if (row := _unchanged(version, *keys[key], known.get(key))) is not None}
    repeated = random.SystemRandom().sample(sorted(found), min(REPEATED, len(found)))
    compiled = [key for key in keys if key not in found]
    for key, row in _compile(version, [keys[key] for key in compiled + repeated]).items():
        if key in found and row != found[key]:
            what = f"{key[0]} on {key[1]}: the table has {found[key]}, the same text gives {row}"
            raise RuntimeError(f"NVRTC {version}, {what}; {UPDATE} --all compiles everything")
        found[key] = row
    return {key: found[key] for key in keys}, len(compiled)


def seal(version: str, one: Specialisation, architecture: str, row: Row) -> str:
    """Digest of what is compiled, and of what came out. Occupancy follows from these."""
    source = one.source(architecture)
    given = (version, nvrtc.options(source, architecture), one.function, one.shared_bytes, source)
    numbers = (row.registers, row.spills, row.stack, row.shared)
    return hashlib.sha256(repr((given, numbers)).encode()).hexdigest()[:16]


def _unchanged(version: str, one: Specialisation, architecture: str, row: Row | None) -> Row | None:
    """The row if its seal fits, with the occupancy of blocks as they are now."""
    if row is None or row.seal != seal(version, one, architecture, row):
        return None
    return replace(row, occupancy=occupancy(architecture, one.block, row.registers, row.shared))


def _compile(version: str, todo: Sequence[tuple[Specialisation, str]]) -> Table:
    library = nvrtc.libraries()[version]

    def row_of(job: tuple[Specialisation, str]) -> Row:
        one, architecture = job
        row = Row.of(one, architecture, library.resources(one.source(architecture), one.function, architecture))
        return replace(row, seal=seal(version, one, architecture, row))

    with ThreadPoolExecutor(kernel_build.num_threads()) as pool:
        return {
            (str(one), architecture): row for (one, architecture), row in zip(todo, pool.map(row_of, todo), strict=True)
        }


# -- Tables ------------------------------------------------------------------------------------------------------------

_TITLE = """NVRTC {version}: what each kernel specialisation needs; written by `{update}`
registers of a thread, bytes that it spills and bytes of its stack, shared bytes of a block, occupancy in per cent, seal
"""
_WIDTHS = {"registers": 3, "spills": 3, "stack": 3, "shared": 5, "occupancy": 3}


def table_file(version: str) -> Path:
    return FOLDER / f"nvrtc-{version}.txt"


def tables() -> dict[str, Path]:
    """The files by exact version of NVRTC."""
    return {path.stem.removeprefix("nvrtc-"): path for path in sorted(FOLDER.glob("nvrtc-*.txt"))}


def write(version: str, table: Table) -> None:
    lines = [_TITLE.format(version=version, update=UPDATE)]
    width = max(map(len, ARCHITECTURES))
    previous = ""
    for (name, architecture), row in table.items():
        if name != previous:
            lines.append(f"\n{name}" if previous else name)
        previous = name
        values = "  ".join(f"{column} {getattr(row, column):{digits}}" for column, digits in _WIDTHS.items())
        lines.append(f"    {architecture:{width}}  {values}  {row.seal}")
    FOLDER.mkdir(exist_ok=True)
    table_file(version).write_text("\n".join(lines) + "\n")


def read(version: str) -> Table:
    table: Table = {}
    name = ""
    for line in table_file(version).read_text().splitlines()[2:]:
        words = line.split()
        if line.startswith(" "):
            numbers = {column: int(words[2 + 2 * i]) for i, column in enumerate(_WIDTHS)}
            table[name, words[0]] = Row(**numbers, seal=words[-1])
        elif words:
            name = line
    return table


def differences(before: Table, now: Table) -> list[str]:
    """One line for all that must not be: spills, stacks, what grew, and specialisations that only one table has."""
    lines = refused(now)
    for (name, architecture), row in now.items():
        old = before.get((name, architecture))
        worse = row.worse_than(old) if old is not None else []
        if worse:
            lines.append(f"{architecture:8} {name}: {', '.join(worse)}")
    lines += [f"{NEW:8} {name}: is not in the table" for name in _names(now.keys() - before.keys())]
    return lines + [f"{OLD:8} {name}: is in the table, but not in use" for name in _names(before.keys() - now.keys())]


def refused(now: Table) -> list[str]:
    """Registers that go to memory make a kernel slow, however few they are. Of the corners the table tells them."""
    return [
        f"{architecture:8} {name}: spills {row.spills} bytes, has {row.stack} bytes of stack; none are allowed"
        for (name, architecture), row in now.items()
        if (row.spills or row.stack) and not name.endswith(CORNER)
    ]


def _names(keys: Iterable[tuple[str, str]]) -> list[str]:
    return sorted({name for name, _ in keys})


def main() -> int:
    parser = argparse.ArgumentParser(
        prog="python -m tests.resource_gate", description=(__doc__ or "").partition("\n")[0]
    )
    parser.add_argument("--update", action="store_true", help="write the tables")
    parser.add_argument("--all", action="store_true", help="compile all, not only what changed")
    options = parser.parse_args()
    failed = False
    wanted = specialisations()
    for version in nvrtc.libraries():
        before = read(version) if version in tables() else {}
        now, compiled = measure(version, wanted, {} if options.all else before)
        lines = differences(before, now)
        print(f"NVRTC {version}: {len(wanted)} specialisations, {len(now)} rows, {compiled} of them new or changed")
        for line in lines:
            if not (options.update and line.startswith((NEW, OLD))):
                print(f"    {line}")
        if not options.update:
            failed |= bool(lines)
        elif refused(now):
            failed = True
            print(f"    {table_file(version).name} is left as it is")
        else:
            write(version, now)
    return int(failed)


if __name__ == "__main__":
    sys.exit(main())
