# SPDX-License-Identifier: Apache-2.0
"""The ops inside torch.func: vmap is a loop of calls, grad is autograd's, forward mode is refused."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

from cupy_router import RoutingMethod, activation_topk, dense_router, hash_router, topk_select
from cupy_router.ops import _run
from tests import inputs
from tests.gradient_cases import SMALL
from tests.methods import METHODS

torch = pytest.importorskip("torch", reason="PyTorch is not installed")

from cupy_router import Router  # noqa: E402

METHOD = RoutingMethod(16, 4, renormalize_eps=1e-20, scale=1.5)
SIZE, N, HIDDEN = 3, 5, 12


def tensor(*shape: int, seed: int = 0) -> Any:
    return torch.from_numpy(inputs.normal(shape, seed=290 + seed))


LOGITS, X = tensor(SIZE, N, 16), tensor(SIZE, N, HIDDEN, seed=1)
GATES, BIASES = tensor(SIZE, 16, HIDDEN, seed=2), tensor(SIZE, 16, seed=3)
SCALES = tensor(SIZE, 16, seed=4).exp()
IDS = torch.from_numpy(inputs.rng(295).integers(-1, 9, (SIZE, N)).astype(np.int32))
TABLE = torch.from_numpy(np.stack([inputs.rng(296, row).permutation(16)[:4] for row in range(9)]).astype(np.int32))
COUNTS = torch.tensor([1, 5, 3], dtype=torch.int32)
ROUTER, HASH_ROUTER = Router(METHOD, weight=GATES[0], bias=BIASES[0]), Router(METHOD, weight=GATES[0], table=TABLE)

# A function, its arguments, which of them have an axis of calls, and how many calls of ops that may take.
CALLS: dict[str, tuple[Callable[..., Any], tuple[Any, ...], tuple[Any, ...], int]] = {
    "topk_select": (lambda a: topk_select(a, 2), (LOGITS,), (0,), 1),
    "topk_select with lengths": (
        lambda a, lengths: topk_select(a, 2, lengths=lengths), (LOGITS, IDS.int() + 3), (0, 0), 1
    ),
    "activation_topk": (lambda a: activation_topk(a, METHOD), (LOGITS,), (0,), 1),
    "another axis": (lambda a: activation_topk(a, METHOD), (LOGITS.movedim(0, 1),), (1,), 1),
    "a product of each": (lambda w, a: activation_topk((w @ a)[None], METHOD), (GATES[0], X[:, 0]), (None, 0), 1),
    "a product of each, padded": (
        lambda w, a: activation_topk((w @ a)[None], METHOD, num_valid=1), (GATES[0], X[:, 0]), (None, 0), SIZE
    ),
    "a layer of all": (
        lambda a, b: activation_topk(a, METHOD, bias=b, expert_scale=b.exp()), (LOGITS, BIASES[0]), (0, None), 1
    ),
    "layers of their own": (
        lambda a, b: activation_topk(a, METHOD, bias=b, expert_scale=b.exp()), (LOGITS[0], BIASES), (None, 0), SIZE
    ),
    "a bias of each row": (
        lambda a, i: activation_topk(a, METHOD, bias=BIASES, bias_index=i), (LOGITS, IDS.clamp(max=3)), (0, 0), 1
    ),
    "rows of all, each with a bias": (
        lambda a, i: activation_topk(a, METHOD, bias=BIASES, bias_index=i), (LOGITS[0], IDS.clamp(max=3)), (None, 0), 1
    ),
    "biases of their own": (
        lambda a, b, i: activation_topk(a, METHOD, bias=b, bias_index=i),
        (LOGITS, torch.stack((BIASES, -BIASES, 2 * BIASES)), IDS[0].clamp(max=3)), (0, 0, None), SIZE,
    ),
    "num_valid": (lambda a: activation_topk(a, METHOD, num_valid=2), (LOGITS,), (0,), SIZE),
    "num_valid of each": (lambda a, n: activation_topk(a, METHOD, num_valid=n), (LOGITS, COUNTS), (0, 0), SIZE),
    "dense_router": (lambda x, w: dense_router(x, w, METHOD, path="decode"), (X, GATES[0]), (0, None), 1),
    "dense_router of gates": (lambda x, w: dense_router(x, w, METHOD), (X, GATES), (0, 0), SIZE),
    "more tokens than decode has": (
        lambda x, w: dense_router(x, w, METHOD, path="decode"), (X.repeat(1, 5, 1), GATES[0]), (0, None), SIZE
    ),
    "hash_router": (lambda ids, a: hash_router(ids, TABLE, METHOD, logits=a), (IDS, LOGITS), (0, 0), 1),
    "rows of all": (lambda ids, a: hash_router(ids, TABLE, METHOD, logits=a), (IDS, LOGITS[0]), (0, None), 1),
    "hash_router of biases": (
        lambda ids, a, i: hash_router(ids, TABLE, METHOD, logits=a, bias=BIASES, bias_index=i),
        (IDS, LOGITS, IDS.clamp(max=3)), (0, 0, 0), 1,
    ),
    "hash_router alone": (lambda ids: hash_router(ids, TABLE), (IDS,), (0,), 1),
    "a Router": (lambda x: ROUTER(x), (X,), (0,), 1),
    "a Router of biases with a table": (
        lambda x, ids, i: Router(METHOD, weight=GATES[0], bias=BIASES, table=TABLE)(x, ids, bias_index=i),
        (X, IDS, IDS.clamp(max=3)), (0, 0, 0), 1,
    ),
    "a Router of biases": (
        lambda x, i: Router(METHOD, weight=GATES[0], bias=BIASES)(x, bias_index=i), (X, IDS.clamp(max=3)), (0, 0), 1
    ),
    "a Router with a table": (lambda x, ids: HASH_ROUTER(x, ids), (X, IDS), (0, 0), 1),
}  # fmt: skip


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The ops that are called while nothing is transformed."""
    found: list[str] = []
    on_host = _run._run_on_host

    def counting(op: Any, *others: Any) -> Any:
        found.append(op.name)
        return on_host(op, *others)

    monkeypatch.setattr(_run, "_run_on_host", counting)
    return found


@pytest.mark.parametrize("name", CALLS)
def test_vmap_equals_a_loop_of_calls(name: str, calls: list[str]) -> None:
    """Of rows that know nothing of each other, one call."""
    function, arrays, dims, number = CALLS[name]
    got = torch.func.vmap(lambda *given: tuple(function(*given)), in_dims=dims)(*arrays)
    assert len(calls) == number
    each = [
        function(*(a if dim is None else a.select(dim, i) for a, dim in zip(arrays, dims, strict=True)))
        for i in range(SIZE)
    ]
    for result, parts in zip(got, zip(*each, strict=True), strict=True):
        torch.testing.assert_close(result, torch.stack(parts), rtol=1e-6, atol=0.0)


@pytest.mark.parametrize("name", CALLS)
def test_vmap_over_no_entries(name: str) -> None:
    """It returns empty tensors of the shapes that an entry has."""
    function, arrays, dims, _ = CALLS[name]
    none = [a if dim is None else a.narrow(dim, 0, 0) for a, dim in zip(arrays, dims, strict=True)]
    got = torch.func.vmap(lambda *given: tuple(function(*given)), in_dims=dims)(*none)
    one = function(*(a if dim is None else a.select(dim, 0) for a, dim in zip(arrays, dims, strict=True)))
    assert [(a.shape, a.dtype) for a in got] == [((0, *a.shape), a.dtype) for a in one]


def test_vmap_in_vmap(calls: list[str]) -> None:
    many = LOGITS.expand(2, SIZE, N, 16) + torch.arange(2.0).reshape(2, 1, 1, 1)
    both = torch.func.vmap(torch.func.vmap(lambda a: tuple(activation_topk(a, METHOD))))
    weights, indices = both(many)
    assert calls == ["activation_topk"]
    want = activation_topk(many.reshape(-1, 16), METHOD)
    assert weights.reshape(-1, 4).equal(want.weights)
    assert indices.reshape(-1, 4).equal(want.indices)


def loss(method: RoutingMethod) -> Callable[..., Any]:
    upstream = torch.arange(1.0, method.num_columns + 1).cos()
    return lambda a, bias, scale: (
        activation_topk(a, method, logit_bias=bias, expert_scale=scale).weights * upstream
    ).sum()


def gradients(function: Callable[..., Any], *arrays: Any) -> Any:
    given = [a.clone().requires_grad_() for a in arrays]
    return torch.autograd.grad(function(*given), given)


@pytest.mark.parametrize("name", SMALL)
def test_gradients_are_those_of_autograd(name: str) -> None:
    method = METHODS[name]
    arrays = tensor(N, method.num_logits), tensor(method.num_experts, seed=1), tensor(method.num_experts, seed=2).exp()
    got = torch.func.grad(loss(method), argnums=(0, 1, 2))(*arrays)
    for ours, want in zip(got, gradients(loss(method), *arrays), strict=True):
        assert ours.equal(want)


@pytest.mark.parametrize("shared", [False, True])
def test_per_example_gradients(shared: bool) -> None:
    """Per-example gradients, as torch.func is used for."""
    arrays, dims = (LOGITS, BIASES, SCALES), (0, 0, 0)
    if shared:
        arrays, dims = (LOGITS, BIASES[0], SCALES[0]), (0, None, None)
    got = torch.func.vmap(torch.func.grad(loss(METHOD), argnums=(0, 1, 2)), in_dims=dims)(*arrays)
    for i in range(SIZE):
        each = (a if dim is None else a[i] for a, dim in zip(arrays, dims, strict=True))
        for ours, want in zip(got, gradients(loss(METHOD), *each), strict=True):
            torch.testing.assert_close(ours[i], want, rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("of", ["dense_router", "hash_router", "Router"])
def test_gradients_with_respect_to_x_and_the_gate(of: str) -> None:
    def total(x: Any, weight: Any) -> Any:
        if of == "dense_router":
            return dense_router(x, weight, METHOD).weights.square().sum()
        if of == "hash_router":
            return hash_router(IDS[0], TABLE, METHOD, x=x, weight=weight).weights.square().sum()
        return ROUTER(x).weights.square().sum() + weight.sum()

    got = torch.func.grad(total, argnums=(0, 1))(X[0], GATES[0])
    for ours, want in zip(got, gradients(total, X[0], GATES[0]), strict=True):
        torch.testing.assert_close(ours, want, rtol=1e-6, atol=1e-7)
    per_example = torch.func.vmap(torch.func.grad(total), in_dims=(0, None))(X, GATES[0])
    torch.testing.assert_close(per_example[0], got[0], rtol=1e-5, atol=1e-6)


def test_a_jacobian() -> None:
    got = torch.func.jacrev(lambda a: activation_topk(a, METHOD).weights)(LOGITS[0])
    want = torch.autograd.functional.jacobian(lambda a: activation_topk(a, METHOD).weights, LOGITS[0])
    torch.testing.assert_close(got, want, rtol=1e-6, atol=1e-7)


def test_a_module_as_a_function() -> None:
    class Gate(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = torch.nn.Parameter(GATES[0].clone())

        def forward(self, x: Any) -> Any:
            return dense_router(x, self.weight, METHOD).weights.square().sum()

    gate = Gate()
    parameters = dict(gate.named_parameters())
    got = torch.func.grad(lambda p: torch.func.functional_call(gate, p, X[0]))(parameters)
    gate(X[0]).backward()
    torch.testing.assert_close(got["weight"], gate.weight.grad)


def test_selection_inputs_have_no_gradient() -> None:
    got = torch.func.grad(lambda a: (topk_select(a, 2).values * a[:, :2]).sum())(LOGITS[0])
    assert got[:, :2].equal(topk_select(LOGITS[0], 2).values)
    assert not got[:, 2:].any()


FORWARD = {
    "jvp": lambda f, a: torch.func.jvp(f, (a,), (a,)),
    "jacfwd": lambda f, a: torch.func.jacfwd(f)(a),
    "hessian": lambda f, a: torch.func.hessian(lambda a: f(a).sum())(a),
}


@pytest.mark.parametrize("how", FORWARD)
def test_forward_mode_is_refused(how: str) -> None:
    with pytest.raises(RuntimeError, match="activation_topk: there are no gradients in forward mode"):
        FORWARD[how](lambda a: activation_topk(a, METHOD).weights, LOGITS[0])


def test_forward_mode_tangents_are_refused() -> None:
    forward_ad = torch.autograd.forward_ad
    out = activation_topk(LOGITS[0], METHOD)
    needs = LOGITS[0].clone().requires_grad_()
    with forward_ad.dual_level():
        dual = forward_ad.make_dual(LOGITS[0], LOGITS[1])
        for call in (lambda: activation_topk(dual, METHOD), lambda: activation_topk(needs, METHOD, bias=dual[0])):
            with pytest.raises(RuntimeError, match="no gradients in forward mode"):
                call()
        # Other tensors are none of its business.
        assert activation_topk(LOGITS[0], METHOD, out=out) is out
        activation_topk(needs, METHOD).weights.sum().backward()
        assert isinstance(activation_topk(LOGITS[0].numpy(), METHOD).weights, np.ndarray)
    assert needs.grad is not None


def test_second_derivatives_are_refused() -> None:
    first = torch.func.grad(loss(METHOD))
    with pytest.raises(RuntimeError, match="first derivatives only"):
        torch.func.grad(lambda a: first(a, BIASES[0], SCALES[0]).square().sum())(LOGITS[0])


def test_out_and_stream_are_refused() -> None:
    out = activation_topk(LOGITS[0], METHOD)
    with pytest.raises(ValueError, match=r"out and stream cannot be given inside .*torch\.func"):
        torch.func.vmap(lambda a: tuple(activation_topk(a, METHOD, out=out)))(LOGITS)
