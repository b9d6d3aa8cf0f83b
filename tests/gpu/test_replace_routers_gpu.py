# SPDX-License-Identifier: Apache-2.0
"""replace_routers on CUDA: families of models in bfloat16, and a text generated in float32.

If CUPY_ROUTER_REPORT_MODELS names a file, the figures are written to it as JSON.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

torch = pytest.importorskip("torch", reason="PyTorch is not installed")
transformers = pytest.importorskip("transformers", reason="transformers is not installed")

from tests import moe_configs, moe_models  # noqa: E402
from tests.moe_configs import NUM_EXPERTS  # noqa: E402
from tests.moe_models import LARGEST_ERROR, MOST_FLIPPED  # noqa: E402

# Every step and every way to return results is among them. The rest takes no other path on a GPU.
FAMILIES = (
    "afmoe cohere2_moe dbrx deepseek_v2 deepseek_v3 deepseek_v4 ernie4_5_moe gemma4 glm4_moe gpt_oss granitemoe "
    "hunyuan_v1_moe inkling jamba jetmoe laguna lfm2_moe llama4 longcat_flash minimax_m2 mistral4 mixtral olmoe "
    "qwen2_moe qwen3_moe"
).split()


@pytest.fixture(scope="module", autouse=True)
def figures() -> Iterator[dict[str, Any]]:
    """Collect the figures of these tests for the report."""
    if not torch.cuda.is_available():
        pytest.skip("PyTorch has no CUDA device")
    found: dict[str, Any] = {
        "device": torch.cuda.get_device_name(),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "bfloat16": [],
        "generate": {},
    }
    with moe_configs.seeded_on_one_thread():
        yield found
    if "CUPY_ROUTER_REPORT_MODELS" in os.environ:
        Path(os.environ["CUPY_ROUTER_REPORT_MODELS"]).write_text(json.dumps(found, indent=1) + "\n")


@pytest.mark.parametrize("family", FAMILIES)
def test_bfloat16(family: str, figures: dict[str, Any]) -> None:
    if family not in moe_configs.families():
        pytest.skip(f"transformers {transformers.__version__} has no {family}")
    rows = moe_models.examine(family, "cuda", torch.bfloat16)
    figures["bfloat16"] += moe_models.report(rows)
    for row in rows:
        assert not row.left
        assert row.flipped <= MOST_FLIPPED * row.picks
        assert row.error <= LARGEST_ERROR
        assert row.difference < 10  # NaN included


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("family", ["deepseek_v3", "deepseek_v4", "gpt_oss", "mixtral", "qwen3_moe"])
def test_gradients(family: str, dtype: str) -> None:
    """In float32 those of the model's own code. In bfloat16, where picks may differ, ours are those of float32 as
    nearly as the model's own are."""
    if family not in moe_configs.families():
        pytest.skip(f"transformers {transformers.__version__} has no {family}")
    exact, ours = moe_models.gradients_twice(family, "cuda")
    if dtype == "float32":
        moe_models.assert_same_gradients(ours, exact, 2e-4)  # CUDA adds up experts in no particular order
        return
    theirs, ours = moe_models.gradients_twice(family, "cuda", torch.bfloat16)

    def error(found: dict[str, Any], name: str) -> float:
        return float((found[name].float() - exact[name]).norm() / exact[name].norm())

    gates = [name for name, want in exact.items() if want is not None and want.ndim == 2 and len(want) == NUM_EXPERTS]
    assert gates
    for name in gates:
        print(f"{name}: theirs {error(theirs, name):.3f}, ours {error(ours, name):.3f}")
        assert error(ours, name) <= 1.5 * error(theirs, name) + 0.02


def test_enough_families_were_seen(figures: dict[str, Any]) -> None:
    families = {row["family"] for row in figures["bfloat16"] if not row["left"]}
    assert len(families) >= 15, "run the whole file"


@pytest.mark.parametrize("name", ["MixtralForCausalLM", "DeepseekV3ForCausalLM"])
def test_generate(name: str, figures: dict[str, Any]) -> None:
    before, after = moe_models.generate_twice(getattr(transformers, name), "cuda")
    figures["generate"][name] = {
        "tokens": len(before),
        "equal": sum(a == b for a, b in zip(before, after, strict=True)),
    }
    assert len(before) == 32
    assert after == before
