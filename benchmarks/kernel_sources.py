# SPDX-License-Identifier: Apache-2.0
"""Digests of the kernels' code, by which tables know whether the kernels have changed since they were measured.

Results record the digest of every kernel file (`harness.environment`). Comments and layout do not count.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

KERNELS = Path(__file__).parents[1] / "kernels"
FAMILIES: dict[str, tuple[str, ...]] = {  # op, or a way of it -> its kernel files, and those that begin so
    "activation_topk": ("activation_topk",),
    "activation_topk_backward": ("activation_topk_backward",),
    "dense_router": ("dense_router", "to_float32", "physical_experts"),
    "expert_layout": ("expert_layout", "slice_counts"),
    "fused_layout": (
        "activation_topk_cluster",
        "activation_topk_layout",
        "dense_router_decode_layout",
        "hash_router_layout",
    ),
    "given_experts": ("given_experts",),
    "hash_router": ("hash_router",),
    "permute": ("permute",),
    "topk_select": ("topk_select",),
    "unpermute": ("unpermute",),
    "update_bias": ("update_bias",),
}
MEASURED: dict[
    str, tuple[str, ...]
] = {  # file of results -> the ops whose kernels it times, if not the one of its name
    "batch_invariance": ("dense_router", "activation_topk"),
    "compile_methods": ("activation_topk",),
    "dense_router": ("dense_router", "activation_topk"),
    "expert_parallel": ("expert_layout", "permute", "unpermute"),
    "frameworks": ("activation_topk",),
    "fused_layout": ("activation_topk", "dense_router", "hash_router", "expert_layout", "fused_layout"),
    "given_experts": ("activation_topk", "dense_router", "given_experts"),
    "methods": ("activation_topk",),
    "ncu": ("activation_topk", "dense_router", "hash_router", "topk_select"),
    "permute": ("permute", "unpermute"),
    "several_biases": ("activation_topk", "dense_router", "hash_router"),
    "transformers": (
        "dense_router",
        "activation_topk",
        "hash_router",
        "expert_layout",
        "permute",
        "unpermute",
        "fused_layout",
    ),
}

_INCLUDE = re.compile(r'^[ \t]*#[ \t]*include[ \t]+"([\w./]+)"', re.M)
_COMMENT = re.compile(r'"(?:\\.|[^"\\\n])*"|//[^\n]*|/\*.*?\*/', re.S)


def digests(folder: Path = KERNELS) -> dict[str, str]:
    """Return a digest of each kernel file of a folder, by stem: of its code and that of its headers."""
    return {path.stem: _digest(path, folder) for path in sorted(folder.glob("*.cu"))}


def _digest(path: Path, folder: Path) -> str:
    code = "\n".join(_texts(path, folder, set()))
    code = _COMMENT.sub(lambda found: found[0] if found[0].startswith('"') else " ", code)
    return hashlib.sha256(" ".join(code.split()).encode()).hexdigest()[:16]


def _texts(path: Path, folder: Path, seen: set[Path]) -> Iterator[str]:
    """Yield the text of a file after those of its headers, each once."""
    if path in seen or not path.is_file():
        return
    seen.add(path)
    text = path.read_text("utf-8")
    for name in _INCLUDE.findall(text):
        yield from _texts(folder / name, folder, seen)
    yield text


def family(stem: str) -> str:
    """Return the op of a kernel file: the one with the longest name that fits."""
    fits = {name: op for op, names in FAMILIES.items() for name in names if stem == name or stem.startswith(f"{name}_")}
    return fits[max(fits, key=len)]


def changed(name: str, environment: dict[str, Any], now: dict[str, str]) -> list[str]:
    """Return the ops of a file of results whose kernels are others `now`; all, if their digests were not recorded."""
    measured = environment.get("kernels", {})
    stems = {stem for stem in (*measured, *now) if measured.get(stem) != now.get(stem)}
    others = {family(stem) for stem in stems if stem in now}
    return [op for op in MEASURED.get(name, (name,)) if op in others]
