# SPDX-License-Identifier: Apache-2.0
"""``cupy-router invariance``: its counts are 0 on the CPU, and a router that depends on the batch is found."""

from __future__ import annotations

import json
import re
from typing import Any

import pytest

import cupy_router
from cupy_router import cli
from cupy_router.cli import invariance


def counts_of(capsys: pytest.CaptureFixture[str], *more: str, code: int = 0) -> list[dict[str, Any]]:
    assert cli.main(["invariance", "--device", "cpu", "--json", *more]) == code
    found: list[dict[str, Any]] = json.loads(capsys.readouterr().out)
    return found


@pytest.mark.parametrize("more", [(), ("--preset", "gpt-oss", "--hidden", "96", "--dtype", "float16")], ids=len)
def test_no_token_depends_on_its_batch(more: tuple[str, ...], capsys: pytest.CaptureFixture[str]) -> None:
    found = counts_of(capsys, "--tokens", "70", *more)
    assert [(one["batch"], one["batch_invariant"]) for one in found] == [
        (batch, batch_invariant) for batch_invariant in (False, True) for batch in (1, 16, 64, 70)
    ]
    assert not any(one[name] for one in found for name in ("logits", "weights", "experts"))


@pytest.mark.parametrize("option", [False, True])
def test_tokens_that_depend_on_their_batch_are_counted(
    option: bool, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The last token of a batch of two or more is another one, by default or with the option."""

    def route(x: Any, *args: Any, batch_invariant: bool, **more: Any) -> Any:
        if batch_invariant == option and len(x) > 1:
            x = x.copy()
            x[-1] = x[0]
        return cupy_router.dense_router(x, *args, batch_invariant=batch_invariant, **more)

    monkeypatch.setattr(invariance, "dense_router", route)
    found = {(one["batch_invariant"], one["batch"]): one for one in counts_of(capsys, "--tokens", "40", code=option)}
    for (batch_invariant, batch), one in found.items():
        expected = {1: 0, 16: 3, 40: 1}[batch] if batch_invariant == option else 0
        assert [one[name] for name in ("logits", "weights", "experts")] == [expected] * 3
    assert cli.main(["invariance", "--device", "cpu", "--tokens", "40"]) == option
    printed = capsys.readouterr().out
    assert ("FAILED" in printed) == option
    numbers = re.findall(r"^ +16 +(.*)$", printed, re.M)[0].split()
    assert numbers == (["0"] * 3 + ["3"] * 3 if option else ["3"] * 3 + ["0"] * 3)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ("--preset gpt-6", r"--preset must be one of deepseek-v4-flash, .*, got 'gpt-6'"),
        ("--hidden 64", "--hidden is for a random gate: add --preset NAME"),
        ("--tokens 3000", "there are 2048 real tokens, got --tokens 3000: add --preset NAME for random ones"),
    ],
)
def test_refused_arguments(arguments: str, message: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["invariance", "--device", "cpu", *arguments.split()]) == 1
    assert re.fullmatch(f"cupy-router invariance: {message}\n", capsys.readouterr().err)


@pytest.mark.parametrize("arguments", ["--tokens 0", "--preset mixtral --hidden -1"])
def test_counts_start_at_1(arguments: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        cli.main(["invariance", *arguments.split()])
    assert "must be at least 1, got" in capsys.readouterr().err
