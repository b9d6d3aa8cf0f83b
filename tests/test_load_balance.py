# SPDX-License-Identifier: Apache-2.0
"""cupy_router.torch.load_balance: counts and mean scores for the losses that balance the load of experts."""

from __future__ import annotations

import doctest
import sys
from typing import Any

import numpy as np
import pytest

from cupy_router import RoutingMethod, activation_topk
from tests import inputs
from tests.gradient_cases import SMALL
from tests.steps import METHODS
from tests.torch_gradients import Case

torch = pytest.importorskip("torch", reason="PyTorch is not installed")
load_balance = pytest.importorskip("cupy_router.torch").load_balance


@pytest.mark.parametrize("name", [name for name in SMALL if isinstance(METHODS[name].score, str)])
def test_load_balance(name: str) -> None:
    """Counts by hand, scores as the op has them; padding counts nothing, whatever lies there."""
    case = Case("activation_topk", name)
    method, logit_bias = case.method, case.arrays.get("logit_bias")
    logits = case.arrays["logits"].detach()[:, : method.num_experts].float()
    _, indices = case.call(num_valid=4)
    garbage = case.arrays["logits"].detach().float()
    garbage[4:] = np.nan
    leaf = garbage.clone().requires_grad_()
    counts, mean_scores = load_balance(leaf, indices, method, logit_bias=logit_bias, normalize=False)
    flat = indices[:4, : method.top_k].flatten().tolist()
    assert counts.tolist() == [flat.count(expert) for expert in range(method.num_experts)]
    plain = RoutingMethod(
        method.num_experts, method.num_experts, method.score, renormalize=False, logit_scale=method.logit_scale,
        logit_softcap=method.logit_softcap,
    )  # fmt: skip
    with torch.no_grad():
        weights, order = activation_topk(logits[:4], plain, logit_bias=logit_bias)
    scores = torch.zeros(4, method.num_experts).scatter(1, order.long(), weights)
    torch.testing.assert_close(mean_scores, scores.mean(0), rtol=1e-5, atol=1e-7)
    (mean_scores * torch.arange(method.num_experts)).sum().backward()
    assert torch.isfinite(leaf.grad).all()
    assert leaf.grad[:4].any()
    assert not leaf.grad[4:].any()
    if method.score in ("sigmoid", "sqrtsoftplus"):
        normalized = load_balance(leaf, indices, method, logit_bias=logit_bias).mean_scores
        torch.testing.assert_close(normalized, (scores / scores.sum(1, keepdim=True)).mean(0), rtol=1e-5, atol=1e-7)


def test_its_example() -> None:
    assert doctest.testmod(sys.modules["cupy_router.torch._load_balance"]).failed == 0


def test_load_balance_of_ties_and_far_logits() -> None:
    method = RoutingMethod(4, 2)
    logits = torch.tensor([[0.0] * 4, [-100.0, -100.0, -100.0, 0.0]], requires_grad=True)
    indices = activation_topk(logits.detach(), method).indices
    counts, mean_scores = load_balance(logits, indices, method)
    assert counts.tolist() == [2, 1, 0, 1]  # equal scores: the lower index
    mean_scores.square().sum().backward()
    assert torch.isfinite(logits.grad).all()


def test_load_balance_without_tokens_or_of_padding_alone() -> None:
    method = RoutingMethod(4, 2, "softmax")
    for n in (0, 3):
        logits = torch.full((n, 4), np.nan, requires_grad=True)
        counts, mean_scores = load_balance(logits, torch.full((n, 2), -1, dtype=torch.int32), method)
        assert (counts.tolist(), mean_scores.tolist()) == ([0] * 4, [0.0] * 4)


def test_load_balance_in_a_graph_and_its_loss() -> None:
    """The loss of even use is 1, and the usual one of a whole layer compiles into one graph."""
    torch.compiler.reset()
    method = RoutingMethod(16, 4, "softmax")

    def loss(x: Any, weight: Any) -> Any:
        logits = torch.nn.functional.linear(x, weight)
        counts, mean_scores = load_balance(logits, activation_topk(logits, method).indices, method)
        return 16 * (counts / counts.sum() * mean_scores).sum()

    assert float(loss(torch.zeros(3, 8), torch.zeros(16, 8))) == pytest.approx(1)
    x, weight = (torch.from_numpy(inputs.normal(shape, seed=210)) for shape in ((9, 8), (16, 8)))
    weight.requires_grad_()
    got = torch.autograd.grad(torch.compile(loss, backend="aot_eager", fullgraph=True)(x, weight), weight)[0]
    torch.testing.assert_close(got, torch.autograd.grad(loss(x, weight), weight)[0], rtol=1e-5, atol=1e-7)
    with pytest.raises(ValueError, match=r"load_balance: method has ScoreFunction\('square'\), which PyTorch cannot"):
        load_balance(x, x.int(), METHODS["own score, a body"])
