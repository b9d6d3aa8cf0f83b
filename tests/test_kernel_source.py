# SPDX-License-Identifier: Apache-2.0
"""From kernel files to what is compiled: headers and macros in one text, parameters, when that is done again."""

from __future__ import annotations

import re
import threading
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from cupy_router import RoutingMethod, compiler, declarations
from cupy_router.ops._method import method_arguments, method_macros
from tests.methods import METHODS
from tests.recorder import Recorder, declared, recording

KERNELS = sorted(compiler.kernel_folders()[-1].glob("*.cu"))
KERNEL = 'SPECIALISED int A = 0;\nSPECIALISED int B = 0;\nextern "C" __global__ void kernel(int n) {}\n'

Write = Callable[..., None]

pytestmark = pytest.mark.filterwarnings("ignore:CUPY_ROUTER_KERNELS. no kernel reads")


@pytest.fixture
def write(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Write]:
    """Writes files, whose names end in _cu or _cuh, into a folder that takes precedence."""
    monkeypatch.setenv("CUPY_ROUTER_KERNELS", str(tmp_path))
    compiler.changed()  # what was read of another folder is forgotten

    def write(**files: str) -> None:
        for name, text in files.items():
            (tmp_path / name.replace("_cu", ".cu")).write_text(text)

    yield write
    monkeypatch.undo()
    compiler.changed()


@pytest.fixture
def recorder() -> Iterator[Recorder]:
    with recording() as recorder:
        yield recorder


def places(text: str) -> dict[str, str]:
    """Where a compiler says that each line is, by the lines' content."""
    found: dict[str, str] = {}
    file, number = "", 0
    for line in text.splitlines():
        mark = re.fullmatch(r'#line (\d+) "(.*)"', line)
        if mark:
            number, file = int(mark[1]), mark[2]
        else:
            if line:
                assert line not in found, f"{line} is there twice"
                found[line] = f"{file}:{number}"
            number += 1
    return found


# -- One text ----------------------------------------------------------------------------------------------------------


def test_headers_are_inlined_once_and_lines_keep_their_places(write: Write) -> None:
    write(
        kernel_cu='// top\n#include "first.cuh"\n#include "second.cuh"\nint in_kernel;\n\nint last;\n',
        first_cuh='#pragma once\n#include "third.cuh"\nint in_first;\n',
        second_cuh='  #  include "third.cuh"\n#include "first.cuh"\nint in_second;\n',
        third_cuh="int in_third;",
    )
    assert places(compiler.expand("kernel")) == {
        "// top": "kernels/kernel.cu:1",
        "#pragma once": "kernels/first.cuh:1",
        "int in_third;": "kernels/third.cuh:1",
        "int in_first;": "kernels/first.cuh:3",
        "int in_second;": "kernels/second.cuh:3",
        "int in_kernel;": "kernels/kernel.cu:4",
        "int last;": "kernels/kernel.cu:6",
    }


def test_headers_that_include_each_other_end(write: Write) -> None:
    write(
        kernel_cu='#include "a.cuh"\nint k;\n', a_cuh='#include "b.cuh"\nint a;\n', b_cuh='#include "a.cuh"\nint b;\n'
    )
    assert list(places(compiler.expand("kernel"))) == ["int b;", "int a;", "int k;"]


def test_other_includes_are_left_to_the_compiler(write: Write) -> None:
    write(kernel_cu='#include <cmath>\n// #include "remark.cuh"\nint k;\n')
    assert list(places(compiler.expand("kernel"))) == ["#include <cmath>", '// #include "remark.cuh"', "int k;"]


CONSTANTS = """SPECIALISED int LANES = 32;  // that share a row
SPECIALISED bool DENSE = false;
SPECIALISED bool WHOLE = true;
SPECIALISED Score SCORE = SIGMOID;
SPECIALISED int WIDTH = LANES;
int k;
"""


def test_constants_have_their_values_in_their_places(write: Write) -> None:
    write(kernel_cu='#include "header.cuh"\n', header_cuh=CONSTANTS)
    text = compiler.expand("kernel", {"LANES": -8, "DENSE": 1, "WHOLE": 0, "SCORE": 2})
    assert places(text) == {
        "SPECIALISED int LANES = -8;  // that share a row": "kernels/header.cuh:1",
        "SPECIALISED bool DENSE = true;": "kernels/header.cuh:2",
        "SPECIALISED bool WHOLE = false;": "kernels/header.cuh:3",
        "SPECIALISED Score SCORE = Score(2);": "kernels/header.cuh:4",
        "SPECIALISED int WIDTH = LANES;": "kernels/header.cuh:5",
        "int k;": "kernels/header.cuh:6",
    }
    assert declarations.constants(text) == {"LANES": -8, "DENSE": 1, "WHOLE": 0, "SCORE": 2, "WIDTH": -8}
    assert compiler.expand("kernel", (("DENSE", 1),)).count("true") == 2
    assert CONSTANTS in compiler.expand("kernel")
    assert declarations.constants(compiler.expand("kernel")) == {"LANES": 32, "DENSE": 0, "WHOLE": 1, "WIDTH": 32}


def test_a_constant_that_no_file_declares_is_an_error(write: Write) -> None:
    write(kernel_cu=CONSTANTS + "// SPECIALISED int REMARK = 1;\n")
    with pytest.raises(compiler.CompileError, match=r"kernels/kernel\.cu has no constant LANE, REMARK"):
        compiler.expand("kernel", {"LANE": 8, "LANES": 8, "REMARK": 2})


@pytest.mark.parametrize("path", KERNELS, ids=lambda path: path.stem)
def test_every_constant_is_declared_once_and_in_one_line(path: Path) -> None:
    text = compiler.expand(path.stem)
    declared = [name for _, name, _ in declarations._CONSTANT.findall(text)]
    assert (
        len(declared) == len(set(declared)) == len(re.findall(r"^\s*SPECIALISED\b", text, re.M)) > 0
        or path.stem == "slice_counts"
    )


def test_a_missing_header_is_named_with_the_folders(write: Write, tmp_path: Path) -> None:
    write(kernel_cu='#include "missing.cuh"\n')
    with pytest.raises(compiler.CompileError, match=r"missing\.cuh is not in ") as caught:
        compiler.expand("kernel")
    assert all(str(folder) in str(caught.value) for folder in (tmp_path, compiler.kernel_folders()[-1]))


@pytest.mark.parametrize("path", KERNELS, ids=lambda path: path.stem)
def test_our_own_lines_are_all_there_at_their_places(path: Path) -> None:
    """Every line of the kernel and of the headers below it, under its number; only the includes are gone."""
    wanted, todo, seen = [], [path.name], set()
    while todo:
        name = todo.pop()
        if name in seen:
            continue
        seen.add(name)
        for number, line in enumerate((path.parent / name).read_text().splitlines(), 1):
            include = re.match(r'#include "(.*)"', line)
            if include:
                todo.append(include[1])
            elif line:
                wanted.append((f"kernels/{name}:{number}", line))
    found, file, number = [], "", 0
    for line in compiler.expand(path.stem).splitlines():
        mark = re.fullmatch(r'#line (\d+) "(.*)"', line)
        if mark:
            number, file = int(mark[1]), mark[2]
            continue
        if line:
            found.append((f"{file}:{number}", line))
        number += 1
    assert sorted(found) == sorted(wanted)
    assert len(seen) > 2


def test_what_methods_ask_for_is_what_the_header_declares() -> None:
    text = (KERNELS[0].parent / "routing" / "config.cuh").read_text()
    layer = ("bias", "logit_bias", "expert_scale")
    methods = [*METHODS.values(), RoutingMethod(8, 2, renormalize_min=0.5)]
    asked = {name for method in methods for name in method_macros(method, layer)}
    assert {name for _, name, _ in declarations._CONSTANT.findall(text)} == asked
    assert declarations.members(text, "MethodNumbers") == list(method_arguments(None))


# -- A folder of one's own ---------------------------------------------------------------------------------------------


def warned(folder: Path) -> list[str]:
    """What is said of the folder, of which nothing has been read yet."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for _ in range(2):
            compiler._texts.clear()
            compiler.expand("topk_select")
    return [str(warning.message).replace(str(folder), "FOLDER") for warning in caught]


def test_files_that_no_kernel_reads_are_reported_once(write: Write, tmp_path: Path) -> None:
    for name in ("types.cuh", "device/types.cuh", "device/mine.cuh", "device/other.cuh", "topk_select.cu", "notes.txt"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text('#include "device/mine.cuh"\n' if name == "topk_select.cu" else "")
    assert warned(tmp_path) == [
        "CUPY_ROUTER_KERNELS: no kernel reads device/other.cuh of FOLDER",
        "CUPY_ROUTER_KERNELS: no kernel reads types.cuh of FOLDER, but device/types.cuh",
    ]
    assert warned(tmp_path) == []


def test_a_folder_that_does_not_exist_is_reported_once(
    write: Write, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("CUPY_ROUTER_KERNELS", str(tmp_path / "missing"))
    assert warned(tmp_path) == ["CUPY_ROUTER_KERNELS: there is no folder FOLDER/missing"]
    assert warned(tmp_path) == []


# -- Parameters --------------------------------------------------------------------------------------------------------


def functions(path: Path) -> list[str]:
    attributes = r"(?:__(?:cluster_dims|launch_bounds)__\([^)]*\)\s+)*"
    return re.findall(rf"__global__ void\s+{attributes}(\w+)\(", path.read_text())


@pytest.mark.parametrize("path", KERNELS, ids=lambda path: path.stem)
def test_the_parameters_of_every_kernel_are_read(path: Path) -> None:
    codes = {"*": "P", "int": "i", "long long": "q", "float": "f", "TensorMap": "T"}
    names = functions(path)
    assert names, path
    assert all(name.startswith(path.stem) for name in names), f"{path}: kernels are named as the file, or begin so"
    for function in names:
        signature = compiler.signature(path.stem, function)
        wanted = []
        for name, kind in declared(path.read_text(), function):
            wanted += [(name, codes[kind])] if kind in codes else [(number, "f") for number in method_arguments(None)]
        assert list(zip(signature.names, signature.format, strict=True)) == wanted
        assert signature.function == function
        assert len(set(signature.names)) == len(signature.names) > 2


def test_parameters_are_read_past_remarks_bounds_and_qualifiers(write: Write) -> None:
    write(
        kernel_cu="""
extern "C" __global__ void kernel_wide(int other) {}  // extern "C" __global__ void kernel(float remark)
extern  "C"  __global__  void  __launch_bounds__( 128 )
    kernel(const float *__restrict__ x,  // the input, (a parenthesis)
           const  long  long n, unsigned char * const *pointers, float const scale,
           int k) {}
"""
    )
    signature = compiler.signature("kernel", "kernel")
    assert signature == compiler.Signature("kernel", ("x", "n", "pointers", "scale", "k"), "PqPfi")
    assert compiler.signature("kernel", "kernel_wide").names == ("other",)


def test_the_members_of_a_struct_stand_in_its_place(write: Write) -> None:
    write(
        kernel_cu="""
struct Numbers {
    float scale;  // of all
    float bias;
};
extern "C" __global__ void kernel(int n, const Numbers numbers, int *x) {}
"""
    )
    signature = compiler.signature("kernel", "kernel")
    assert signature == compiler.Signature("kernel", ("n", "scale", "bias", "x"), "iffP", (1, 2, 1))


@pytest.mark.parametrize("members", ["int n;", "float a, b;", "float a; double b;", ""])
def test_other_structs_are_refused(write: Write, members: str) -> None:
    write(kernel_cu=f'struct Numbers {{ {members} }};\nextern "C" __global__ void kernel(Numbers numbers) {{}}\n')
    with pytest.raises(compiler.CompileError, match="parameter numbers has type Numbers"):
        compiler.signature("kernel", "kernel")


@pytest.mark.parametrize("kind", ["double", "unsigned", "short", "long", "size_t", "float4", "bool"])
def test_other_types_are_refused(write: Write, kind: str) -> None:
    write(kernel_cu=f'extern "C" __global__ void kernel(int n, {kind} x) {{}}\n')
    with pytest.raises(compiler.CompileError, match=f"kernel: parameter x has type {kind}; allowed are pointers, int"):
        compiler.signature("kernel", "kernel")


def test_a_kernel_that_is_not_in_its_file_is_named(write: Write) -> None:
    write(kernel_cu="__global__ void kernel(int n) {}\n")
    with pytest.raises(compiler.CompileError, match=r'kernels/kernel\.cu has no extern "C" __global__ void kernel\('):
        compiler.signature("kernel", "kernel")


# -- When something is compiled ----------------------------------------------------------------------------------------


def build(**macros: int) -> compiler.Function:
    return compiler.compile("kernel", "kernel", macros, ("cpu", 0))


def test_each_specialisation_is_compiled_once(write: Write, recorder: Recorder) -> None:
    write(kernel_cu=KERNEL)
    first = build(A=1, B=2)
    assert build(B=2, A=1) is first
    assert build(A=1, B=3) is not first
    assert len(recorder.sources) == 2
    assert first.signature.names == ("n",)


def test_each_device_has_its_own(write: Write, recorder: Recorder) -> None:
    write(kernel_cu=KERNEL)
    functions = [compiler.compile("kernel", "kernel", {}, ("cpu", device)) for device in (0, 1, 0, 1)]
    assert [function.device for function in functions] == [0, 1, 0, 1]
    assert functions[:2] == functions[2:]
    assert len(recorder.sources) == 2


def test_threads_that_want_the_same_compile_it_once(write: Write, recorder: Recorder) -> None:
    write(kernel_cu=KERNEL)
    start, found = threading.Barrier(8), []

    def work() -> None:
        start.wait()
        found.append(build(A=1))

    workers = [threading.Thread(target=work) for _ in range(8)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join(timeout=60)
    assert len(recorder.sources) == 1
    assert [function is found[0] for function in found] == [True] * 8


@pytest.mark.parametrize("macros", [{}, {"A": 1}])
def test_what_is_compiled_is_the_whole_text(write: Write, recorder: Recorder, macros: dict[str, int]) -> None:
    """Headers and macros included, so that CuPy's disk cache, whose key is the text, tells all kernels apart."""
    write(kernel_cu='#include "header.cuh"\n' + KERNEL, header_cuh="int before;\n")
    build(**macros)
    write(header_cuh="int after;\n")
    assert compiler.changed()
    build(**macros)
    build(**macros, B=2)
    assert recorder.sources[0] == compiler.expand("kernel", macros).replace("after", "before")
    assert recorder.sources[1] == compiler.expand("kernel", macros)
    assert len(set(recorder.sources)) == 3


@pytest.mark.parametrize("edit", ["the kernel", "a header", "a header of a header"])
def test_an_edit_is_seen_once(write: Write, recorder: Recorder, edit: str) -> None:
    write(kernel_cu='#include "a.cuh"\n' + KERNEL, a_cuh='#include "b.cuh"\n', b_cuh="int b;\n", unused_cuh="int u;\n")
    before = build()
    assert not compiler.changed()
    write(unused_cuh="int edited;\n")
    assert not compiler.changed()
    if edit == "the kernel":
        write(kernel_cu="int edited;\n" + KERNEL)
    elif edit == "a header":
        write(a_cuh="int edited;\n")
    else:
        write(b_cuh="int edited;\n")
    assert compiler.changed()
    after = build()
    assert after is not before
    assert "int edited;" in recorder.sources[-1]
    assert not compiler.changed()
    assert build() is after


def test_a_file_that_appears_in_front_or_goes_is_an_edit(
    write: Write, recorder: Recorder, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    own = compiler.expand("topk_select")
    assert not compiler.changed()
    (tmp_path / "select").mkdir()
    ours = tmp_path / "select" / "order_key.cuh"
    ours.write_text("int ours;\n")
    assert compiler.changed()
    assert "int ours;" in compiler.expand("topk_select")
    ours.unlink()
    assert compiler.changed()
    assert compiler.expand("topk_select") == own
    write(topk_select_cu=KERNEL)
    assert compiler.changed()
    assert compiler.expand("topk_select").endswith(KERNEL)
    monkeypatch.delenv("CUPY_ROUTER_KERNELS")
    assert compiler.changed()
    assert compiler.expand("topk_select") == own


def test_what_failed_is_tried_again(write: Write, recorder: Recorder) -> None:
    write(kernel_cu='#include "missing.cuh"\n' + KERNEL)
    for _ in range(2):
        with pytest.raises(compiler.CompileError):
            build()
    assert recorder.sources == []
    write(missing_cuh="int now_there;\n")
    assert compiler.changed()
    assert build().signature.names == ("n",)
