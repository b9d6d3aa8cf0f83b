# SPDX-License-Identifier: Apache-2.0
"""Kernel files with a planted fault, in a folder that takes precedence over those of the package."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from cupy_router import compiler
from cupy_router.ops import _cached
from cupy_router.simt.device import SCHEDULES, KernelFault, SimtBackend


def take_precedence(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Let the kernel files of a folder take precedence, as soon as they are there."""
    monkeypatch.setenv("CUPY_ROUTER_KERNELS", str(folder))
    monkeypatch.setattr(compiler, "WATCHING", True)


def run_on_executor(schedule: str, time_limit: float, monkeypatch: pytest.MonkeyPatch) -> None:
    """Let calls run on the executor from here on, with their kernels compiled anew. time_limit: in seconds."""
    monkeypatch.setitem(compiler.BACKENDS, "cpu", SimtBackend(schedule, seed=1, time_limit=time_limit))
    _cached.forget()
    compiler.forget()


def shows(folder: Path, file: str, right: str, wrong: str, is_right: Callable[[str], bool]) -> bool:
    """Plant a fault: `wrong` in place of `right`, which stands once in a kernel file.

    Return True if under some schedule `is_right(schedule)` is False, or the executor reports a fault, such as a step
    that never ends.
    """
    text = (compiler.kernel_folders()[-1] / file).read_text()
    assert text.count(right) == 1, f"{file} has to be read again: where is {right}"
    (folder / file).parent.mkdir(exist_ok=True)
    (folder / file).write_text(text.replace(right, wrong))

    def is_right_or_ends(schedule: str) -> bool:
        try:
            return is_right(schedule)
        except KernelFault:
            return False

    return not all(map(is_right_or_ends, SCHEDULES))
