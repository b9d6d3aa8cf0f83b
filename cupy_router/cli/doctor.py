# SPDX-License-Identifier: Apache-2.0
"""``cupy-router doctor``: check everything that kernels need, run one, and give a remedy for each fault."""

from __future__ import annotations

import argparse
import json
import warnings
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import cupy_router

from . import checks, terminal, versions
from .cache_check import cache
from .kernel_check import kernel
from .result import Result, attempt

Check = Callable[[], Result]

CHECKS: dict[str, Check] = {
    "cache": cache,  # before CuPy is imported
    "gpu": checks.gpu,
    "driver": checks.driver,
    "cupy": checks.cupy,
    "nvrtc": checks.nvrtc,
    "headers": checks.headers,
    "cublas": checks.cublas,
    "python": versions.python,
    **{name: partial(versions.package, name) for name in versions.PACKAGES},
    "kernel": kernel,
}


def add_parser(commands: Any) -> None:
    about = "Check what the kernels need, run one, and give a remedy for each fault."
    code = "Exit code: 0 if the kernel ran with the right results and there is no fault, else 1."
    parser = commands.add_parser("doctor", help="check what the kernels need, run one", description=about, epilog=code)
    parser.add_argument("--json", action="store_true", help="print the results as JSON")
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Print the results; return 0 if a kernel ran with the right results and there is no fault, else 1."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of folders and packages, which the checks describe
        results = [attempt(name, check) for name, check in CHECKS.items()]
    kernels_run, faults = judge(results)
    if args.json:
        content = {
            "cupy_router": cupy_router.__version__,
            "kernels_run": kernels_run,
            "faults": faults,
            "summary": summary(kernels_run, faults),
            "checks": [result._asdict() for result in results],
        }
        print(json.dumps(content, indent=1))
    else:
        show(results)
        print(summary(kernels_run, faults))
    return 0 if kernels_run and not faults else 1


def judge(results: Sequence[Result]) -> tuple[bool, int]:
    """Return whether kernels run, and the number of faults."""
    kernels_run = any(result.name == "kernel" and result.state == "ok" for result in results)
    return kernels_run, sum(result.state == "fault" for result in results)


def summary(kernels_run: bool, faults: int) -> str:
    counted = "1 fault" if faults == 1 else f"{faults} faults"
    if kernels_run:
        return f"Kernels run, but there is something to correct: {counted}." if faults else "Kernels run."
    if faults:
        return f"No kernel runs: {counted}."
    return "No kernel runs, as there is no GPU. The installation has no fault: CPU arrays run the NumPy reference."


def show(results: Sequence[Result]) -> None:
    print(f"cupy-router {cupy_router.__version__}")
    for result in results:
        state = "FAULT" if result.state == "fault" else result.state
        terminal.field(f"{state:<6}{result.name}", result.found, 20)
        if result.remedy:
            terminal.field("", result.remedy, 20)
