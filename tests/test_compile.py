# SPDX-License-Identifier: Apache-2.0
"""Every specialisation in use, compiled by NVRTC for every architecture; what it needs may not grow. Needs no GPU."""

from __future__ import annotations

import os
import re
import warnings
from collections.abc import Sequence
from dataclasses import replace
from functools import cache
from pathlib import Path

import pytest

from cupy_router import compiler, presets
from cupy_router.check.architectures import OLDEST
from cupy_router.nvrtc import Resources, resources
from tests import machine_code, nvrtc, resource_gate
from tests.nvrtc import ARCHITECTURES
from tests.resource_gate import Row, occupancy
from tests.specialisations import CORNER, FULL, Specialisation, specialisations

KERNELS = compiler.kernel_folders()[-1]
INSTALL = "pip install nvidia-cuda-nvrtc-cu12 (12.x) or nvidia-cuda-nvrtc (13.x)"


def any_nvrtc() -> nvrtc.Nvrtc:
    """The oldest that is here, or a skip."""
    found = list(nvrtc.libraries().values())
    return found[0] if found else pytest.skip(f"NVRTC is not here: {INSTALL}")


@cache
def in_use() -> list[Specialisation]:
    return specialisations()


# -- The gate ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("version", resource_gate.tables())
def test_no_kernel_needs_more_than_before(version: str) -> None:
    """On failure: make the kernel leaner, or accept with the command below and say why in the commit.

    What did not change since the table was written is not compiled again, except for a few rows."""
    if version not in nvrtc.libraries():
        message = f"NVRTC {version} is not here: {INSTALL}; set {nvrtc.FOLDERS} to keep several"
        if nvrtc.FOLDERS in os.environ:  # whoever names folders wants every table checked
            pytest.fail(message)
        pytest.skip(message)
    before = resource_gate.read(version)
    now, compiled = resource_gate.measure(version, in_use(), before)
    found = resource_gate.differences(before, now)
    assert not found, "\n".join([f"NVRTC {version}", *found, f"to accept: {resource_gate.UPDATE}"])
    if compiled:
        changed = f"{compiled} of {len(now)} kernels changed since their table was written and were compiled"
        warnings.warn(f"NVRTC {version}: {changed}; {resource_gate.UPDATE} saves the next run from it", stacklevel=1)


def test_both_generations_of_nvrtc_have_a_table() -> None:
    assert {version.partition(".")[0] for version in resource_gate.tables()} == {"12", "13"}


KERNEL = """#line 1 "kernels/planted.cu"
extern "C" __global__ void __launch_bounds__(128) planted(const float *x, float *y, int n) {
#ifdef STACK
    float local[64];
    for (int i = 0; i < 64; ++i) local[i * n % 64] = x[i];
    y[threadIdx.x] = local[n % 64];
#else
    float sum = 0;
    float local[REGISTERS];
    for (int i = 0; i < REGISTERS; ++i) local[i] = x[i];
    __syncthreads();
    for (int i = 0; i < REGISTERS; ++i) sum = sum * local[i] + x[threadIdx.x] * local[REGISTERS - 1 - i];
    y[threadIdx.x] = sum;
#endif
}
"""


def planted(**macros: int) -> resource_gate.Table:
    source = "".join(f"#define {name} {value}\n" for name, value in macros.items()) + KERNEL
    specialisation = Specialisation("planted", (), "planted", 128)
    needs = any_nvrtc().resources(source, "planted", "sm_90")
    return {("planted", "sm_90"): Row.of(specialisation, "sm_90", needs)}


def test_the_gate_sees_a_kernel_that_grew() -> None:
    before, now = planted(REGISTERS=8), planted(REGISTERS=60)
    (line,) = resource_gate.differences(before, now)
    assert re.fullmatch(r"sm_90 +planted: registers \d+ -> \d+, occupancy \d+ -> \d+", line)
    assert resource_gate.differences(now, before) == []


def test_the_gate_refuses_a_stack() -> None:
    table = planted(STACK=1)
    (line,) = resource_gate.differences(table, table)
    assert re.fullmatch(r"sm_90 +planted: spills 0 bytes, has 256 bytes of stack; none are allowed", line)
    assert resource_gate.refused(table) == [line]
    (key,) = table
    corner = {(f"{key[0]} {CORNER}", key[1]): table[key]}
    assert resource_gate.differences(corner, corner) == []
    (line,) = resource_gate.differences({name: replace(row, stack=255) for name, row in corner.items()}, corner)
    assert line.endswith(": stack 255 -> 256")


class Planted(Specialisation):
    """Of a text that is not in a file."""

    text = KERNEL

    def __str__(self) -> str:
        return self.function

    def source(self, architecture: str) -> str:
        return "".join(f"#define {name} {value}\n" for name, value in self.macros) + self.text

    @property
    def architectures(self) -> tuple[str, ...]:
        return ("sm_100",)


@pytest.fixture
def compiled(monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, str]]:
    """What the gate compiles, in this process."""
    todo: list[tuple[str, str]] = []

    def compile_here(version: str, pairs: Sequence[tuple[Specialisation, str]]) -> resource_gate.Table:
        todo.extend((str(one), architecture) for one, architecture in pairs)
        table = {}
        for one, architecture in pairs:
            needs = nvrtc.libraries()[version].resources(one.source(architecture), one.function, architecture)
            row = Row.of(one, architecture, needs)
            table[str(one), architecture] = replace(row, seal=resource_gate.seal(version, one, architecture, row))
        return table

    monkeypatch.setattr(resource_gate, "_compile", compile_here)
    return todo


def test_only_what_changed_is_compiled(
    compiled: list[tuple[str, str]], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    version, key = any_nvrtc().version, ("planted", "sm_100")
    monkeypatch.setattr(resource_gate, "REPEATED", 0)
    monkeypatch.setattr(resource_gate, "FOLDER", tmp_path)
    one = Planted("planted", (("REGISTERS", 8),), "planted", 128)
    table, count = resource_gate.measure(version, [one], {})
    assert (count, compiled) == (1, [key])
    resource_gate.write(version, table)
    table = resource_gate.read(version)
    assert resource_gate.measure(version, [one], table) == (table, 0)
    assert compiled == [key]
    small, count = resource_gate.measure(version, [replace(one, block=32)], table)
    assert (count, table[key].occupancy, small[key].occupancy) == (0, 100, 50)
    for changed in (replace(one, macros=(("REGISTERS", 60),)), replace(one, shared_bytes=512)):
        assert resource_gate.measure(version, [changed], table)[1] == 1
    for name in ("registers", "spills", "stack", "shared"):
        edited = {key: replace(table[key], **{name: getattr(table[key], name) + 1})}
        assert resource_gate.measure(version, [one], edited) == (table, 1)
    monkeypatch.setattr(Planted, "text", f"{KERNEL}// another text")
    assert resource_gate.measure(version, [one], table)[1] == 1
    monkeypatch.setattr(Planted, "text", KERNEL)
    assert resource_gate.measure(version, [one], table)[1] == 0
    monkeypatch.setattr(nvrtc, "OPTIONS", (*nvrtc.OPTIONS, "-maxrregcount=64"))
    assert resource_gate.measure(version, [one], table)[1] == 1


def test_some_of_what_did_not_change_is_compiled_and_must_be_the_same(compiled: list[tuple[str, str]]) -> None:
    version, key = any_nvrtc().version, ("planted", "sm_100")
    one = Planted("planted", (("REGISTERS", 8),), "planted", 128)
    table, _ = resource_gate.measure(version, [one], {})
    assert resource_gate.measure(version, [one], table) == (table, 0)
    assert compiled == [key] * 2
    wrong = replace(table[key], registers=table[key].registers + 1)
    wrong = replace(wrong, seal=resource_gate.seal(version, one, "sm_100", wrong))
    with pytest.raises(RuntimeError, match=r"planted on sm_100: the table has .* the same text gives .* --all"):
        resource_gate.measure(version, [one], {key: wrong})


def test_a_header_changes_the_seals_of_what_includes_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """And no others."""
    row = Row(32, 0, 0, 0, 100)

    def seals() -> dict[str, str]:
        kernels = sorted(path.stem for path in KERNELS.glob("*.cu"))
        return {name: resource_gate.seal("1.2.3", Specialisation(name, (), name), "sm_90", row) for name in kernels}

    before = seals()
    header = tmp_path / "layout" / "place.cuh"
    header.parent.mkdir()
    header.write_text((KERNELS / "layout" / "place.cuh").read_text() + "// changed\n")
    with monkeypatch.context() as patch:
        patch.setenv("CUPY_ROUTER_KERNELS", str(tmp_path))
        assert compiler.changed()
        after = seals()
    assert compiler.changed()
    assert seals() == before
    readers = {name for name in before if '"kernels/layout/place.cuh"' in compiler.expand(name)}
    assert {name for name in before if before[name] != after[name]} == readers
    assert 0 < len(readers) < len(before)


def test_the_gate_names_what_only_one_table_has() -> None:
    row = Row(32, 0, 0, 0, 100)
    before, now = {("gone", "sm_80"): row, ("gone", "sm_90"): row}, {("added", "sm_90"): row}
    added, gone = resource_gate.differences(before, now)
    assert (added.split(), gone.split()) == (
        "new added: is not in the table".split(),
        "old gone: is in the table, but not in use".split(),
    )


@pytest.mark.parametrize("field", ["registers", "spills", "stack", "shared", "occupancy"])
def test_each_number_counts(field: str) -> None:
    row = Row(40, 8, 8, 1024, 75)
    more = replace(row, **{field: getattr(row, field) + 1})
    worse, better = (row, more) if field == "occupancy" else (more, row)
    assert worse.worse_than(better) == [f"{field} {getattr(better, field)} -> {getattr(worse, field)}"]
    assert better.worse_than(worse) == []


def test_a_table_is_read_as_it_was_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(resource_gate, "FOLDER", tmp_path / "resources")
    table = {
        (name, architecture): Row(32 + i, 0, 0, 128 * i, 100 - i, seal=f"{i:016x}")
        for name in ("first A=1 B=2", "second")
        for i, architecture in enumerate(ARCHITECTURES)
    }
    resource_gate.write("1.2.3", table)
    assert list(resource_gate.tables()) == ["1.2.3"]
    read = resource_gate.read("1.2.3")
    assert read == table
    assert [row.seal for row in read.values()] == [row.seal for row in table.values()]
    text = resource_gate.table_file("1.2.3").read_text()
    resource_gate.write("1.2.3", resource_gate.read("1.2.3"))
    assert resource_gate.table_file("1.2.3").read_text() == text


# -- What is in use ----------------------------------------------------------------------------------------------------


def test_every_preset_is_in_use() -> None:
    found = [(one.function, dict(one.macros)) for one in in_use()]
    for name, method in presets().items():
        for function in ("activation_topk", "dense_router_decode", "hash_router"):
            if name not in FULL and function.startswith("hash"):
                continue
            for dtype in range(3) if name in FULL else (2 if function.startswith("dense") else 0,):
                wanted = {"NUM_EXPERTS": method.num_experts, "TOP_K": method.top_k, "DTYPE": dtype}
                assert any(name == function and wanted.items() <= macros.items() for name, macros in found), wanted


def test_every_kernel_is_in_use() -> None:
    declared = set()
    for path in KERNELS.glob("*.cu"):
        declared |= set(re.findall(r"__global__ void\s+(?:__\w+__\([^)]*\)\s+)*(\w+)\(", path.read_text()))
    assert declared == {one.function for one in in_use()}


def test_the_list_is_the_same_every_time_and_leaves_nothing_behind() -> None:
    before = dict(compiler.BACKENDS), compiler._functions
    assert specialisations() == in_use()
    assert (dict(compiler.BACKENDS), compiler._functions) == before


# -- Machine code ------------------------------------------------------------------------------------------------------


def test_machine_code_is_the_same_whatever_its_text_calls_things() -> None:
    source = KERNEL.replace("REGISTERS", "8")
    codes = [any_nvrtc().machine_code(text, "planted", "sm_90") for text in (source, source.replace("sum", "total"))]
    assert codes[0] == codes[1]
    assert len(codes[0][0]) % machine_code.INSTRUCTION == 0
    assert any_nvrtc().machine_code(source.replace("+ x", "- x"), "planted", "sm_90")[0] != codes[0][0]


def test_growth_beyond_what_is_allowed_is_told() -> None:
    before = machine_code.Code("a", 1000, Resources(40, 0, 0, 0))
    now = machine_code.Code("b", 1010, Resources(41, 8, 0, 0))
    assert machine_code.growth(before, now, 1) == ["registers 40 -> 41", "spills 0 -> 8"]
    assert machine_code.growth(before, now, 0.5)[2:] == ["instructions 1000 -> 1010"]
    assert machine_code.growth(now, before, 0) == []


# -- Compiling ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kernel", sorted(path.stem for path in KERNELS.glob("*.cu")))
def test_every_kernel_file_compiles_alone(kernel: str) -> None:
    """With the defaults of its macros, as an editor or a reader would try it."""
    functions = set(re.findall(rf"\b({kernel}\w*)\(", (KERNELS / f"{kernel}.cu").read_text()))
    assert functions
    for nvrtc_ in nvrtc.libraries().values() or [any_nvrtc()]:
        for architecture in Specialisation(kernel, (), kernel).architectures:
            text = compiler.expand(kernel)
            given = nvrtc.options(text, architecture)
            (log,) = nvrtc_.compile(text, f"{kernel}.cu", given, "ProgramLog")
            for function in functions:
                assert resources(log.decode(), function).registers > 0


@pytest.mark.parametrize("kernel", [kernel for kernel, oldest in OLDEST.items() if oldest == 80])
def test_kernels_that_are_left_out_need_newer_instructions(kernel: str) -> None:
    with pytest.raises(compiler.CompileError, match=r"requires \.target sm_80"):
        any_nvrtc().resources(compiler.expand(kernel), kernel, "sm_75")


@pytest.mark.filterwarnings("ignore:CUPY_ROUTER_KERNELS. no kernel reads alone.cu")
@pytest.mark.parametrize("header", sorted(path.relative_to(KERNELS).as_posix() for path in KERNELS.rglob("*.cuh")))
def test_every_header_compiles_alone(header: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It includes what it needs."""
    (tmp_path / "alone.cu").write_text(f'#include "{header}"\nextern "C" __global__ void alone() {{}}\n')
    monkeypatch.setenv("CUPY_ROUTER_KERNELS", str(tmp_path))
    assert any_nvrtc().resources(compiler.expand("alone"), "alone", "sm_90").stack == 0


def test_errors_name_file_and_line() -> None:
    source = compiler.expand("topk_select", {"TOP_K": 33})  # more winners than lanes
    with pytest.raises(compiler.CompileError, match=r"kernels/[\w/]+\.cuh?\(\d+\): error: static assertion failed"):
        any_nvrtc().resources(source, "topk_select", "sm_90")


# -- Reading logs, counting warps --------------------------------------------------------------------------------------

LOG = """ptxas info    : 0 bytes gmem
ptxas info    : Compiling entry function 'other' for 'sm_80'
ptxas info    : Function properties for other
    0 bytes stack frame, 0 bytes spill stores, 0 bytes spill loads
ptxas info    : Used 12 registers, used 0 barriers, 380 bytes cmem[0]
ptxas info    : Compiling entry function 'kernel' for 'sm_80'
ptxas info    : Function properties for kernel
    40 bytes stack frame, 16 bytes spill stores, 24 bytes spill loads
ptxas info    : Used 96 registers, used 1 barriers, 40 bytes cumulative stack size, 2068 bytes smem, 432 bytes cmem[0]
"""


def test_the_log_is_read() -> None:
    assert resources(LOG, "kernel") == Resources(96, 40, 40, 2068)
    assert resources(LOG, "other") == Resources(12, 0, 0, 0)


@pytest.mark.parametrize(("log", "function"), [("", "kernel"), (LOG, "kern"), (LOG[:-120], "kernel")])
def test_a_log_that_does_not_say_it_is_an_error(log: str, function: str) -> None:
    with pytest.raises(RuntimeError, match=f"ptxas does not say what {function} needs"):
        resources(log, function)


@pytest.mark.parametrize(
    ("architecture", "block", "registers", "shared", "percent"),
    [
        ("sm_90", 128, 32, 0, 100),
        ("sm_90", 128, 33, 0, 75),  # 40 registers: 12 warps in each quarter
        ("sm_90", 128, 64, 0, 50),
        ("sm_90", 256, 128, 0, 25),
        ("sm_90", 128, 255, 0, 12),  # two blocks of 4 warps
        ("sm_90", 32, 32, 0, 50),  # 32 blocks of one warp
        ("sm_90", 512, 32, 32768, 100),  # 4 blocks, each with 33 KB
        ("sm_90", 512, 32, 60000, 75),  # 3 blocks fit into 228 KB
        ("sm_75", 32, 32, 0, 50),
        ("sm_75", 1024, 64, 32769, 100),
        ("sm_75", 512, 32, 32768, 100),  # nothing is reserved there
        ("sm_75", 512, 32, 32769, 50),
        ("sm_80", 128, 40, 0, 75),
        ("sm_86", 32, 32, 0, 33),
        ("sm_120", 1024, 40, 0, 66),
        ("sm_120", 512, 40, 51200, 33),  # one block of 51 KB of 100
    ],
)  # fmt: skip
def test_occupancy(architecture: str, block: int, registers: int, shared: int, percent: int) -> None:
    assert occupancy(architecture, block, registers, shared) == percent


def test_occupancy_is_known_for_every_architecture() -> None:
    assert tuple(resource_gate.MULTIPROCESSORS) == ARCHITECTURES
