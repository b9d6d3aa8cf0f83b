# SPDX-License-Identifier: Apache-2.0
"""Cases executed in a process of their own: a kernel that writes out of bounds may end it."""

from __future__ import annotations

import multiprocessing
from collections.abc import Iterable, Iterator
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from typing import Any, NamedTuple

from cupy_router.check.backend import executing
from cupy_router.check.cases import run_case
from cupy_router.simt.device import KernelFault

SCHEDULES = ("run_ahead", "reversed", "shuffled")
TIME_LIMIT = 5.0  # CPU seconds of a launch, of which the slowest case takes a hundredth
DIED = "the kernel overwrote memory that is not its own, which ended the process"
# Faults whose place only a sanitizer tells.
_WITHOUT_PLACE = ("memory fault",)


class Execution(NamedTuple):
    """The results of a case under each schedule, or the fault that ended it."""

    number: int
    results: dict[str, Any]
    fault: str = ""
    has_place: bool = True  # the fault names its file and line


def execute(number: int) -> Execution:
    """Run a case in this process."""
    results = {}
    with executing() as backend:
        backend.time_limit = TIME_LIMIT
        for schedule in SCHEDULES:
            backend.schedule = schedule
            try:
                results[schedule] = run_case(number)
            except KernelFault as error:
                return Execution(number, results, str(error), error.name not in _WITHOUT_PLACE)
    return Execution(number, results)


def executions(numbers: Iterable[int]) -> Iterator[Execution]:
    """Run cases in a child, one after another, up to the first fault: scratch memory may be spoilt after it."""
    with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as pool:
        for number in numbers:
            try:
                found = pool.submit(execute, number).result()
            except BrokenProcessPool:
                found = Execution(number, {}, DIED, False)
            yield found
            if found.fault:
                return
