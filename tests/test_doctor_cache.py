# SPDX-License-Identifier: Apache-2.0
"""``cupy-router doctor`` and the folder of compiled kernels: unusable, or open to other users."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace

import pytest

from cupy_router import kernel_cache
from cupy_router.cli import cache_check
from tests.simulated_machine import Machine, examine, simulated


@pytest.fixture
def machine(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[Machine]:
    with simulated(monkeypatch, tmp_path) as found:
        yield found


def test_a_folder_that_cannot_be_used(machine: Machine, capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    machine.patch.setenv(kernel_cache.FOLDER, str(tmp_path / "file" / "x"))
    code, _, results = examine(capsys)
    assert code == 0
    assert results["cache"].state == "note"
    assert "every process compiles its kernels again" in results["cache"].found
    assert results["cache"].remedy == "Set CUPY_CACHE_DIR to a folder that can be written."
    machine.patch.setenv(kernel_cache.IN_MEMORY, "1")
    assert cache_check.cache().found.startswith("in memory, as CUPY_CACHE_IN_MEMORY=1 asks")


def faults_of(folder: Path, above: Path) -> list[str]:
    """Return how folders at and below `above` are open: those above are the machine's."""
    found = cache_check.open_to_others(folder)
    return [f"{Path(where).relative_to(above)} {how}" for where, how, _ in found if Path(where).is_relative_to(above)]


@pytest.mark.parametrize(
    ("parent", "mode", "found"),
    [
        (0o755, 0o700, []),
        (0o755, 0o755, []),
        (0o755, 0o757, ["a/b can be written by other users"]),
        (0o755, 0o1777, ["a/b can be written by other users"]),
        (0o755, 0o775, ["a/b can be written by other users"]),
        (0o777, 0o700, ["a can be written by other users"]),
        (0o1777, 0o700, []),
    ],
    ids=lambda value: oct(value) if isinstance(value, int) else None,
)
def test_a_folder_that_others_may_write(
    parent: int, mode: int, found: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(cache_check, "is_private_group", lambda number: False)
    folder = tmp_path / "a" / "b"
    folder.mkdir(parents=True)
    folder.chmod(mode)
    folder.parent.chmod(parent)
    assert faults_of(folder, tmp_path) == found
    monkeypatch.setattr(cache_check, "is_private_group", lambda number: True)
    assert faults_of(folder, tmp_path) == ([] if mode == 0o775 else found)


def test_a_folder_of_another_user(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    user = os.getuid()
    monkeypatch.setattr(os, "getuid", lambda: user + 1)
    if user == 0:  # what root owns is trusted
        os.chown(tmp_path, 4321, -1)
    owner = tmp_path.stat().st_uid
    where, how, remedy = next(cache_check.open_to_others(tmp_path))
    assert (where, how) == (str(tmp_path), f"belongs to another user ({owner})")
    assert remedy == "Set CUPY_CACHE_DIR to a folder of your own."


def test_an_open_folder_is_a_fault_although_kernels_run(machine: Machine, capsys: pytest.CaptureFixture[str]) -> None:
    problem = (str(machine.cache), "can be written by other users", "Run chmod.")
    machine.patch.setattr(cache_check, "open_to_others", lambda folder: iter([problem]))
    code, content, results = examine(capsys)
    assert (code, content["kernels_run"]) == (1, True)
    assert results["cache"].found.endswith("can be written by other users, and kernels are loaded from it")
    assert results["cache"].remedy == "Run chmod."


def test_private_groups(monkeypatch: pytest.MonkeyPatch) -> None:
    import grp
    import pwd

    user = SimpleNamespace(pw_name="ada", pw_gid=1000)
    monkeypatch.setattr(pwd, "getpwuid", lambda number: user)
    for name, number, members, private in [
        ("ada", 1000, [], True),
        ("ada", 1000, ["ada", "bob"], False),
        ("users", 1000, [], False),
        ("ada", 1001, [], False),
    ]:
        group = SimpleNamespace(gr_name=name, gr_gid=number, gr_mem=members)
        monkeypatch.setattr(grp, "getgrgid", lambda _, group=group: group)
        assert cache_check.is_private_group(number) == private
