# SPDX-License-Identifier: Apache-2.0
"""Instructions of plain methods' kernels as NVRTC compiles them, now and in an earlier commit. Needs no GPU.

    python -m benchmarks.instructions COMMIT --architecture sm_90

What a method does not ask for must not cost instructions: a table of machine code in 16-byte instructions, padding
included, of each kernel file as it is and as it was.
"""

from __future__ import annotations

import argparse
import io
import os
import struct
import subprocess
import tarfile
import tempfile
from pathlib import Path

from benchmarks.rows import text_table
from cupy_router import RoutingMethod, compiler
from cupy_router.ops import _dense_decode, _row_lanes
from cupy_router.ops.activation_topk import interleaved_lanes, method_macros
from cupy_router.tuning import DEFAULT

ROOT = Path(__file__).parents[1]
INSTRUCTION = 16  # bytes, since sm_70
PLAIN = {
    f"{score}, E {experts}, k {k}": RoutingMethod(experts, k, score)
    for experts, k in ((256, 6), (384, 6))
    for score in ("sqrtsoftplus", "sigmoid", "softmax")
}


def kernels() -> dict[str, tuple[str, str, dict[str, int]]]:
    """Title -> file, function, macros."""
    found = {}
    for title, method in PLAIN.items():
        macros = method_macros(method, ["bias"])
        for rows in (64, 1024, 8192):
            lanes, columns = _row_lanes.lanes_and_columns(method.num_experts, method.top_k)
            interleaved = interleaved_lanes(DEFAULT, method, rows)
            if interleaved:
                lanes, columns = interleaved, _row_lanes.interleaved_columns(method.num_experts, interleaved)
            layout = {"DEALT": int(bool(interleaved))}
            layout |= {"LANES": lanes, "PER_LANE": columns}
            found[f"activation_topk, {title}, {rows} rows"] = ("activation_topk", "activation_topk", macros | layout)
        hashing = {"SOURCE": 1, "LANES": 8}
        if method.score != "softmax":
            found[f"hash_router, {title}"] = ("hash_router", "hash_router", method_macros(method) | hashing)
        launch = _dense_decode.launch_for(
            DEFAULT, method, "bfloat16", "bfloat16", 16, 4096, aligned=True, dense=True, given=["bias"]
        )
        found[f"dense_router, {title}, 16 rows"] = (_dense_decode.FILE, _dense_decode.FUNCTION, launch.macros)
    return found


def instructions(source: str, function: str, architecture: str) -> int:
    """The size of a kernel's machine code."""
    from cupy.cuda import nvrtc

    program = nvrtc.createProgram(source, "kernel.cu", (), ())
    try:
        nvrtc.compileProgram(program, ("-std=c++17", "-ftz=true", f"-arch={architecture}"))
        return _section_size(nvrtc.getCUBIN(program), f".text.{function}") // INSTRUCTION
    finally:
        nvrtc.destroyProgram(program)


def _section_size(elf: bytes, wanted: str) -> int:
    """Of a section of a 64-bit ELF file."""
    (table,) = struct.unpack_from("<Q", elf, 0x28)
    entry, count, names = struct.unpack_from("<HHH", elf, 0x3A)
    sections = [struct.unpack_from("<IIQQQQ", elf, table + i * entry) for i in range(count)]
    text = sections[names][4]
    for name, _, _, _, _, size in sections:
        if elf[text + name : elf.index(b"\0", text + name)].decode() == wanted:
            return int(size)
    raise ValueError(f"the machine code has no section {wanted}")


def counts(architecture: str) -> dict[str, int]:
    found = {}
    for title, (file, function, macros) in kernels().items():
        found[title] = instructions(compiler.expand(file, macros), function, architecture)
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("commit", help="whose kernels to compare with")
    parser.add_argument("--architecture", default="sm_90")
    options = parser.parse_args()
    now = counts(options.architecture)
    archive = subprocess.run(
        ["git", "archive", options.commit, "kernels"], cwd=ROOT, capture_output=True, check=True
    ).stdout
    with tempfile.TemporaryDirectory() as folder:
        with tarfile.open(fileobj=io.BytesIO(archive)) as files:
            files.extractall(folder, filter="data")
        os.environ["CUPY_ROUTER_KERNELS"] = f"{folder}/kernels"
        compiler.changed()
        before = counts(options.architecture)
    lines = [(title, str(before[title]), str(now[title])) for title in now]
    print(text_table((f"instructions, {options.architecture}", options.commit, "now"), lines))


if __name__ == "__main__":
    main()
