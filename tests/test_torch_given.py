# SPDX-License-Identifier: Apache-2.0
"""Given experts in PyTorch: values and gradients against a plain twin; eager, compiled, mapped."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from cupy_router import Router, RoutingMethod, activation_topk, dense_router
from tests import compare, frameworks
from tests.given_calls import KINDS, UNSET, Call
from tests.gradient_cases import SMOOTH, TOLERANCE

torch = pytest.importorskip("torch", reason="PyTorch is not installed")
import cupy_router.torch  # noqa: E402, F401  # a test may begin with a traced call
from tests.torch_gradients import twin  # noqa: E402

EAGER = [kind for kind in KINDS if kind != "dense_router decode"]
NAMES = (
    "soft cap", "sqrtsoftplus after top-k", "softmax after top-k", "sigmoid, bias on logits", "everything",
    "8 groups, best 4, top 2", "8 groups, best 3, max", "two shared experts", "shared in the normaliser",
    "bfloat16 weights", "uint8 indices", "own score",
)  # fmt: skip


def on_torch(call: Call, device: str = "cpu") -> tuple[dict[str, Any], dict[str, Any]]:
    """Return the arrays of a call as tensors, and those of them that require grad."""
    arrays = {name: frameworks.PyTorch(device).array(array) for name, array in call.arrays().items()}
    return arrays, {name: array.requires_grad_() for name, array in arrays.items() if name in SMOOTH}


def check_against_twin(call: Call, routing: Any, smooth: dict[str, Any], **frozen: Any) -> None:
    """Assert that weights and gradients of the rows with experts are those of the twin, and 0 in all others.

    frozen: the other float arrays of the call.
    """
    method, (experts, exist) = call.method, call.experts()
    rows = torch.from_numpy(np.flatnonzero(exist)).to(routing.weights.device)
    wide = {name: array.detach().double().requires_grad_() for name, array in (smooth | frozen).items()}
    logits = wide["logits"] if "logits" in wide else wide["x"] @ wide["weight"].t()
    layer = {name: wide.get(name) for name in ("logit_bias", "expert_scale")}
    ids = torch.from_numpy(experts).to(rows.device)[rows]
    want = twin(logits[rows], ids, method, **layer)
    rounding = {"float32": 2e-6, "float16": 2.0**-10, "bfloat16": 2.0**-7}[method.weight_dtype]
    torch.testing.assert_close(routing.weights.detach()[rows].double(), want.detach(), rtol=rounding, atol=1e-6)
    assert not routing.weights.detach().double()[torch.from_numpy(~exist).to(rows.device)].any()

    upstream = torch.linspace(-1, 2, routing.weights.numel(), dtype=torch.float64).reshape(routing.weights.shape)
    upstream = upstream.to(rows.device)
    got = torch.autograd.grad((routing.weights.double() * upstream).sum(), list(smooth.values()), retain_graph=True)
    right = torch.autograd.grad((want * upstream[rows]).sum(), [wide[name] for name in smooth])
    for (name, array), gradient, its_twin in zip(smooth.items(), got, right, strict=True):
        assert (gradient.dtype, gradient.shape) == (array.dtype, array.shape)
        rtol = TOLERANCE[str(array.dtype).removeprefix("torch.")]
        most = float(its_twin.abs().max())
        atol = 4e-6 * max(1.0, most)
        if method.weight_dtype != "float32":  # autograd rounds what comes in to the dtype of the weights
            atol += 2 * TOLERANCE[method.weight_dtype] * most
        torch.testing.assert_close(gradient.double(), its_twin, rtol=rtol, atol=atol, msg=lambda m, n=name: f"{n}: {m}")


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("unset", UNSET)
@pytest.mark.parametrize("kind", EAGER)
def test_weights_and_gradients_are_those_of_a_plain_router(kind: str, unset: str, name: str) -> None:
    call = Call(kind, name, unset)
    arrays, smooth = on_torch(call)
    routing = call(arrays)
    assert not routing.indices.requires_grad
    check_against_twin(call, routing, smooth)


@pytest.mark.parametrize("kind", EAGER)
def test_a_drifted_expert_has_its_real_gradient(kind: str) -> None:
    """Others have scores that are 0 outside of the top k before they are gathered, and no gradient there."""
    call = Call(kind, "bfloat16 weights", "empty")
    arrays, smooth = on_torch(call)
    experts, exist = call.experts()
    routing = call(arrays)
    (gradient,) = torch.autograd.grad(routing.weights.float().square().sum(), [smooth.get("logits", smooth.get("x"))])
    assert gradient[torch.from_numpy(exist)].abs().amax(dim=1).gt(0).all()
    if kind == "activation_topk":
        touched = np.zeros(gradient.shape, bool)
        np.put_along_axis(touched[:], np.where(exist[:, None], experts, 0), True, axis=1)
        touched[~exist] = False
        assert not gradient.numpy()[~touched].any(), "gradients at the given experts only"


@pytest.mark.parametrize("frozen", ["x", "weight", "logit_bias", "expert_scale"])
def test_only_what_is_required_gets_a_gradient(frozen: str) -> None:
    call = Call("dense_router", "everything", "empty")
    arrays, smooth = on_torch(call)
    smooth[frozen].requires_grad_(False)
    call(arrays).weights.float().sum().backward()
    assert {name for name, array in smooth.items() if array.grad is None} == {frozen}


@pytest.mark.parametrize("dtype", ["uint8", "int16", "int64"])
def test_a_slice_of_recorded_experts(dtype: str) -> None:
    """[layers, tokens, k] or [tokens, layers, k]: replayed without a conversion."""
    call = Call("dense_router", "two shared experts", "empty", dtype)
    arrays, smooth = on_torch(call)
    want = call(arrays)
    recorded = torch.zeros(call.n, 3, 6, dtype=arrays["indices"].dtype)
    recorded[:, 1] = arrays["indices"]
    routing = call(arrays | {"indices": recorded[:, 1]})
    for a, b in zip(routing, want, strict=True):
        assert torch.equal(a, b)
    check_against_twin(call, routing, smooth)


def test_logits_and_weights_have_gradients_together() -> None:
    call = Call("dense_router", "two shared experts", "empty")
    arrays, smooth = on_torch(call)
    routing = call(arrays, return_logits=True)
    both = torch.autograd.grad(routing.weights.sum() + routing.logits.square().sum(), [smooth["x"]], retain_graph=True)
    one = torch.autograd.grad(routing.weights.sum(), [smooth["x"]], retain_graph=True)
    other = torch.autograd.grad(routing.logits.square().sum(), [smooth["x"]])
    torch.testing.assert_close(both[0], one[0] + other[0], rtol=1e-5, atol=1e-5)


@pytest.mark.slow("seconds", every=5)
@pytest.mark.parametrize("name", ["everything", "two shared experts"])
@pytest.mark.parametrize("unset", UNSET)
@pytest.mark.parametrize("kind", ["activation_topk", "dense_router", "Router", "Router of arrays"])
def test_compiled(kind: str, unset: str, name: str) -> None:
    torch.compiler.reset()
    call = Call(kind.removesuffix(" of arrays"), name, unset)
    arrays, smooth = on_torch(call)
    if kind == "Router of arrays":
        hosts = {k: a for k, a in call.arrays().items() if k not in ("x", "indices")}
        router = Router(call.method, **hosts)
        smooth = {"x": smooth["x"]}

        def route(given: dict[str, Any], **more: Any) -> Any:
            return router(given["x"], indices=given["indices"], unset=unset, **more)
    else:
        route = call
    compiled = torch.compile(route, backend="aot_eager", fullgraph=True, dynamic=True)
    for n in (23, 9):
        some = {k: a[:n] if k in ("x", "logits", "indices", "token_ids") else a for k, a in arrays.items()}
        got, want = compiled(some), route(some)
        for a, b in zip(got, want, strict=True):
            compare.assert_same_bits(frameworks.PyTorch().numpy(a), frameworks.PyTorch().numpy(b))
        gradients = [torch.autograd.grad(r.weights.float().sum(), list(smooth.values())) for r in (got, want)]
        for a, b in zip(*gradients, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("kind", ["activation_topk", "dense_router"])
def test_mapped(kind: str) -> None:
    """torch.func.vmap merges rows; ids are rows like logits and x."""
    call = Call(kind, "two shared experts", "empty", n=12)
    arrays = {name: frameworks.PyTorch().array(array) for name, array in call.arrays().items()}
    rows = {name for name in arrays if name in ("logits", "x", "indices")}
    want = call(arrays)
    batches = {name: array.reshape(3, 4, -1) if name in rows else array for name, array in arrays.items()}
    dims = ({name: 0 if name in rows else None for name in arrays},)
    got = torch.func.vmap(lambda given: tuple(call(given)), in_dims=dims)(batches)
    for a, b in zip(got, want, strict=True):
        torch.testing.assert_close(a.reshape(b.shape), b, rtol=0, atol=0)


def test_a_training_step_replays_a_rollout() -> None:
    """The loss of a step is that of the recorded experts, however the gate has changed meanwhile."""
    method = RoutingMethod(64, 6, "sigmoid", index_dtype="uint8")
    x, gate = torch.randn(40, 32), torch.randn(64, 32, requires_grad=True)
    record = torch.empty(2, 40, 6, dtype=torch.uint8)
    with torch.no_grad():
        record[1] = dense_router(x, gate, method).indices
        gate += 0.3 * torch.randn(64, 32)
    replayed = dense_router(x, gate, method, indices=record[1], unset="empty")
    assert torch.equal(replayed.indices, record[1])
    fresh = dense_router(x, gate, method)
    assert (fresh.indices.long().sort(dim=1).values != record[1].long().sort(dim=1).values).any(dim=1).any()
    replayed.weights.square().sum().backward()
    wide = gate.detach().double().requires_grad_()
    twin(x.double() @ wide.t(), record[1].long(), method).square().sum().backward()
    torch.testing.assert_close(gate.grad.double(), wide.grad, rtol=1e-5, atol=1e-5)


def test_ids_of_another_device_are_refused() -> None:
    with pytest.raises(ValueError, match="indices must be a tensor on cpu or cuda, got one on meta"):
        activation_topk(torch.zeros(5, 8), RoutingMethod(8, 2), indices=torch.zeros(5, 2, device="meta").int())
