# SPDX-License-Identifier: Apache-2.0
"""Kernels compiled by NVRTC for every architecture."""

from __future__ import annotations

import hashlib
import os
from contextlib import suppress
from pathlib import Path

from cupy_router.compiler_options import OPTIONS as COMPILER_OPTIONS
from cupy_router.compiler_options import architecture_option
from cupy_router.nvrtc import Nvrtc

# One of each kind: kernels need the same on sm_89 as on sm_86, and the same on sm_90a as on sm_90.
ARCHITECTURES = ("sm_75", "sm_80", "sm_86", "sm_90", "sm_100", "sm_120")
# The oldest architecture on which an op chooses a kernel, if that is not the oldest of all.
OLDEST = {
    "dense_router_decode": 80,
    "dense_router_decode_layout": 80,
    "activation_topk_cluster": 90,
    "expert_layout_cluster": 90,
    "topk_select_cluster": 90,
    "topk_select_held": 80,
}
ONLY = {"dense_router_prefill": 90}  # the only architecture on which one is chosen
_THRESHOLD = "BY_THRESHOLD = true;"  # a switch for which the same holds
# Besides those of the package, those of CuPy, and what lets ptxas say what a kernel needs.
OPTIONS = ("-ftz=true", "--ptxas-options=-v", "--no-cache")


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


def compile_text(library: Nvrtc, folder: Path, source: str, architecture: str) -> str:
    """Return what ptxas says of the kernels of a text, also from an earlier run; CompileError with the log."""
    options = (*COMPILER_OPTIONS, *OPTIONS, architecture_option(source, architecture))
    key = hashlib.sha256(repr((library.version, options, source)).encode()).hexdigest()[:32]
    kept = folder / f"{architecture}-{key}.log"
    with suppress(OSError):
        return kept.read_text("utf-8")
    (log,) = library.compile(source, "kernel.cu", options, "ProgramLog")
    text = log.decode(errors="replace")
    partial = kept.with_name(f"{kept.name}.{os.getpid()}")
    partial.write_text(text, "utf-8")
    partial.replace(kept)
    return text
