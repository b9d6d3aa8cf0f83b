# SPDX-License-Identifier: Apache-2.0
"""The logits that routers return: values, shapes, dtypes, padding, `out`; weights and indices are those without."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from cupy_router import (
    LayoutSpec,
    Router,
    Routing,
    RoutingMethod,
    RoutingPlan,
    RoutingPlanWithLogits,
    RoutingWithLogits,
    dense_router,
    expert_layout,
    gemm,
    hash_router,
)
from cupy_router.ops import _cached, _chunks
from tests import compare, inputs
from tests.backends import DTYPES, Backend
from tests.canvas import Canvas
from tests.logit_calls import KINDS, Call
from tests.recorder import recording

EVERY = pytest.mark.parametrize("kind", KINDS)
METHOD = RoutingMethod(16, 4)
DENSE = ("dense_router", "dense_router decode", "dense_router prefill")
DECODED = ("logit scale and soft cap", "shared in the normaliser", "softmax after top-k", "everything")
LARGE = ("4096 experts, 64 chosen", "bfloat16 weights by a block")  # too large for the decode path
CASES = [(kind, name) for kind in KINDS for name in (*DECODED, *LARGE) if "decode" not in kind or name in DECODED]


def sizes(*numbers: int) -> list[tuple[str, int]]:
    """Return kinds of calls with the numbers of tokens that they take."""
    return [(kind, n) for kind in KINDS for n in numbers if "decode" not in kind or n <= 64]


def uploaded(backend: Backend, call: Call, row_pad: int = 0, offset: int = 0) -> dict[str, Any]:
    return {name: backend.array(array, row_pad, offset) for name, array in call.arrays().items()}


def on_host(backend: Backend, result: Any) -> list[np.ndarray]:
    return [backend.numpy(array) for array in result[:3]]


def check(backend: Backend, call: Call, result: Any, plain: Any, num_valid: int | None = None) -> None:
    """Assert that logits are the products, and that weights and indices are those of the call without logits."""
    weights, indices, logits = on_host(backend, result)
    compare.assert_same_bits(logits, call.logits(num_valid, str(logits.dtype)))
    compare.assert_same_bits(indices, backend.numpy(plain[1]))
    same_weights(backend, call, weights, backend.numpy(plain[0]))


def same_weights(backend: Backend, call: Call, got: np.ndarray, want: np.ndarray) -> None:
    """A hash layer that returns logits has other kernels, which sum the scores in another order."""
    if call.is_hash and backend.runs_kernels:
        np.testing.assert_allclose(
            got.astype(np.float64), want.astype(np.float64), rtol=2e-6 if got.itemsize > 2 else 2**-7
        )
    else:
        compare.assert_same_bits(got, want)


# -- Values ------------------------------------------------------------------------------------------------------------


@pytest.mark.many_kernels
@pytest.mark.parametrize("given", [(), ("logit_bias",), ("logit_bias", "expert_scale")], ids="+".join)
@pytest.mark.parametrize(("kind", "name"), CASES)
def test_logits_are_the_products_without_scale_and_cap(
    kind: str, name: str, given: tuple[str, ...], backend: Backend
) -> None:
    call = Call(kind, name, given=given)
    arrays = uploaded(backend, call)
    result = call(arrays, return_logits=True)
    assert type(result) is RoutingWithLogits
    assert result.logits.shape == (call.n, call.method.num_logits)
    check(backend, call, result, call(arrays))


@pytest.mark.many_kernels
@pytest.mark.parametrize("dtype", inputs.FLOATS)
@pytest.mark.parametrize(("kind", "n"), sizes(0, 1, 2, 7, 33, 64, 65, 300))
def test_numbers_of_tokens(kind: str, n: int, dtype: str, backend: Backend) -> None:
    call = Call(kind, "sigmoid, bias on logits", n, dtype)
    arrays = uploaded(backend, call)
    check(backend, call, call(arrays, return_logits=True), call(arrays))


@pytest.mark.parametrize("logits_dtype", inputs.FLOATS)
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("kind", DENSE)
def test_logits_in_another_dtype_are_rounded_once(kind: str, dtype: str, logits_dtype: str, backend: Backend) -> None:
    """Weights and indices come from the float32 logits."""
    call = Call(kind, dtype=dtype, given=("logit_bias",))
    arrays = uploaded(backend, call)
    result = call(arrays, return_logits=True, logits_dtype=logits_dtype)
    assert backend.numpy(result.logits).dtype == DTYPES[logits_dtype]
    check(backend, call, result, call(arrays))


@EVERY
def test_rows_that_lie_apart(kind: str, backend: Backend) -> None:
    call = Call(kind, given=("logit_bias",), hidden=47)
    for row_pad, offset in ((3, 1), (8, 0)):
        arrays = uploaded(backend, call, row_pad, offset)
        check(backend, call, call(arrays, return_logits=True), call(arrays))


@EVERY
def test_a_gate_of_another_dtype_than_x(kind: str, backend: Backend) -> None:
    call = Call(kind)
    arrays = uploaded(backend, call) | {"x": backend.array(replace(call, dtype="bfloat16").arrays()["x"])}
    check(backend, call, call(arrays, return_logits=True), call(arrays))


@EVERY
def test_nan_and_infinity_stay_in_their_places(kind: str, backend: Backend) -> None:
    call = Call(kind, "softmax after top-k")
    host = call.arrays()
    host["x"][2, 3], host["x"][4], host["weight"][5, 7] = np.nan, np.inf, np.inf
    result = call({name: backend.array(array) for name, array in host.items()}, return_logits=True)
    with np.errstate(invalid="ignore"):
        want = (host["x"].astype(np.float64) @ host["weight"].astype(np.float64).T).astype(np.float32)
    np.testing.assert_array_equal(backend.numpy(result.logits), want)


# -- Padding and bad tokens --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("given", [(), ("logit_bias",)], ids=["plain", "logit_bias"])
@pytest.mark.parametrize(
    "num_valid", [0, 4, 9, np.array(4, np.int32), np.array([-1], np.int32), np.array([99], np.int32)], ids=str
)
@EVERY
def test_logits_of_padding_are_0(kind: str, num_valid: Any, given: tuple[str, ...], backend: Backend) -> None:
    call = Call(kind, "two shared experts", given=given)
    arrays = uploaded(backend, call)
    valid = min(max(int(np.reshape(num_valid, ())), 0), call.n)
    count = num_valid if isinstance(num_valid, int) else backend.array(num_valid)
    check(backend, call, call(arrays, return_logits=True, num_valid=count), call(arrays, num_valid=count), valid)


@pytest.mark.parametrize("kind", ["hash_router", "hash Router"])
def test_tokens_without_experts_have_logits(kind: str, backend: Backend) -> None:
    call = Call(kind)
    weights, indices, logits = on_host(backend, call(uploaded(backend, call), return_logits=True))
    bad = np.isin(call.arrays()["token_ids"], (-1, 7))
    assert bad.any()
    assert not bad.all()
    assert (indices[bad] == -1).all()
    assert not weights[bad].any()
    compare.assert_same_bits(logits[bad], call.logits()[bad])
    assert logits[bad].any(axis=1).all()


@pytest.mark.parametrize("n", [1, 64, 65])
@pytest.mark.parametrize("kind", ["hash_router", "hash Router"])
def test_a_hash_layer_takes_a_product_and_a_launch(kind: str, n: int) -> None:
    """The product is a launch for few tokens, and a library's for more."""
    call = Call(kind, "sigmoid, bias on logits", n)
    with recording() as recorder:
        call(call.arrays(), return_logits=True)
    few = ["dense_router_decode"] if n <= 64 else []
    assert [launch.function for launch in recorder.launches] == [*few, "hash_router"]


# -- Chunks, layouts, out ----------------------------------------------------------------------------------------------


@pytest.mark.needs_kernels
@pytest.mark.parametrize("num_valid", [None, 90, np.array([90], np.int32)], ids=["all rows", "number", "array"])
@pytest.mark.parametrize("given", [(), ("logit_bias",)], ids=["plain", "logit_bias"])
@pytest.mark.parametrize("kind", ["dense_router prefill", "hash_router", "hash Router"])
def test_chunks_of_tokens(
    kind: str, given: tuple[str, ...], num_valid: Any, backend: Backend, monkeypatch: pytest.MonkeyPatch
) -> None:
    call = Call(kind, "bfloat16 weights", 130, given=given)
    monkeypatch.setattr(_chunks, "budget", lambda gpu: 32 * 4 * call.method.num_logits)
    arrays = uploaded(backend, call)
    count = backend.array(num_valid) if isinstance(num_valid, np.ndarray) else num_valid
    valid = None if num_valid is None else 90
    check(backend, call, call(arrays, return_logits=True, num_valid=count), call(arrays, num_valid=count), valid)


@pytest.mark.needs_kernels
@pytest.mark.parametrize("kind", ["dense_router", "hash_router", "hash Router"])
def test_without_cublas(kind: str, backend: Backend, monkeypatch: pytest.MonkeyPatch) -> None:
    call, large = Call(kind, "bfloat16 weights", 130, hidden=40), Call(kind, LARGE[0], 130, hidden=40)
    arrays, many = uploaded(backend, call), uploaded(backend, large)
    monkeypatch.setattr(gemm, "why_not", lambda device: "it is not installed")
    _cached.forget()
    check(backend, call, call(arrays, return_logits=True), call(arrays))
    with pytest.raises(RuntimeError, match="need cuBLAS: it is not installed"):
        large(many, return_logits=True)


@pytest.mark.parametrize("num_valid", [None, 5])
@pytest.mark.parametrize(("kind", "n"), sizes(0, 1, 9, 70))
def test_a_layout_is_that_of_the_indices(kind: str, n: int, num_valid: int | None, backend: Backend) -> None:
    call = Call(kind, "two shared experts", n, given=("logit_bias",))
    valid = None if num_valid is None else min(num_valid, n)
    arrays, spec = uploaded(backend, call), LayoutSpec(alignment=4, want=("offsets", "order", "positions"))
    plan = call(arrays, return_logits=True, layout=spec, num_valid=valid)
    assert type(plan) is RoutingPlanWithLogits
    check(backend, call, plan, call(arrays, num_valid=valid), valid)
    want = expert_layout(plan.indices, 66, alignment=4, want=spec.want)
    for got, right in zip(plan.layout, want, strict=True):
        if isinstance(right, int) or right is None:
            assert got == right
        else:
            compare.assert_same_bits(backend.numpy(got), backend.numpy(right))


@pytest.mark.parametrize("padding", [0, 1, 7])
@pytest.mark.parametrize("num_valid", [None, 5])
@EVERY
def test_out_is_filled_and_returned(kind: str, num_valid: int | None, padding: int, backend: Backend) -> None:
    call = Call(kind, given=("logit_bias",))
    arrays = uploaded(backend, call)
    want = call(arrays, return_logits=True, num_valid=num_valid)
    canvases = [Canvas(array.shape, padding, backend.numpy(array).dtype, backend) for array in want]
    out = RoutingWithLogits(*(canvas.array for canvas in canvases))
    assert call(arrays, return_logits=True, num_valid=num_valid, out=out) is out
    for got, right, canvas in zip(out, want, canvases, strict=True):
        compare.assert_same_bits(backend.numpy(got), backend.numpy(right))
        assert canvas.is_clean()


@EVERY
def test_out_with_rows_in_reverse(kind: str, backend: Backend) -> None:
    call = Call(kind)
    arrays = uploaded(backend, call)
    want = call(arrays, return_logits=True)
    out = RoutingWithLogits(*(backend.xp.empty_like(array)[::-1] for array in want))
    assert call(arrays, return_logits=True, out=out) is out
    for got, right in zip(out, want, strict=True):
        compare.assert_same_bits(backend.numpy(got), backend.numpy(right))


@EVERY
def test_results_are_bitwise_repeatable(kind: str, backend: Backend) -> None:
    call = Call(kind, n=20)
    arrays = uploaded(backend, call) | {"x": backend.array(inputs.normal((20, call.hidden), seed=710))}
    first = on_host(backend, call(arrays, return_logits=True))
    for _ in range(5):
        for a, b in zip(on_host(backend, call(arrays, return_logits=True)), first, strict=True):
            compare.assert_same_bits(a, b)


# -- Errors ------------------------------------------------------------------------------------------------------------


def zeros(*shape: int, dtype: Any = np.float32) -> np.ndarray:
    return np.zeros(shape, dtype)


X, GATE, IDS, TABLE = zeros(6, 8), zeros(16, 8), zeros(6, dtype=np.int32), zeros(10, 4, dtype=np.int32)
ROUTING = zeros(6, 4), zeros(6, 4, dtype=np.int32)


def dense(**more: Any) -> Any:
    return dense_router(X, GATE, METHOD, **{"return_logits": True, **more})


def hashed(**more: Any) -> Any:
    return hash_router(IDS, TABLE, METHOD, **{"x": X, "weight": GATE, "return_logits": True, **more})


def router(**more: Any) -> Any:
    return Router(METHOD, weight=GATE)(X, **{"return_logits": True, **more})


# the call, the options that are wrong, the error, and what it says
BAD: list[tuple[Callable[..., Any], dict[str, Any], Any, str]] = [
    (dense, {"return_logits": 1}, TypeError, "dense_router: return_logits must be .*, got"),
    (hashed, {"return_logits": None}, TypeError, "hash_router: return_logits must be .*, got"),
    (router, {"return_logits": "yes"}, TypeError, "Router: return_logits must be .*, got"),
    (dense, {"logits_dtype": "float64"}, ValueError, "dense_router: logits_dtype must be .*, got 'float64'"),
    (dense, {"logits_dtype": np.float32}, ValueError, "dense_router: logits_dtype must be .*, got <class"),
    (hashed, {"x": None, "weight": None}, ValueError, "hash_router: return_logits needs x and weight"),
    (hashed, {"x": None, "weight": None, "logits": zeros(6, 16)}, ValueError, "hash_router: return_logits needs x and"),
    *[
        (call, {"out": (*ROUTING, zeros(*shape, dtype=dtype))}, error, said)
        for call in (dense, hashed, router)
        for shape, dtype, error, said in (
            ((6, 16), np.float16, TypeError, "out.logits must be float32"),
            ((6, 4), np.float32, ValueError, r"out.logits must have shape \[.*\] = \[6, 16\]"),
            ((16,), np.float32, ValueError, r"out.logits must have shape \[.*\] = \[6, 16\]"),
        )
    ],
]  # fmt: skip


@pytest.mark.parametrize(("call", "wrong", "error", "said"), BAD)
def test_what_is_wrong_is_named_and_nothing_is_written(
    call: Callable[..., Any], wrong: dict[str, Any], error: Any, said: str, backend: Backend
) -> None:
    out = wrong.get("out") or (*ROUTING, zeros(6, 16))
    marked = RoutingWithLogits(*(np.full_like(array, 9) for array in out))
    with pytest.raises(error, match=said) as caught:
        call(**{**wrong, "out": marked})
    assert "\n" not in str(caught.value)
    assert all((array == 9).all() for array in marked)


@pytest.mark.parametrize("call", [dense, hashed, router])
def test_out_of_another_form_is_refused(call: Callable[..., Any]) -> None:
    marked = [np.full_like(array, 9) for array in (*ROUTING, zeros(6, 16))]
    expected = r"out must be RoutingWithLogits\(weights, indices, logits\), got "
    for out in (Routing(*marked[:2]), RoutingPlan(*marked), tuple(marked), RoutingWithLogits(*marked[:2], None)):
        with pytest.raises(TypeError, match="out"):
            call(out=out)
    with pytest.raises(TypeError, match=expected + "Routing$"):
        call(out=Routing(*marked[:2]))
    with pytest.raises(TypeError, match=r"out must be Routing\(weights, indices\), got RoutingWithLogits"):
        call(return_logits=False, out=RoutingWithLogits(*marked))
    assert all((array == 9).all() for array in marked)


def test_a_hash_router_without_a_gate_has_no_logits() -> None:
    with pytest.raises(ValueError, match="Router: return_logits needs x and weight"):
        Router(METHOD, table=TABLE)(X, IDS, return_logits=True)
