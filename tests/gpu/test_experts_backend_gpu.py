# SPDX-License-Identifier: Apache-2.0
"""The experts implementation "cupy_router" on CUDA, against those of transformers."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest

torch = pytest.importorskip("torch", reason="PyTorch is not installed")
transformers = pytest.importorskip("transformers", reason="transformers is not installed")

from cupy_router.torch import _experts, replace_routers  # noqa: E402
from tests import moe_configs, moe_experts  # noqa: E402
from tests.moe_experts import FORMS, assert_close, experts, inputs, run  # noqa: E402

NUM_TOKENS = [1, 2, 16, 300]
MANY = 16  # with fewer, the largest gradient may be a dot product that cancels, small beside the rounding of 16 bits
# Of the largest value. A sum of `hidden` products in float32 may be off by as many roundings.
TOLERANCE = {torch.bfloat16: 0.02, torch.float16: 3e-3, torch.float32: moe_experts.HIDDEN * 2**-24}


@pytest.fixture(autouse=True)
def _seeded_on_cuda() -> Iterator[None]:
    if not torch.cuda.is_available():
        pytest.skip("PyTorch has no CUDA device")
    _experts.register()
    with moe_configs.seeded_on_one_thread():
        yield


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("num_tokens", NUM_TOKENS)
@pytest.mark.parametrize("form", FORMS)
def test_forms(form: str, num_tokens: int, dtype: Any) -> None:
    module, given = experts(form, "cuda", dtype), inputs(num_tokens, "cuda", dtype)
    want = run(module, "grouped_mm", given)
    if dtype == torch.float32 or num_tokens >= MANY:
        assert_close(run(module, "cupy_router", given), want, TOLERANCE[dtype])
    with torch.inference_mode():
        assert_close({"": module(*given)}, {"": want["output"]}, TOLERANCE[dtype])


@pytest.mark.parametrize("num_tokens", NUM_TOKENS)
@pytest.mark.parametrize("form", FORMS)
def test_experts_that_are_elsewhere(form: str, num_tokens: int, monkeypatch: pytest.MonkeyPatch) -> None:
    dtype = torch.bfloat16 if num_tokens >= MANY else torch.float32
    module, given = experts(form, "cuda", dtype), inputs(num_tokens, "cuda", dtype, elsewhere=True)
    if hasattr(module, "_is_expert_parallel"):
        module._is_expert_parallel = True
    want = run(module, "grouped_mm", given)
    monkeypatch.setattr(_experts, "_grouped_mm", moe_experts.grouped_mm_with_garbage)
    assert_close(run(module, "cupy_router", given), want, TOLERANCE[dtype])
    with torch.inference_mode():
        assert_close({"": module(*given)}, {"": want["output"]}, TOLERANCE[dtype])


def test_the_same_bits_every_time() -> None:
    module, given = experts("gated", "cuda", torch.bfloat16), inputs(300, "cuda", torch.bfloat16)
    first = run(module, "cupy_router", given)
    for _ in range(10):
        assert_close(run(module, "cupy_router", given), first, 0.0)


@pytest.mark.parametrize("num_tokens", NUM_TOKENS)
def test_the_host_never_waits_and_a_graph_can_be_captured(num_tokens: int) -> None:
    module, given = experts("gated", "cuda", torch.bfloat16), inputs(num_tokens, "cuda", torch.bfloat16)
    module.config._experts_implementation = "cupy_router"
    with torch.inference_mode():
        module(*given)
        torch.cuda.set_sync_debug_mode("error")
        try:
            module(*given)
        finally:
            torch.cuda.set_sync_debug_mode("default")
        graph, stream = torch.cuda.CUDAGraph(), torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            module(*given)
        torch.cuda.current_stream().wait_stream(stream)
        with torch.cuda.graph(graph):
            found = module(*given)
        others = inputs(num_tokens + 1, "cuda", torch.bfloat16)
        for array, other in zip(given, others, strict=True):
            array.copy_(other[:num_tokens])
        graph.replay()
        assert_close({"": found}, {"": module(*given)}, TOLERANCE[torch.bfloat16] if num_tokens == 1 else 0.0)


@pytest.mark.parametrize("mode", ["default", "reduce-overhead"])
def test_compiled(mode: str) -> None:
    module = experts("gated", "cuda", torch.bfloat16)
    compiled = torch.compile(module, fullgraph=True, mode=mode)
    module.config._experts_implementation = "cupy_router"
    for num_tokens in (1, 16, 16, 16, 300):
        given = inputs(num_tokens, "cuda", torch.bfloat16)
        with torch.inference_mode():
            found = compiled(*given).clone()
            assert_close({"": found}, {"": module(*given)}, TOLERANCE[torch.bfloat16])
    if mode == "default":
        assert_close(
            run(module, "cupy_router", given, compiled), run(module, "grouped_mm", given), TOLERANCE[torch.bfloat16]
        )


@pytest.mark.parametrize("num_tokens", [1, moe_experts.EXPERTS // moe_experts.TOP_K])
@pytest.mark.parametrize("form", FORMS)
def test_compiled_with_few_pairs(form: str, num_tokens: int) -> None:
    """The kernels of Inductor read the weights of each pair; nothing is multiplied by a grouped GEMM."""
    module, given = experts(form, "cuda", torch.bfloat16), inputs(num_tokens, "cuda", torch.bfloat16)
    want = run(module, "grouped_mm", given)["output"]
    module.config._experts_implementation = "cupy_router"
    torch.compiler.reset()
    compiled = torch.compile(module, fullgraph=True, dynamic=False)
    with torch.inference_mode():
        compiled(*given)
        with torch.profiler.profile() as profiler:
            assert_close({"": compiled(*given)}, {"": want}, TOLERANCE[torch.bfloat16])
    assert not [event.name for event in profiler.events() if "grouped" in event.name or "gemm" in event.name.lower()]


@pytest.mark.parametrize("name", ["Mixtral", "GptOss", "Qwen3Moe", "DeepseekV3"])
def test_generate(name: str) -> None:
    torch.manual_seed(0)
    model = moe_configs.build(getattr(transformers, f"{name}ForCausalLM"))
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim > 1:
                parameter.normal_(std=parameter.shape[-1] ** -0.5)
    model.cuda()
    tokens = torch.arange(6, 13, device="cuda")[None]
    own = model.generate(tokens, max_new_tokens=16, do_sample=False)
    replace_routers(model, experts=True)
    assert torch.equal(model.generate(tokens, max_new_tokens=16, do_sample=False), own)
    assert model.config._experts_implementation == "cupy_router"
