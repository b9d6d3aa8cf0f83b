# SPDX-License-Identifier: Apache-2.0
"""The backward pass by the gate's rows of the chosen experts alone, and by all: each against a plain twin."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from cupy_router import RoutingMethod, dense_router
from cupy_router.tuning import DEFAULT
from tests import inputs
from tests.given_calls import Call, read_gates

torch = pytest.importorskip("torch", reason="PyTorch is not installed")
from cupy_router.torch import _chosen_gradient  # noqa: E402  # after importorskip
from tests.test_torch_given import check_against_twin, on_torch  # noqa: E402

METHOD = RoutingMethod(24, 4, "sigmoid", scale=1.5)
NAMES = (
    "logit scale and soft cap", "softmax after top-k", "sigmoid, bias on logits", "everything",
    "8 groups, best 4, top 2", "two shared experts", "bfloat16 weights", "uint8 indices", "own score",
    "32 columns of results",
)  # fmt: skip
WHOLE = ("softmax, bias on logits", "shared in the normaliser")  # weights depend on more logits than the chosen ones
WAYS = {"chosen": 1 << 40, "all": 0}


@pytest.fixture
def served(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Numbers of tokens of the backward passes by chosen experts alone."""
    found, gradients = [], _chosen_gradient.gradients

    def counted(method: RoutingMethod, grad_weights: Any, *others: Any) -> Any:
        found.append(len(grad_weights))
        return gradients(method, grad_weights, *others)

    monkeypatch.setattr(_chosen_gradient, "gradients", counted)
    return found


def frozen_of(smooth: dict[str, Any], *names: str) -> dict[str, Any]:
    """Take those of the tensors out that exist, as tensors without a gradient."""
    return {name: smooth.pop(name).requires_grad_(False) for name in names if name in smooth}


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("kind", ["dense_router", "hash Router"])
@pytest.mark.parametrize("way", WAYS)
def test_gradients_are_those_of_a_plain_router(
    way: str, kind: str, name: str, dtype: str, served: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Rows are of every kind: experts, one of them twice, -1, and no expert."""
    read_gates(monkeypatch, WAYS[way])
    call = Call(kind, name, "route", dtype=dtype)
    arrays, smooth = on_torch(call)
    frozen = frozen_of(smooth, "expert_scale")
    check_against_twin(call, call(arrays), smooth, **frozen)
    assert served == ([call.n] if way == "chosen" else [])


@pytest.mark.parametrize("names", [("x",), ("weight",), ("logit_bias",), ("x", "weight"), ("x", "expert_scale")])
def test_what_is_needed(names: tuple[str, ...], served: list[int]) -> None:
    """The gradient with respect to expert_scale needs the logits of all experts."""
    call = Call("dense_router", "everything", "empty")
    arrays, smooth = on_torch(call)
    frozen = frozen_of(smooth, *(smooth.keys() - set(names)))
    check_against_twin(call, call(arrays), smooth, **frozen)
    assert bool(served) == ("expert_scale" not in names)


@pytest.mark.parametrize("name", WHOLE)
def test_methods_whose_weights_depend_on_all_logits(name: str, served: list[int]) -> None:
    call = Call("dense_router", name, "empty")
    arrays, smooth = on_torch(call)
    frozen = frozen_of(smooth, "expert_scale")
    check_against_twin(call, call(arrays), smooth, **frozen)
    assert not served


@pytest.mark.parametrize("options", [{}, {"return_logits": True}, {"batch_invariant": True}])
def test_few_tokens_only_and_only_if_the_logits_are_not_there(options: dict[str, bool], served: list[int]) -> None:
    """Batch-invariant calls compute logits again in the order of their forward pass."""
    most = DEFAULT.table.given_experts.max_gates_read_backward * METHOD.num_experts // METHOD.top_k
    gate = torch.from_numpy(inputs.normal((24, 40), seed=741))
    for n in (1, most, most + 1):
        x = torch.from_numpy(inputs.normal((n, 40), seed=742)).requires_grad_()
        dense_router(x, gate, METHOD, **options).weights.square().sum().backward()
    assert served == ([] if options else [1, most])


def test_other_layouts_and_dtypes(served: list[int]) -> None:
    """Rows at a distance, a gate of another dtype, and a gradient that is one number."""
    wide, gate = (torch.from_numpy(inputs.normal((rows, 80), seed=rows)) for rows in (30, 24))
    for x, weight in ((wide[:, 8:48], gate[:, 40:]), (wide[::3, :40].bfloat16(), gate[:, :40]),
                      (wide[:, :40].half(), gate[:, :40].bfloat16())):  # fmt: skip
        x, weight = (array.detach().requires_grad_() for array in (x, weight))
        routing = dense_router(x, weight, METHOD)
        found = torch.autograd.grad(routing.weights.sum(), [x, weight])
        logits = x.double() @ weight.double().t()
        scores = logits.gather(1, routing.indices.long()).sigmoid()
        right = torch.autograd.grad((1.5 * scores / scores.sum(1, keepdim=True)).sum(), [x, weight])
        for got, want in zip(found, right, strict=True):
            assert (got.dtype, got.shape) == (want.dtype, want.shape)
            torch.testing.assert_close(got, want, rtol=2e-2 if got.dtype != torch.float32 else 1e-4, atol=2e-6)
    assert len(served) == 3


@pytest.mark.parametrize("name", [name for name in NAMES if name != "everything"])  # its indices are int64
def test_jax_computes_the_same_in_both_ways(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    jax = pytest.importorskip("jax", reason="JAX is not installed")
    if jax.__version_info__ < (0, 8):
        pytest.skip("calls inside jax.jit need JAX 0.8 or later")
    from cupy_router.jax import _chosen_gradient as by_chosen

    served = []
    gradients = by_chosen.gradients
    monkeypatch.setattr(by_chosen, "gradients", lambda *given: served.append(1) or gradients(*given))
    call, found = Call("dense_router", name, "route"), {}
    arrays = {key: jax.numpy.array(array) for key, array in call.arrays().items() if key != "expert_scale"}
    given = {key: arrays[key] for key in ("x", "weight", "logit_bias") if key in arrays}
    for way, most in WAYS.items():
        read_gates(monkeypatch, most)

        def loss(some: dict[str, Any]) -> Any:
            weights = call(arrays | some).weights.astype("float32")
            return (weights * np.linspace(-1, 2, weights.size, dtype=np.float32).reshape(weights.shape)).sum()

        found[way] = jax.jit(jax.grad(loss))(given)
    assert len(served) == 1
    for key, array in found["chosen"].items():
        np.testing.assert_allclose(array, found["all"][key], rtol=1e-5, atol=1e-5, err_msg=key)
