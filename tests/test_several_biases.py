# SPDX-License-Identifier: Apache-2.0
"""Several biases, of which each token has one: the experts and weights that it has with its bias alone."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from cupy_router import LayoutSpec, Router, Routing, RoutingMethod, activation_topk, dense_router, expert_layout, gemm
from cupy_router.ops import _cached, _chunks
from tests import compare, inputs
from tests.backends import Backend
from tests.bias_calls import HASHED, KINDS, NAMES, WIDE, Call
from tests.canvas import Canvas
from tests.fuzz.case import call as routed
from tests.methods import Layer

EVERY = pytest.mark.parametrize("kind", KINDS)
CHUNKED = ("dense_router prefill", "hash_router of x", "hash Router")


def uploaded(backend: Backend, call: Call, row_pad: int = 0, offset: int = 0) -> dict[str, Any]:
    flat = ("bias_index", "logit_bias", "expert_scale", "token_ids")
    return {
        name: backend.array(array) if name in flat else backend.array(array, row_pad, offset)
        for name, array in call.arrays().items()
    }


def check(backend: Backend, call: Call, result: Any, num_valid: int | None = None) -> None:
    """Assert that each token has the oracle's experts and weights for its own bias, or none if that does not exist."""
    weights, indices = backend.numpy(result.weights), backend.numpy(result.indices)
    arrays, exist = call.arrays(), call.exist
    exist[call.n if num_valid is None else num_valid :] = False
    for by_table in (False, True) if call.is_hash else (False,):
        rows = exist & ((arrays["bias_index"] == 0) == by_table) if call.is_hash else exist
        bias = arrays["bias"][arrays["bias_index"][rows]]
        layer = Layer(bias, arrays.get("logit_bias"), arrays.get("expert_scale"))
        table = arrays["table"][arrays["token_ids"][rows]] if by_table else None
        compare.assert_right((weights[rows], indices[rows]), call.logits()[rows], call.method, layer, table)
    assert (indices[~exist] == -1).all()
    assert not weights[~exist].astype(np.float32).any()


# -- Values ------------------------------------------------------------------------------------------------------------


@pytest.mark.many_kernels
@pytest.mark.parametrize("name", NAMES)
@EVERY
def test_every_token_has_its_own_bias(kind: str, name: str, backend: Backend) -> None:
    call = Call(kind, name)
    assert not call.exist.all()
    check(backend, call, call(uploaded(backend, call)))


@pytest.mark.many_kernels
@pytest.mark.parametrize("name", WIDE)
@pytest.mark.parametrize("kind", ["activation_topk", "hash_router of logits"])
def test_rows_of_a_block(kind: str, name: str, backend: Backend) -> None:
    call = Call(kind, name, 9)
    check(backend, call, call(uploaded(backend, call)))


@pytest.mark.parametrize("n", [0, 1, 64, 300])
@EVERY
def test_numbers_of_tokens(kind: str, n: int, backend: Backend) -> None:
    n = min(n, 64) if "decode" in kind else n
    call = Call(kind, "bfloat16 weights", n)
    check(backend, call, call(uploaded(backend, call)))


@pytest.mark.parametrize("name", ["8 groups, best 4, top 2", "bfloat16 weights", "everything"])
@pytest.mark.parametrize("as_of_rows", [1000, 5000])
@pytest.mark.parametrize("kind", ["activation_topk", "hash_router of logits"])
def test_rows_that_share_a_warp(kind: str, as_of_rows: int, name: str, backend: Backend) -> None:
    call = Call(kind, name, 21)
    op = kind.partition(" ")[0]
    check(backend, call, routed(op, as_of_rows, method=call.method, **uploaded(backend, call)))


@pytest.mark.parametrize("num_biases", [1, 2, 40])
@EVERY
def test_numbers_of_biases(kind: str, num_biases: int, backend: Backend) -> None:
    call = Call(kind, "8 groups, best 4, top 2", num_biases=num_biases)
    check(backend, call, call(uploaded(backend, call)))


@EVERY
def test_rows_that_lie_apart(kind: str, backend: Backend) -> None:
    call = Call(kind)
    for row_pad, offset in ((3, 1), (8, 0)):
        check(backend, call, call(uploaded(backend, call, row_pad, offset)))


@EVERY
def test_biases_in_reverse_and_one_for_all(kind: str, backend: Backend) -> None:
    call = Call(kind)
    arrays = uploaded(backend, call)
    turned = arrays | {"bias": backend.array(np.ascontiguousarray(call.arrays()["bias"][::-1]))[::-1]}
    check(backend, call, call(turned))
    first = np.repeat(call.arrays()["bias"][:1], call.num_biases, 0)
    shared = backend.xp.broadcast_to(backend.array(np.ascontiguousarray(first[:1])), first.shape)
    got, want = (call(arrays | {"bias": bias}) for bias in (shared, backend.array(first)))
    for a, b in zip(got, want, strict=True):
        compare.assert_same_bits(backend.numpy(a), backend.numpy(b))


@pytest.mark.parametrize("kind", [kind for kind in KINDS if kind not in HASHED])
def test_rows_are_those_of_a_call_with_one_bias(kind: str, backend: Backend) -> None:
    call = Call(kind, "bfloat16 weights")
    arrays = uploaded(backend, call)
    got = call(arrays)
    index = call.arrays()["bias_index"]
    one = {name: array for name, array in arrays.items() if name != "bias_index"}
    for i in range(call.num_biases):
        alone = one | {"bias": backend.array(call.arrays()["bias"][i])}
        want = call(alone | {"bias_index": None} if kind == "Router" else alone)
        for a, b in zip(got, want, strict=True):
            compare.assert_same_bits(backend.numpy(a)[index == i], backend.numpy(b)[index == i])


@EVERY
def test_results_are_bitwise_repeatable(kind: str, backend: Backend) -> None:
    call = Call(kind, n=20)
    arrays = uploaded(backend, call)
    first = call(arrays)
    for _ in range(3):
        for a, b in zip(call(arrays), first, strict=True):
            compare.assert_same_bits(backend.numpy(a), backend.numpy(b))


def test_unsure_rows_choose_again_by_their_own_bias(backend: Backend) -> None:
    """All selection values are nearly equal, so that bounds decide nothing."""
    method, n = RoutingMethod(256, 6), 12
    logits = backend.array(np.zeros((n, 256), np.float32))
    bias = np.stack([np.linspace(0, 1e-4, 256), np.linspace(1e-4, 0, 256)]).astype(np.float32)
    index = (np.arange(n) % 2).astype(np.int32)
    given = {"bias": backend.array(bias), "bias_index": backend.array(index)}
    got = backend.numpy(routed("activation_topk", 5000, logits=logits, method=method, **given).indices)
    best = np.arange(255, 249, -1)
    np.testing.assert_array_equal(got, np.where(index[:, None] == 0, best, 255 - best))


# -- Padding, layouts, chunks, out, logits -----------------------------------------------------------------------------


@pytest.mark.parametrize("num_valid", [0, 4, np.array(4, np.int32), np.array([99], np.int32)], ids=str)
@EVERY
def test_padding(kind: str, num_valid: Any, backend: Backend) -> None:
    call = Call(kind)
    count = num_valid if isinstance(num_valid, int) else backend.array(num_valid)
    valid = min(int(np.reshape(num_valid, ())), call.n)
    check(backend, call, call(uploaded(backend, call), num_valid=count), valid)


@pytest.mark.parametrize("n", [1, 11, 70])
@EVERY
def test_a_layout_is_that_of_the_indices(kind: str, n: int, backend: Backend) -> None:
    call = Call(kind, "two shared experts", min(n, 64) if "decode" in kind else n)
    spec = LayoutSpec(alignment=4, want=("offsets", "order", "positions"))
    plan = call(uploaded(backend, call), layout=spec)
    check(backend, call, plan)
    want = expert_layout(plan.indices, 66, alignment=4, want=spec.want)
    for name in spec.want:
        compare.assert_same_bits(backend.numpy(getattr(plan.layout, name)), backend.numpy(getattr(want, name)))


@pytest.mark.needs_kernels
@pytest.mark.parametrize("kind", CHUNKED)
def test_chunks_of_tokens(kind: str, backend: Backend, monkeypatch: pytest.MonkeyPatch) -> None:
    call = Call(kind, "bfloat16 weights", 130)
    monkeypatch.setattr(_chunks, "budget", lambda gpu: 32 * 4 * call.method.num_logits)
    for returned in (False, True):
        check(backend, call, call(uploaded(backend, call), return_logits=returned))


@pytest.mark.needs_kernels
@pytest.mark.parametrize("kind", ["Router", "hash_router of x", "hash Router"])
def test_without_cublas(kind: str, backend: Backend, monkeypatch: pytest.MonkeyPatch) -> None:
    call, large = Call(kind, "bfloat16 weights", 130), Call(kind, WIDE[0], 5)
    monkeypatch.setattr(gemm, "why_not", lambda device: "it is not installed")
    _cached.forget()
    for returned in (False, True):
        check(backend, call, call(uploaded(backend, call), return_logits=returned))
    with pytest.raises(RuntimeError, match="need cuBLAS: it is not installed"):
        large(uploaded(backend, large))


@EVERY
def test_out_is_filled_and_returned(kind: str, backend: Backend) -> None:
    call = Call(kind, "two shared experts")
    arrays = uploaded(backend, call)
    want = call(arrays)
    canvases = [Canvas(array.shape, 3, backend.numpy(array).dtype, backend) for array in want]
    out = Routing(*(canvas.array for canvas in canvases))
    assert call(arrays, out=out) is out
    for got, right, canvas in zip(out, want, canvases, strict=True):
        compare.assert_same_bits(backend.numpy(got), backend.numpy(right))
        assert canvas.is_clean()


@pytest.mark.parametrize("kind", [kind for kind in KINDS if kind not in ("activation_topk", "hash_router of logits")])
def test_a_token_without_a_bias_has_logits(kind: str, backend: Backend) -> None:
    call = Call(kind, "bfloat16 weights")
    result = call(uploaded(backend, call), return_logits=True)
    check(backend, call, result)
    logits = call.logits()
    if "logit_bias" in call.arrays():
        logits[:, : call.method.num_experts] += call.arrays()["logit_bias"]
    np.testing.assert_array_equal(backend.numpy(result.logits), logits)


@pytest.mark.parametrize("n", [11, 70])
@pytest.mark.parametrize("kind", ["activation_topk", "Router", "hash Router"])
def test_given_experts_beside_biases(kind: str, n: int, backend: Backend) -> None:
    """A token whose experts are given needs no bias; a row of -1 is routed by its bias."""
    call = Call(kind, "two shared experts", n)
    arrays, method = uploaded(backend, call), call.method
    ids = inputs.rng(726, n).random((n, method.num_experts)).argsort(axis=1)[:, : method.top_k].astype(np.int32)
    ids[::3] = -1
    got, routed_alone = call(arrays, indices=backend.array(ids)), call(arrays)
    layer = {name: arrays[name] for name in ("logit_bias", "expert_scale") if name in arrays}
    logits = backend.array(np.ascontiguousarray(call.logits()))
    given = activation_topk(logits, method, **layer, indices=backend.array(ids), unset="empty")
    for mixed, unset, is_set in zip(got, routed_alone, given, strict=True):
        mixed, unset, is_set = map(backend.numpy, (mixed, unset, is_set))
        np.testing.assert_allclose(mixed[::3], unset[::3], rtol=1e-6)
        np.testing.assert_allclose(np.delete(mixed, np.s_[::3], 0), np.delete(is_set, np.s_[::3], 0), rtol=2e-6)


# -- Errors ------------------------------------------------------------------------------------------------------------

METHOD = RoutingMethod(16, 4)
LOGITS, X, GATE = np.zeros((6, 16), np.float32), np.zeros((6, 8), np.float32), np.zeros((16, 8), np.float32)
TWO, WHICH = np.zeros((2, 16), np.float32), np.zeros(6, np.int32)

BAD: list[tuple[dict[str, Any], Any, str]] = [
    ({"bias": TWO}, ValueError, r"bias \[num_biases, num_experts\] needs a bias_index \[num_tokens\], got float32 \[2"),
    ({"bias": TWO[:1]}, ValueError, r"got float32 \[1, 16\] on .*: call bias.reshape\(-1\)$"),
    ({"bias_index": WHICH}, ValueError, r"bias_index needs a bias \[num_biases, num_experts\], got none"),
    ({"bias": TWO[0], "bias_index": WHICH}, ValueError, r"bias_index needs a bias .*, got float32 \[16\]"),
    ({"bias": TWO[:0], "bias_index": WHICH}, ValueError, r"bias must have at least one row, got float32 \[0, 16\]"),
    ({"bias": TWO, "bias_index": WHICH[:5]}, ValueError, r"bias_index must have shape \[num_tokens\] = \[6\], got"),
    ({"bias": TWO, "bias_index": WHICH[:, None]}, ValueError, r"bias_index must have shape \[num_tokens\] = \[6\]"),
    ({"bias": TWO, "bias_index": WHICH.astype(np.int64)}, TypeError, "bias_index must be int32, got int64"),
    ({"bias": TWO, "bias_index": [0] * 6}, TypeError, "bias_index must be an array"),
    ({"bias": TWO[:, :15], "bias_index": WHICH}, ValueError, r"bias must have shape .* = \[num_biases, 16\], got"),
    ({"bias": TWO[None], "bias_index": WHICH}, ValueError, r"bias must have shape \[num_experts\] = \[16\]"),
    ({"bias": TWO.astype(np.float16), "bias_index": WHICH}, TypeError, "bias must be float32, got float16"),
    ({"bias": np.zeros((16, 2), np.float32).T, "bias_index": WHICH}, ValueError, "contiguous along its last axis"),
]  # fmt: skip


@pytest.mark.parametrize(("wrong", "error", "said"), BAD)
def test_what_is_wrong_is_named_and_nothing_is_written(
    wrong: dict[str, Any], error: Any, said: str, backend: Backend
) -> None:
    calls = {
        "activation_topk": lambda **more: activation_topk(LOGITS, METHOD, **more),
        "dense_router": lambda **more: dense_router(X, GATE, METHOD, **more),
    }
    for name, call in calls.items():
        out = Routing(np.full((6, 4), 9, np.float32), np.full((6, 4), 9, np.int32))
        with pytest.raises(error, match=f"^{name}: .*{said}") as caught:
            call(**wrong, out=out)
        assert "\n" not in str(caught.value)
        assert all((array == 9).all() for array in out)


def test_a_method_without_scores_to_select_by_takes_no_bias() -> None:
    with pytest.raises(ValueError, match="bias has no scores to go to"):
        activation_topk(LOGITS, RoutingMethod(16, 4, "softmax", score_after_topk=True), bias=TWO, bias_index=WHICH)


def test_a_router_of_one_bias_takes_no_index_and_one_of_several_needs_it() -> None:
    with pytest.raises(ValueError, match="bias_index needs a bias"):
        Router(METHOD, weight=GATE, bias=TWO[0])(X, bias_index=WHICH)
    with pytest.raises(ValueError, match="needs a bias_index"):
        Router(METHOD, weight=GATE, bias=TWO)(X)
    with pytest.raises(ValueError, match=r"bias must have shape \[num_biases, num_experts\]"):
        Router(METHOD, weight=GATE, bias=TWO[:, :5])
