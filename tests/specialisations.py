# SPDX-License-Identifier: Apache-2.0
"""Every kernel specialisation in use: what the ops ask to be compiled for the presets, the benchmarks and some corners.

Nothing is listed by its macros. Calls are made, in part by the benchmark scripts themselves, with NumPy's memory in the
place of the GPU's, while a :class:`Recorder` stands in for the device; so the list is what the ops really plan.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest import mock

import numpy as np

from cupy_router import RoutingMethod, activation_topk, compiler, hash_router, presets, topk_select
from tests.backends import DTYPES
from tests.recorder import recording

FLOATS = ("float32", "float16", "bfloat16")
BENCHMARKS = Path(__file__).parents[1] / "benchmarks"
VOCAB_SIZE, HIDDEN = 1000, 4096


@dataclass(frozen=True, order=True)
class Specialisation:
    """A kernel, its macros, and the largest block and dynamic shared memory that it is launched with."""

    function: str
    macros: tuple[tuple[str, int], ...]
    kernel: str
    block: int
    shared_bytes: int

    def __str__(self) -> str:
        return " ".join([self.function, *(f"{name}={value}" for name, value in self.macros)])

    @property
    def source(self) -> str:
        return compiler.expand(self.kernel, self.macros)


def specialisations() -> list[Specialisation]:
    """In a fixed order, without repetitions."""
    largest: dict[tuple[str, tuple[tuple[str, int], ...], str], tuple[int, int]] = {}
    with recording() as recorder:
        for calls in (_presets, _benchmarks, _corners):
            calls()
        for launch in recorder.launches:
            key = launch.function, tuple(sorted(launch.macros.items())), launch.kernel
            block, shared_bytes = largest.get(key, (0, 0))
            largest[key] = max(block, launch.block[0]), max(shared_bytes, launch.shared_bytes)
    return sorted(Specialisation(*key, *sizes) for key, sizes in largest.items())


def _matrix(rows: int, columns: int, dtype: str, misaligned: bool = False) -> Any:
    flat = np.zeros(rows * columns + 8, DTYPES[dtype])
    return flat[misaligned : rows * columns + misaligned].reshape(rows, columns)


def _presets() -> None:
    """Every dtype, aligned or not, enough rows for blocks of full size."""
    n = 8192
    for method in presets().values():
        bias = np.zeros(method.num_experts, np.float32)
        table = np.zeros((VOCAB_SIZE, method.top_k), np.int32)
        ids = np.zeros(n, np.int32)
        for dtype in FLOATS:
            for misaligned in (False, True):
                activation_topk(_matrix(n, method.num_experts, dtype, misaligned), method, bias=bias)
            hash_router(ids, table, method, logits=_matrix(n, method.num_experts, dtype))
            weight = _matrix(method.num_experts, HIDDEN, dtype)
            hash_router(ids[:4], table, method, x=_matrix(4, HIDDEN, dtype), weight=weight)
        hash_router(ids.astype(np.int64), table)


def _corners() -> None:
    """The widest rows and most winners that a warp takes, rows with limits, every score, the kernels for any size."""
    for dtype in FLOATS:
        topk_select(_matrix(4096, 256, dtype), 8, lengths=np.zeros(4096, np.int32))
        topk_select(_matrix(4, 40_000, dtype), 512)
    topk_select(_matrix(4096, 1000, "float32"), 32)
    for score in ("sigmoid", "softmax", "identity"):
        activation_topk(_matrix(4096, 256, "float32"), RoutingMethod(256, 8, score))
    activation_topk(_matrix(4096, 1000, "float32"), RoutingMethod(1000, 32, "softmax"))
    activation_topk(_matrix(4, 2000, "float32"), RoutingMethod(2000, 40, "softmax"))
    ids, table = np.zeros(4096, np.int64), np.zeros((VOCAB_SIZE, 8), np.int64)
    softmax = RoutingMethod(256, 8, "softmax")
    hash_router(ids, table, softmax, logits=_matrix(4096, 256, "float32"))
    weight = _matrix(256, HIDDEN, "float32", misaligned=True)
    hash_router(ids[:4], table, softmax, x=_matrix(4, HIDDEN, "bfloat16"), weight=weight)


# -- Benchmarks --------------------------------------------------------------------------------------------------------


class _NumPyAsCuPy:
    """NumPy under CuPy's name. "Random" memory is zeros that nobody touches."""

    random = SimpleNamespace(
        standard_normal=lambda shape, dtype: np.zeros(shape, dtype),
        randint=lambda low, high, shape: np.zeros(shape, np.int64),
    )

    def __getattr__(self, name: str) -> Any:
        return getattr(np, name)


def _benchmarks() -> None:
    """The GPU part of every benchmark script, each call made once instead of timed."""
    for path in sorted(BENCHMARKS.glob("bench_*.py")):
        script = importlib.import_module(f"benchmarks.{path.stem}")
        timing: dict[str, Any] = {
            "cold_inputs": lambda make, *_, **__: [make()],
            "graph_microseconds": _call_once,
            "torch_graph_microseconds": lambda *_, **__: (0.0, 0.0),
        }
        with mock.patch.object(script, "cupy", _NumPyAsCuPy()), mock.patch.multiple(script.harness, **timing):
            script.gpu_rows()


def _call_once(call: Callable[[int], Any], *_: Any, **__: Any) -> tuple[float, float]:
    call(0)
    return 0.0, 0.0
