# SPDX-License-Identifier: Apache-2.0
"""Kernels compiled by NVRTC for every architecture, in processes: it compiles one program at a time in each."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Sequence
from dataclasses import astuple
from pathlib import Path
from typing import Any

from cupy_router.compiler_options import OPTIONS as COMPILER_OPTIONS
from cupy_router.compiler_options import architecture_option
from cupy_router.declarations import CompileError
from cupy_router.nvrtc import Nvrtc, Resources, resources

# One of each kind: kernels need the same on sm_89 as on sm_86, and the same on sm_90a as on sm_90.
ARCHITECTURES = ("sm_75", "sm_80", "sm_86", "sm_90", "sm_100", "sm_120")
# The oldest architecture on which an op chooses a kernel, if that is not the oldest of all.
OLDEST = {
    "dense_router_decode": 80,
    "dense_router_decode_layout": 80,
    "activation_topk_cluster": 90,
    "expert_layout_cluster": 90,
    "topk_select_cluster": 90,
}
ONLY = {"dense_router_prefill": 90}  # the only architecture on which one is chosen
_THRESHOLD = "BY_THRESHOLD = true;"  # a switch for which the same holds
# Besides those of the package, those of CuPy, and what lets ptxas say what a kernel needs.
OPTIONS = ("-ftz=true", "--ptxas-options=-v", "--no-cache")

Job = tuple[str, str, str, str, str]  # library, cache folder, function, source, architecture


def number(architecture: str) -> int:
    """Return 90 for "sm_90"."""
    return int(architecture.removeprefix("sm_").rstrip("a"))


def wanted(function: str, source: str) -> tuple[str, ...]:
    """Return the architectures for which an op may compile a kernel."""
    return chosen_on(function, by_threshold=_THRESHOLD in source)


def chosen_on(function: str, *, by_threshold: bool = False) -> tuple[str, ...]:
    """Return the architectures on which an op may choose a kernel. `by_threshold`: it has BY_THRESHOLD."""
    oldest = 90 if by_threshold else OLDEST.get(function, ONLY.get(function, 0))
    newest = ONLY.get(function, 999)
    return tuple(name for name in ARCHITECTURES if oldest <= number(name) <= newest)


_opened: dict[str, Nvrtc] = {}


def compile_job(job: Job) -> Resources | str:
    """Return what a kernel needs, or the compiler's lines. Needs are kept in the cache folder."""
    library, folder, function, source, architecture = job
    if library not in _opened:
        _opened[library] = Nvrtc(Path(library))
    nvrtc = _opened[library]
    options = (*COMPILER_OPTIONS, *OPTIONS, architecture_option(source, architecture))
    key = hashlib.sha256(repr((nvrtc.version, options, *job[2:])).encode()).hexdigest()[:32]
    kept = Path(folder) / f"{function}-{architecture}-{key}.json"
    try:
        return Resources(*json.loads(kept.read_text()))
    except (OSError, ValueError, TypeError):
        pass
    try:
        (log,) = nvrtc.compile(source, "kernel.cu", options, "ProgramLog")
    except CompileError as error:
        return str(error)
    found = resources(log.decode(errors="replace"), function)
    partial = kept.with_name(f"{kept.name}.{os.getpid()}")
    partial.write_text(json.dumps(astuple(found)))
    partial.replace(kept)
    return found


def supported(library: Path) -> Sequence[Any]:
    """Return the version of a library, and the architectures that it knows."""
    nvrtc = Nvrtc(library)
    known = nvrtc.architectures
    return nvrtc.version, [name for name in ARCHITECTURES if number(name) in known]
