# SPDX-License-Identifier: Apache-2.0
"""Run cases: compile their kernels for all architectures and for the CPU, execute them, compare, look for races."""

from __future__ import annotations

import os
import re
import subprocess
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any

from cupy_router import compiler, kernel_build, nvrtc
from cupy_router.check import architectures, comparison
from cupy_router.check.backend import Kernel, LateBackend, executing
from cupy_router.check.cases import CASES, run_case
from cupy_router.check.execution import executions
from cupy_router.declarations import CompileError
from cupy_router.nvrtc import Resources
from cupy_router.simt import device
from cupy_router.simt.sanitized import Call, Report, call_sanitized, why_not_sanitized

FIRST = "sm_90"  # the architecture that is compiled first: most errors are there for all
MOST_SANITIZED = 4  # cases, unless all are asked for: a sanitizer makes a case take seconds
SANITIZER_SECONDS = 120  # an endless loop has no other limit there
_PLACE = re.compile(r"kernels/[\w./]+\.cuh?:\d+")


@dataclass(frozen=True)
class Fault:
    """Something wrong: the op, what it is about, and lines for people, with files and lines."""

    op: str
    title: str
    text: str


@dataclass
class Outcome:
    """The result of a check: faults, and gaps, which are what could not be checked."""

    faults: list[Fault] = field(default_factory=list)
    gaps: list[str] = field(default_factory=list)  # what could not be checked here, and the remedy
    notes: list[str] = field(default_factory=list)  # what was done
    needs: dict[tuple[str, str], list[Resources]] = field(default_factory=dict)  # by file and architecture

    is_executable: bool = True  # every kernel was compiled for the CPU

    @property
    def is_good(self) -> bool:
        return not self.faults and not self.gaps


def check(numbers: Sequence[int], only: frozenset[str] = frozenset(), sanitize: int = 0) -> Outcome:
    """Check cases, by their numbers.

    only: names of kernel files; cases whose kernels read none of them are left out. Empty: none is left out.
    sanitize: how many cases also run under sanitizers. Those that fail do in any case.
    """
    outcome = Outcome()
    before = compiler.BACKENDS.pop("cpu", None)
    try:
        expected = {i: run_case(i) for i in numbers}
    finally:
        if before is not None:
            compiler.BACKENDS["cpu"] = before
    with executing() as backend:
        kernels = _kernels(backend, numbers, only, outcome)
        if not kernels and not outcome.faults:
            outcome.gaps.append(f"no call reads {', '.join(sorted(only))}")
            return outcome
        _compile_cases(kernels, outcome)
        if device.why_not() is not None:
            outcome.gaps.append(f"no kernel was executed: {device.why_not()}")
        elif outcome.is_executable:
            failed = _execute(list(kernels), expected, outcome)
            _sanitize(kernels, failed, sanitize, outcome)
    return outcome


def _kernels(
    backend: LateBackend, numbers: Sequence[int], only: frozenset[str], outcome: Outcome
) -> dict[int, list[Kernel]]:
    """Return the kernels of each case."""
    found = {}
    for i in numbers:
        backend.kernels = []
        try:
            run_case(i)
        except compiler.CompileError as error:  # of the files themselves: an include, a constant, a parameter
            if not any(fault.text == str(error) for fault in outcome.faults):
                outcome.faults.append(Fault(CASES[i].op, "", str(error)))
            continue
        except (TypeError, ValueError) as error:  # parameters that the op does not pass
            outcome.faults.append(Fault(CASES[i].op, CASES[i].title, str(error)))
            continue
        if not only or any(only & set(kernel.files) for kernel in backend.kernels):
            found[i] = backend.kernels
    backend.kernels = None
    return found


# -- Compilers ---------------------------------------------------------------------------------------------------------


def _compile_cases(kernels: dict[int, list[Kernel]], outcome: Outcome) -> None:
    owners: dict[Kernel, tuple[str, str]] = {}
    for i, asked in kernels.items():
        for kernel in asked:
            owners.setdefault(kernel, (CASES[i].op, kernel.files[0]))
    compile_all(owners, outcome)


def compile_all(owners: dict[Kernel, tuple[str, str]], outcome: Outcome) -> None:
    """Compile for all architectures, and at the same time for the CPU; each kernel has an op and a title for faults."""
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        built = [pool.submit(_build, kernel, None) for kernel in owners] if device.why_not() is None else []
        _for_all_architectures(owners, outcome)
        errors = [future.result() for future in built]
    outcome.is_executable = not outcome.faults and not any(errors)
    if outcome.faults:
        return
    for (op, title), error in zip(owners.values(), errors, strict=False):
        if error is not None and outcome.needs:
            outcome.gaps.append(f"{title} was not executed, as g++ refuses what NVRTC accepts: {error}")
            return
        if error is not None:
            outcome.faults.append(Fault(op, f"{title} for the CPU", error))
            return


def _build(kernel: Kernel, sanitizer: str | None) -> str | None:
    """Return the first errors of g++, None if it made a library."""
    try:
        device.build_library(kernel.source, kernel.function, sanitizer)
    except compiler.CompileError as error:
        lines = [line for line in str(error).splitlines() if ": error:" in line or ": fatal error:" in line]
        return "\n".join(lines[:3]) or str(error)
    return None


def _for_all_architectures(owners: dict[Kernel, tuple[str, str]], outcome: Outcome) -> None:
    path = nvrtc.find()
    if path is None:
        remedy = "install nvidia-cuda-nvrtc-cu12 or cupy-router[cuda12]"
        outcome.gaps.append(f"nothing was compiled for GPUs, as there is no NVRTC: {remedy}")
        return
    library = nvrtc.Nvrtc(path)
    version, supported = library.version, library.architectures
    known = [name for name in architectures.ARCHITECTURES if architectures.number(name) in supported]
    missing = [name for name in architectures.ARCHITECTURES if name not in known]
    if missing:
        outcome.gaps.append(f"NVRTC {version} does not know {', '.join(missing)}: install a newer one")
    todo = [(kernel, name) for kernel in owners for name in architectures.wanted(*_text(kernel)) if name in known]
    first = [(kernel, name) for kernel, name in todo if name == FIRST]
    logs = _logs(library, first)
    if any(isinstance(log, CompileError) for log in logs.values()):  # the other architectures say the same
        todo, known = first, [FIRST]
    else:
        logs |= _logs(library, [(kernel, name) for kernel, name in todo if name != FIRST])
    refused: dict[str, tuple[Kernel, list[str]]] = {}
    for kernel, name in todo:
        log = logs[kernel.source, name]
        if isinstance(log, str):
            outcome.needs.setdefault((kernel.files[0], name), []).append(nvrtc.resources(log, kernel.function))
            continue
        for line in _errors(str(log)):
            refused.setdefault(line, (kernel, []))[1].append(name)
    for line, (kernel, names) in list(refused.items())[:3]:
        where = [name for name in known if name in names]
        op, title = owners[kernel]
        outcome.faults.append(Fault(op, title if where == known else f"{title} for {', '.join(where)}", line))
    if not refused:
        outcome.notes.append(f"{_count(len(owners), 'kernel')} compiled for {' '.join(known)} by NVRTC {version}")


def _logs(library: nvrtc.Nvrtc, todo: Sequence[tuple[Kernel, str]]) -> dict[tuple[str, str], str | CompileError]:
    """Compile each text once for an architecture, in threads, and return what ptxas says, or the errors."""
    folder = device.cache_folder()
    folder.mkdir(parents=True, exist_ok=True)

    def log(text: tuple[str, str]) -> str | CompileError:
        try:
            return architectures.compile_text(library, folder, *text)
        except CompileError as error:
            return error

    texts = list(dict.fromkeys((kernel.source, name) for kernel, name in todo))
    with ThreadPoolExecutor(kernel_build.num_threads()) as pool:
        return dict(zip(texts, pool.map(log, texts), strict=True))


def _count(number: int, thing: str) -> str:
    return f"{number} {thing}" if number == 1 else f"{number} {thing}s"


def _text(kernel: Kernel) -> tuple[str, str]:
    return kernel.function, kernel.source


def _errors(log: str) -> list[str]:
    """Return the errors of a log, each with file and line; a call that fails to instantiate counts as its own."""
    found = [line.strip() for line in log.splitlines() if re.search(r"\): (catastrophic )?error", line)]
    return found or [log]


# -- Execution ---------------------------------------------------------------------------------------------------------


def _execute(numbers: Sequence[int], expected: dict[int, Any], outcome: Outcome) -> list[int]:
    """Run every case under several schedules; return those whose fault a sanitizer may place."""
    failed: list[int] = []
    num_executed = 0
    for number, results, fault, has_place in executions(numbers):
        case = CASES[number]
        num_executed += 1
        if fault:
            outcome.faults.append(Fault(case.op, case.title, fault))
            failed += [] if has_place else [number]
            break
        compared = {schedule: comparison.difference(found, expected[number]) for schedule, found in results.items()}
        wrong = {schedule: text for schedule, text in compared.items() if text is not None}
        if wrong:
            text = next(iter(wrong.values()))
            if comparison.FACTOR not in text:  # which no race makes
                failed.append(number)
            some = "" if len(wrong) == len(results) else f" (only when threads run in the order {', '.join(wrong)})"
            outcome.faults.append(Fault(case.op, case.title, f"{text}{some}"))
    verdict = f"{len(outcome.faults)} of them wrong" if outcome.faults else "equal to the reference"
    outcome.notes.append(f"{_count(num_executed, 'case')} executed on the CPU, {verdict}")
    return failed


def _sanitize(kernels: dict[int, list[Kernel]], failed: Sequence[int], most: int, outcome: Outcome) -> None:
    """Run cases under both sanitizers: the first of those that failed, and one for each kernel file."""
    chosen = list(failed[:1])
    seen = {kernels[i][0].files[0] for i in chosen}
    for i in kernels:
        if most >= len(kernels) or (len(chosen) < most and kernels[i][0].files[0] not in seen):
            seen.add(kernels[i][0].files[0])
            if i not in chosen:
                chosen.append(i)
    usable = [name for name in device.SANITIZERS if why_not_sanitized(name) is None] if chosen else []
    if not usable:
        if chosen:
            outcome.notes.append(f"not looked for races: {why_not_sanitized('thread')}")
        return
    todo = dict.fromkeys(kernel for i in chosen for kernel in kernels[i])
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        list(pool.map(lambda job: _build(*job), [(kernel, name) for name in usable for kernel in todo]))
        found = list(pool.map(_sanitized(chosen), usable))
    reports = [report for report in found if report is not None]
    if len(reports) < len(found):
        outcome.notes.append("a sanitizer did not finish, so there may be races and accesses out of bounds")
    for report in reports:
        if report.fault is not None:
            case = CASES[chosen[len(report.results)]]
            places = dict.fromkeys(_PLACE.findall(report.text))
            text = f"{report.fault} at {_few(places)}" if places else f"{report.fault}\n{report.text[:1000]}"
            outcome.faults.append(Fault(case.op, case.title, text))
    if len(reports) == len(found) and not any(report.fault for report in reports):
        outcome.notes.append(
            f"{_count(len(chosen), 'case')} without a data race or an access out of bounds, by sanitizers"
        )


def _sanitized(chosen: Sequence[int]) -> Callable[[str], Report | None]:
    """Return a function that runs cases under a sanitizer; it returns None if it does not finish."""
    calls = [Call("cupy_router.check.cases:run_case", (i,)) for i in chosen]

    def report(name: str) -> Report | None:
        try:
            return call_sanitized(calls, sanitizer=name, timeout=SANITIZER_SECONDS)
        except (subprocess.TimeoutExpired, RuntimeError):  # an endless loop; a process that died without a report
            return None

    return report


def _few(places: Iterable[str]) -> str:
    listed = list(places)
    return " and ".join(listed[:2]) + (f" (called from {', '.join(listed[2:5])})" if len(listed) > 2 else "")
