# SPDX-License-Identifier: Apache-2.0
"""Gradients of the logits of dense_router in PyTorch: alone, beside those of weights, batched, twice, refused."""

from __future__ import annotations

from typing import Any
from unittest import mock

import pytest

from cupy_router import RoutingMethod, RoutingWithLogits, dense_router
from tests import inputs

torch = pytest.importorskip("torch", reason="PyTorch is not installed")
from cupy_router.torch import _routing_gradient  # noqa: E402

METHOD = RoutingMethod(12, 3, "sigmoid", scale=1.5)
N, HIDDEN = 7, 10


def tensor(*shape: int, seed: int) -> Any:
    return torch.from_numpy(inputs.normal(shape, seed=400 + seed))


def arrays(dtype: Any = torch.float32) -> list[Any]:
    """Return x, weight and logit_bias."""
    made = [tensor(N, HIDDEN, seed=0).to(dtype), tensor(12, HIDDEN, seed=1).to(dtype), tensor(12, seed=2)]
    return [array.requires_grad_() for array in made]


def route(x: Any, weight: Any, logit_bias: Any, **options: Any) -> Any:
    return dense_router(x, weight, METHOD, logit_bias=logit_bias, return_logits=True, **options)


def plain_logits(x: Any, weight: Any, logit_bias: Any) -> Any:
    return x.float() @ weight.float().T + logit_bias


UPSTREAM = tensor(N, 12, seed=3)


@pytest.mark.parametrize("logits_dtype", inputs.FLOATS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_loss_of_logits_alone(dtype: Any, logits_dtype: str) -> None:
    given = arrays(dtype)
    result = route(*given, logits_dtype=logits_dtype)
    assert result.logits.dtype == getattr(torch, logits_dtype)
    upstream = UPSTREAM.to(result.logits.dtype)
    with mock.patch.object(_routing_gradient, "run") as run:
        got = torch.autograd.grad(result.logits, given, upstream)
    assert not run.called, "weights need no backward pass"
    want = torch.autograd.grad(plain_logits(*given), given, upstream.float())
    for a, b in zip(got, want, strict=True):
        assert a.dtype == b.dtype
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize("logits_dtype", ["float32", "bfloat16"])
def test_a_loss_of_weights_alone_is_that_of_a_call_without_logits(logits_dtype: str) -> None:
    given, upstream = arrays(), tensor(N, 3, seed=4)
    got = torch.autograd.grad(route(*given, logits_dtype=logits_dtype).weights, given, upstream)
    weights = dense_router(*given[:2], METHOD, logit_bias=given[2]).weights
    for a, b in zip(got, torch.autograd.grad(weights, given, upstream), strict=True):
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize(("logits_dtype", "products"), [("float32", 0), ("bfloat16", 1)])
def test_exact_logits_are_kept_rather_than_computed_again(logits_dtype: str, products: int) -> None:
    result = route(*arrays(), logits_dtype=logits_dtype)
    with mock.patch.object(_routing_gradient, "gate_gemm", wraps=_routing_gradient.gate_gemm) as gate_gemm:
        (result.weights.sum() + result.logits.sum()).backward()
    assert gate_gemm.call_count == products


def test_what_was_kept_may_not_be_changed() -> None:
    result = route(*arrays())
    result.logits.mul_(2)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        result.weights.sum().backward()


@pytest.mark.parametrize("count", [0, 3, N])
@pytest.mark.parametrize("as_array", [False, True])
def test_padding_has_no_gradient(count: int, as_array: bool) -> None:
    given = arrays()
    num_valid = torch.tensor([count], dtype=torch.int32) if as_array else count
    upstream = UPSTREAM.clone()
    upstream[count:] = torch.nan  # what a loss makes of padding does not spread
    got = torch.autograd.grad(route(*given, num_valid=num_valid).logits, given, upstream)
    want = torch.autograd.grad(plain_logits(*given)[:count], given, UPSTREAM[:count])
    for a, b in zip(got, want, strict=True):
        torch.testing.assert_close(a, b)


def both(result: Any) -> Any:
    return (result.weights**2).sum() + (result.logits * UPSTREAM).sum()


def test_functional_gradients_are_the_eager_ones() -> None:
    given = arrays()
    want = torch.autograd.grad(both(route(*given)), given)
    got = torch.func.grad(lambda *arrays: both(route(*arrays)), argnums=(0, 1, 2))(*[a.detach() for a in given])
    for a, b in zip(got, want, strict=True):
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize("logits_dtype", ["float32", "bfloat16"])
def test_batched_gradients(logits_dtype: str) -> None:
    given = arrays()
    result = route(*given, logits_dtype=logits_dtype, num_valid=5)
    upstream = torch.stack([UPSTREAM, UPSTREAM.flip(0)]).to(result.logits.dtype)
    weights = torch.stack([result.weights.detach(), 1 - result.weights.detach()])
    for outputs, grads in (
        ((result.logits,), (upstream,)),
        ((result.weights, result.logits), (weights, upstream)),
    ):
        got = torch.autograd.grad(outputs, given, grads, retain_graph=True, is_grads_batched=True)
        for place in range(2):
            one = torch.autograd.grad(outputs, given, [grad[place] for grad in grads], retain_graph=True)
            for a, b in zip(got, one, strict=True):
                torch.testing.assert_close(a[place], b)


def test_second_derivatives_of_logits_but_not_of_weights() -> None:
    given = arrays()
    first = torch.autograd.grad((route(*given).logits ** 3).sum(), given, create_graph=True)
    got = torch.autograd.grad(sum(grad.sum() for grad in first), given)
    first = torch.autograd.grad((plain_logits(*given) ** 3).sum(), given, create_graph=True)
    for a, b in zip(got, torch.autograd.grad(sum(grad.sum() for grad in first), given), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-4)
    first = torch.autograd.grad(both(route(*given)), given, create_graph=True)
    with pytest.raises(RuntimeError, match="first derivatives only"):
        torch.autograd.grad(sum(grad.sum() for grad in first), given)


def test_out_is_refused_where_there_is_a_gradient() -> None:
    out = RoutingWithLogits(torch.zeros(N, 3), torch.zeros(N, 3, dtype=torch.int32), torch.zeros(N, 12))
    with pytest.raises(ValueError, match="dense_router: out cannot be given"):
        route(*arrays(), out=out)
    assert not any(array.any() for array in out)
    with torch.no_grad():
        assert route(*arrays(), out=out) is out
    assert out.logits.any()


def test_indices_have_no_gradient() -> None:
    result = route(*arrays())
    assert [array.requires_grad for array in result] == [True, False, True]
