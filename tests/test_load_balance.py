# SPDX-License-Identifier: Apache-2.0
"""cupy_router.torch.load_balance: counts and mean scores for the losses that balance the load of experts."""

from __future__ import annotations

import doctest
import sys
from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from cupy_router import RoutingMethod, activation_topk
from tests import inputs
from tests.gradient_cases import SMALL
from tests.methods import METHODS
from tests.torch_gradients import Case

torch = pytest.importorskip("torch", reason="PyTorch is not installed")
load_balance = pytest.importorskip("cupy_router.torch").load_balance

METHOD = RoutingMethod(8, 2)


@pytest.mark.parametrize("name", [name for name in SMALL if isinstance(METHODS[name].score, str)])
def test_load_balance(name: str) -> None:
    """Counts by hand, scores as in the op; padding is not counted."""
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
    plain = replace(  # all steps from logits to scores, and none after them
        method, top_k=method.num_experts, score_after_topk=False, bias_on="score", num_groups=1, top_groups=1,
        renormalize=False, renormalize_eps=0.0, renormalize_min=None, scale=1.0, num_shared_experts=0,
        shared_in_normalizer=False, weight_dtype="float32",
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


def test_the_docstring_example() -> None:
    assert doctest.testmod(sys.modules["cupy_router.torch._load_balance"]).failed == 0


def test_load_balance_of_ties_and_far_logits() -> None:
    method = RoutingMethod(4, 2)
    logits = torch.tensor([[0.0] * 4, [-100.0, -100.0, -100.0, 0.0]], requires_grad=True)
    indices = activation_topk(logits.detach(), method).indices
    counts, mean_scores = load_balance(logits, indices, method)
    assert counts.tolist() == [2, 1, 0, 1]  # equal scores: the lower index
    mean_scores.square().sum().backward()
    assert torch.isfinite(logits.grad).all()


@pytest.mark.parametrize(
    ("score", "logit"),
    [
        ("sigmoid", -200.0), ("sigmoid", -100.0), ("sigmoid", -np.inf), ("sqrtsoftplus", -200.0),
        ("sqrtsoftplus", -np.inf), ("sqrtsoftplus", 300.0), ("softmax", -np.inf), ("softmax", np.inf), ("identity", 0),
    ],
)  # fmt: skip
def test_load_balance_with_a_token_of_extreme_logits(score: str, logit: float) -> None:
    """Its scores are the op's weights, 0 for a sum of 0; gradients of other tokens are unaffected."""
    method = RoutingMethod(4, 4, score)
    logits = torch.tensor([[1.0, 2, 3, 4], [logit] * 4], requires_grad=True)
    with torch.no_grad():
        weights, indices = activation_topk(logits, method)
    counts, mean_scores = load_balance(logits, indices, method)
    assert counts.tolist() == [2] * 4
    torch.testing.assert_close(mean_scores, torch.zeros(2, 4).scatter(1, indices.long(), weights).mean(0))
    (got,) = torch.autograd.grad(mean_scores[0], logits)
    (want,) = torch.autograd.grad(load_balance(logits[:1], indices[:1], method).mean_scores[0] / 2, logits)
    torch.testing.assert_close(got[0], want[0])
    assert torch.isfinite(got[1]).all()
    if not weights[1].any():
        assert not got[1].any()


def test_load_balance_of_invalid_indices() -> None:
    """Their rows count as padding: checking them would wait for the GPU, counting them would break its context."""
    method = RoutingMethod(4, 2)
    logits = torch.randn(5, 4, generator=torch.Generator().manual_seed(1))
    want = load_balance(logits[:1], torch.tensor([[0, 3]]), method)
    for dtype in (torch.int32, torch.int64):
        indices = torch.tensor([[0, 3], [4, 1], [1, 4], [-7, 2], [2**31 - 1, -(2**31)]], dtype=dtype)
        for got, alone in zip(load_balance(logits, indices, method), want, strict=True):
            torch.testing.assert_close(got, alone)


def test_load_balance_without_valid_tokens() -> None:
    method = RoutingMethod(4, 2, "softmax")
    for n in (0, 3):
        logits = torch.full((n, 4), np.nan, requires_grad=True)
        counts, mean_scores = load_balance(logits, torch.full((n, 2), -1, dtype=torch.int32), method)
        assert (counts.tolist(), mean_scores.tolist()) == ([0] * 4, [0.0] * 4)


@pytest.mark.slow("seconds")
@pytest.mark.filterwarnings("error:Dynamo detected")
def test_load_balance_in_a_graph_and_its_loss() -> None:
    """Even use gives loss 1, and the usual loss of a whole layer compiles into one graph."""
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


def given(**changed: Any) -> dict[str, Any]:
    return {"logits": torch.zeros(5, 8), "indices": torch.zeros(5, 2, dtype=torch.int32), "method": METHOD} | changed


REFUSED: list[tuple[dict[str, Any], type[Exception], str]] = [
    ({"logits": np.zeros((5, 8), np.float32)}, TypeError, "logits must be a PyTorch tensor, got ndarray"),
    ({"logits": torch.zeros(5, 8).double()}, TypeError, "logits must be float32 or float16 or bfloat16, got float64"),
    (
        {"logits": torch.zeros(1, 5, 8)},
        ValueError,
        r"logits must have shape \[num_tokens, num_experts \(\+ shared\)\] = \[num_tokens, 8\], got",
    ),
    ({"logits": torch.zeros(5, 7)}, ValueError, r"logits must have shape \[.*\] = \[num_tokens, 8\], got"),
    ({"method": RoutingMethod(4, 2)}, ValueError, r"logits must have shape \[.*\] = \[num_tokens, 4\], got"),
    ({"indices": None}, TypeError, "indices must be a PyTorch tensor, got NoneType"),
    ({"indices": torch.zeros(5, 2)}, TypeError, "indices must be uint8 or .* or int64, got float32"),
    ({"indices": torch.zeros(4, 2, dtype=torch.int32)}, ValueError, r"indices must have shape \[.*\] = \[5, 2\], got"),
    ({"indices": torch.zeros(5, 3, dtype=torch.int32)}, ValueError, r"indices must have shape \[.*\] = \[5, 2\], got"),
    ({"indices": torch.zeros(5, dtype=torch.int32)}, ValueError, r"indices must have shape \[.*\], got int32 \[5\]"),
    ({"indices": torch.zeros(5, 2, dtype=torch.int32, device="meta")}, ValueError, "all arrays must lie on one device"),
    ({"logit_bias": np.zeros(8, np.float32)}, TypeError, "logit_bias must be a PyTorch tensor, got ndarray"),
    ({"logit_bias": torch.zeros(8).half()}, TypeError, "logit_bias must be float32, got float16"),
    ({"logit_bias": torch.zeros(7)}, ValueError, r"logit_bias must have shape \[num_experts\] = \[8\], got"),
]


@pytest.mark.parametrize(("changed", "error", "words"), REFUSED, ids=[words for *_, words in REFUSED])
def test_refused_arguments_of_load_balance(changed: dict[str, Any], error: type[Exception], words: str) -> None:
    load_balance(**given())
    with pytest.raises(error, match=f"^load_balance: {words}"):
        load_balance(**given(**changed))


@pytest.mark.slow("seconds")
def test_refused_arguments_of_load_balance_in_a_graph() -> None:
    torch.compiler.reset()
    compiled = torch.compile(load_balance, backend="aot_eager", fullgraph=True, dynamic=True)
    for n in (5, 9):
        more = {"logits": torch.zeros(n, 8), "indices": torch.zeros(n, 2, dtype=torch.int32)}
        assert compiled(**given(**more)).counts.tolist() == [2 * n, *[0] * 7]
    wrong = given(logits=torch.zeros(5, 7))
    with pytest.raises(RuntimeError):  # PyTorch's own, which shows the line
        compiled(**wrong)
    with pytest.raises(ValueError, match=r"^load_balance: logits must have shape \[.*\] = \[num_tokens, 8\]"):
        torch.compile(load_balance, backend="aot_eager")(**wrong)


def test_load_balance_with_shared_experts() -> None:
    """Their columns may be given or not; logits have the columns of the op."""
    method = RoutingMethod(8, 2, "sigmoid", num_shared_experts=1, shared_in_normalizer=True)
    logits = torch.randn(5, 9, generator=torch.Generator().manual_seed(1))
    indices = activation_topk(logits, method).indices
    for got, want in zip(*(load_balance(logits, i, method) for i in (indices, indices[:, :2])), strict=True):
        assert torch.equal(got, want)
    with pytest.raises(ValueError, match=r"logits must have shape \[.*\] = \[num_tokens, 9\], got float32 \[5, 8\]"):
        load_balance(logits[:, :8], indices, method)
