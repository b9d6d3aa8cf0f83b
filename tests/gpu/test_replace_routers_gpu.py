# SPDX-License-Identifier: Apache-2.0
"""replace_routers on CUDA: families of models in bfloat16, and a text generated in float32.

If CUPY_ROUTER_REPORT_MODELS names a file, the figures are appended to it, a line of JSON for each test.
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

from tests import moe_configs, moe_gradients, moe_models  # noqa: E402
from tests.moe_models import LARGEST_ERROR, MOST_FLIPPED  # noqa: E402

# Every step and every way to return results is among them. The rest takes no other path on a GPU.
FAMILIES = (
    "afmoe cohere2_moe dbrx deepseek_v2 deepseek_v3 deepseek_v4 ernie4_5_moe gemma4 glm4_moe gpt_oss granitemoe "
    "hunyuan_v1_moe inkling jamba jetmoe laguna lfm2_moe llama4 longcat_flash minimax_m2 mistral4 mixtral olmoe "
    "qwen2_moe qwen3_moe"
).split()
GRADIENTS = ["deepseek_v3", "deepseek_v4", "gpt_oss", "mixtral", "qwen3_moe"]


@pytest.fixture(autouse=True)
def _seeded_on_cuda() -> Iterator[None]:
    if not torch.cuda.is_available():
        pytest.skip("PyTorch has no CUDA device")
    with moe_configs.seeded_on_one_thread():
        yield


def record(**figures: Any) -> None:
    """Append figures to the report, if one is asked for."""
    if "CUPY_ROUTER_REPORT_MODELS" in os.environ:
        where = {"device": torch.cuda.get_device_name(), "torch": torch.__version__}
        with Path(os.environ["CUPY_ROUTER_REPORT_MODELS"]).open("a") as report:
            report.write(json.dumps({**where, "transformers": transformers.__version__, **figures}) + "\n")


@pytest.mark.parametrize("family", FAMILIES)
def test_bfloat16(family: str) -> None:
    if family not in moe_configs.families():
        pytest.skip(f"transformers {transformers.__version__} has no {family}")
    rows = moe_models.examine(family, "cuda", torch.bfloat16)
    assert rows
    record(bfloat16=moe_models.report(rows))
    for row in rows:
        assert not row.left
        assert row.flipped <= MOST_FLIPPED * row.picks
        assert row.error <= LARGEST_ERROR
        assert row.difference < 10  # NaN included


@pytest.mark.parametrize("family", GRADIENTS)
def test_gradients(family: str) -> None:
    """In float32 those of the model's own code."""
    if family not in moe_configs.families():
        pytest.skip(f"transformers {transformers.__version__} has no {family}")
    exact, ours = moe_gradients.gradients_twice(family, "cuda")
    moe_gradients.assert_same_gradients(ours, exact, 2e-4)  # CUDA adds up experts in no particular order


@pytest.mark.parametrize("family", GRADIENTS)
def test_gradients_in_bfloat16(family: str) -> None:
    if family not in moe_configs.families():
        pytest.skip(f"transformers {transformers.__version__} has no {family}")
    check_router_errors(family, "cuda")


def check_router_errors(family: str, device: str) -> None:
    """Gradients of routers in bfloat16 are those of float32, rounded at most twice: by the weights and at the end.

    Those of whole models show nothing about it. They depend on which near-equal logits were rounded to change places.
    """
    found = list(moe_gradients.router_errors(family, device, torch.bfloat16))
    assert found
    for router in found:
        print(router)
        assert router.tokens > 0.9
        assert max(router.ours) <= 2 * 2**-9


def test_most_families_are_in_this_version() -> None:
    assert len(set(FAMILIES) & set(moe_configs.families())) >= 15


@pytest.mark.parametrize("name", ["MixtralForCausalLM", "DeepseekV3ForCausalLM"])
def test_generate(name: str) -> None:
    before, after = moe_models.generate_twice(getattr(transformers, name), "cuda")
    record(generate=name, tokens=len(before), equal=sum(a == b for a, b in zip(before, after, strict=True)))
    assert len(before) == 32
    assert after == before
