# SPDX-License-Identifier: Apache-2.0
"""A Gate in what PyTorch does to modules: autograd, torch.func, checkpointing, compile, export, FSDP."""

from __future__ import annotations

import copy
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from cupy_router import Routing, RoutingMethod
from tests.gates import (
    EXPERTS,
    HIDDEN,
    METHOD,
    K,
    arguments,
    assert_same,
    dense_gate,
    expected,
    hash_gate,
    others,
    randomized,
    seeded,  # noqa: F401
)

torch = pytest.importorskip("torch", reason="PyTorch is not installed")
from cupy_router.torch import Gate  # noqa: E402

MAKERS = [dense_gate, hash_gate]


def plain_weights(arrays: Any, x: Any, indices: Any) -> Any:
    """The weights of METHOD at given experts, in plain PyTorch."""
    scores = torch.sigmoid(x @ arrays["weight"].T + arrays["logit_bias"]).gather(-1, indices.long())
    scores = scores / scores.sum(-1, keepdim=True) * METHOD.scale
    return scores * arrays["per_expert_scale"][indices.long()]


@pytest.mark.parametrize("make", MAKERS)
def test_a_training_step_is_that_of_plain_pytorch(make: Callable[[], Any]) -> None:
    gate = make()
    twin, given = copy.deepcopy(gate), arguments(gate)
    x, target = given[0], torch.randn(2, 3, K)
    losses = []
    for module in (gate, twin):
        optimizer = torch.optim.SGD(module.parameters(), lr=0.5)
        inputs = x.clone().requires_grad_()
        weights, indices = module(inputs, *given[1:])
        if module is twin:
            weights = plain_weights(dict(twin.named_parameters()), inputs, indices)
        loss = (weights - target).square().sum()
        loss.backward()
        optimizer.step()
        losses.append((loss.detach(), inputs.grad))
    torch.testing.assert_close(losses[0], losses[1])
    for (name, got), want in zip(gate.named_parameters(), twin.parameters(), strict=True):
        torch.testing.assert_close(got, want, msg=name)
        torch.testing.assert_close(got.grad, want.grad, msg=name)
    if gate.tid2eid is None:
        assert torch.equal(gate.e_score_correction_bias, twin.e_score_correction_bias)


@pytest.mark.parametrize("make", MAKERS)
def test_activation_checkpointing(make: Callable[[], Any]) -> None:
    gate = make()
    twin, given = copy.deepcopy(gate), arguments(gate)
    gate(*given).weights.square().sum().backward()
    weights = torch.utils.checkpoint.checkpoint(lambda *given: twin(*given).weights, *given, use_reentrant=False)
    weights.square().sum().backward()
    for got, want in zip(twin.parameters(), gate.parameters(), strict=True):
        assert torch.equal(got.grad, want.grad)


@pytest.mark.parametrize("make", MAKERS)
def test_torch_func(make: Callable[[], Any]) -> None:
    gates = [make() for _ in range(3)]
    given = arguments(gates[0])
    stacked = torch.func.stack_module_state(gates)
    ensemble = torch.func.vmap(lambda *arrays: torch.func.functional_call(gates[0], arrays, given).weights)
    for gate, weights in zip(gates, ensemble(*stacked), strict=True):
        torch.testing.assert_close(weights, gate(*given).weights)
    assert_same(torch.func.vmap(gates[0])(*given), gates[0](*given))

    def loss(parameters: Any) -> Any:
        return torch.func.functional_call(gates[0], parameters, given).weights.square().sum()

    found = torch.func.grad(loss)(dict(gates[0].named_parameters()))
    gates[0](*given).weights.square().sum().backward()
    for name, parameter in gates[0].named_parameters():
        torch.testing.assert_close(found[name], parameter.grad)


# -- Graphs ------------------------------------------------------------------------------------------------------------


@pytest.mark.slow("seconds")
@pytest.mark.parametrize("make", MAKERS)
def test_a_gate_compiles_into_one_graph_and_uses_the_arrays_that_it_has_now(make: Callable[[], Any]) -> None:
    torch.compiler.reset()
    gate = make()
    compiled = torch.compile(gate, backend="aot_eager", fullgraph=True)
    for axes in ((2, 3), (3, 3), (4, 5), (7, 6)):
        given = arguments(gate, axes)
        assert_same(compiled(*given), gate(*given))
    gate.load_state_dict(others(gate), assign=True)
    assert_same(compiled(*given), expected(gate.state_dict(), *given))
    gate.to(torch.bfloat16)
    assert_same(compiled(*given), expected(gate.state_dict(), *given))


@pytest.mark.slow("seconds")
@pytest.mark.parametrize("fullgraph", [False, True])
@pytest.mark.parametrize("make", MAKERS)
def test_out_in_compiled_code(make: Callable[[], Any], fullgraph: bool) -> None:
    torch.compiler.reset()
    gate = make().requires_grad_(False)
    compiled = torch.compile(lambda out, *given: gate(*given, out=out), backend="aot_eager", fullgraph=fullgraph)
    for axes in ((), (5,), (2, 3)):
        given = arguments(gate, axes)
        out = Routing(torch.zeros(*axes, K), torch.zeros(*axes, K, dtype=torch.int32))
        compiled(out, *given)
        assert_same(out, gate(*given))


def test_equal_gates_share_one_graph() -> None:
    """Also where each has a method of its own, as models make them."""
    from torch._dynamo.testing import CompileCounter

    if tuple(map(int, torch.__version__.split(".")[:2])) < (2, 5):
        pytest.skip("before 2.5 PyTorch compiles every module by itself")
    torch.compiler.reset()
    graphs, x = CompileCounter(), torch.randn(4, HIDDEN)
    for _ in range(12):
        layer = randomized(Gate(HIDDEN, RoutingMethod(EXPERTS, K, "sigmoid"), bias=True))
        layer.compile(backend=graphs, fullgraph=True)
        with torch.no_grad():
            assert_same(layer(x), layer.forward(x))
    assert graphs.frame_count == 1


@pytest.mark.slow("seconds", every=2)
@pytest.mark.parametrize("strict", [False, True])
@pytest.mark.parametrize("make", MAKERS)
def test_an_exported_gate_has_its_arrays_and_any_batch(make: Callable[[], Any], strict: bool) -> None:
    gate = make()
    given = arguments(gate)
    batch = torch.export.Dim("batch", min=2, max=1000)
    program = torch.export.export(gate, given, strict=strict, dynamic_shapes=tuple({0: batch} for _ in given))
    assert program.state_dict.keys() == gate.state_dict().keys()
    assert not program.constants
    parameters = set(program.graph_signature.inputs_to_parameters.values())
    assert parameters == {name for name, _ in gate.named_parameters()}
    given = arguments(gate, (7, 3))
    module = program.module()
    assert_same(module(*given), gate(*given))
    module.load_state_dict(others(gate))
    assert_same(module(*given), expected(dict(module.state_dict()), *given))


# -- FSDP --------------------------------------------------------------------------------------------------------------


def train_sharded(rank: int, ranks: int, store: str) -> None:
    """One of the processes of the test below."""
    from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict, set_model_state_dict
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard

    if sys.platform == "linux":
        os.environ["GLOO_SOCKET_IFNAME"] = "lo"  # the name of the machine may have no address
    torch.distributed.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=ranks)
    mesh = init_device_mesh("cpu", (ranks,))
    for make in MAKERS:
        torch.manual_seed(0)
        gate = make()
        plain = copy.deepcopy(gate)
        frozen = [name for name, _ in gate.named_buffers()]
        model = torch.nn.ModuleDict({"gate": fully_shard(gate, mesh=mesh)})
        torch.manual_seed(rank)
        given = arguments(plain, (5,))
        assert type(gate.weight).__name__ == "DTensor"
        before = gate(*given)
        assert_same(before, plain(*given))
        before.weights.square().sum().backward()
        plain(*given).weights.square().sum().backward()
        for sharded, whole in zip(gate.parameters(), plain.parameters(), strict=True):
            torch.distributed.all_reduce(whole.grad)
            torch.testing.assert_close(sharded.grad.full_tensor(), whole.grad / ranks)
        torch.optim.SGD(gate.parameters(), lr=0.5).step()
        whole = get_model_state_dict(model, options=StateDictOptions(full_state_dict=True, broadcast_from_rank0=False))
        whole = {name.removeprefix("gate."): tensor for name, tensor in whole.items()}
        assert whole.keys() == plain.state_dict().keys()
        assert all(torch.equal(whole[name], getattr(plain, name)) for name in frozen)
        assert_same(gate(*given), expected(whole, *given))
        gate.reshard()
        loaded = {f"gate.{name}": tensor for name, tensor in plain.state_dict().items()}
        set_model_state_dict(model, loaded, options=StateDictOptions(full_state_dict=True))
        assert_same(gate(*given), plain(*given))

    x = torch.randn(5, HIDDEN).bfloat16()
    for policy in (MixedPrecisionPolicy(param_dtype=torch.bfloat16), MixedPrecisionPolicy()):
        with torch.device("meta"):
            gate = Gate(HIDDEN, METHOD, bias=True, logit_bias=policy.param_dtype is not None)
        fully_shard(gate, mesh=mesh, mp_policy=policy)
        gate.to_empty(device="cpu").reset_parameters()
        if policy.param_dtype is None:  # then FSDP wants parameters of one dtype
            gate.to(torch.bfloat16)
        arrays = {"weight": gate.weight.full_tensor().bfloat16()}
        assert_same(gate(x), expected(arrays, x))
    torch.distributed.destroy_process_group()


@pytest.mark.slow("process")
@pytest.mark.parametrize("ranks", [1, 2])
def test_fully_shard(ranks: int, tmp_path: Path) -> None:
    pytest.importorskip("torch.distributed.fsdp", reason="PyTorch without distributed")
    if not hasattr(torch.distributed.fsdp, "fully_shard"):
        pytest.skip("this PyTorch has no fully_shard")
    torch.multiprocessing.spawn(train_sharded, (ranks, str(tmp_path / "store")), nprocs=ranks)


def test_a_call_on_the_cpu_leaves_storages_resizable() -> None:
    """FSDP frees and allocates them with every call."""
    gate = hash_gate()
    given = arguments(gate)
    gate(*given)
    for tensor in (*given, *gate.state_dict().values()):
        assert tensor.untyped_storage().resizable()
