# SPDX-License-Identifier: Apache-2.0
"""cupy_router.torch.Gate: shapes and arguments, of calls and of the constructor."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

from cupy_router import Routing, RoutingMethod, TopK, hash_router
from tests.gates import (
    EXPERTS,
    HIDDEN,
    METHOD,
    K,
    arguments,
    assert_same,
    dense_gate,
    expected,
    hash_gate,
    seeded,  # noqa: F401
    table,
)

torch = pytest.importorskip("torch", reason="PyTorch is not installed")
from cupy_router.torch import Gate  # noqa: E402

AXES = [(), (5,), (2, 3), (2, 1, 3, 2), (0,), (3, 0), (0, 4)]

# -- Shapes and arguments of a call ------------------------------------------------------------------------------------


@pytest.mark.parametrize("axes", AXES, ids=str)
@pytest.mark.parametrize("make", [dense_gate, hash_gate])
def test_any_number_of_leading_axes(make: Callable[[], Any], axes: tuple[int, ...]) -> None:
    gate = make()
    given = arguments(gate, axes)
    got = gate(*given)
    assert got.weights.shape == got.indices.shape == (*axes, K)
    assert_same(got, expected(gate.state_dict(), *given))


def test_shared_experts_are_columns() -> None:
    gate = Gate(HIDDEN, RoutingMethod(EXPERTS, K, "sigmoid", num_shared_experts=2, shared_in_normalizer=True))
    assert gate.weight.shape == (EXPERTS + 2, HIDDEN)
    assert gate(torch.randn(2, 3, HIDDEN)).indices.shape == (2, 3, K + 2)


def test_a_preset_by_name() -> None:
    gate = Gate(HIDDEN, "deepseek-v4-flash")
    assert gate.method == RoutingMethod(256, 6, renormalize_eps=1e-20, scale=1.5)
    assert gate(torch.randn(2, HIDDEN)).weights.shape == (2, 6)


@pytest.mark.parametrize("axes", AXES, ids=str)
@pytest.mark.parametrize("make", [dense_gate, hash_gate])
def test_out_has_the_shape_of_the_results(make: Callable[[], Any], axes: tuple[int, ...]) -> None:
    gate = make().requires_grad_(False)
    given = arguments(gate, axes)
    out = Routing(torch.full((*axes, K), 7.0), torch.full((*axes, K), 7, dtype=torch.int32))
    assert gate(*given, out=out) is out
    assert_same(out, expected(gate.state_dict(), *given))
    assert [array._version for array in out] == [1, 1]  # so that autograd knows
    leaf = Routing(torch.zeros((*axes, K), requires_grad=True), out.indices)
    with pytest.raises(ValueError, match=r"out\.weights must not require grad"):
        gate(*given, out=leaf)


def test_out_may_be_a_part_of_larger_tensors() -> None:
    gate, x = dense_gate().requires_grad_(False), torch.randn(2, 3, HIDDEN)
    weights, indices = torch.full((2, 3, K + 3), 7.0), torch.full((2, 3, K + 1), 7, dtype=torch.int32)
    out = Routing(weights[..., :K], indices[..., :K])
    assert_same(gate(x, out=out), expected(gate.state_dict(), x))
    assert (weights[..., K:] == 7).all()


@pytest.mark.parametrize("make", [dense_gate, hash_gate])
@pytest.mark.parametrize("count", [4, np.int64(4), torch.tensor([4], dtype=torch.int32)], ids=repr)
def test_num_valid_counts_tokens_of_all_axes(make: Callable[[], Any], count: Any) -> None:
    gate = make()
    given = arguments(gate, (2, 3))
    weights, indices = gate(*given, num_valid=count)
    want = gate(*given)
    for got, full, empty in ((weights, want.weights, 0), (indices, want.indices, -1)):
        assert torch.equal(got.flatten(0, 1)[:4], full.flatten(0, 1)[:4])
        assert (got.flatten(0, 1)[4:] == empty).all()


def test_a_dense_gate_ignores_token_ids() -> None:
    gate, x = dense_gate(), torch.randn(2, 3, HIDDEN)
    assert_same(gate(x, torch.arange(3)), gate(x))


def test_views_of_x() -> None:
    gate, x = dense_gate(), torch.randn(3, 2, 2 * HIDDEN)
    for view in (x[:, :, :HIDDEN], x.transpose(0, 1)[..., :HIDDEN], x[:, 0, HIDDEN:]):
        assert_same(gate(view), expected(gate.state_dict(), view.contiguous()))


@pytest.mark.parametrize("axes", [(), (5,), (2, 3), (2, 1, 3, 2)], ids=str)
def test_rows_that_are_not_contiguous_are_refused_whatever_the_axes(axes: tuple[int, ...]) -> None:
    gate, wide, column = dense_gate(), torch.randn(*axes, 2 * HIDDEN), torch.randn(HIDDEN, *axes)
    for view in (wide[..., ::2], column.permute(*range(1, column.ndim), 0)) if axes else (wide[::2],):
        with pytest.raises(ValueError, match=r"^Gate: x must be contiguous along its last axis, got strides"):
            gate(view)


def test_columns_of_one_element_are_contiguous() -> None:
    gate = Gate(1, METHOD)
    for x in (torch.randn(2, 3, 4)[..., :1], torch.randn(4, 2, 3).permute(1, 2, 0)[..., :1], torch.randn(3, 4)[:, :1]):
        assert_same(gate(x), gate(x.contiguous()))


@pytest.mark.slow("seconds")
def test_errors_in_compiled_code() -> None:
    torch.compiler.reset()
    gate = hash_gate()
    for call in (lambda x: gate(x), lambda x: gate(x, IDS, num_valid="3"), lambda x: gate(x[..., :2], IDS)):
        with pytest.raises((TypeError, ValueError), match=r"^Gate: (token_ids|num_valid|x) must"):
            torch.compile(call, backend="aot_eager")(X)


def test_a_hash_gate_without_a_weight_is_uniform() -> None:
    gate, (x, ids) = Gate(None, METHOD, table=table(torch.int32)), arguments(hash_gate())
    assert list(gate.state_dict()) == ["tid2eid"]
    assert (gate(x, ids).weights == hash_router(torch.arange(1), gate.tid2eid, METHOD).weights[0]).all()
    assert torch.equal(gate(x[..., :3], ids).indices, gate.tid2eid[ids])
    assert gate(torch.empty(2, 0, 0), torch.empty(2, 0, dtype=torch.int64)).weights.shape == (2, 0, K)


X, IDS = torch.ones(2, 3, HIDDEN), torch.zeros(2, 3, dtype=torch.int64)
with warnings.catch_warnings(action="ignore"):  # prototypes of PyTorch
    NESTED = torch.nested.nested_tensor([torch.ones(3, HIDDEN), torch.ones(2, HIDDEN)])
JAGGED = torch.nested.nested_tensor([torch.ones(3, HIDDEN), torch.ones(2, HIDDEN)], layout=torch.jagged)
OUT = Routing(torch.empty(2, 3, K), torch.empty(2, 3, K, dtype=torch.int32))
TURNED = Routing(torch.empty(3, 2, K).transpose(0, 1), OUT.indices)


@pytest.mark.parametrize(
    ("call", "error", "words"),
    [
        (lambda g, h: g(np.ones((2, HIDDEN))), TypeError, "x must be a PyTorch tensor, got ndarray"),
        (lambda g, h: g(torch.ones(2, 3)), ValueError, r"x must have shape \[..., 8\], got \[2, 3\]"),
        (lambda g, h: g(torch.tensor(1.0)), ValueError, r"x must have shape \[..., 8\], got \[\]"),
        (lambda g, h: g(X.double()), TypeError, "x must be float32 or float16 or bfloat16, got float64"),
        (lambda g, h: h(X), TypeError, "token_ids must be a PyTorch tensor where a table selects, got NoneType"),
        (lambda g, h: h(X, torch.arange(6)), ValueError, r"token_ids must have shape \[2, 3\] like x, got \[6\]"),
        (lambda g, h: g(X, num_valid=7), ValueError, r"num_valid must be in 0\.\.6, got 7"),
        (lambda g, h: g(X, out=TopK(*OUT)), TypeError, "out must be a Routing, got TopK"),
        (lambda g, h: g(X, out=Routing(*(a.numpy() for a in OUT))), TypeError, "out.weights must be a PyTorch tensor"),
        (
            lambda g, h: g(X, out=Routing(*(a.flatten(0, 1) for a in OUT))),
            ValueError,
            r"out.weights must have shape \[2, 3, 4\], got \[6, 4\]",
        ),
        (
            lambda g, h: g(X, out=TURNED),
            ValueError,
            r"out.weights must have rows at equal distances, got strides \[4, 8",
        ),
        (lambda g, h: g(X, out=OUT._replace(indices=OUT.weights)), TypeError, "out.indices must be int32, got float32"),
        (lambda g, h: h(X, torch.zeros(2, 3)), TypeError, "token_ids must be int32 or int64, got float32"),
        (lambda g, h: h(X, IDS, num_valid="3"), TypeError, "num_valid must be an int or a one-element int32 array"),
        (lambda g, h: g(NESTED), ValueError, "x must be a dense tensor, got a nested one"),
        (lambda g, h: g(JAGGED), ValueError, "x must be a tensor with its own memory, got a NestedTensor"),
        (lambda g, h: g(X.to_sparse()), ValueError, "x must be a dense tensor.*, got torch.sparse_coo"),
        (lambda g, h: g(X[0].to_sparse()), ValueError, "x must be a dense tensor.*, got torch.sparse_coo"),
        (lambda g, h: g(torch.nn.UninitializedParameter()), ValueError, "x must be a dense tensor, got a lazy"),
        (lambda g, h: g.to("meta")(X), ValueError, "weight must be a .* meta"),
        (lambda g, h: h(X, NESTED), ValueError, "token_ids must be a dense tensor, got a nested one"),
        (lambda g, h: h(X, IDS.to_sparse()), ValueError, "token_ids must be a dense tensor.*, got torch.sparse"),
        (lambda g, h: g(X, out=OUT._replace(weights=NESTED)), ValueError, "out.weights must be a dense tensor"),
        (lambda g, h: g(X, out=OUT._replace(indices=NESTED)), ValueError, "out.indices must be a dense tensor"),
    ],
)
def test_refused_calls(call: Callable[[Any, Any], Any], error: type, words: str) -> None:
    gates = (dense_gate().requires_grad_(False), hash_gate().requires_grad_(False))
    with pytest.raises(error, match=f"^Gate: {words}"):
        call(*gates)


# -- Arguments of the constructor --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "error", "words"),
    [
        ({"hidden": 0}, ValueError, "hidden must be at least 1, got 0"),
        ({"hidden": None}, TypeError, "hidden must be an int, got NoneType"),
        ({"method": "deepseek"}, ValueError, "method is 'deepseek', but must be the name of a preset"),
        ({"method": 3}, TypeError, "method must be a RoutingMethod or the name of a preset, got int"),
        ({"bias": 2}, TypeError, "bias must be True or False, got int"),
        ({"logit_bias": torch.ones(EXPERTS)}, TypeError, "logit_bias must be True or False, got Tensor"),
        ({"expert_scale": 1.0}, TypeError, "expert_scale must be True or False, got float"),
        ({"dtype": torch.float64}, TypeError, r"dtype must be torch.float32 .* got torch.float64$"),
        ({"dtype": "bfloat16"}, TypeError, "dtype must be torch.float32 .* got 'bfloat16'$"),
        ({"table": np.zeros((5, K), np.int32)}, TypeError, "table must be a PyTorch tensor, got ndarray"),
        ({"table": torch.zeros(5, K)}, TypeError, r"table must be int32 or int64, got float32 \[5, 4\]"),
        ({"table": torch.zeros(5, 3, dtype=torch.int32)}, ValueError, r"table must have shape .* = \[vocab_size, 4\]"),
        ({"table": NESTED}, ValueError, "table must be a dense tensor, got a nested one"),
        ({"table": table().to_sparse()}, ValueError, "table must be a dense tensor.*, got torch.sparse"),
        ({"table": table().to("meta")}, ValueError, r"table must have values for a gate on cpu, got int64 \[30, 4\]"),
        ({"table": table(), "bias": True}, ValueError, "bias and table do not go together"),
        (
            {"table": table(), "hidden": None, "expert_scale": True},
            ValueError,
            "logit_bias and expert_scale need hidden",
        ),
        ({"method": "gpt-oss", "bias": True}, ValueError, "bias has no scores to go to"),
    ],
)
def test_refused_arguments(arguments: dict[str, Any], error: type, words: str) -> None:
    with pytest.raises(error, match=f"^Gate: {words}"):
        Gate(**{"hidden": HIDDEN, "method": METHOD} | arguments)


def test_repr_is_the_call_and_of_now() -> None:
    shown = f"Gate({HIDDEN}, {METHOD!r}"
    gate = dense_gate()
    assert repr(gate) == f"{shown}, bias=True, logit_bias=True, expert_scale=True)"
    gate.logit_bias = gate.e_score_correction_bias = None
    assert repr(gate) == f"{shown}, expert_scale=True)"
    assert repr(Gate(HIDDEN, METHOD, table=table())) == f"{shown}, table=[30, 4])"
    assert repr(Gate(None, METHOD, table=table())) == f"Gate(None, {METHOD!r}, table=[30, 4])"
