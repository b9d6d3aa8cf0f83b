# SPDX-License-Identifier: Apache-2.0
"""A kernel as PTX of which some parameters have become constants; knows nothing of routing.

XLA hands over addresses of arrays and nothing else, so what else a kernel takes has to be in its text.
"""

from __future__ import annotations

import re
import struct
import sys
from functools import lru_cache, partial

from cupy_router import compiler
from cupy_router.compiler import CompileError, Signature


@lru_cache(maxsize=1024)
def kernel(
    source: str,
    architecture: str,
    signature: Signature,
    arguments: tuple[str, ...],
    constants: tuple[tuple[str, int | float], ...],
) -> str:
    """The kernel of a text, for an architecture such as "compute_90", with `arguments` for its only parameters, in
    their order, and `constants` for the others."""
    return specialised(_compiled(source, architecture), signature, arguments, dict(constants))


@lru_cache(maxsize=256)
def _compiled(source: str, architecture: str) -> str:
    """With the options that other launches have."""
    nvrtc = compiler.require_cuda().cuda.nvrtc
    program = nvrtc.createProgram(source, "kernel.cu", (), ())
    try:
        nvrtc.compileProgram(program, (*compiler.OPTIONS, "-ftz=true", f"-arch={architecture}"))
        text = nvrtc.getPTX(program)
    except nvrtc.NVRTCError:
        raise CompileError(nvrtc.getProgramLog(program)) from None
    finally:
        nvrtc.destroyProgram(program)
    return (text.decode() if isinstance(text, bytes) else str(text)).rstrip("\0")


def specialised(ptx: str, signature: Signature, arguments: tuple[str, ...], constants: dict[str, int | float]) -> str:
    """CompileError if the text is not of the form that is known."""
    function = signature.function
    entry = re.search(rf"\.entry\s+{function}\s*\(([^)]*)\)", ptx)
    declared = [line.strip() for line in entry[1].split(",")] if entry else []
    if entry is None or len(declared) != len(signature.names):
        raise CompileError(f"{function} has {len(declared)} parameters in PTX, not {len(signature.names)}")
    head, body = ptx[: entry.start(1)], ptx[entry.end(1) :]
    widths = {prefix: int(bits) for bits, prefix in re.findall(r"\.reg\s+\.[a-z](\d+)\s+(%[a-z]+)<", body)}
    kept: dict[str, str] = {}
    for name, code, declaration in zip(signature.names, signature.format, declared, strict=True):
        if name in arguments:
            kept[name] = declaration
            continue
        symbol = declaration.split()[-1]
        value = int.from_bytes(struct.pack(f"@{code}", constants[name]), sys.byteorder)
        load = rf"ld\.param\.([a-z])(\d+)(\s+)(%[a-z]+)(\d+),\s*\[{symbol}\];"
        body = re.sub(load, partial(_constant, value=value, widths=widths), body)
        if re.search(rf"\b{symbol}\b", body):
            raise CompileError(f"{function}: PTX reads {name} in a way that is not known")
    return f"{head}{', '.join(kept[name] for name in arguments)}{body}"


def _constant(load: re.Match[str], value: int, widths: dict[str, int]) -> str:
    """For a load of the lowest bits of a parameter into a register, which may have more."""
    kind, bits, space, prefix, number = load.groups()
    size, register = int(bits), widths.get(prefix, 0)
    if not 16 <= size <= register:
        return load[0]
    value &= (1 << size) - 1
    if kind == "s" and value >> (size - 1):
        value += (1 << register) - (1 << size)
    return f"mov.b{register}{space}{prefix}{number}, {value:#x};"
