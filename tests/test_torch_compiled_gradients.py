# SPDX-License-Identifier: Apache-2.0
"""Gradients of weights in graphs of torch.compile, and the ops of these graphs by PyTorch's own checks."""

from __future__ import annotations

import numpy as np
import pytest

from cupy_router import Router, dense_router
from tests import inputs
from tests.gradient_cases import KINDS
from tests.test_torch_autograd import METHOD, parameter, tensor
from tests.torch_gradients import Case

torch = pytest.importorskip("torch", reason="PyTorch is not installed")

COMPILED = ("everything", "softmax after top-k, bias on logits", "shared in the normaliser", "soft cap")


@pytest.mark.slow("seconds")
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", COMPILED)
def test_compiled_calls_have_the_same_gradients(name: str, kind: str) -> None:
    torch.compiler.reset()
    case = Case(kind, name)
    if kind == "Router" or kind == "hash Router":
        given = dict(case.arrays)
        x, token_ids = given.pop("x"), given.pop("token_ids", None)
        router = Router(case.method, **given)
        routing = torch.compile(lambda x: router(x + 0, token_ids), backend="aot_eager", fullgraph=True)(x)
    else:
        routing = torch.compile(case.call, backend="aot_eager", fullgraph=True)()
    case.check(routing)


@pytest.mark.slow("seconds")
def test_a_compiled_router_with_frozen_arrays() -> None:
    """Of any framework: the graph holds the router, and goes back through it."""
    gate = inputs.normal((16, 8), seed=201)
    table = np.stack([inputs.rng(202, r).permutation(16)[:4] for r in range(9)])
    ids = torch.arange(5)
    for router in (
        Router(METHOD, weight=gate),
        Router(METHOD, weight=torch.from_numpy(gate), bias=tensor(16, seed=5)),
        Router(METHOD, weight=torch.from_numpy(gate), table=torch.from_numpy(table)),
        Router(METHOD, table=torch.from_numpy(table)),
    ):
        torch.compiler.reset()
        compiled = torch.compile(lambda x, r=router: r(x * 2, ids), backend="aot_eager", fullgraph=True)
        x = parameter(5, 8)
        routing, eager = compiled(x), router(x * 2, ids)
        assert routing.weights.requires_grad == eager.weights.requires_grad == (router.weight is not None)
        if router.weight is not None:
            got, want = (torch.autograd.grad(r.weights.square().sum(), x)[0] for r in (routing, eager))
            torch.testing.assert_close(got, want, rtol=1e-6, atol=1e-7)


@pytest.mark.slow("seconds")
def test_a_compiled_call_of_other_sizes() -> None:
    torch.compiler.reset()
    weight = parameter(16, 8, seed=1)
    compiled = torch.compile(
        lambda x: dense_router(x, weight, METHOD).weights, backend="aot_eager", fullgraph=True, dynamic=True
    )
    for n in (5, 7, 1, 9):
        x = parameter(n, 8, seed=n)
        got = torch.autograd.grad(compiled(x).square().sum(), [x, weight])
        want = torch.autograd.grad(dense_router(x, weight, METHOD).weights.square().sum(), [x, weight])
        for a, b in zip(got, want, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-7)
