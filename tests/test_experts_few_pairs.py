# SPDX-License-Identifier: Apache-2.0
"""Compiled experts with few pairs, which read the weights of each. This is for GPUs, but gives the same on a CPU."""

from __future__ import annotations

import math
import re
from collections.abc import Iterator
from functools import partial
from typing import Any

import pytest

from tests import frameworks

torch = pytest.importorskip("torch", reason="PyTorch is not installed")
transformers = frameworks.transformers_with_models()

from cupy_router.torch import _experts  # noqa: E402
from tests import moe_configs, moe_experts  # noqa: E402
from tests.moe_experts import FORMS, assert_close, experts, inputs, run  # noqa: E402

EXACT, ROUNDED = 2e-6, 2e-2  # of the largest value: sums in another order; bfloat16, rounded once or more often


@pytest.fixture(autouse=True)
def _as_on_a_gpu(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setattr(_experts, "_picks_on", lambda device: True)
    with moe_configs.seeded_on_one_thread():
        _experts.register()
        yield


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("form", FORMS)
def test_compiled_with_few_pairs(form: str, dtype: Any) -> None:
    """Up to a pair for each expert."""
    module = experts(form, dtype=dtype)
    module.config._experts_implementation = "cupy_router"
    few = moe_experts.EXPERTS // moe_experts.TOP_K
    for num_tokens, grouped in ((1, False), (2, False), (few, False), (few + 1, True)):
        given = inputs(num_tokens, dtype=dtype)
        targets: list[str] = []
        torch.compiler.reset()
        compiled = torch.compile(module, fullgraph=True, dynamic=False, backend=partial(_recorded, targets))
        with torch.no_grad():
            found = compiled(*given)
        assert any("grouped_mm" in target for target in targets) == grouped, targets
        want = run(module, "grouped_mm", given)["output"]
        module.config._experts_implementation = "cupy_router"
        assert_close({"": found}, {"": want}, EXACT if dtype == torch.float32 else ROUNDED)


@pytest.mark.slow("seconds")
@pytest.mark.parametrize("form", ["gated", "transposed", "biased"])
def test_inductor_writes_no_products_to_memory(form: str, monkeypatch: pytest.MonkeyPatch) -> None:
    from torch._inductor import ir
    from torch._inductor.utils import run_and_get_code

    monkeypatch.setattr(ir, "is_cpu", lambda node: False)  # choose buffers as for a GPU
    module, given = experts(form), inputs(moe_experts.EXPERTS // moe_experts.TOP_K)
    module.config._experts_implementation = "cupy_router"
    torch.compiler.reset()
    with torch.no_grad(), torch._inductor.config.patch(force_disable_caches=True):
        _, (code, *_) = run_and_get_code(torch.compile(module, fullgraph=True, dynamic=False), *given)
    shapes = re.findall(r"empty_strided_\w+\(\(([\d, ]+)\)", code)
    assert shapes
    sizes = [math.prod(int(size) for size in shape.split(",") if size.strip()) for shape in shapes]
    assert max(sizes) <= moe_experts.EXPERTS * max(moe_experts.HIDDEN, 2 * moe_experts.INTERMEDIATE), shapes


def test_sizes_that_are_not_known_are_not_few() -> None:
    """One graph serves few pairs and many."""
    module, targets = experts("gated"), list[str]()
    module.config._experts_implementation = "cupy_router"
    compiled = torch.compile(module, fullgraph=True, dynamic=True, backend=partial(_recorded, targets))
    with torch.no_grad():
        for num_tokens in (3, 40, 5):
            given = inputs(num_tokens)
            assert_close({"": compiled(*given)}, {"": module(*given)}, EXACT)
    assert len([target for target in targets if "grouped_mm" in target]) == 2


def _recorded(targets: list[str], graph: Any, examples: Any) -> Any:
    targets.extend(str(node.target) for node in graph.graph.nodes if node.op == "call_function")
    return graph


def test_parts_of_a_sum() -> None:
    lengths = {768: 3, 2048: 1, 2880: 3, 14336: 1, 1408: 1, 64: 1, 1: 1, 1021: 1}
    assert {length: _experts._num_parts(length) for length in lengths} == lengths
