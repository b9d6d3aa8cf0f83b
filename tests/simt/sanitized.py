# SPDX-License-Identifier: Apache-2.0
"""Kernels under AddressSanitizer with UndefinedBehaviorSanitizer, or ThreadSanitizer.

A sanitizer has to be in a process from its start, so calls run in a child Python that preloads it: kernels by themselves
(:func:`run_sanitized`) or whole ops, with compiler, launcher and argument packing (:func:`call_sanitized`). Arrays are copied
there into memory of exactly their own size, strides and misalignment kept, so that one element too far is found.
"""

from __future__ import annotations

import ctypes
import importlib
import os
import pickle
import re
import subprocess
import sys
import tempfile
import traceback
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from tests.simt.device import KernelFault, SimtBackend, sanitizer_library, why_not

# What a sanitizer writes -> the name of the fault. The first that is found counts.
_FAULTS = {
    r"AddressSanitizer: global-buffer-overflow": "shared memory out of bounds",
    r"AddressSanitizer: heap-buffer-overflow": "global memory out of bounds",
    r"AddressSanitizer: stack-buffer-(over|under)flow": "local memory out of bounds",
    r"AddressSanitizer: [\w-]+": "bad memory access",
    r"runtime error: (load|store|reference|member access)[^\n]*misaligned": "misaligned access",
    r"runtime error: index [^\n]*out of bounds": "array index out of bounds",
    r"runtime error: ": "undefined behaviour",
    r"ThreadSanitizer: data race": "data race",
    r"ThreadSanitizer: [\w-]+": "thread error",
}
_ENVIRONMENT = {
    "PYTHONMALLOC": "malloc",
    "OPENBLAS_NUM_THREADS": "1",
    "OMP_NUM_THREADS": "1",
    "ASAN_OPTIONS": "detect_leaks=0",  # Python keeps what it allocated
    "UBSAN_OPTIONS": "print_stacktrace=1",
    "TSAN_OPTIONS": "halt_on_error=1",
}


@dataclass(frozen=True)
class Call:
    """`module:function` with its arguments; arrays among them, also within tuples and dictionaries, are copied."""

    function: str
    args: tuple[Any, ...] = ()
    kwargs: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Report:
    """`results` of the calls up to the first fault; `fault` is its name, None if there was none; `text` all that was said."""

    results: list[Any]
    fault: str | None
    text: str


def why_not_sanitized(sanitizer: str) -> str | None:
    """Why this sanitizer cannot run here, None if it can."""
    reason = why_not()
    if reason is None and not Path(sanitizer_library(sanitizer)).is_absolute():
        reason = f"{sanitizer_library(sanitizer)} is missing (it comes with g++)"
    return reason


def run_sanitized(
    source: str,
    function: str,
    grid: Sequence[int],
    block: Sequence[int],
    args: Sequence[Any],
    *,
    sanitizer: str = "address",
    schedule: str = "run_ahead",
    seed: int = 0,
) -> Report:
    """One launch; `args` as for :func:`launch`. results[0] are the arguments afterwards."""
    call = Call("tests.simt.sanitized:launch", (source, function, tuple(grid), tuple(block), tuple(args)))
    return call_sanitized([call], sanitizer=sanitizer, schedule=schedule, seed=seed)


def call_sanitized(
    calls: Sequence[Call],
    *,
    sanitizer: str = "address",
    schedule: str = "run_ahead",
    seed: int = 0,
    timeout: float = 600.0,
) -> Report:
    """The calls one after another in one child, kernels of ops included, up to the first fault.

    RuntimeError if a call fails for another reason (an argument that an op refuses).
    """
    with tempfile.TemporaryDirectory() as folder:
        job = ([(c.function, _pack(c.args), _pack(c.kwargs)) for c in calls], sanitizer, schedule, seed)
        (Path(folder) / "job").write_bytes(pickle.dumps(job))
        environment = os.environ | _ENVIRONMENT | {
            "LD_PRELOAD": sanitizer_library(sanitizer),
            "PYTHONPATH": os.pathsep.join(filter(None, [str(Path(__file__).parents[2]), *sys.path])),
        }  # fmt: skip
        child = subprocess.run(
            [sys.executable, "-m", "tests.simt.sanitized", folder],
            env=environment, capture_output=True, text=True, errors="replace", timeout=timeout,
        )  # fmt: skip
        text = child.stdout + child.stderr
        answer = Path(folder) / "answer"
        results, failure = pickle.loads(answer.read_bytes()) if answer.exists() else ([], None)
    fault = next((name for pattern, name in _FAULTS.items() if re.search(pattern, text)), None)
    if fault is None and isinstance(failure, tuple):
        fault, text = failure[0], failure[1] + "\n" + text
    elif fault is None and (failure is not None or child.returncode):
        raise RuntimeError(f"sanitized call {len(results)} failed:\n{failure or ''}\n{text}")
    return Report([_unpack(result) for result in results], fault, text)


def launch(
    source: str,
    function: str,
    grid: Sequence[int],
    block: Sequence[int],
    args: Sequence[Any],
    backend: SimtBackend | None = None,
) -> tuple[Any, ...]:
    """Build and launch a kernel by itself, in this process; gives `args` back, arrays as the kernel left them.

    Arrays go as pointers; scalars as NumPy scalars or ctypes values of the parameter's own type.
    """
    backend = backend or _child_backend
    assert backend is not None, "outside a sanitized child, name the backend"
    values = [ctypes.c_void_p(arg.ctypes.data) if isinstance(arg, np.ndarray) else _scalar(arg) for arg in args]
    pointers = (ctypes.c_void_p * len(values))(*(ctypes.addressof(value) for value in values))
    gx, gy, gz = (*grid, 1, 1)[:3]
    bx, by, bz = (*block, 1, 1)[:3]
    handle = backend.build(source, function, 0)
    backend.launch(handle, gx, gy, gz, bx, by, bz, 0, 0, ctypes.addressof(pointers), 0)
    return tuple(args)


_child_backend: SimtBackend | None = None


def _scalar(value: Any) -> Any:
    return np.ctypeslib.as_ctypes_type(value.dtype)(value.item()) if isinstance(value, np.generic) else value


@dataclass(frozen=True)
class _Array:
    """An array on its way between processes: only the bytes from its first to its last element, and where they lay."""

    content: bytes
    misalignment: int
    first: int
    dtype: Any
    shape: tuple[int, ...]
    strides: tuple[int, ...]
    writeable: bool

    @classmethod
    def of(cls, array: np.ndarray) -> _Array:
        low, high = np.lib.array_utils.byte_bounds(array)
        content = ctypes.string_at(low, high - low) if array.size else b""
        start = array.ctypes.data
        return cls(content, low % 16, start - low, array.dtype, array.shape, array.strides, array.flags.writeable)

    def array(self) -> np.ndarray:
        memory = np.empty(
            self.misalignment + len(self.content), np.uint8
        )  # from malloc: 16-byte aligned, not a byte more
        memory[self.misalignment :] = np.frombuffer(self.content, np.uint8)
        offset = self.misalignment + self.first
        array: np.ndarray = np.ndarray(self.shape, self.dtype, memory, offset if self.content else 0, self.strides)
        array.flags.writeable = self.writeable
        return array


def _map(value: Any, kind: type, change: Any) -> Any:
    if isinstance(value, kind):
        return change(value)
    if isinstance(value, dict):
        return {key: _map(item, kind, change) for key, item in value.items()}
    if isinstance(value, tuple) and hasattr(value, "_fields"):
        return type(value)(*(_map(item, kind, change) for item in value))
    if isinstance(value, tuple | list):
        return type(value)(_map(item, kind, change) for item in value)
    return value


def _pack(value: Any) -> Any:
    return _map(value, np.ndarray, _Array.of)


def _unpack(value: Any) -> Any:
    return _map(value, _Array, _Array.array)


def _child(folder: Path) -> None:
    global _child_backend
    calls, sanitizer, schedule, seed = pickle.loads((folder / "job").read_bytes())
    results: list[Any] = []
    failure: object = None
    try:
        from cupy_router import compiler

        _child_backend = compiler.BACKENDS["cpu"] = SimtBackend(schedule, seed, sanitizer)
        for function, args, kwargs in calls:
            module, name = function.split(":")
            results.append(_pack(getattr(importlib.import_module(module), name)(*_unpack(args), **_unpack(kwargs))))
            (folder / "part").write_bytes(pickle.dumps((results, None)))
            os.replace(folder / "part", folder / "answer")  # a sanitizer ends the process without a word to Python
    except KernelFault as fault:
        failure = (fault.name, str(fault))
    except Exception:
        failure = traceback.format_exc()
    (folder / "answer").write_bytes(pickle.dumps((results, failure)))


if __name__ == "__main__":
    from tests.simt import sanitized  # under its own name, where `launch` looks for the backend

    sanitized._child(Path(sys.argv[1]))
