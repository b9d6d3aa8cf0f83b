# SPDX-License-Identifier: Apache-2.0
"""replace_routers on every MoE model of the installed transformers package."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

import pytest

from tests import frameworks

torch = pytest.importorskip("torch", reason="PyTorch is not installed")
transformers = frameworks.transformers_with_models()

from cupy_router import RoutingMethod  # noqa: E402
from cupy_router.torch import _replace, _swapped  # noqa: E402
from tests import moe_configs, moe_models  # noqa: E402
from tests.moe_configs import LEFT, LEFT_IF_VARIED, VARIANTS  # noqa: E402
from tests.moe_models import LARGEST_ERROR, MOST_FLIPPED, examine, generate_twice, report  # noqa: E402

PINNED = transformers.__version__.startswith("5.23.")


@pytest.fixture(autouse=True)
def _quiet() -> Iterator[None]:
    with moe_configs.seeded_on_one_thread():
        yield


def check(rows: list[Any], variant: str | None = None) -> None:
    """Each router class is swapped and equal, or left for the reason that is known."""
    for row in rows:
        if row.left:
            known = LEFT | LEFT_IF_VARIED if variant else LEFT
            assert re.search(known.get(row.router, "no reason is known"), row.left), (
                f"{row.router} was left: {row.left}"
            )
            continue
        assert variant or row.router not in LEFT, "it is swapped by now: take it from the list"
        assert row.picks > 0
        assert row.flipped == 0
        assert row.error < 2e-6
        assert row.difference < 1e-4
        steps = {step for step, _ in row.effects}
        assert steps >= ({"bias", "logit_bias"} & set(row.tensors)), "no effect was measured"
        assert ("groups" in steps) == (row.method.num_groups > 1)
        for step, share in row.effects:
            assert share >= 0.1, f"{step} changes only {share:.0%} of the picks, which shows little"


@pytest.mark.slow("seconds", every=13)
@pytest.mark.parametrize("family", moe_configs.families())
def test_family(family: str) -> None:
    rows = examine(family)
    check(rows)
    if not rows:  # it mentions experts because another model brings them
        assert not moe_configs.has_experts(family)
    if PINNED:
        written = [line for line in document() if line.startswith(f"| `{family}` |")]
        assert written == moe_models.lines(rows), "write it anew: python -m tests.moe_models --write"


@pytest.mark.slow("seconds")
@pytest.mark.parametrize("variant", VARIANTS)
def test_variant(variant: str) -> None:
    families = [family for family in moe_configs.families() if moe_configs.varies(family, variant)]
    assert families
    for family in families:
        check(examine(family, variant=variant), variant)


def document() -> list[str]:
    text = moe_models.DOCUMENT.read_text()
    start, end = (text.index(marker) for marker in moe_models.MARKERS)
    return text[start:end].splitlines()


@pytest.mark.skipif(not PINNED, reason="the table in the document is about transformers 5.23")
def test_document() -> None:
    lines = [line for line in document() if line.startswith("| `")]
    assert {line.split("`")[1] for line in lines} <= set(moe_configs.families())
    swapped = {line.split("`")[3] for line in lines if line.endswith("| equal |")}
    assert len(swapped) >= 60
    assert moe_models.summary(len(swapped), len(lines)) in document()


@pytest.fixture(params=["verified before", "seen by the walk"])
def noticed(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Callable[[str], None]:
    """Asserts that something is wrong with a family, which is noticed before routers are swapped, or else here."""
    if request.param == "seen by the walk":
        monkeypatch.setattr(_replace, "verify", lambda module, kind, spec: spec)

    def assert_noticed(family: str) -> None:
        rows = examine(family)
        assert any("for random tokens" in row.left for row in rows) == (request.param == "verified before")
        with pytest.raises(AssertionError):
            check(rows)

    return assert_noticed


@pytest.mark.slow("seconds", every=3)
@pytest.mark.parametrize(
    ("family", "wrong"),
    [
        ("deepseek_v3", {"scale": 1.75 * (1 + 2**-14)}),
        ("deepseek_v3", {"num_groups": 1, "top_groups": 1}),
        ("deepseek_v3", {"group_score": "max"}),
        ("mistral4", {"num_groups": 1, "top_groups": 1}),
        ("deepseek_v4", {"score": "sigmoid"}),
        ("mixtral", {"renormalize": False}),
        ("laguna", {"score": "softmax"}),
        ("muse_spark", {"logit_scale": 1.0}),
        ("kolibri1", {"bias_on": "score", "score_after_topk": False}),
    ],
)
def test_a_wrong_method_is_noticed(
    family: str, wrong: dict[str, Any], noticed: Callable[[str], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    right = RoutingMethod.from_config
    monkeypatch.setattr(RoutingMethod, "from_config", lambda config: replace(right(config), **wrong))
    noticed(family)


@pytest.mark.slow("seconds", every=4)
@pytest.mark.parametrize(
    ("family", "role"), [("glm4_moe", "bias"), ("afmoe", "bias"), ("gemma4", "expert_scale"), ("gpt_oss", "logit_bias")]
)
def test_a_tensor_that_is_ignored_is_noticed(
    family: str, role: str, noticed: Callable[[str], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    right = _swapped.run

    def without(op: Any, options: Any, inputs: Any, *more: Any) -> Any:
        kept = [None if name == role else array for name, array in zip(op.names, inputs, strict=True)]
        return right(op, options, tuple(kept), *more)

    monkeypatch.setattr(_swapped, "run", without)
    noticed(family)


@pytest.mark.slow("seconds", every=3)
@pytest.mark.parametrize("family", ["gpt_oss", "deepseek_v3", "dbrx", "inkling2", "jetmoe", "llama4"])
def test_bfloat16(family: str) -> None:
    """Models that round logits to bfloat16 flip some picks; of the others not a bit changes.

    Their weights may differ in the last bit of float32. Whether rounding shows it depends on the random values, which
    other versions of transformers fill in in another order.
    """
    for row in examine(family, dtype=torch.bfloat16):
        assert not row.left
        assert row.flipped <= MOST_FLIPPED * row.picks
        assert row.error <= LARGEST_ERROR
        assert row.difference == 0 or not PINNED or family not in ("deepseek_v3", "inkling2")
    assert json.loads(json.dumps(report(examine(family))))


@pytest.mark.slow("seconds", every=3)
@pytest.mark.parametrize("name", ["MixtralForCausalLM", "DeepseekV3ForCausalLM", "DeepseekV4ForCausalLM"])
def test_generate(name: str) -> None:
    before, after = generate_twice(getattr(transformers, name), "cpu")
    assert len(before) == 32
    assert len(set(before)) > 4, "a text that repeats itself shows little"
    assert after == before
