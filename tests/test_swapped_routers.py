# SPDX-License-Identifier: Apache-2.0
"""What replace_routers promises besides equal results: parameters, gradients, copies, dtypes."""

from __future__ import annotations

import copy
import io
import pickle
import types
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests import frameworks

torch = pytest.importorskip("torch", reason="PyTorch is not installed")
transformers = frameworks.transformers_with_models()

from cupy_router.torch import replace_routers, restore_routers  # noqa: E402
from tests import moe_configs  # noqa: E402
from tests.moe_configs import NUM_EXPERTS  # noqa: E402


@pytest.fixture(autouse=True)
def _quiet() -> Iterator[None]:
    with moe_configs.seeded_on_one_thread():
        yield


def mixtral(seed: int = 1) -> Any:
    """A small model whose routers have something to choose."""
    torch.manual_seed(seed)
    model = moe_configs.build(transformers.MixtralForCausalLM)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim >= 2:
                parameter.normal_(std=parameter.shape[-1] ** -0.5)
    return model


def logits_of(model: Any, **given: Any) -> Any:
    with torch.no_grad():
        return model(torch.arange(6, 36)[None], **given).logits


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    return moe_configs.counted_calls(monkeypatch)


def test_parameters_stay_where_they_are() -> None:
    model = mixtral()
    before, names = dict(model.named_parameters()), [name for name, _ in model.named_modules()]
    keys, shown = list(model.state_dict()), repr(model)
    assert replace_routers(model) == 2
    assert all(parameter is before[name] for name, parameter in model.named_parameters())
    assert list(model.state_dict()) == keys
    assert [name for name, _ in model.named_modules()] == names
    assert isinstance(model.model.layers[0].mlp.gate, type(mixtral().model.layers[0].mlp.gate))
    assert "(gate): MixtralTopKRouter(cupy_router=RoutingMethod(num_experts=24, top_k=4, score='softmax'))" in repr(
        model
    )
    assert restore_routers(model) == 2
    assert repr(model) == shown
    assert not [name for module in model.modules() for name in vars(module) if "cupy" in name]


def test_swapping_and_restoring_twice() -> None:
    model = mixtral()
    assert restore_routers(model) == 0
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert [replace_routers(model), replace_routers(model)] == [2, 0]
    assert restore_routers(model.model.layers[0]) == 1
    assert [replace_routers(model), restore_routers(model), restore_routers(model)] == [1, 2, 0]


def test_changed_parameters_are_used(calls: list[str]) -> None:
    model, other = mixtral(), mixtral(seed=2)
    replace_routers(model)
    model.load_state_dict(other.state_dict())
    torch.testing.assert_close(logits_of(model), logits_of(other), rtol=1e-4, atol=1e-5)
    assert calls == ["dense_router"] * 2


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_our_ops_run_without_gradients(mode: Any, calls: list[str]) -> None:
    model = mixtral()
    replace_routers(model)
    with mode():
        model(torch.tensor([[1, 2]]))
    assert calls == ["dense_router"] * 2


def test_frozen_models_need_no_gradient(calls: list[str]) -> None:
    model = mixtral().requires_grad_(False)
    replace_routers(model)
    model(torch.tensor([[1, 2]]))
    assert calls == ["dense_router"] * 2


@pytest.mark.parametrize("way", ["deepcopy", "pickle", "torch.save"])
def test_copies_are_swapped_independently(way: str, calls: list[str]) -> None:
    model = mixtral()
    replace_routers(model)
    if way == "deepcopy":
        other = copy.deepcopy(model)
    elif way == "pickle":
        other = pickle.loads(pickle.dumps(model))
    else:
        file = io.BytesIO()
        torch.save(model, file)
        file.seek(0)
        other = torch.load(file, weights_only=False)
    assert torch.equal(logits_of(other), logits_of(model))
    assert len(calls) == 4
    with torch.no_grad():
        other.model.layers[0].mlp.gate.weight.zero_()
    assert bool((model.model.layers[0].mlp.gate.weight != 0).any())
    assert restore_routers(other) == 2
    assert replace_routers(model) == 0


def test_checkpoints_are_unchanged(tmp_path: Path) -> None:
    model = mixtral()
    replace_routers(model)
    model.save_pretrained(tmp_path)
    other = transformers.MixtralForCausalLM.from_pretrained(tmp_path)
    assert restore_routers(other) == 0
    restore_routers(model)
    assert torch.equal(logits_of(other), logits_of(model))


def test_router_logits_are_recorded() -> None:
    model = mixtral()
    ids = torch.arange(6, 36)[None]
    with torch.no_grad():
        before = model(ids, output_router_logits=True)
        replace_routers(model)
        after = model(ids, output_router_logits=True)
    assert len(after.router_logits) == 2
    for ours, theirs in zip(after.router_logits, before.router_logits, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(after.aux_loss, before.aux_loss)


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_models_may_change_their_dtype(dtype: str, calls: list[str]) -> None:
    model = mixtral()
    replace_routers(model)
    model.to(getattr(torch, dtype))
    got = logits_of(model)
    assert got.dtype == getattr(torch, dtype)
    assert len(calls) == 2
    assert float((got.float() - logits_of(mixtral())).abs().mean()) < 0.1


def test_logits_are_not_rounded_to_16_bits_before_selection() -> None:
    """Logits that differ only beyond the precision of bfloat16 still decide."""
    model = mixtral().to(torch.bfloat16)
    gate = model.model.layers[0].mlp.gate
    with torch.no_grad():
        gate.weight.zero_()
        gate.weight[:, 0] = 1.0
        gate.weight[:, 1] = (torch.arange(NUM_EXPERTS) % 7) * 2.0**-12
    x = torch.zeros(1, 64, dtype=torch.bfloat16)
    x[0, :2] = 1.0
    replace_routers(model)
    with torch.no_grad():
        logits, weights, indices = gate(x)
    assert logits.unique().numel() == 1
    assert weights.dtype == torch.float32
    assert indices.tolist() == [[6, 13, 20, 5]]


def test_autocast_does_not_round_logits() -> None:
    model = mixtral()
    gate, x = model.model.layers[0].mlp.gate, torch.randn(40, 64)
    replace_routers(model)
    with torch.no_grad():
        expected = gate(x)
        with torch.autocast("cpu", torch.bfloat16):
            got = gate(x)
    assert torch.equal(got[2], expected[2])
    assert torch.equal(got[1], expected[1])


def test_noise_in_training_is_kept(calls: list[str]) -> None:
    model = moe_configs.build(transformers.DbrxForCausalLM)
    for block in model.transformer.blocks:
        block.ffn.router.moe_jitter_eps = 0.1
    replace_routers(model)
    with torch.no_grad():
        torch.manual_seed(3)
        noisy = model.train().transformer.blocks[0].ffn.router(torch.ones(2, 64))
        plain = model.eval().transformer.blocks[0].ffn.router(torch.ones(2, 64))
    assert not torch.equal(noisy, plain)


@pytest.mark.slow("seconds")
def test_torch_compile() -> None:
    model = mixtral()
    gate, x = model.model.layers[0].mlp.gate, torch.randn(9, 64)
    replace_routers(model)
    with torch.no_grad():
        expected = gate(x)
        got = torch.compile(gate, backend="aot_eager", fullgraph=True)(x)
    assert all(torch.equal(ours, theirs) for ours, theirs in zip(got, expected, strict=True))


def test_hooks_of_accelerate(calls: list[str]) -> None:
    """They put a function of their own on the instance, which calls the forward that was there before."""
    model = mixtral()
    gate = model.model.layers[0].mlp.gate
    expected = logits_of(model)
    gate._old_forward = gate.forward
    gate.forward = types.MethodType(lambda self, *args, **kwargs: self._old_forward(*args, **kwargs), gate)
    assert replace_routers(model) == 2
    torch.testing.assert_close(logits_of(model), expected, rtol=1e-4, atol=1e-5)
    assert len(calls) == 2
    assert restore_routers(model) == 2
    assert torch.equal(logits_of(model), expected)
    assert len(calls) == 2
