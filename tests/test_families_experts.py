# SPDX-License-Identifier: Apache-2.0
"""replace_routers(model, experts=True) on every model of the installed transformers package that has experts."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests import frameworks

torch = pytest.importorskip("torch", reason="PyTorch is not installed")
transformers = frameworks.transformers_with_models()

from cupy_router.torch import _experts, restore_routers  # noqa: E402
from tests import moe_configs, moe_families  # noqa: E402
from tests.moe_models import DOCUMENT, generated, run  # noqa: E402
from tests.moe_values import inputs_of  # noqa: E402

FAMILIES = [name for name in moe_configs.families() if moe_families.registered(name)]
PINNED = transformers.__version__.startswith("5.23.")


@pytest.fixture(autouse=True)
def _quiet() -> Iterator[None]:
    with moe_configs.seeded_on_one_thread():
        yield


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The classes of experts that our implementation runs, one for each call."""
    found: list[str] = []
    forward = _experts.experts_forward

    def noting(experts: Any, *args: Any) -> Any:
        found.append(type(experts).__name__)
        return forward(experts, *args)

    monkeypatch.setattr(_experts, "experts_forward", noting)
    return found


def swap_all(model: Any) -> None:
    """Swap a model, none of whose experts may stay as they are."""
    assert moe_families.swap(model) == {}


@pytest.mark.filterwarnings("ignore:`gradient_checkpointing_enable` is deprecated")
@pytest.mark.slow("seconds", every=32)
@pytest.mark.parametrize("family", FAMILIES)
def test_outputs_and_gradients(family: str, calls: list[str]) -> None:
    """In float32, against the model's own code, and with gradient checkpointing."""
    for model in moe_families.models(family):
        once = values_are_close(model, calls)
        assert once > 0
        if any(hasattr(module, "gradient_checkpointing") for module in model.modules()):
            model.train().gradient_checkpointing_enable()
            assert values_are_close(model, calls) > once, "nothing was computed again"


def values_are_close(model: Any, calls: list[str]) -> int:
    """Compare a model before and after the swap, which is undone, and return the number of calls of our experts."""
    theirs = moe_families.by_own_code(model)
    swap_all(model)
    calls.clear()
    moe_families.assert_as_close(moe_families.values(model), theirs)
    restore_routers(model)
    return len(calls)


@pytest.mark.slow("seconds", every=32)
@pytest.mark.parametrize("family", FAMILIES)
def test_bfloat16(family: str, calls: list[str]) -> None:
    """Experts are as exact as those of transformers, for the hidden states that they have in the model."""
    for model in moe_families.models(family, torch.bfloat16):
        with torch.no_grad():
            found = moe_families.calls_of_experts(model)
            assert found
            for module, (args, kwargs) in found:
                errors = moe_families.rounding_errors(module, args, kwargs)
                assert 0 < errors.pop("cupy_router") <= 1.05 * max(errors.values())
    assert calls


@pytest.mark.slow("seconds", every=32)
@pytest.mark.parametrize("family", FAMILIES)
def test_generate(family: str, calls: list[str]) -> None:
    for model in moe_families.models(family):
        if not model.can_generate():  # an encoder, a classifier or a part of a larger model
            continue
        model.set_experts_implementation("eager")
        before = generated(model, "cpu", 8)
        swap_all(model)
        calls.clear()
        assert generated(model, "cpu", 8) == before
        assert calls


@pytest.mark.slow("seconds", every=32)
@pytest.mark.parametrize("family", FAMILIES)
def test_save_and_load(family: str, tmp_path: Path) -> None:
    """A swapped model writes the files that it wrote before, and what is loaded has its results."""
    for number, model in enumerate(moe_families.models(family)):
        own, ours = tmp_path / f"{number} own", tmp_path / f"{number} ours"
        model.save_pretrained(own)
        swap_all(model)
        model.save_pretrained(ours)
        assert {path.name for path in own.iterdir()} == {path.name for path in ours.iterdir()}
        for path in own.iterdir():
            assert path.read_bytes() == (ours / path.name).read_bytes(), path.name
        loaded = type(model).from_pretrained(ours).eval()
        swap_all(loaded)
        inputs = inputs_of(model, "cpu", torch.float32)
        want, got = run(model, inputs), run(loaded, inputs)
        assert (got - want).abs().max() <= 1e-5 * want.abs().max()  # products depend on where the weights begin


# -- The table ---------------------------------------------------------------------------------------------------------


def document() -> list[str]:
    text = DOCUMENT.read_text()
    start, end = (text.index(marker) for marker in moe_families.MARKERS)
    return text[start:end].splitlines()


@pytest.mark.slow("seconds", every=38)
@pytest.mark.parametrize("family", moe_configs.families())
def test_family(family: str) -> None:
    """A family is swapped, or named with a reason; whether it has implementations is seen in its code."""
    rows = moe_families.examine(family)
    assert bool(rows) == moe_configs.has_experts(family)
    assert all(not row.left for row in rows) or not moe_families.registered(family)
    assert any(row.left for row in rows) or not rows or moe_families.registered(family)
    if PINNED:
        written = [line for line in document() if line.startswith(f"| `{family}` |")]
        assert written == moe_families.lines(rows), "write it anew: python -m tests.moe_families --write"


@pytest.mark.skipif(not PINNED, reason="the table in the document is about transformers 5.23")
def test_every_folder_with_experts_is_in_the_document() -> None:
    lines = [line for line in document() if line.startswith("| `")]
    runs = {line.split("`")[1] for line in lines if line.endswith(f"| {moe_families.RUNS} |")}
    assert runs == set(FAMILIES)
    assert {line.split("`")[1] for line in lines} == {f for f in moe_configs.families() if moe_configs.has_experts(f)}
    assert moe_families.summary(sum(line.endswith("| runs |") for line in lines), len(lines)) in document()


@pytest.mark.skipif(not PINNED, reason="the tables in the document are about transformers 5.23")
def test_experts_run_where_routers_stay() -> None:
    text = DOCUMENT.read_text()
    stay = set(re.findall(r"^\| `(\w+)` \| `\w+` \| .* \| left: ", text, re.M))
    (sentence,) = re.findall(r"where the router stays as it is \((.*?)\)", text)
    assert re.findall(r"`(\w+)`", sentence) == sorted(stay & set(FAMILIES))
