# SPDX-License-Identifier: Apache-2.0
"""Experts of every family of transformers on CUDA, in bfloat16."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

torch = pytest.importorskip("torch", reason="PyTorch is not installed")
pytest.importorskip("transformers", reason="transformers is not installed")

from tests import moe_configs, moe_families  # noqa: E402


@pytest.fixture(autouse=True)
def _seeded_on_cuda() -> Iterator[None]:
    if not torch.cuda.is_available():
        pytest.skip("PyTorch has no CUDA device")
    with moe_configs.seeded_on_one_thread():
        yield


@pytest.mark.parametrize("family", [name for name in moe_configs.families() if moe_families.registered(name)])
def test_experts_are_as_exact_as_those_of_transformers(family: str) -> None:
    """For the hidden states that they have in a model, all at once and one token alone."""
    for model in moe_families.models(family, torch.bfloat16, "cuda"):
        with torch.no_grad():
            for module, (args, kwargs) in moe_families.calls_of_experts(model):
                for given in (args, tuple(array[:1] for array in args)):
                    errors = moe_families.rounding_errors(module, given, kwargs)
                    assert errors.pop("cupy_router") <= 1.05 * max(errors.values())
