# SPDX-License-Identifier: Apache-2.0
"""Given experts: their real weights, whatever would be selected; rows of -1, and ids that are no experts."""

from __future__ import annotations

from dataclasses import replace
from typing import Any
from unittest import mock

import numpy as np
import pytest

from cupy_router import LayoutSpec, Router, Routing, RoutingMethod, activation_topk, dense_router, expert_layout, tuning
from cupy_router.ops import _cached
from cupy_router.ops.activation_topk import interleaved_lanes
from cupy_router.tuning import DEFAULT
from tests import compare, inputs, oracle
from tests.backends import Backend
from tests.canvas import Canvas
from tests.fuzz.case import _Chosen
from tests.given_calls import HASHED, IDS, KINDS, NAMES, UNSET, WIDE, Call
from tests.methods import Layer
from tests.recorder import recording

EVERY = pytest.mark.parametrize("kind", KINDS)
BOTH = pytest.mark.parametrize("unset", UNSET)


def uploaded(backend: Backend, call: Call, row_pad: int = 0, offset: int = 0) -> dict[str, Any]:
    return {
        name: backend.array(array, row_pad, offset) if array.ndim == 2 else backend.array(array)
        for name, array in call.arrays().items()
    }


def check(backend: Backend, call: Call, result: Any, num_valid: int | None = None) -> None:
    """Assert that each token has its experts with the oracle's weights, or none."""
    weights, indices = backend.numpy(result.weights), backend.numpy(result.indices)
    arrays, (experts, exist) = call.arrays(), call.experts()
    exist[call.n if num_valid is None else num_valid :] = False
    layer = Layer(None, arrays.get("logit_bias"), arrays.get("expert_scale"))
    logits = call.logits()[exist]
    compare.assert_right((weights[exist], indices[exist]), logits, call.method, layer, experts[exist])
    assert (indices[~exist] == np.array(-1).astype(indices.dtype)).all()
    assert not weights[~exist].astype(np.float32).any()


# -- Values ------------------------------------------------------------------------------------------------------------


@pytest.mark.many_kernels
@pytest.mark.parametrize("name", NAMES)
@BOTH
@EVERY
def test_every_token_has_the_weights_of_its_experts(kind: str, unset: str, name: str, backend: Backend) -> None:
    call = Call(kind, name, unset)
    _, exist = call.experts()
    assert 0 < exist.sum() < call.n
    check(backend, call, call(uploaded(backend, call)))


@pytest.mark.many_kernels
@pytest.mark.parametrize("name", ["int16 indices", "everything", "8 groups, best 4, top 2", "uint8 indices"])
@BOTH
def test_given_rows_beside_rows_that_are_chosen_again(unset: str, name: str, backend: Backend) -> None:
    """Among many rows, several share a warp, which sorts all their candidates if bounds leave the order of one open."""
    call, rows = Call("activation_topk", name, unset, n=60), DEFAULT.table.rows
    arrays = call.arrays()
    arrays["logits"] = inputs.rng(736).integers(0, 3, arrays["logits"].shape).astype(np.float32)
    arrays["indices"][::7] = arrays["indices"][::7, :1]  # one expert in all places
    given = {key: backend.array(array) for key, array in arrays.items()}
    want = call(given)  # a row for a warp
    many = replace(DEFAULT.table, rows=replace(rows, few_rows=0, very_few_rows=0))
    with mock.patch.object(tuning.gpu, "nearest", return_value=many):
        _cached.forget()
        assert 0 < interleaved_lanes(DEFAULT, call.method, call.n) < 32
        got = call(given)
    _cached.forget()
    for array, right in zip(got, want, strict=True):
        compare.assert_same_bits(backend.numpy(array), backend.numpy(right))


@pytest.mark.many_kernels
@pytest.mark.parametrize("name", WIDE)
@BOTH
def test_rows_of_a_block(unset: str, name: str, backend: Backend) -> None:
    call = Call("activation_topk", name, unset, n=7)
    check(backend, call, call(uploaded(backend, call)))


@pytest.mark.many_kernels
@pytest.mark.parametrize("name", ["everything", "soft cap", "two shared experts"])
@pytest.mark.parametrize("n", [23, 200])
@BOTH
@pytest.mark.parametrize("kind", HASHED)
def test_hash_layers(kind: str, unset: str, n: int, name: str, backend: Backend) -> None:
    """Tokens whose row is -1 have the experts of the table, unless there are no token ids."""
    call = Call(kind, name, unset, "int16", n)
    arrays = uploaded(backend, call)
    if "without gate" not in kind:
        check(backend, call, call(arrays))
        check(backend, call, call(arrays, layout=LayoutSpec()))
        check(backend, call, call(arrays, return_logits=True, num_valid=9), 9)
        return
    weights, indices = (backend.numpy(array) for array in call(arrays, num_valid=n - 3))
    experts, exist = call.experts()
    exist[n - 3 :] = False
    np.testing.assert_array_equal(indices[exist][:, : call.method.top_k], experts[exist])
    assert (weights[exist][:, : call.method.top_k].astype(np.float32) == np.float32(1 / call.method.top_k)).all() or (
        call.method.weight_dtype != "float32"
    )
    assert (indices[~exist] == -1).all()
    assert not weights[~exist].astype(np.float32).any()


@pytest.mark.many_kernels
@pytest.mark.parametrize("dtype", IDS)
@BOTH
@EVERY
def test_ids_of_any_dtype_in_rows_that_lie_apart(kind: str, unset: str, dtype: str, backend: Backend) -> None:
    """Unsigned ids have no unset row: the highest value, which a routing has in place of -1, is no expert."""
    call = Call(kind, "two shared experts", unset, dtype, with_shared=dtype in ("int16", "uint8"))
    result = call(uploaded(backend, call, 3, 1))
    check(backend, call, result)
    if dtype.startswith("u"):
        assert (backend.numpy(result.indices)[1::6] == -1).all()


@pytest.mark.many_kernels
@pytest.mark.parametrize("as_of", [0, 1000, 5000])
@pytest.mark.parametrize("name", ["two shared experts", "soft cap", "8 groups, best 4, top 2", "int16 indices"])
def test_every_division_of_rows_over_lanes(name: str, as_of: int, backend: Backend) -> None:
    call = Call("activation_topk", name, "route", "int16")
    with _Chosen(as_of, ""):
        check(backend, call, call(uploaded(backend, call)))


@pytest.mark.many_kernels
@pytest.mark.parametrize("valid", [0, 4, 20])
@BOTH
@EVERY
def test_padding(kind: str, unset: str, valid: int, backend: Backend) -> None:
    call = Call(kind, "two shared experts", unset)
    arrays = uploaded(backend, call)
    for num_valid in (valid, backend.array(np.array([valid], np.int32))):
        check(backend, call, call(arrays, num_valid=num_valid), valid)


@pytest.mark.many_kernels
@BOTH
@pytest.mark.parametrize("n", [0, 1, 5, 64, 65])
@EVERY
def test_any_number_of_tokens(kind: str, n: int, unset: str, backend: Backend) -> None:
    if n > 64 and kind.endswith("decode"):
        pytest.skip("more than path 'decode' takes")
    call = Call(kind, "float16 weights, int64 indices", unset, n=n, dtype="bfloat16")
    if n:
        check(backend, call, call(uploaded(backend, call)))
    else:
        empty = {
            name: a[:0] if name in ("logits", "x", "indices", "token_ids") else a
            for name, a in Call(kind, call.name).arrays().items()
        }
        result = call({name: backend.array(a) if a.size else backend.upload(a) for name, a in empty.items()})
        assert result.indices.shape == (0, 6)


@pytest.mark.many_kernels
@BOTH
@EVERY
def test_out_is_filled_at_its_stride(kind: str, unset: str, backend: Backend) -> None:
    call = Call(kind, "two shared experts", unset)
    canvases = [Canvas((call.n, 8), 3, dtype, backend) for dtype in (np.float32, np.int32)]
    out = Routing(*(canvas.array for canvas in canvases))
    assert call(uploaded(backend, call), out=out) is out
    check(backend, call, out)
    assert all(canvas.is_clean() for canvas in canvases)


@pytest.mark.many_kernels
@pytest.mark.parametrize("name", ["two shared experts", "softmax, bias on logits"])
@BOTH
@pytest.mark.parametrize("kind", [kind for kind in KINDS if kind != "activation_topk"])
def test_logits_are_those_of_all_experts(kind: str, unset: str, name: str, backend: Backend) -> None:
    call = Call(kind, name, unset)
    result = call(uploaded(backend, call), return_logits=True, num_valid=20)
    check(backend, call, result, 20)
    want = call.logits()
    bias = call.arrays().get("logit_bias")
    want = want if bias is None else want + bias
    np.testing.assert_allclose(backend.numpy(result.logits)[:20], want[:20], rtol=1e-6, atol=1e-6)
    assert not backend.numpy(result.logits)[20:].any()


@pytest.mark.many_kernels
@pytest.mark.parametrize("n", [5, 40, 200])
@BOTH
@EVERY
def test_layout_is_that_of_the_experts(kind: str, unset: str, n: int, backend: Backend) -> None:
    if n > 64 and kind.endswith("decode"):
        pytest.skip("more than path 'decode' takes")
    call = Call(kind, "two shared experts", unset, n=n)
    result = call(uploaded(backend, call), layout=LayoutSpec(4))
    check(backend, call, result)
    want = expert_layout(result.indices, 66, alignment=4)
    for name in ("counts", "offsets", "order", "positions"):
        got, right = (backend.numpy(getattr(layout, name)) for layout in (result.layout, want))
        np.testing.assert_array_equal(got, right)


# -- Known mistakes of router replay -----------------------------------------------------------------------------------


@EVERY
def test_a_drifted_expert_has_its_real_weight(kind: str, backend: Backend) -> None:
    """Experts that this model would not choose; others have set their scores to zero before they gathered them."""
    call = Call(kind, "float16 weights, int64 indices", "empty")
    arrays = call.arrays()
    experts, exist = call.experts()
    selected = oracle.choose(oracle.prepare(call.logits(), call.method, arrays.get("logit_bias")), call.method)
    drifted = np.array([set(a) != set(b) for a, b in zip(experts, selected, strict=True)]) & exist
    assert drifted.any()
    weights = backend.numpy(call(uploaded(backend, call)).weights)
    assert (weights[drifted].astype(np.float32) > 0).all()


@EVERY
def test_expert_0_is_an_expert_and_no_padding(kind: str, backend: Backend) -> None:
    call = Call(kind, "two shared experts", "empty")
    arrays = uploaded(backend, call)
    arrays["indices"] = backend.array(np.zeros((call.n, 6), np.int32))
    result = call(arrays)
    assert (backend.numpy(result.indices)[:, :6] == 0).all()
    assert (backend.numpy(result.weights)[:, :6] > 0).all()


@EVERY
def test_replayed_selection_gives_the_same_bits(kind: str, backend: Backend) -> None:
    """Indices of a call, given to the same call, change nothing, wherever the weights come from the same logits."""
    for name in ("two shared experts", "everything", "3 groups of 8"):
        call = Call(kind, name)
        arrays = uploaded(backend, call)
        del arrays["indices"]
        method = call.method
        if kind == "activation_topk":
            want = activation_topk(arrays.pop("logits"), method, **arrays)
        elif kind == "Router":
            want = Router(method, **{k: v for k, v in arrays.items() if k != "x"})(arrays["x"])
        elif kind == "hash Router":
            layer = {k: v for k, v in arrays.items() if k not in ("x", "token_ids")}
            want = Router(method, **layer)(arrays["x"], arrays["token_ids"])
        else:
            want = dense_router(
                arrays.pop("x"), arrays.pop("weight"), method, path=kind.partition(" ")[2] or None, **arrays
            )
        arrays = uploaded(backend, call) | {"indices": want.indices}
        got = call(arrays)
        compare.assert_same_bits(backend.numpy(got.indices), backend.numpy(want.indices))
        weights = [backend.numpy(routing.weights).astype(np.float32) for routing in (got, want)]
        np.testing.assert_allclose(*weights, rtol=1e-6 if str(got.weights.dtype) == "float32" else 2.0**-7)


def test_all_rows_of_minus_one_are_routed_as_without(backend: Backend) -> None:
    for kind in KINDS:
        call = Call(kind, "8 groups, best 4, top 2", "route")
        arrays = uploaded(backend, call)
        arrays["indices"] = backend.array(np.full((call.n, 8), -1, np.int64))
        got, want = call(arrays), call(arrays | {"indices": None})
        for a, b in zip(got, want, strict=True):
            compare.assert_same_bits(backend.numpy(a), backend.numpy(b))


def test_nan_and_infinite_logits_of_given_experts(backend: Backend) -> None:
    logits = np.array([[np.nan, 1, 2, np.inf], [np.nan, 1, 2, 3], [1, np.inf, 2, 3]], np.float32)
    ids = np.array([[1, 2], [0, 1], [1, 3]], np.int32)
    method = RoutingMethod(4, 2, "identity")
    for unset in UNSET:
        result = activation_topk(backend.array(logits), method, indices=backend.array(ids), unset=unset)
        want = [[1 / 3, 2 / 3], [np.nan, 1], [np.nan, 0]]
        np.testing.assert_allclose(backend.numpy(result.weights), want, rtol=1e-6)


@pytest.mark.parametrize("hidden", [512, 10240])
def test_only_the_products_that_are_needed_while_these_are_few(hidden: int) -> None:
    """A limit of the gate's rows that they read, and one of elements."""
    tuned, method = DEFAULT.table.given_experts, RoutingMethod(256, 8)
    most = min(tuned.max_gates_read * 256, tuned.max_elements_read // hidden) // 8
    weight, products, logits = np.zeros((256, hidden), np.float16), 2, 1  # sources of the weights
    for n, source in ((1, products), (most, products), (most + 1, logits)):
        x, ids = np.zeros((n, hidden), np.float16), np.zeros((n, 8), np.int16)
        with recording() as recorder:
            dense_router(x, weight, method, indices=ids, unset="empty")
        assert [(call.kernel, call.macros["SOURCE"]) for call in recorder.launches] == [("given_experts", source)]


# -- Arguments ---------------------------------------------------------------------------------------------------------

LOGITS = np.zeros((6, 16), np.float32)
BAD: list[tuple[dict[str, Any], type[Exception], str]] = [
    ({"indices": np.zeros((6, 3), np.int32)}, ValueError, r"indices must have shape .* = \[6, 2\], got int32 \[6, 3\]"),
    ({"indices": np.zeros((5, 2), np.int32)}, ValueError, r"indices must have shape .* = \[6, 2\], got int32 \[5, 2\]"),
    ({"indices": np.zeros((2, 6), np.int32)}, ValueError, r"indices must have shape .* = \[6, 2\], got int32 \[2, 6\]"),
    ({"indices": np.zeros(6, np.int32)}, ValueError, r"indices must have shape \[num_tokens, .*\], got int32 \[6\]"),
    ({"indices": np.zeros((6, 2), np.int8)}, TypeError, "indices must be uint8 or .* got int8"),
    ({"indices": np.zeros((6, 2), np.float32)}, TypeError, "indices must be uint8 or .* got float32"),
    ({"indices": np.zeros((6, 2), np.int32), "unset": "keep"}, ValueError, "unset must be 'route' or 'empty', got 'k"),
    ({"unset": np.array(["route", "empty"])}, ValueError, "unset must be 'route' or 'empty', got ndarray"),
    ({"indices": np.zeros((2, 6), np.int32).T}, ValueError, "indices must be contiguous along its last axis, got"),
]


@pytest.mark.parametrize(("arguments", "error", "message"), BAD)
def test_errors(arguments: dict[str, Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=f"^activation_topk: {message}"):
        activation_topk(LOGITS, RoutingMethod(16, 2), **arguments)
    x, weight = np.zeros((6, 8), np.float32), np.zeros((16, 8), np.float32)
    with pytest.raises(error, match=f"^dense_router: {message}"):
        dense_router(x, weight, RoutingMethod(16, 2), **arguments)
    with pytest.raises(error, match=f"^Router: {message}"):
        Router(RoutingMethod(16, 2), weight=weight)(x, **arguments)


def test_columns_of_shared_experts_in_errors() -> None:
    method = RoutingMethod(16, 2, num_shared_experts=2)
    with pytest.raises(ValueError, match=r"top_k = 2 or, with those of shared experts, 4 columns, got int32 \[6, 3\]"):
        activation_topk(LOGITS, method, indices=np.zeros((6, 3), np.int32))
