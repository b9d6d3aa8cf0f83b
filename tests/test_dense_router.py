# SPDX-License-Identifier: Apache-2.0
"""dense_router: both paths against the oracle, mostly on products that float32 holds exactly, whatever their order."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from cupy_router import Routing, RoutingMethod, dense_router, gemm, tuning
from cupy_router.ops import _chunks
from cupy_router.ops import _dense_decode as decode
from tests import compare, inputs, oracle
from tests.backends import DTYPES, Backend

ITEM = pytest.mark.acceptance
PATHS = ("decode", "prefill")
BOUND = 1e-5  # of a logit's error, per length of x and length of the gate's row; cuBLAS was seen at 6e-6


def exact(shape: tuple[int, int], seed: int, dtype: str = "float32") -> np.ndarray:
    """Small integers over a power of two: products and their sums are exact in float32, logits spread by about 2."""
    integers = inputs.rng(seed, *shape).integers(-8, 9, shape)
    return (integers * 2.0 ** -round(np.log2(3.5 * shape[1] ** 0.25))).astype(DTYPES[dtype])


def gated(n: int, experts: int, hidden: int, dtype: str = "float32", other: str | None = None) -> tuple[Any, Any]:
    return exact((n, hidden), 60, dtype), exact((experts, hidden), 61, other or dtype)


def logits_of(x: np.ndarray, weight: np.ndarray) -> np.ndarray:
    with np.errstate(all="ignore"):
        return (x.astype(np.float64) @ weight.astype(np.float64).T).astype(np.float32)


def route(
    backend: Backend,
    x: np.ndarray,
    weight: np.ndarray,
    method: RoutingMethod,
    bias: np.ndarray | None = None,
    *,
    path: str | None = None,
    num_valid: Any = None,
    valid_rows: int | None = None,
    **layout: int,
) -> Routing:
    """Return the op's result on this backend, checked against the oracle on the exact logits."""
    arrays = [backend.array(x, **layout), backend.array(weight, **layout)]
    device_bias = None if bias is None else backend.array(bias)
    result = dense_router(*arrays, method, bias=device_bias, path=path, num_valid=num_valid)
    assert type(result) is Routing
    got = Routing(backend.numpy(result.weights), backend.numpy(result.indices))
    n = len(x) if valid_rows is None else valid_rows
    logits = logits_of(x[:n], weight)
    valid = Routing(got.weights[:n], got.indices[:n])
    compare.assert_routes(valid, oracle.route(logits, method, bias), logits, method, bias)
    assert (got.indices[n:] == -1).all()
    assert (got.weights[n:] == 0).all()
    for array, host in zip(arrays, (x, weight), strict=True):
        compare.assert_same_bits(backend.numpy(array), host)
    return got


# -- Sizes -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("n", inputs.TOKEN_CASES)
def test_number_of_tokens(backend: Backend, n: int) -> None:
    n = backend.rows(n, 64, exactly=True)
    route(backend, *gated(n, 64, 48), RoutingMethod(64, 6))


@pytest.mark.many_kernels
@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize(
    ("experts", "k"),
    [
        pytest.param(e, min(1 + i * 13 % 32, e), marks=ITEM(f"E = {e}"), id=f"{e}-{min(1 + i * 13 % 32, e)}")
        for i, e in enumerate(inputs.EXPERTS)
    ],
)
def test_experts_and_k(backend: Backend, experts: int, k: int, path: str) -> None:
    method = RoutingMethod(experts, k, inputs.SCORES[experts % 4], scale=2.5)
    route(backend, *gated(5, experts, 40, "bfloat16"), method, path=path)


@pytest.mark.parametrize("experts", [1025, 1500])
def test_more_experts_or_results_than_the_fused_kernel_takes(backend: Backend, experts: int) -> None:
    route(backend, *gated(3, experts, 24), RoutingMethod(experts, 6))
    route(backend, *gated(3, 60, 24), RoutingMethod(60, 40))


@pytest.mark.many_kernels
@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("hidden", [1, 7, 8, 33, 100, 1000, 4096])
@pytest.mark.parametrize("dtype", inputs.FLOATS)
def test_hidden_sizes(backend: Backend, hidden: int, dtype: str, path: str) -> None:
    route(backend, *gated(4, 32, hidden, dtype), RoutingMethod(32, 4), path=path)


# -- Dtypes, methods, bias ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("dtype", inputs.FLOATS)
@pytest.mark.parametrize("weight_dtype", inputs.FLOATS)
def test_every_pair_of_dtypes(backend: Backend, dtype: str, weight_dtype: str, path: str) -> None:
    route(backend, *gated(9, 36, 64, dtype, weight_dtype), RoutingMethod(36, 6), path=path)


@pytest.mark.many_kernels
@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("score", inputs.SCORES)
@pytest.mark.parametrize("renormalize", [False, True])
@pytest.mark.parametrize("biased", [False, True])
def test_scores(backend: Backend, score: str, renormalize: bool, biased: bool, path: str) -> None:
    method = RoutingMethod(36, 6, score, renormalize=renormalize, renormalize_eps=1e-20, scale=1.5)
    bias = inputs.normal((36,), seed=62) if biased else None
    route(backend, *gated(9, 36, 64, "bfloat16"), method, bias, path=path)


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("kind", [pytest.param(kind, marks=ITEM(kind), id=kind) for kind in inputs.BIAS])
def test_bias(backend: Backend, kind: str, path: str) -> None:
    route(backend, *gated(9, 36, 64), RoutingMethod(36, 6, renormalize_min=1e-12), inputs.BIAS[kind](36), path=path)


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_every_kind_of_tokens(backend: Backend, value: float, dtype: str, path: str) -> None:
    """A token with NaN has no finite logit; one with infinities has infinite logits and, from opposite signs, NaN."""
    x, weight = gated(9, 36, 64, dtype)
    x[2, 5] = x[7, 63] = value
    x[7, 0] = -value
    got = route(backend, x, weight, RoutingMethod(36, 6, "sigmoid", renormalize=False), path=path)
    if np.isnan(value):
        np.testing.assert_array_equal(got.indices[[2, 7]], [np.arange(6)] * 2)


@pytest.mark.parametrize("path", PATHS)
def test_equal_logits_choose_the_lower_expert(backend: Backend, path: str) -> None:
    x, weight = gated(9, 36, 64, "bfloat16")
    weight[:] = weight[0]
    got = route(backend, x, weight, RoutingMethod(36, 6), path=path)
    np.testing.assert_array_equal(got.indices, [np.arange(6)] * 9)


# -- Rounding ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("dtype", inputs.FLOATS)
def test_logits_are_accumulated_and_kept_in_float32(backend: Backend, dtype: str, path: str) -> None:
    """Seen through identity scores, on which weights are the logits themselves."""
    n, experts, hidden = 7, 32, 2048
    x, weight = inputs.normal((n, hidden), dtype, 63), inputs.normal((experts, hidden), dtype, 64, hidden**-0.5)
    method = RoutingMethod(experts, experts, "identity", renormalize=False)
    result = dense_router(backend.array(x), backend.array(weight), method, path=path)
    got, chosen = backend.numpy(result.weights).astype(np.float64), backend.numpy(result.indices)
    want = x.astype(np.float64) @ weight.astype(np.float64).T
    bound = (
        BOUND
        * np.linalg.norm(x.astype(np.float64), axis=1)[:, None]
        * np.linalg.norm(weight.astype(np.float64), axis=1)
    )
    error = np.abs(got - np.take_along_axis(want, chosen, 1)) / np.take_along_axis(bound, chosen, 1)
    assert error.max() < 1
    assert (np.diff(got) <= 0).all()
    compare.assert_selects_validly(chosen, experts)
    rounded = want.astype(DTYPES["bfloat16"]).astype(np.float64)
    assert (np.abs(rounded - want) / bound).max() > 10, "the bound is too wide to tell bfloat16 logits apart"


@pytest.mark.parametrize("path", PATHS)
def test_results_are_repeatable(backend: Backend, path: str) -> None:
    x, weight = backend.array(inputs.normal((33, 512))), backend.array(inputs.normal((64, 512), seed=65))
    runs = [dense_router(x, weight, RoutingMethod(64, 6), path=path) for _ in range(3)]
    for again in runs[1:]:
        for got, want in zip(again, runs[0], strict=True):
            compare.assert_same_bits(backend.numpy(got), backend.numpy(want))


# -- Slices ------------------------------------------------------------------------------------------------------------


@pytest.fixture
def small_slices(monkeypatch: pytest.MonkeyPatch) -> None:
    """Slices of 16 tokens where there are 32 experts; the method of these tests is no other test's, nor is its plan."""
    monkeypatch.setattr(_chunks, "budget", lambda gpu: 16 * 32 * 4)


@pytest.mark.usefixtures("small_slices")
@pytest.mark.parametrize("n", [1, 16, 17, 80])
def test_chunks_of_tokens(backend: Backend, n: int) -> None:
    bias = inputs.normal((32,), seed=66)
    route(backend, *gated(n, 32, 40, "bfloat16"), RoutingMethod(32, 5, scale=1.25), bias, path="prefill", row_pad=3)


VALID = [
    pytest.param(v, marks=ITEM(f"num_valid {name}"), id=str(v)) for v, name in ((0, "0"), (19, "some"), (40, "all"))
]


@pytest.mark.usefixtures("small_slices")
@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("valid", [*VALID, 16])
def test_padding_by_num_valid(backend: Backend, valid: int, path: str) -> None:
    method = RoutingMethod(32, 5, scale=1.25)
    arguments = {"method": method, "path": path, "valid_rows": valid}
    route(backend, *gated(40, 32, 40), num_valid=valid, **arguments)
    for shape in ((), (1,)):
        route(backend, *gated(40, 32, 40), num_valid=backend.array(np.full(shape, valid, np.int32)), **arguments)


@pytest.mark.usefixtures("small_slices")
@pytest.mark.acceptance("num_valid clamped")
@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize(("given", "valid"), [(-3, 0), (41, 40), (2**31 - 1, 40), (-(2**31), 0)])
def test_num_valid_in_an_array_is_clamped(backend: Backend, given: int, valid: int, path: str) -> None:
    count = backend.array(np.array([given], np.int32))
    method = RoutingMethod(32, 5, scale=1.25)
    route(backend, *gated(40, 32, 40), method, path=path, num_valid=count, valid_rows=valid)


@pytest.mark.needs_kernels
@pytest.mark.parametrize("valid", [None, 0, 64, 100])
def test_without_cublas_the_fused_kernel_serves_any_number(
    backend: Backend, valid: int | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(gemm, "why_not", lambda device: "it was taken away.")
    method = RoutingMethod(32, 5, scale=1.75)  # its plans are of this test alone
    count = None if valid is None else backend.array(np.array([valid], np.int32))
    route(backend, *gated(150, 32, 40), method, num_valid=count, valid_rows=valid)
    with pytest.raises(RuntimeError, match=r"more than 1024 experts, .* need cuBLAS: it was taken away"):
        route(backend, *gated(2, 1100, 40), RoutingMethod(1100, 5, scale=1.75))


@pytest.mark.needs_kernels
def test_gpus_before_sm_80_take_two_steps(backend: Backend, monkeypatch: pytest.MonkeyPatch) -> None:
    method = RoutingMethod(32, 5, scale=1.875)  # its plans are of this test alone
    monkeypatch.setattr(decode, "launch_for", None)
    with tuning.assume(replace(tuning.DEFAULT, capability=(7, 5))):
        route(backend, *gated(3, 32, 40, "bfloat16"), method)
        with pytest.raises(ValueError, match=r"path 'decode' takes a GPU of compute capability 8\.0 or later"):
            route(backend, *gated(3, 32, 40, "bfloat16"), method, path="decode")


# -- Layout, out -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("dtype", inputs.FLOATS)
@pytest.mark.parametrize(
    ("row_pad", "offset"),
    [
        pytest.param(8, 0, marks=ITEM("strided rows"), id="row-stride-of-8-more"),
        pytest.param(3, 1, marks=ITEM("strided rows", "misaligned base"), id="odd-row-stride-and-base"),
    ],
)
def test_layout(backend: Backend, dtype: str, path: str, row_pad: int, offset: int) -> None:
    route(backend, *gated(9, 36, 64, dtype), RoutingMethod(36, 6), path=path, row_pad=row_pad, offset=offset)


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_rows_in_any_order(backend: Backend, dtype: str, path: str) -> None:
    """Rows in reverse, every other one, one repeated: strides that cuBLAS does not take among them."""
    method, (x, weight) = RoutingMethod(36, 6), gated(9, 36, 64, dtype)
    on_device, gate = backend.array(x), backend.array(weight)
    views = [view for view in inputs.row_views(backend.xp, on_device)[:3] if view.shape[1] == 64]
    hosts = inputs.row_views(np, x)[:3]
    for view, host in zip(views, hosts, strict=True):
        result = dense_router(view, gate[::-1], method, path=path)
        want = oracle.route(logits_of(host, weight[::-1]), method)
        np.testing.assert_array_equal(backend.numpy(result.indices), want.indices)
        compare.assert_weights_close(backend.numpy(result.weights), want.weights, 2e-6)


@pytest.mark.parametrize("path", PATHS)
def test_out_is_filled_and_returned(backend: Backend, path: str) -> None:
    x, weight = gated(40, 36, 64)
    block = backend.array(np.full((40, 6), 7, np.float32), row_pad=2), backend.array(np.full((40, 6), 7, np.int32))
    out = Routing(*block)
    assert dense_router(backend.array(x), backend.array(weight), RoutingMethod(36, 6), path=path, out=out) is out
    want = oracle.route(logits_of(x, weight), RoutingMethod(36, 6))
    np.testing.assert_array_equal(backend.numpy(out.indices), want.indices)
    compare.assert_weights_close(backend.numpy(out.weights), want.weights, 2e-6)


# -- What is refused ---------------------------------------------------------------------------------------------------

METHOD = RoutingMethod(8, 2)


@pytest.mark.parametrize(
    ("change", "error", "words"),
    [
        ({"path": "fast"}, ValueError, r"path must be None, 'decode' or 'prefill', got 'fast'"),
        ({"weight": None}, TypeError, "weight must be an array, got None"),
        ({"weight": np.zeros((8, 15), np.float32)}, ValueError, r"weight must have shape .* = \[8, 16\], got float32"),
        ({"weight": np.zeros((7, 16), np.float32)}, ValueError, r"weight must have shape .* = \[8, 16\], got float32"),
        ({"weight": np.zeros((8, 16))}, TypeError, "weight must be float32 or float16 or bfloat16, got float64"),
        ({"x": np.zeros((3, 16), np.int32)}, TypeError, "x must be float32 or float16 or bfloat16, got int32"),
        ({"x": np.zeros((3, 16, 1), np.float32)}, ValueError, r"x must have shape \[num_tokens, hidden\]"),
        (
            {"x": np.zeros((3, 0), np.float32), "weight": np.zeros((8, 0), np.float32)},
            ValueError,
            "x must have at least one column",
        ),
        ({"bias": np.zeros(7, np.float32)}, ValueError, r"bias must have shape \[num_experts\] = \[8\]"),
        ({"bias": np.zeros(8, np.float16)}, TypeError, "bias must be float32, got float16"),
        ({"num_valid": 4}, ValueError, r"num_valid must be in 0\.\.3, got 4"),
        ({"x": np.zeros((65, 16), np.float32), "path": "decode"}, ValueError, "at most 64 tokens, .* got 65 tokens"),
        ({"method": "no-such-model"}, ValueError, "must be the name of a preset"),
    ],
)
def test_refused_arguments(backend: Backend, change: dict[str, Any], error: type, words: str) -> None:
    given = {"x": np.zeros((3, 16), np.float32), "weight": np.zeros((8, 16), np.float32), "method": METHOD} | change
    arrays = {name: backend.array(value) if isinstance(value, np.ndarray) else value for name, value in given.items()}
    with pytest.raises(error, match=words):
        dense_router(**arrays)


@pytest.mark.parametrize(("experts", "k"), [(1025, 4), (64, 33)])
def test_decode_is_refused_where_it_does_not_fit(backend: Backend, experts: int, k: int) -> None:
    x, weight = (backend.array(a) for a in gated(2, experts, 8))
    with pytest.raises(ValueError, match="dense_router: path 'decode' takes at most"):
        dense_router(x, weight, RoutingMethod(experts, k), path="decode")
