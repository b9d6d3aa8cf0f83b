# SPDX-License-Identifier: Apache-2.0
"""Training through swapped routers: gradients of whole models are those of the models' own code."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests import frameworks

torch = pytest.importorskip("torch", reason="PyTorch is not installed")
transformers = frameworks.transformers_with_models()

from cupy_router.torch import _gate_gemm, replace_routers, restore_routers  # noqa: E402
from cupy_router.torch._swapped import Swapped  # noqa: E402
from tests import moe_configs, moe_gradients  # noqa: E402
from tests.gpu.test_replace_routers_gpu import FAMILIES, GRADIENTS, check_router_errors  # noqa: E402
from tests.test_swapped_routers import mixtral  # noqa: E402


@pytest.fixture(autouse=True)
def _quiet() -> Iterator[None]:
    with moe_configs.seeded_on_one_thread():
        yield


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    return moe_configs.counted_calls(monkeypatch)


@pytest.mark.slow("seconds", every=12)
@pytest.mark.parametrize("family", FAMILIES)
def test_gradients_of_a_family(family: str, calls: list[str]) -> None:
    """Every step of a method, every tensor that a router may have, and every way to return results."""
    if family not in moe_configs.families():
        pytest.skip(f"transformers {transformers.__version__} has no {family}")
    theirs, ours = moe_gradients.gradients_twice(family)
    assert calls
    moe_gradients.assert_same_gradients(ours, theirs, 1e-5)


@pytest.mark.slow("seconds", every=2)
@pytest.mark.parametrize("family", GRADIENTS)
def test_gradients_in_bfloat16(family: str) -> None:
    check_router_errors(family, "cpu")


def test_a_loss_on_the_logits_as_well(calls: list[str]) -> None:
    """The model's own loss that balances the load is made of the logits that routers return."""
    model, untouched = mixtral().train(), mixtral().train()
    replace_routers(model)
    ids = torch.arange(6, 36)[None]
    for each in (model, untouched):
        each(ids, labels=ids, output_router_logits=True).loss.backward()
    assert calls == ["dense_router"] * 2
    found, wanted = ({name: p.grad for name, p in each.named_parameters()} for each in (model, untouched))
    moe_gradients.assert_same_gradients(found, wanted, 1e-5)
    assert bool((model.model.layers[0].mlp.gate.weight.grad != 0).any())


def test_a_gradient_for_the_hidden_states_alone(calls: list[str]) -> None:
    block = mixtral().requires_grad_(False).model.layers[0].mlp
    block.config = mixtral().config
    x = torch.randn(1, 5, 64, requires_grad=True)
    (want,) = torch.autograd.grad(block(x).square().sum(), x)
    replace_routers(block)
    (got,) = torch.autograd.grad(block(x).square().sum(), x)
    assert calls == ["dense_router"]
    torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("reentrant", [False, True])
def test_checkpoints(reentrant: bool, calls: list[str]) -> None:
    """Both passes go through our routers, so that what is repeated is what was there."""
    block, x = mixtral().model.layers[0].mlp, torch.randn(1, 30, 64, requires_grad=True)
    block.config = mixtral().config
    replace_routers(block)
    wanted = torch.autograd.grad(block(x).square().sum(), (x, block.gate.weight))
    output = torch.utils.checkpoint.checkpoint(block, x, use_reentrant=reentrant)
    output.square().sum().backward()
    assert calls == ["dense_router"] * 3
    for got, want in zip((x.grad, block.gate.weight.grad), wanted, strict=True):
        torch.testing.assert_close(got, want)


@pytest.mark.slow("seconds")
def test_a_compiled_router() -> None:
    model = mixtral()
    gate = model.model.layers[0].mlp.gate
    x = torch.randn(9, 64, requires_grad=True)
    wanted = torch.autograd.grad(gate(x)[1].square().sum(), (x, gate.weight))
    replace_routers(model)
    compiled = torch.compile(gate, backend="aot_eager", fullgraph=True)
    for got, want in zip(torch.autograd.grad(compiled(x)[1].square().sum(), (x, gate.weight)), wanted, strict=True):
        torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-6)


def test_steps_of_an_optimizer() -> None:
    losses = []
    for swap in (False, True):
        model = mixtral().train()
        if swap:
            assert replace_routers(model) == 2
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
        ids = torch.arange(6, 36)[None]
        losses.append([])
        for _ in range(8):
            optimizer.zero_grad()
            loss = model(ids, labels=ids).loss
            loss.backward()
            optimizer.step()
            losses[-1].append(float(loss.detach()))
    assert losses[0][-1] < 0.8 * losses[0][0]
    torch.testing.assert_close(torch.tensor(losses[1]), torch.tensor(losses[0]), rtol=1e-4, atol=1e-5)


def test_a_second_derivative_is_refused() -> None:
    model = mixtral()
    replace_routers(model)
    gate, x = model.model.layers[0].mlp.gate, torch.randn(9, 64, requires_grad=True)
    (first,) = torch.autograd.grad(gate(x)[1].square().sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match="first derivatives only"):
        first.sum().backward()
    restore_routers(model)
    assert not any(isinstance(module, Swapped) for module in model.modules())
    (first,) = torch.autograd.grad(gate(x)[1].square().sum(), x, create_graph=True)
    first.sum().backward()


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_gradients_of_the_gate_gemm(dtype: str) -> None:
    """What `gate_gemm` does on CUDA with 16-bit floats, by the products of its way back."""
    x, weight = (torch.randn(shape).to(getattr(torch, dtype)).requires_grad_() for shape in ((7, 12), (5, 12)))
    grad = torch.randn(7, 5)
    want = torch.autograd.grad(torch.nn.functional.linear(x.float(), weight.float()), (x, weight), grad)
    with torch.autocast("cpu", torch.bfloat16):
        got = _gate_gemm.gate_gemm_gradients(x.detach(), weight.detach(), grad, (True, True))
    for ours, theirs in zip(got, want, strict=True):
        torch.testing.assert_close(ours, theirs)
    assert _gate_gemm.gate_gemm_gradients(x, weight, grad, (False, False)) == (None, None)


def test_bfloat16_parts_add_up_to_a_gradient() -> None:
    """So the products of the parts, each exact in float32, add up to the product of the gradient."""
    grad = torch.randn(64, 24) * 2.0 ** torch.randint(-60, 60, (64, 24))
    grad[0, :4] = torch.tensor([torch.inf, -torch.inf, torch.nan, 0.0])
    parts = _gate_gemm.in_bfloat16_parts(grad)
    assert (parts.dtype, parts.shape) == (torch.bfloat16, (64, 72))
    total = parts.double().reshape(64, 3, 24).sum(1)
    torch.testing.assert_close(total, grad.double(), rtol=2.0**-24, atol=0, equal_nan=True)
    weight = torch.randn(24, 16).bfloat16()
    got = parts[1:].double() @ weight.repeat(3, 1).double()
    torch.testing.assert_close(got, grad[1:].double() @ weight.double(), rtol=1e-6, atol=1e-6 * float(got.abs().max()))
