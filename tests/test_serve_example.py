# SPDX-License-Identifier: Apache-2.0
"""The example that serves a model of transformers, with a tiny one on this machine."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from tests import frameworks

torch = pytest.importorskip("torch", reason="PyTorch is not installed")
frameworks.transformers_with_models()

from examples import serve_transformers, time_by_kind  # noqa: E402
from tests import moe_configs  # noqa: E402

SETTINGS = {
    "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "num_key_value_heads": 2, "head_dim": 16,
    "num_experts": 8, "num_experts_per_tok": 2, "moe_intermediate_size": 16, "vocab_size": 64,
}  # fmt: skip
HERE = str(Path(__file__).parent)
SHORT = ["--prompt", "8", "--tokens", "4", "--turns", "2", "--batch", "2"]


@pytest.fixture(autouse=True)
def _quiet() -> Iterator[None]:
    with moe_configs.seeded_on_one_thread():
        yield


def tiny() -> Any:
    return serve_transformers.load("qwen3_moe", [f"{name}={value}" for name, value in SETTINGS.items()])


@pytest.mark.slow("seconds")
def test_it_prints_speed_and_where_the_time_goes(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    tiny().save_pretrained(tmp_path)
    serve_transformers.main([str(tmp_path), *SHORT])
    printed = capsys.readouterr().out
    assert re.search(r"Qwen3MoeForCausalLM, .* billion parameters in torch.bfloat16 on .*: 2 routers swapped", printed)
    for line in (
        r"prompts, 2 x 8( +[\d,]+){2} +\d\.\d\d",
        r"generated( +[\d,]+){2} +\d\.\d\d",
        r"together( +\S+ / \S+){2}",
    ):
        assert re.search(f"^{line}$", printed, re.M), printed
    assert re.search(r"^the first \d of 8 tokens are the same$", printed, re.M)


@pytest.mark.slow("seconds")
def test_times_by_kind_are_parts_of_the_step() -> None:
    """Work of each kind takes time, also inside another kind, and nothing is counted twice."""
    model = tiny()
    experts = [
        path for path, module in model.named_modules() if time_by_kind.kind_of(path, module) == "experts: the rest"
    ]
    assert experts == [f"model.layers.{number}.mlp.experts" for number in range(2)]
    step = serve_transformers.decode_step(model, torch.randint(64, (1, 8)))
    times = time_by_kind.profile(model, step)
    assert set(times) == {"router", "experts: GEMMs", "experts: the rest", "attention", "the rest"}
    assert all(host > 0 for host, _ in times.values())
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["no_such_model"], "no_such_model is neither a folder nor a model type of transformers"),
        (["mixtral", "vocab_size"], "vocab_size is not a name and a value as in JSON"),
        (["mixtral", "hidden_act=silu"], "hidden_act=silu is not a name and a value as in JSON"),
        (["mixtral", "--batch", "0"], "--batch: must be at least 1, got 0"),
        (["mixtral", "--prompt", "0"], "--prompt: must be at least 1, got 0"),
        (["mixtral", "--tokens", "1"], "--tokens: must be at least 2, got 1"),
        (["mixtral", "--turns", "0"], "--turns: must be at least 1, got 0"),
        (["mixtral", "--turns", "x"], "--turns: invalid number value: 'x'"),
        ([HERE, "vocab_size=64"], f"vocab_size=64 is for a model with random weights, and {HERE} is a folder"),
    ],
)
def test_other_arguments(arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        serve_transformers.main(arguments)
    assert message in capsys.readouterr().err


def event(name: str, begin: float, end: float, number: int = 0, on_gpu: bool = False) -> Any:
    """An event as in a profile of PyTorch, with times in microseconds."""
    device = torch.autograd.DeviceType.CUDA if on_gpu else torch.autograd.DeviceType.CPU
    interval = SimpleNamespace(start=begin, end=end, elapsed_us=lambda: end - begin)
    annotation = on_gpu and name in ("attention", "the rest")
    return SimpleNamespace(name=name, id=number, device_type=device, time_range=interval, is_user_annotation=annotation)


def test_kernels_belong_to_the_innermost_kind_that_launched_them() -> None:
    """Whenever they run: a GPU is behind its host."""
    events = [
        event("the rest", 0, 10_000),
        event("attention", 1000, 3000),
        event("aten::bmm", 1000, 2000),  # GEMMs of attention are attention
        event("cudaLaunchKernel", 1500, 1600, 1),
        event("experts: the rest", 4000, 8000),
        event("aten::linear", 5000, 7000),
        event("aten::bmm", 5500, 6500),  # inside the one before
        event("cuLaunchKernelEx", 6000, 6100, 2),
        event("cudaLaunchKernel", 7500, 7600, 3),
        event("cudaLaunchKernel", 9000, 9100, 4),
        event("aten::linear", 9000, 9200, 5),  # ids of ops are others than those of launches
        *(event(f"kernel {number}", 20_000, 20_000 + 1000 * number, number, True) for number in (1, 2, 3, 4)),
        event("unknown launch", 20_000, 29_000, 5, True),
        event("attention", 20_000, 21_000, 1, True),  # a range on the GPU, not a kernel
    ]
    found = time_by_kind.by_kind(events)
    assert found.pop("router") == (0, 0)
    want = {"attention": (2, 1), "experts: GEMMs": (2, 2), "experts: the rest": (2, 3), "the rest": (4, 4)}
    assert {kind: tuple(map(round, times)) for kind, times in found.items()} == want


def test_kinds_are_found_by_name_and_class() -> None:
    kinds = {path: time_by_kind.kind_of(path, torch.nn.Identity()) for path in ("a.gate", "a.router", "a.experts")}
    assert kinds == {"a.gate": "router", "a.router": "router", "a.experts": "experts: the rest"}
    assert time_by_kind.kind_of("a.gate_proj", torch.nn.Identity()) is None
    assert time_by_kind.kind_of("a.self_attn", type("SomeAttention", (torch.nn.Module,), {})()) == "attention"
