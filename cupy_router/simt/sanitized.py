# SPDX-License-Identifier: Apache-2.0
"""Kernels under AddressSanitizer with UndefinedBehaviorSanitizer, or ThreadSanitizer.

A sanitizer has to be in a process from its start, so calls run in a child Python that preloads it: kernels by
themselves (:func:`run_sanitized`) or whole ops, with compiler, launcher and argument packing (:func:`call_sanitized`).
Arrays are copied there into memory of exactly their own size, strides and misalignment kept, so that one element too
far is found.
"""

from __future__ import annotations

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
from functools import cache
from pathlib import Path
from typing import Any, cast

from cupy_router.simt.device import KernelFault, SimtBackend, launch, sanitizer_library, why_not
from cupy_router.simt.transport import pack, unpack

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
    """The results of the calls up to the first fault, its name (None: no fault), and all that was said."""

    results: list[Any]
    fault: str | None
    text: str


@cache
def why_not_sanitized(sanitizer: str) -> str | None:
    """Why this sanitizer cannot run here, None if it can."""
    reason = why_not()
    if reason is None and not Path(sanitizer_library(sanitizer)).is_absolute():
        reason = f"{sanitizer_library(sanitizer)} is missing (it comes with g++)"
    if reason is None:
        trial = subprocess.run([*_python(sanitizer), "-c", ""], env=_environment(), capture_output=True, text=True)
        if trial.returncode:
            reason = f"Python does not start under {sanitizer_library(sanitizer)}: {trial.stderr.strip()[:200]}"
    return reason


def _python(sanitizer: str) -> list[str]:
    """Python with the sanitizer's library, and without random addresses if allowed: ThreadSanitizer dislikes some."""
    fixed = ["setarch", "-R"]
    try:
        allowed = subprocess.run([*fixed, "true"], capture_output=True).returncode == 0
    except OSError:
        allowed = False
    return [*(fixed if allowed else []), "env", f"LD_PRELOAD={sanitizer_library(sanitizer)}", sys.executable]


def _environment() -> dict[str, str]:
    search = [str(Path(__file__).parents[2]), *filter(None, sys.path)]
    return os.environ | _ENVIRONMENT | {"PYTHONPATH": os.pathsep.join(search)}


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
    """One launch; `args` as for :func:`cupy_router.simt.device.launch`. results[0] are the arguments afterwards."""
    call = Call("cupy_router.simt.sanitized:launch_here", (source, function, tuple(grid), tuple(block), tuple(args)))
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
        job = ([(c.function, pack(c.args), pack(c.kwargs)) for c in calls], sanitizer, schedule, seed)
        (Path(folder) / "job").write_bytes(pickle.dumps(job))
        child = subprocess.run(
            [*_python(sanitizer), "-m", "cupy_router.simt.sanitized", folder],
            env=_environment(), capture_output=True, text=True, errors="replace", timeout=timeout,
        )  # fmt: skip
        text = child.stdout + child.stderr
        answer = Path(folder) / "answer"
        results, failure = pickle.loads(answer.read_bytes()) if answer.exists() else ([], None)
    fault = next((name for pattern, name in _FAULTS.items() if re.search(pattern, text)), None)
    if fault is None and isinstance(failure, tuple):
        fault, text = failure[0], failure[1] + "\n" + text
    elif fault is None and (failure is not None or child.returncode):
        raise RuntimeError(f"sanitized call {len(results)} failed:\n{failure or ''}\n{text}")
    return Report([unpack(result) for result in results], fault, text)


_backend: SimtBackend | None = None  # in the child


def launch_here(*kernel: Any) -> tuple[Any, ...]:
    """:func:`cupy_router.simt.device.launch` in the child: source, function, grid, block, args."""
    assert _backend is not None, "only a child calls this"
    return launch(_backend, *kernel)


def run_job(folder: Path) -> None:
    global _backend
    calls, sanitizer, schedule, seed = pickle.loads((folder / "job").read_bytes())
    results: list[Any] = []
    failure: object = None
    try:
        from cupy_router import compiler

        _backend = SimtBackend(schedule, seed, sanitizer)
        compiler.BACKENDS["cpu"] = cast(compiler.Backend, _backend)
        for function, args, kwargs in calls:
            module, name = function.split(":")
            results.append(pack(getattr(importlib.import_module(module), name)(*unpack(args), **unpack(kwargs))))
            (folder / "part").write_bytes(pickle.dumps((results, None)))
            os.replace(folder / "part", folder / "answer")  # a sanitizer ends the process without a word to Python
    except KernelFault as fault:
        failure = (fault.name, str(fault))
    except Exception:
        failure = traceback.format_exc()
    (folder / "answer").write_bytes(pickle.dumps((results, failure)))


if __name__ == "__main__":
    from cupy_router.simt import sanitized  # under its own name, where launch_here looks for the backend

    sanitized.run_job(Path(sys.argv[1]))
