# SPDX-License-Identifier: Apache-2.0
"""Frameworks without special support: their arrays are read by DLPack, results have the closest type.

The closest type is their own if they follow the array API standard, else NumPy's (CuPy's on a GPU), which
they can take back without a copy.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np
import pytest

from cupy_router import Routing, RoutingMethod, TopK, activation_topk, dense_router, hash_router, topk_select
from tests import compare, frameworks, inputs, oracle
from tests.backends import DTYPES

METHOD = RoutingMethod(16, 3)
X, WEIGHT, LOGITS = inputs.normal((5, 8)), inputs.normal((16, 8), seed=1), inputs.normal((5, 16), seed=2)
IDS = np.array([0, 9, 3, -1, 5], np.int32)
TABLE = np.stack([inputs.rng(60, r).permutation(16)[:3] for r in range(10)]).astype(np.int32)


class Foreign(NamedTuple):
    """Conversion from and to NumPy, and the type of results."""

    array: Callable[[np.ndarray], Any]
    numpy: Callable[[Any], np.ndarray]
    result_type: Any


def _strict() -> Foreign:
    xp = pytest.importorskip("array_api_strict", reason="array-api-strict is not installed")
    return Foreign(lambda host: xp.asarray(host.copy()), np.from_dlpack, type(xp.asarray([0.0])))


def _tvm_ffi() -> Foreign:
    tvm_ffi = pytest.importorskip("tvm_ffi", reason="apache-tvm-ffi is not installed")
    return Foreign(lambda host: tvm_ffi.from_dlpack(host.copy()), np.from_dlpack, np.ndarray)


def _warp() -> Foreign:
    warp = pytest.importorskip("warp", reason="warp-lang is not installed")
    warp.config.quiet = True
    return Foreign(lambda host: warp.array(host, device="cpu"), lambda array: array.numpy(), np.ndarray)


class LikeWarp:
    """Like Warp's arrays: a `__dlpack__` with only a stream argument, as before DLPack 1.0."""

    def __init__(self, host: Any) -> None:
        self.host = host

    def __dlpack__(self, stream: int | None = None) -> object:
        return self.host.__dlpack__()

    def __dlpack_device__(self) -> tuple[int, int]:
        return self.host.__dlpack_device__()


FOREIGN: dict[str, Callable[[], Foreign]] = {
    "array_api_strict": _strict,
    "TVM FFI": _tvm_ffi,
    "Warp": _warp,
    "like Warp": lambda: Foreign(lambda host: LikeWarp(host.copy()), lambda array: array.host, np.ndarray),
}
CALLS: dict[str, tuple[Callable[..., Any], dict[str, np.ndarray]]] = {
    "topk_select": (lambda scores: topk_select(scores, 3), {"scores": LOGITS}),
    "activation_topk": (lambda logits, bias: activation_topk(logits, METHOD, bias=bias),
                        {"logits": LOGITS, "bias": LOGITS[0].copy()}),
    "hash_router": (lambda ids, table, logits: hash_router(ids, table, METHOD, logits=logits),
                    {"ids": IDS, "table": TABLE, "logits": LOGITS}),
    "dense_router": (lambda x, weight: dense_router(x, weight, METHOD), {"x": X, "weight": WEIGHT}),
    "dense_router with logits": (lambda x, weight: dense_router(x, weight, METHOD, return_logits=True),
                                 {"x": X, "weight": WEIGHT}),
    "hash_router with logits": (lambda ids, table, **gate: hash_router(ids, table, METHOD, return_logits=True, **gate),
                                {"ids": IDS, "table": TABLE, "x": X, "weight": WEIGHT}),
}  # fmt: skip


@pytest.mark.parametrize("op", CALLS)
@pytest.mark.parametrize("name", FOREIGN)
def test_results_have_the_closest_type(name: str, op: str) -> None:
    foreign, (call, arrays) = FOREIGN[name](), CALLS[op]
    got = call(**{key: foreign.array(host) for key, host in arrays.items()})
    for a, b in zip(got, call(**arrays), strict=True):
        assert type(a) is foreign.result_type
        np.testing.assert_array_equal(np.asarray(np.from_dlpack(a)), b)


@pytest.mark.parametrize("dtype", inputs.FLOATS)
@pytest.mark.parametrize("name", ["TVM FFI", "like Warp"])
def test_floats_of_every_dtype(name: str, dtype: str) -> None:
    """In PyTorch's memory, since NumPy arrays of bfloat16 cannot be exported."""
    take: Callable[[Any], Any] = LikeWarp
    if name == "TVM FFI":
        take = pytest.importorskip("tvm_ffi", reason="apache-tvm-ffi is not installed").from_dlpack

    def foreign(host: np.ndarray) -> Any:
        return take(frameworks.PyTorch().array(host))

    scores = inputs.normal((5, 16), dtype, seed=2)
    values, indices = topk_select(foreign(scores), 3)
    want = oracle.topk(scores, 3)
    assert values.dtype == DTYPES[dtype]
    compare.assert_same_bits(values, want[0])
    np.testing.assert_array_equal(indices, want[1])
    x, weight = (host.astype(DTYPES[dtype]) for host in (X, WEIGHT))
    method = RoutingMethod(16, 3, weight_dtype=dtype)
    for call, arrays in ((activation_topk, [scores]), (dense_router, [x, weight])):
        got, routed = call(*map(foreign, arrays), method), call(*arrays, method)
        assert got.weights.dtype == DTYPES[dtype]
        compare.assert_same_bits(got.weights, routed.weights)
        np.testing.assert_array_equal(got.indices, routed.indices)


@pytest.mark.parametrize("name", FOREIGN)
def test_out_is_filled_in_place(name: str) -> None:
    foreign = FOREIGN[name]()
    for op, kind, fill in (("topk_select", TopK, 0), ("activation_topk", Routing, 7)):
        call, arrays = CALLS[op]
        want = call(**arrays)
        out = kind(*(foreign.array(np.full_like(a, fill)) for a in want))
        given = [foreign.array(host) for host in arrays.values()]
        filled = (
            topk_select(*given, 3, out=out)
            if op == "topk_select"
            else activation_topk(given[0], METHOD, bias=given[1], out=out)
        )
        assert filled is out
        for a, b in zip(out, want, strict=True):
            np.testing.assert_array_equal(foreign.numpy(a), b)


@pytest.mark.parametrize("name", FOREIGN)
def test_mixed_with_arrays_of_other_frameworks(name: str) -> None:
    """The first array decides the type of the results."""
    foreign, (call, arrays) = FOREIGN[name](), CALLS["activation_topk"]
    want = call(**arrays)
    mixed = call(arrays["logits"], foreign.array(arrays["bias"]))
    assert type(mixed.weights) is np.ndarray
    np.testing.assert_array_equal(mixed.indices, want.indices)
    mixed = call(foreign.array(arrays["logits"]), arrays["bias"])
    assert type(mixed.weights) is foreign.result_type
    np.testing.assert_array_equal(np.from_dlpack(mixed.indices), want.indices)


@pytest.mark.parametrize("name", FOREIGN)
def test_num_valid_in_an_array(name: str) -> None:
    foreign = FOREIGN[name]()
    got = activation_topk(foreign.array(LOGITS), METHOD, num_valid=foreign.array(np.array([2], np.int32)))
    want = activation_topk(LOGITS, METHOD, num_valid=2)
    np.testing.assert_array_equal(np.from_dlpack(got.indices), want.indices)
    np.testing.assert_array_equal(np.from_dlpack(got.weights), want.weights)


def test_errors_name_the_argument() -> None:
    with pytest.raises(TypeError, match="scores must be float32 or float16 or bfloat16, got float64"):
        topk_select(LikeWarp(np.zeros((3, 4))), 2)
    with pytest.raises(ValueError, match="scores must have"):
        topk_select(LikeWarp(np.zeros(4, np.float32)), 2)
