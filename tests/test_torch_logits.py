# SPDX-License-Identifier: Apache-2.0
"""The logits that routers return in PyTorch: eager, compiled, mapped, exported, and their gradients."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from cupy_router import LayoutSpec, Router, RoutingMethod, RoutingPlanWithLogits, RoutingWithLogits
from tests import compare, inputs
from tests.logit_calls import KINDS, LAYER, Call

torch = pytest.importorskip("torch", reason="PyTorch is not installed")
import cupy_router.torch  # noqa: E402, F401  # a test may begin with a traced call

EVERY = pytest.mark.parametrize("kind", [kind for kind in KINDS if not kind.startswith("dense_router ")])
WITH_LOGITS = {"return_logits": True}
METHOD = RoutingMethod(16, 4, renormalize_eps=1e-20, scale=1.5)


def on_torch(call: Call) -> dict[str, Any]:
    return {name: torch.from_numpy(array) for name, array in call.arrays().items()}


def same(got: Any, want: Any) -> None:
    assert type(got) is RoutingWithLogits
    for a, b in zip(got, want, strict=True):
        compare.assert_same_bits(a.detach().numpy(), np.asarray(b))


def held(x_names: tuple[str, ...], call: Call) -> tuple[Any, dict[str, Any]]:
    """Return a Router of NumPy arrays, and what its calls get."""
    arrays = call.arrays()
    layer = {name: array for name, array in arrays.items() if name not in x_names}
    return Router(call.method, **layer), {n: torch.from_numpy(a) for n, a in arrays.items() if n in x_names}


@EVERY
def test_eager_results_are_those_of_the_host(kind: str) -> None:
    call = Call(kind, given=LAYER)
    for num_valid in (None, 4):
        want = call(call.arrays(), **WITH_LOGITS, num_valid=num_valid)
        got = call(on_torch(call), **WITH_LOGITS, num_valid=num_valid)
        assert all(isinstance(array, torch.Tensor) for array in got)
        same(got, want)


@pytest.mark.slow("seconds")
@pytest.mark.parametrize("of", ["tensors", "arrays"])
@pytest.mark.parametrize("kind", ["Router", "hash Router"])
def test_compiled_routers(kind: str, of: str) -> None:
    """A Router of tensors becomes the op itself, one of NumPy arrays an op that finds it by its key."""
    torch.compiler.reset()
    call, spec = Call(kind, "two shared experts", given=LAYER), LayoutSpec(want=("counts",))
    router, rows = held(("x", "token_ids"), call)
    if of == "tensors":
        layer = {name: torch.from_numpy(a) for name, a in router.arrays().items() if a is not None}
        router = Router(call.method, **layer)

    def route(rows: dict[str, Any], **more: Any) -> Any:
        return router(rows["x"], rows.get("token_ids"), return_logits=True, **more)

    compiled = torch.compile(route, backend="aot_eager", fullgraph=True, dynamic=True)
    for n in (9, 5):
        some = {name: array[:n] for name, array in rows.items()}
        same(compiled(some), route(some))
        same(compiled(some, num_valid=3), route(some, num_valid=3))
        plan, right = compiled(some, layout=spec), route(some, layout=spec)
        assert type(plan) is type(right) is RoutingPlanWithLogits
        same(RoutingWithLogits(*plan[:3]), right[:3])
        assert (plan.layout.counts == right.layout.counts).all()


@pytest.mark.slow("seconds", every=4)
@pytest.mark.parametrize("of", ["tensors", "arrays"])
@pytest.mark.parametrize("kind", ["Router", "hash Router"])
def test_compiled_routers_fill_out(kind: str, of: str) -> None:
    torch.compiler.reset()
    call = Call(kind, given=LAYER)
    router, rows = held(("x", "token_ids"), call)
    if of == "tensors":
        layer = {name: torch.from_numpy(a) for name, a in router.arrays().items() if a is not None}
        router = Router(call.method, **layer)
    want = router(rows["x"], rows.get("token_ids"), return_logits=True)

    def into(rows: dict[str, Any], outs: list[Any]) -> Any:
        out = router(rows["x"], rows.get("token_ids"), return_logits=True, out=RoutingWithLogits(*outs))
        return out.logits * 2

    outs = [torch.zeros_like(array) for array in want]
    got = torch.compile(into, backend="aot_eager", fullgraph=True)(rows, outs)
    same(RoutingWithLogits(*outs), want)
    assert (got == want.logits * 2).all()


def loss(routing: Any) -> Any:
    """Return a loss whose gradient is not 0 where logits are."""
    weights, logits = (torch.linspace(-1, 1, a.numel()).reshape(a.shape) for a in (routing.weights, routing.logits))
    return (routing.weights * weights).sum() + ((routing.logits + 1) ** 2 * logits).sum()


@pytest.mark.parametrize("compiled", [False, pytest.param(True, marks=pytest.mark.slow("seconds"))])
@pytest.mark.parametrize("num_valid", [None, 4, np.array([4], np.int32)], ids=["all rows", "number", "array"])
@EVERY
def test_gradients_of_weights_and_logits_add_up(kind: str, num_valid: Any, compiled: bool) -> None:
    """Against the gradients of one call for the weights and plain PyTorch for the logits."""
    torch.compiler.reset()
    call = Call(kind, given=LAYER)
    count = torch.from_numpy(num_valid) if isinstance(num_valid, np.ndarray) else num_valid

    def gradients(function: Any) -> dict[str, Any]:
        tensors = on_torch(call)
        smooth = [name for name, array in tensors.items() if array.is_floating_point()]
        for name in smooth:
            tensors[name].requires_grad_()
        function(tensors).backward()
        return {name: tensors[name].grad for name in smooth}

    def ours(tensors: dict[str, Any]) -> Any:
        return loss(call(tensors, **WITH_LOGITS, num_valid=count))

    def plain(tensors: dict[str, Any]) -> Any:
        routing = call(tensors, num_valid=count)
        logits = tensors["x"] @ tensors["weight"].T + tensors["logit_bias"]
        valid = call.n if num_valid is None else 4
        return loss(RoutingWithLogits(*routing, torch.cat([logits[:valid], torch.zeros_like(logits[valid:])])))

    found = gradients(torch.compile(ours, backend="aot_eager", fullgraph=True) if compiled else ours)
    for name, want in gradients(plain).items():
        torch.testing.assert_close(
            found[name], want, rtol=1e-5, atol=1e-4, msg=lambda text, name=name: f"{name}: {text}"
        )


@pytest.mark.slow("seconds", every=4)
@pytest.mark.parametrize("num_valid", [None, 4])
@pytest.mark.parametrize("kind", ["Router", "hash Router"])
def test_gradients_of_a_compiled_router_of_arrays(kind: str, num_valid: int | None) -> None:
    torch.compiler.reset()
    call = Call(kind, given=LAYER)
    router, rows = held(("x", "token_ids"), call)
    ids = rows.get("token_ids")

    def by_x(function: Any) -> Any:
        x = rows["x"].clone().requires_grad_()
        function(x).backward()
        return x.grad

    def route(x: Any) -> Any:
        return loss(router(x, ids, return_logits=True, num_valid=num_valid))

    tensors = Router(call.method, **{n: torch.from_numpy(a) for n, a in router.arrays().items() if a is not None})
    want = by_x(lambda x: loss(tensors(x, ids, return_logits=True, num_valid=num_valid)))
    got = by_x(torch.compile(route, backend="aot_eager", fullgraph=True))
    torch.testing.assert_close(got, want)
    assert got[: num_valid or 9].any(dim=1).all()
    assert num_valid is None or not got[num_valid:].any()


@EVERY
def test_vmap(kind: str) -> None:
    call = Call(kind, given=LAYER)
    tensors = on_torch(call)
    many = torch.stack([tensors["x"], tensors["x"].flip(0)])
    got = torch.func.vmap(lambda x: call({**tensors, "x": x}, **WITH_LOGITS, num_valid=7))(many)
    for place in range(2):
        want = call({**tensors, "x": many[place]}, **WITH_LOGITS, num_valid=7)
        same(RoutingWithLogits(*(array[place] for array in got)), want)


@pytest.mark.slow("seconds", every=4)
@EVERY
def test_exported_programs(kind: str) -> None:
    call = Call(kind, given=LAYER)

    class Layer(torch.nn.Module):  # type: ignore[misc]
        def forward(self, arrays: dict[str, Any]) -> Any:
            return tuple(call(arrays, return_logits=True))

    tensors = on_torch(call)
    program = torch.export.export(Layer(), (tensors,))
    same(RoutingWithLogits(*program.module()(tensors)), call(call.arrays(), **WITH_LOGITS))


def test_a_router_made_of_files_returns_logits_on_the_device_of_x(tmp_path: Any) -> None:
    safetensors = pytest.importorskip("safetensors.numpy", reason="safetensors is not installed")
    gate, x = inputs.normal((16, 8)), inputs.normal((5, 8), seed=1)
    safetensors.save_file({"layers.0.mlp.gate.weight": gate}, tmp_path / "model.safetensors")
    router = Router.from_safetensors(tmp_path / "model.safetensors", "layers.0", METHOD)
    got = router(torch.from_numpy(x), return_logits=True)
    same(got, Router(METHOD, weight=gate)(x, return_logits=True))
