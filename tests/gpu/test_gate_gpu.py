# SPDX-License-Identifier: Apache-2.0
"""cupy_router.torch.Gate on a GPU: results, a training step, CUDA graphs, compiled, moved there and created there."""

from __future__ import annotations

import copy
import importlib
from typing import Any

import pytest

from cupy_router import Routing, RoutingMethod
from tests.gpu.support import on_gpu
from tests.gpu.test_graphs import capture

METHOD = RoutingMethod(32, 4, "sigmoid", scale=1.5)
FLOAT32 = ("e_score_correction_bias", "logit_bias", "per_expert_scale")


@pytest.fixture
def torch() -> Any:
    importlib.import_module("cupy_router.torch")
    return on_gpu("torch").torch


def gates(torch: Any) -> list[Any]:
    """A dense and a hash gate in CPU memory. Products of small integers are exact, and ties do not occur."""
    from cupy_router.torch import Gate

    torch.manual_seed(7)
    table = torch.rand(50, 32).argsort(dim=1)[:, :4]
    found = [
        Gate(64, METHOD, bias=True, logit_bias=True, expert_scale=True),
        Gate(64, METHOD, logit_bias=True, expert_scale=True, table=table),
    ]
    with torch.no_grad():
        for gate in found:
            gate.weight.copy_(torch.randint(-8, 9, gate.weight.shape) / 64)
            for name in FLOAT32:
                if getattr(gate, name) is not None:
                    getattr(gate, name).normal_()
    return found


def arguments(torch: Any, gate: Any, axes: tuple[int, ...] = (3, 50)) -> tuple[Any, ...]:
    x = torch.randint(-8, 9, (*axes, 64)) / 16
    return (x,) if gate.tid2eid is None else (x, torch.randint(50, axes))


def close(torch: Any, got: Routing, want: Routing) -> None:
    assert torch.equal(got.indices.cpu(), want.indices.cpu())
    torch.testing.assert_close(got.weights.cpu(), want.weights.cpu(), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("axes", [(), (5,), (3, 50), (0, 2)], ids=str)
def test_on_a_gpu(torch: Any, axes: tuple[int, ...]) -> None:
    for gate in gates(torch):
        given = arguments(torch, gate, axes)
        want, moved = gate(*given), copy.deepcopy(gate).cuda()
        on_device = [array.cuda() for array in given]
        got = moved(*on_device)
        assert got.weights.is_cuda
        assert got.weights.shape == (*axes, 4)
        close(torch, got, want)
        out = Routing(*map(torch.zeros_like, got))
        with torch.no_grad():
            assert moved(*on_device, out=out) is out
        close(torch, out, want)


def test_float32_arrays_move_exactly(torch: Any) -> None:
    for gate in gates(torch):
        moved = copy.deepcopy(gate).to("cuda", torch.bfloat16)
        assert moved.weight.dtype == torch.bfloat16
        assert {tensor.device.type for tensor in moved.state_dict().values()} == {"cuda"}
        for name in FLOAT32:
            if getattr(gate, name) is not None:
                assert getattr(moved, name).dtype == torch.float32
                assert torch.equal(getattr(moved, name).cpu(), getattr(gate, name))


def test_created_on_a_gpu_and_emptied_onto_it(torch: Any) -> None:
    from cupy_router.torch import Gate

    source, _ = gates(torch)
    options = {"bias": True, "logit_bias": True, "expert_scale": True}
    with torch.device("cuda"):
        inside = Gate(64, METHOD, **options)
    meta = Gate(64, METHOD, **options, device="meta").to_empty(device="cuda")
    (x,) = arguments(torch, source)
    for gate in (Gate(64, METHOD, **options, device="cuda"), inside, meta):
        assert {tensor.device.type for tensor in gate.state_dict().values()} == {"cuda"}
        gate.load_state_dict(source.state_dict())
        close(torch, gate(x.cuda()), source(x))


def test_a_training_step_is_that_of_the_cpu(torch: Any) -> None:
    for gate in gates(torch):
        given, twin = arguments(torch, gate), copy.deepcopy(gate).cuda()
        for module, arrays in ((gate, given), (twin, [array.cuda() for array in given])):
            module(*arrays).weights.square().sum().backward()
            torch.optim.SGD(module.parameters(), lr=0.01).step()
        for (name, got), want in zip(twin.named_parameters(), gate.parameters(), strict=True):
            torch.testing.assert_close(got.cpu(), want, rtol=1e-4, atol=1e-4, msg=name)


@pytest.mark.parametrize("mode", ["default", "reduce-overhead"])
def test_compiled_with_the_arrays_of_now(torch: Any, mode: str) -> None:
    for gate in gates(torch):
        torch.compiler.reset()
        gate = gate.cuda().requires_grad_(False)
        given = [array.cuda() for array in arguments(torch, gate)]
        compiled = torch.compile(gate, fullgraph=True, mode=mode)
        for _ in range(3):
            close(torch, Routing(*(array.clone() for array in compiled(*given))), gate(*given))
        changed = {name: tensor.roll(1, 0) for name, tensor in gate.state_dict().items()}
        gate.load_state_dict(changed, assign=True)
        for _ in range(3):
            close(torch, Routing(*(array.clone() for array in compiled(*given))), gate(*given))


def test_a_captured_call_is_replayed_with_loaded_values(torch: Any) -> None:
    gpu = on_gpu("torch")
    for gate in gates(torch):
        gate = gate.cuda().requires_grad_(False)
        given = [array.cuda() for array in arguments(torch, gate)]
        got, replay = capture(gpu, lambda gate=gate, given=given: gate(*given))
        gate.load_state_dict({name: tensor.roll(1, 0) for name, tensor in gate.state_dict().items()})
        replay()
        close(torch, got, gate(*given))
