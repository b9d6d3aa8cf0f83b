# SPDX-License-Identifier: Apache-2.0
"""Files that are watched while other threads add some."""

from __future__ import annotations

from pathlib import Path

import pytest

from cupy_router import watch
from cupy_router.watch import Watch


def test_paths_may_be_added_while_watching(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    watched = Watch()
    for name in ("a", "b"):
        watched.add(tmp_path / name)
    stamp = watch._stamp

    def adding(path: Path) -> watch.Stamp:
        watched._stamps.setdefault(path.with_suffix(".new"), None)
        return stamp(path)

    monkeypatch.setattr(watch, "_stamp", adding)
    assert not watched.changed()
    (tmp_path / "a").write_text("new")
    assert watched.changed()
