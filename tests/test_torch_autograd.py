# SPDX-License-Identifier: Apache-2.0
"""Gradients of weights by PyTorch's autograd, on CPU tensors: eager calls, and where there are none."""

from __future__ import annotations

import copy
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import cupy_router
from cupy_router import (
    Router,
    RoutingMethod,
    ScoreFunction,
    activation_topk,
    dense_router,
    expert_layout,
    hash_router,
    permute,
    topk_select,
    unpermute,
)
from cupy_router.ops._method import MethodOptions
from tests import inputs
from tests.gradient_cases import KINDS, SMALL
from tests.methods import METHODS
from tests.torch_gradients import Case, twin

torch = pytest.importorskip("torch", reason="PyTorch is not installed")

METHOD = RoutingMethod(16, 4, renormalize_eps=1e-20, scale=1.5)


def tensor(*shape: int, seed: int = 0) -> Any:
    return torch.from_numpy(inputs.normal(shape, seed=200 + seed))


def parameter(*shape: int, seed: int = 0) -> Any:
    return tensor(*shape, seed=seed).requires_grad_()


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", SMALL)
def test_gradients_are_those_of_plain_pytorch(name: str, kind: str) -> None:
    case = Case(kind, name)
    case.check(case.call())


@pytest.mark.parametrize("name", [name for name in METHODS if name not in SMALL])
def test_gradients_of_many_experts(name: str) -> None:
    case = Case("activation_topk", name)
    case.check(case.call())


def test_padding_has_no_gradient() -> None:
    for num_valid in (4, torch.tensor([4], dtype=torch.int32)):
        for kind in ("activation_topk", "dense_router", "Router", "hash Router"):
            case = Case(kind, "logit scale")
            routing = case.call(num_valid=num_valid)
            case.check(routing)
            (first,) = torch.autograd.grad(routing.weights.sum(), [case.smooth.get("x", case.smooth.get("logits"))])
            assert not first[4:].any()


def test_weights_are_the_same_with_a_gradient_and_without() -> None:
    for kind in KINDS:
        case = Case(kind, "everything")
        with torch.no_grad():
            want = case.call()
        got = case.call()
        assert not want.weights.requires_grad
        for a, b in zip(got, want, strict=True):
            torch.testing.assert_close(a.detach(), b, rtol=0, atol=0)


@pytest.mark.parametrize("frozen", ["x", "weight", "logit_bias", "expert_scale"])
def test_frozen_inputs_get_no_gradient(frozen: str) -> None:
    given = {"x": parameter(5, 8), "weight": parameter(16, 8, seed=1)}
    given |= {"logit_bias": parameter(16, seed=2), "expert_scale": parameter(16, seed=3)}
    given[frozen].requires_grad_(False)
    weights, _ = dense_router(method=METHOD, **given)
    weights.square().sum().backward()
    assert {name for name, array in given.items() if array.grad is None} == {frozen}


def test_a_bias_that_only_selects_has_no_gradient() -> None:
    bias = parameter(16, seed=1)
    weights, indices = activation_topk(tensor(5, 16), METHOD, bias=bias)
    assert not weights.requires_grad
    weights, _ = activation_topk(parameter(5, 16), METHOD, bias=bias)
    weights.square().sum().backward()
    assert bias.grad is None
    assert not indices.requires_grad


NO_GRADIENT: dict[str, Callable[[Any], Any]] = {
    "topk_select": lambda x: topk_select(x, 3)[0],
    "uniform hash_router": lambda x: hash_router(torch.arange(3), torch.zeros(9, 4, dtype=torch.int32)).weights,
    "uniform hash Router": lambda x: (
        Router(METHOD, table=torch.zeros(9, 4, dtype=torch.int32))(x, torch.arange(len(x))).weights
    ),
    "numbers": lambda x: activation_topk(x.detach(), METHOD).weights,
}


@pytest.mark.parametrize("name", NO_GRADIENT)
def test_results_without_a_gradient(name: str) -> None:
    assert not NO_GRADIENT[name](parameter(5, 16)).requires_grad


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_no_graph_is_recorded_without_grad_mode(mode: Any) -> None:
    x, weight = parameter(5, 8), parameter(16, 8, seed=1)
    with mode():
        out = dense_router(x, weight, METHOD)
        again = dense_router(x, weight, METHOD, out=out)
    assert again is out
    assert out.weights.grad_fn is None


def test_out_is_refused_with_a_gradient() -> None:
    x = parameter(5, 16)
    out = activation_topk(x.detach(), METHOD)
    before = out.weights.clone()
    with pytest.raises(ValueError, match=r"^activation_topk: out cannot be given where weights have a gradient"):
        activation_topk(x + 1, METHOD, out=out)
    assert torch.equal(out.weights, before)


@pytest.mark.parametrize("compiled", [False, True])
def test_a_second_derivative_is_refused(compiled: bool) -> None:
    calls = [
        (lambda x: activation_topk(x, METHOD), parameter(5, 16)),
        (lambda x: dense_router(x, tensor(16, 8, seed=1), METHOD), parameter(5, 8)),
    ]
    if compiled:  # as graphs call them
        ops, router = torch.ops.cupy_router, Router(METHOD, weight=tensor(16, 8, seed=1))
        calls = [
            (
                lambda x: ops.activation_topk(MethodOptions(METHOD).text, x, *[None] * 8, -1),
                parameter(5, 16),
            ),
            (lambda x: ops.router(router.key, x, None, None, None, "route", False, None, -1), parameter(5, 8)),
        ]
    for call, x in calls:
        (first,) = torch.autograd.grad(call(x)[0].square().sum(), x, create_graph=True)
        with pytest.raises(
            RuntimeError, match="weights of a routing have first derivatives only, so this has no gradient"
        ):
            torch.autograd.grad(first.sum(), x)


def test_a_custom_score_needs_a_derivative() -> None:
    """Routing works without; the backward pass reports what is missing."""
    x = parameter(5, 16)
    cubic = ScoreFunction("cubic", cuda="x * x * x", numpy=lambda x: x**3)
    weights, _ = activation_topk(x, RoutingMethod(16, 4, cubic))
    with pytest.raises(
        ValueError, match=r"activation_topk_backward: ScoreFunction\('cubic'\) has no gradient: give it a"
    ):
        weights.sum().backward()


def test_backward_twice_with_retain_graph() -> None:
    x = parameter(5, 8)
    weights, _ = dense_router(x, tensor(16, 8, seed=1), METHOD)
    loss = weights.square().sum()
    first, second = (torch.autograd.grad(loss, x, retain_graph=True)[0] for _ in range(2))
    assert torch.equal(first, second)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", ["everything", "shared in the normaliser", "soft cap"])
def test_jacobians_by_a_batch_of_gradients(name: str, kind: str) -> None:
    """Autograd goes back once for all rows, by `is_grads_batched`; such gradients have no memory of their own."""
    case = Case(kind, name)

    def weights(*smooth: Any) -> Any:
        return case.route(case.arrays | dict(zip(case.smooth, smooth, strict=True))).weights

    jacobian, given = torch.autograd.functional.jacobian, tuple(case.smooth.values())
    for got, want in zip(jacobian(weights, given, vectorize=True), jacobian(weights, given), strict=True):
        torch.testing.assert_close(got, want)


def test_incoming_gradients_may_be_noncontiguous() -> None:
    """That of a sum is one number, repeated; that of a transpose has strides."""
    x = parameter(5, 16)
    method = RoutingMethod(16, 4, "sigmoid", renormalize=False)
    (summed,) = torch.autograd.grad(activation_topk(x, method).weights.sum(), x)
    (dense,) = torch.autograd.grad(activation_topk(x, method).weights, x, torch.ones(5, 4))
    assert torch.equal(summed, dense)
    upstream = tensor(4, 5, seed=4)
    (turned,) = torch.autograd.grad((activation_topk(x, method).weights.t() * upstream).sum(), x)
    (straight,) = torch.autograd.grad((activation_topk(x, method).weights * upstream.t()).sum(), x)
    assert torch.equal(turned, straight)


def test_inputs_that_are_strided_or_not_leaves() -> None:
    base = parameter(5, 40)
    x = (base * 2)[:, 3:19]
    weights, indices = activation_topk(x, METHOD)
    (got,) = torch.autograd.grad(weights.square().sum(), base)
    (want,) = torch.autograd.grad(twin((base * 2)[:, 3:19], indices, METHOD).square().sum(), base)
    torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-6)


def test_mixed_with_other_frameworks() -> None:
    """They have no gradient themselves, also where they are strided, read-only or bfloat16."""
    import ml_dtypes

    x, gate = parameter(5, 8), inputs.normal((16, 8), seed=201)
    want = torch.autograd.grad(dense_router(x, torch.from_numpy(gate), METHOD).weights.square().sum(), x)[0]
    frozen = gate.copy()
    frozen.flags.writeable = False
    wide = np.zeros((16, 20), np.float32)
    wide[::-1, 4:12] = gate
    for weight in (gate, frozen, wide[::-1, 4:12]):
        for call in (lambda w: dense_router(x, w, METHOD), lambda w: Router(METHOD, weight=w)(x)):
            got = torch.autograd.grad(call(weight).weights.square().sum(), x)[0]
            torch.testing.assert_close(got, want, rtol=0, atol=0)
    halves = gate.astype(ml_dtypes.bfloat16)
    rounded = torch.from_numpy(halves.astype(np.float32))
    got, want = (
        torch.autograd.grad(dense_router(x, w, METHOD).weights.square().sum(), x)[0] for w in (halves, rounded)
    )
    torch.testing.assert_close(got, want, rtol=1e-6, atol=1e-7)
    with pytest.raises(TypeError, match="dense_router: weight must be float32 or float16 or bfloat16, got float64"):
        dense_router(x, gate.astype(np.float64), METHOD)
    with pytest.raises(TypeError, match="dense_router: weight must be an array"):
        dense_router(x, "gate", METHOD)


def test_results_of_other_frameworks_lose_no_gradient() -> None:
    """NumPy in, NumPy out: refused for arrays that require grad in grad mode, as PyTorch refuses their `.numpy()`."""
    x, weight = inputs.normal((5, 8), seed=201), parameter(16, 8)
    layout = expert_layout(inputs.rng(202).integers(0, 4, (5, 2)).astype(np.int32), 4)
    pairs, residual = parameter(5, 2), parameter(5, 8)
    calls: dict[str, Callable[[Any, Any], Any]] = {
        "dense_router: x": lambda x, a: dense_router(x, a(weight), METHOD),
        "activation_topk: logits": lambda x, a: activation_topk(np.tile(x, 2), METHOD, logit_bias=a(weight)[:, 0] + 0),
        "hash_router: token_ids": lambda x, a: hash_router(
            np.zeros(5, np.int32), np.arange(16, dtype=np.int32).reshape(4, 4), METHOD, x=x, weight=a(weight)
        ),
        "permute: x": lambda x, a: permute(x, layout, weights=a(pairs)),
        "unpermute: y": lambda x, a: unpermute(np.tile(x, (2, 1)), layout, residual=a(residual)),
    }
    for name, call in calls.items():
        with pytest.raises(
            TypeError, match=f"^{name} must be a tensor where .* a gradient, got ndarray: pass a tensor"
        ):
            call(x, lambda array: array)
        results = [call(x, torch.Tensor.detach)]
        with torch.no_grad():
            results.append(call(x, lambda array: array))
        for result in results:
            assert isinstance(result if isinstance(result, np.ndarray) else result.weights, np.ndarray)


def test_autocast_does_not_round_gradients() -> None:
    x, weight = parameter(5, 8), parameter(16, 8, seed=1)
    method = RoutingMethod(16, 4, "softmax", logit_scale=8.0)
    want = torch.autograd.grad(dense_router(x, weight, method).weights.square().sum(), [x, weight])
    with torch.autocast("cpu", torch.bfloat16):
        got = torch.autograd.grad(dense_router(x, weight, method).weights.square().sum(), [x, weight])
    for a, b in zip(got, want, strict=True):
        assert torch.equal(a, b)


def test_no_tokens() -> None:
    x, weight = parameter(0, 8), parameter(16, 8, seed=1)
    dense_router(x, weight, METHOD).weights.sum().backward()
    assert x.grad.shape == (0, 8)
    assert not weight.grad.any()


FIRST_CALL = """
import torch
from cupy_router import RoutingMethod, activation_topk
x = torch.ones(3, 16, requires_grad=True)
print(activation_topk(x, RoutingMethod(16, 4)).weights.requires_grad)
"""


@pytest.mark.slow("process")
def test_the_first_call_of_a_process_has_a_gradient() -> None:
    root = Path(cupy_router.__file__).parents[1]
    done = subprocess.run([sys.executable, "-c", FIRST_CALL], cwd=root, capture_output=True, text=True)
    assert done.stdout == "True\n", done.stderr


# -- In a model --------------------------------------------------------------------------------------------------------


class Layer(torch.nn.Module):  # type: ignore[misc]
    """Four experts, two of which serve each token."""

    def __init__(self, ours: bool) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(1)
        self.gate = torch.nn.Parameter(torch.randn(4, 8, generator=generator) / 3)
        self.experts = torch.nn.Parameter(torch.randn(4, 8, 8, generator=generator) / 3)
        self.method, self.ours = RoutingMethod(4, 2, "softmax"), ours

    def forward(self, x: Any) -> Any:
        if self.ours:
            weights, indices = dense_router(x, self.gate, self.method)
        else:
            weights, indices = (x @ self.gate.t()).softmax(-1).topk(2)
            weights = weights / weights.sum(-1, keepdim=True)
        dense = torch.zeros(len(x), 4).scatter(1, indices.long(), weights)
        return torch.einsum("ne,eij,nj->ni", dense, self.experts, x)


@pytest.mark.slow("seconds")
def test_a_layer_learns_as_with_a_plain_router() -> None:
    x, target = tensor(64, 8, seed=8), tensor(64, 8, seed=9)
    curves = []
    for ours in (True, False):
        layer = Layer(ours)
        optimizer = torch.optim.SGD(layer.parameters(), lr=1.0)
        losses = []
        for _ in range(30):
            loss = (layer(x) - target).square().mean()
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            losses.append(loss.item())
        curves.append(losses)
    assert curves[0][-1] < 0.9 * curves[0][0]
    np.testing.assert_allclose(curves[0], curves[1], rtol=1e-4)


def test_copies_of_a_model_have_gradients_of_their_own() -> None:
    layer = Layer(ours=True)
    twin_layer = copy.deepcopy(layer)
    layer(tensor(5, 8)).sum().backward()
    assert layer.gate.grad.any()
    assert twin_layer.gate.grad is None


@pytest.mark.usefixtures("jax_on_the_cpu")
def test_a_gate_that_holds_a_jax_array() -> None:
    """It is converted where weights have a gradient; what cannot be is refused by name."""
    jnp = pytest.importorskip("jax.numpy", reason="JAX is not installed")
    weight, method = inputs.normal((8, 4), seed=640), RoutingMethod(8, 2)
    x = torch.from_numpy(inputs.normal((3, 4), seed=641)).requires_grad_()

    class Holder:
        def __init__(self, array: Any) -> None:
            self.array = array

        def __jax_array__(self) -> Any:
            return jnp.asarray(self.array)

    found = []
    for gate in (Holder(weight), torch.from_numpy(weight)):
        (gradient,) = torch.autograd.grad(dense_router(x, gate, method).weights[:, 0].sum(), x)
        found.append(gradient)
    assert torch.equal(*found)


@pytest.mark.usefixtures("jax_on_the_cpu")
def test_an_array_that_cannot_become_a_tensor_is_refused_by_name(monkeypatch: pytest.MonkeyPatch) -> None:
    """Such as one of a library whose DLPack has no dtype or device that PyTorch knows."""
    jnp = pytest.importorskip("jax.numpy", reason="JAX is not installed")
    monkeypatch.setattr(torch, "from_dlpack", lambda array: array.nothing)
    x = torch.ones(3, 4, requires_grad=True)
    with pytest.raises(TypeError, match=r"^dense_router: weight must be a tensor, or convertible to one by DLPack, wh"):
        dense_router(x, jnp.ones((8, 4)), RoutingMethod(8, 2))
