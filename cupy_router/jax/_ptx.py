# SPDX-License-Identifier: Apache-2.0
"""Kernels as PTX with constants in place of some parameters. Knows nothing of routing.

XLA hands over addresses of arrays and nothing else, so what else a kernel takes has to be in its text. There the kernel
becomes a function of the device, and an entry that takes the addresses alone calls it.
"""

from __future__ import annotations

import struct

from cupy_router import compiler, thread_locale
from cupy_router.compiler import CompileError, Signature
from cupy_router.compiler_options import OPTIONS, architecture_option
from cupy_router.declarations import Parameter, declaration, members


@thread_locale.kept()
def kernel(
    source: str,
    architecture: str,
    signature: Signature,
    arguments: tuple[str, ...],
    constants: tuple[tuple[str, int | float], ...],
) -> str:
    """Compile a kernel to PTX for an architecture such as "compute_90", with the options of other launches.

    Its only parameters are `arguments`, in their order, though it may not need all; its others become `constants`.
    """
    nvrtc = compiler.require_cuda().cuda.nvrtc
    text = with_entry(source, signature.function, arguments, dict(constants))
    program = nvrtc.createProgram(text, "kernel.cu", (), ())
    try:
        nvrtc.compileProgram(program, (*OPTIONS, "-ftz=true", architecture_option(source, architecture)))
        ptx = nvrtc.getPTX(program)
    except nvrtc.NVRTCError:
        raise CompileError(nvrtc.getProgramLog(program)) from None
    finally:
        nvrtc.destroyProgram(program)
    return (ptx.decode() if isinstance(ptx, bytes) else str(ptx)).rstrip("\0")


def with_entry(source: str, function: str, arguments: tuple[str, ...], constants: dict[str, int | float]) -> str:
    """Return a text whose kernel has `arguments` as its only parameters; CompileError if there is no such kernel."""
    found = declaration(source, function)
    if found is None:
        raise CompileError(f'the text has no extern "C" __global__ void {function}(...)')
    by_name = {parameter.name: parameter for parameter in found.parameters}
    body, parameters = f"{function}_body", ", ".join(parameter.text for parameter in found.parameters)
    given = ", ".join(by_name[name].text if name in by_name else f"const void* {name}" for name in arguments)
    values = ", ".join(
        parameter.name if parameter.name in arguments else _literal(source, parameter, constants)
        for parameter in found.parameters
    )
    return (
        f"{source[: found.begin]}__device__ __forceinline__ void {body}({parameters}){source[found.end :]}\n"
        f'#line 1 "entry of {function}"\n'
        f'extern "C" __global__ void {found.bounds} {function}({given}) {{\n'
        f"    {body}({values});\n"
        f"}}\n"
    )


def _literal(source: str, parameter: Parameter, constants: dict[str, int | float]) -> str:
    """Return the value of a parameter in C++."""
    if parameter.kind == "*":
        return "nullptr"
    if parameter.kind in ("int", "long long"):
        return f"static_cast<{parameter.kind}>({int(constants[parameter.name]):#x}ll)"
    if parameter.kind == "float":
        return _float(constants[parameter.name])
    return f"{parameter.kind}{{{', '.join(_float(constants[name]) for name in members(source, parameter.kind))}}}"


def _float(value: float) -> str:
    """Return a float in C++ with every bit, also for infinity and NaN."""
    (bits,) = struct.unpack("=I", struct.pack("=f", value))
    return f"__uint_as_float({bits:#010x}u)"
