# SPDX-License-Identifier: Apache-2.0
"""Replicas of experts in PyTorch: gradients of the weights, which go to the experts, graphs and vmap."""

from __future__ import annotations

from typing import Any

import pytest

from cupy_router import LayoutSpec
from tests.replica_calls import KINDS, NAMES, Call

torch = pytest.importorskip("torch", reason="PyTorch is not installed")

EVERY = pytest.mark.parametrize("kind", KINDS)
GIVEN = pytest.mark.parametrize("given", ["", "route"])
SMOOTH = ("logits", "x", "weight", "logit_bias", "expert_scale")


def on_torch(call: Call) -> tuple[dict[str, Any], list[Any]]:
    """Return the arrays as tensors, and those of them that require grad."""
    arrays = {name: torch.from_numpy(array) for name, array in call.arrays().items()}
    return arrays, [array.requires_grad_() for name, array in arrays.items() if name in SMOOTH]


def same(got: Any, want: Any) -> None:
    for a, b in zip(got, want, strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=0)


@pytest.mark.parametrize("name", NAMES)
@GIVEN
@EVERY
def test_gradients_are_those_of_the_experts(kind: str, given: str, name: str) -> None:
    call = Call(kind, name, given=given)
    arrays, smooth = on_torch(call)
    found, experts = call(arrays, num_valid=20), call.logical(arrays, num_valid=20)
    upstream = torch.linspace(-1, 2, found.weights.numel()).view(found.weights.shape).to(found.weights.dtype)
    got, want = (torch.autograd.grad(each.weights, smooth, upstream) for each in (found, experts))
    assert all(gradient.any() for gradient in want)
    same(got, want)


def test_gradients_of_logits_that_are_returned() -> None:
    call = Call("dense_router prefill", "two shared experts")
    arrays, smooth = on_torch(call)
    gradients = []
    for route in (call, call.logical):
        plan = route(arrays, return_logits=True, layout=LayoutSpec())
        loss = plan.weights.square().sum() + plan.logits.sum()
        gradients.append(torch.autograd.grad(loss, smooth))
    same(*gradients)


@pytest.mark.slow("seconds", every=2)
@EVERY
def test_compiled_calls_and_their_gradients(kind: str) -> None:
    """Of another number of tokens, too, with one graph."""
    torch.compiler.reset()
    call = Call(kind, "two shared experts")
    arrays, smooth = on_torch(call)
    first = "logits" if kind == "activation_topk" else "x"
    compiled = torch.compile(
        lambda x: tuple(call({**arrays, first: x})), backend="aot_eager", fullgraph=True, dynamic=True
    )
    for n in (call.n, 5):
        x = arrays[first][:n]
        same(compiled(x), call({**arrays, first: x}))
    weights, _ = compiled(arrays[first])
    same(
        torch.autograd.grad(weights.square().sum(), smooth),
        torch.autograd.grad(call(arrays).weights.square().sum(), smooth),
    )


def test_vmap_counts_the_tokens_of_each_call() -> None:
    call = Call("activation_topk", n=12)
    arrays, _ = on_torch(call)
    logits = arrays.pop("logits").detach().view(3, 4, -1)
    with torch.no_grad():
        got = torch.func.vmap(lambda rows: tuple(call({**arrays, "logits": rows})))(logits)
        for i in range(3):
            same([array[i] for array in got], call({**arrays, "logits": logits[i]}))


@pytest.mark.slow("seconds")
def test_exported_programs() -> None:
    call = Call("dense_router prefill", "two shared experts")
    arrays = {name: array.detach() for name, array in on_torch(call)[0].items()}

    class Model(torch.nn.Module):
        def forward(self, arrays: dict[str, Any]) -> Any:
            return tuple(call(arrays))

    with torch.no_grad():
        same(torch.export.export(Model(), (arrays,)).module()(arrays), call(arrays))


@pytest.mark.slow("seconds")
def test_a_router_of_numpy_arrays_is_no_part_of_a_graph() -> None:
    call = Call("Router")
    arrays = call.arrays()
    arrays |= {name: torch.from_numpy(arrays[name]) for name in ("x", "replicas", "replica_counts")}
    want = call(arrays)
    same(torch.compile(lambda x: tuple(call({**arrays, "x": x})), backend="eager")(arrays["x"]), want)
