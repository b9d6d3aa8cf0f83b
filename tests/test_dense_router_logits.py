# SPDX-License-Identifier: Apache-2.0
"""Logits from the launches of dense_router: those of the oracle to the bit, on products that float32 holds exactly."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from cupy_router import (
    ExpertLayout,
    LayoutSpec,
    RoutingMethod,
    RoutingPlanWithLogits,
    RoutingWithLogits,
    dense_router,
    gemm,
)
from cupy_router.ops import _chunks
from tests import compare, inputs, oracle
from tests.backends import DTYPES, Backend
from tests.canvas import Canvas
from tests.recorder import recording

PATHS = ("decode", "prefill")


def exact(shape: tuple[int, ...], seed: int, dtype: str = "float32") -> np.ndarray:
    """Multiples of 1/4: sums of a few products of them are exact in float32."""
    return (inputs.rng(seed, *shape).integers(-8, 9, shape) / 4).astype(DTYPES[dtype])


def wanted(
    x: np.ndarray, weight: np.ndarray, logit_bias: np.ndarray | None, dtype: str, valid: int | None
) -> np.ndarray:
    """Return step 1 by the oracle, without padding."""
    logits = oracle.prepare(oracle.gate_logits(x, weight), RoutingMethod(len(weight), 1), logit_bias)
    logits[len(x) if valid is None else valid :] = 0
    return logits.astype(DTYPES[dtype])


def check(
    backend: Backend,
    method: RoutingMethod,
    n: int,
    *,
    hidden: int = 40,
    dtype: str = "float32",
    logits_dtype: str = "float32",
    with_bias: bool = False,
    num_valid: Any = None,
    valid: int | None = None,
    padding: int = -1,
    **options: Any,
) -> None:
    """Compare logits with the oracle, everything else with a call without logits. `padding` of results that are given,
    -1 for results of the call."""
    x, weight = exact((n, hidden), 70, dtype), exact((method.num_logits, hidden), 71, dtype)
    bias = exact((method.num_experts,), 72) if with_bias else None
    given = {"logit_bias": None if bias is None else backend.array(bias), "num_valid": num_valid, **options}
    arrays = backend.array(x), backend.array(weight)
    plain = dense_router(*arrays, method, **given)
    out, canvases = None, []
    if padding >= 0:
        shapes = [(n, method.num_columns)] * 2 + [(n, method.num_logits)]
        dtypes = (DTYPES[method.weight_dtype], DTYPES[method.index_dtype], DTYPES[logits_dtype])
        canvases = [Canvas(shape, padding, d, backend) for shape, d in zip(shapes, dtypes, strict=True)]
        out = RoutingWithLogits(*(canvas.array for canvas in canvases))
    result = dense_router(*arrays, method, return_logits=True, logits_dtype=logits_dtype, out=out, **given)
    assert out is None or result is out
    assert all(canvas.is_clean() for canvas in canvases)
    logits = backend.numpy(result.logits)
    if method.shared_in_normalizer and bias is not None:
        bias = np.pad(bias, (0, method.num_shared_experts))
    compare.assert_same_bits(logits, wanted(x, weight, bias, logits_dtype, valid))
    others = [result.weights, result.indices]
    if "layout" in options:
        assert type(result) is RoutingPlanWithLogits
        others += [array for array in result.layout[:7] if array is not None]
        plain = (*plain[:2], *[array for array in plain.layout[:7] if array is not None])
    for got, want in zip(others, plain, strict=True):
        compare.assert_same_bits(backend.numpy(got), backend.numpy(want))


METHOD = RoutingMethod(36, 6, "sigmoid", logit_scale=0.5, logit_softcap=30.0)


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("with_bias", [False, True])
@pytest.mark.parametrize("logits_dtype", inputs.FLOATS)
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_dtypes_and_bias(backend: Backend, dtype: str, logits_dtype: str, with_bias: bool, path: str) -> None:
    check(backend, METHOD, 9, dtype=dtype, logits_dtype=logits_dtype, with_bias=with_bias, path=path)


@pytest.mark.many_kernels
@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize(("experts", "n"), [(1, 1), (6, 64), (33, 17), (128, 64), (256, 1), (257, 5), (1022, 3)])
def test_sizes(backend: Backend, experts: int, n: int, path: str) -> None:
    check(backend, RoutingMethod(experts, min(6, experts)), n, dtype="bfloat16", with_bias=experts % 2 == 0, path=path)
    check(backend, RoutingMethod(experts, 1), n, dtype="bfloat16", logits_dtype="float16", path=path)


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("score", ["softmax", "identity"])
def test_methods_that_keep_logits_rather_than_scores(backend: Backend, score: str, path: str) -> None:
    check(backend, RoutingMethod(40, 4, score, score_after_topk=True, logit_scale=2.0), 5, with_bias=True, path=path)
    check(backend, RoutingMethod(40, 4, score, num_groups=4, top_groups=2), 5, path=path)


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("with_bias", [False, True])
def test_shared_experts_have_logits(backend: Backend, with_bias: bool, path: str) -> None:
    method = RoutingMethod(32, 4, "sigmoid", num_shared_experts=3, shared_in_normalizer=True)
    check(backend, method, 5, with_bias=with_bias, path=path)


@pytest.mark.parametrize("with_bias", [False, True])
@pytest.mark.parametrize("method", [RoutingMethod(1100, 6), RoutingMethod(50, 40)], ids=["experts", "top_k"])
def test_rows_that_no_warp_holds(backend: Backend, method: RoutingMethod, with_bias: bool) -> None:
    check(backend, method, 5, with_bias=with_bias, num_valid=3, valid=3)
    check(backend, method, 5, with_bias=with_bias, logits_dtype="bfloat16")


@pytest.fixture
def small_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Chunks of 16 tokens where there are 32 experts; the method of these tests is no other test's, nor is its plan."""
    monkeypatch.setattr(_chunks, "budget", lambda gpu: 16 * 32 * 4)


@pytest.mark.usefixtures("small_chunks")
@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("with_bias", [False, True])
@pytest.mark.parametrize("valid", [0, 16, 19, 40])
def test_padding_is_zero(backend: Backend, valid: int, with_bias: bool, path: str) -> None:
    method = RoutingMethod(32, 5, scale=1.125)
    for dtype in ("float32", "bfloat16"):
        given = {"with_bias": with_bias, "logits_dtype": dtype, "path": path, "valid": valid}
        check(backend, method, 40, num_valid=valid, **given)
        check(backend, method, 40, num_valid=backend.array(np.array([valid], np.int32)), padding=3, **given)


@pytest.mark.usefixtures("small_chunks")
@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("padding", [0, 1, 4])
@pytest.mark.parametrize("logits_dtype", ["float32", "float16"])
def test_results_that_are_given(backend: Backend, logits_dtype: str, padding: int, path: str) -> None:
    method = RoutingMethod(32, 5, scale=1.125)
    check(backend, method, 20, logits_dtype=logits_dtype, padding=padding, path=path)
    check(backend, method, 20, logits_dtype=logits_dtype, padding=padding, path=path, with_bias=True)


def test_rows_of_logits_in_reverse_are_no_target_of_the_product(backend: Backend) -> None:
    x, weight = exact((9, 40), 70), exact((36, 40), 71)
    block = backend.array(np.full((9, 36), 7, np.float32))
    k = METHOD.top_k
    out = RoutingWithLogits(backend.xp.zeros((9, k), np.float32), backend.xp.zeros((9, k), np.int32), block[::-1])
    dense_router(backend.array(x), backend.array(weight), METHOD, path="prefill", return_logits=True, out=out)
    compare.assert_same_bits(backend.numpy(block)[::-1], wanted(x, weight, None, "float32", None))


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("n", [1, 40])
@pytest.mark.parametrize("logits_dtype", ["float32", "bfloat16"])
def test_with_a_layout(backend: Backend, n: int, logits_dtype: str, path: str) -> None:
    spec = LayoutSpec(4, want=tuple(ExpertLayout._fields[:7]))
    check(backend, METHOD, n, logits_dtype=logits_dtype, with_bias=n == 1, layout=spec, path=path, dtype="bfloat16")
    check(backend, METHOD, n, layout=LayoutSpec(), num_valid=n // 2, valid=n // 2, path=path, dtype="bfloat16")


@pytest.mark.needs_kernels
def test_without_cublas_the_fused_kernel_serves_any_number(backend: Backend, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gemm, "why_not", lambda device: "it was taken away.")
    check(backend, RoutingMethod(32, 5, scale=1.375), 150, num_valid=100, valid=100)  # its plans are of this test alone


@pytest.mark.parametrize("path", PATHS)
def test_no_tokens(backend: Backend, path: str) -> None:
    check(backend, METHOD, 0, path=path)


# -- Launches ----------------------------------------------------------------------------------------------------------


@pytest.mark.backends("reference")
@pytest.mark.parametrize("n", [4, 200])
@pytest.mark.parametrize("options", [{}, {"logits_dtype": "bfloat16"}, {"num_valid": 2}, {"logit_bias": 1}], ids=str)
def test_logits_take_no_further_launch(n: int, options: dict[str, Any]) -> None:
    x, weight = np.zeros((n, 16), np.float32), np.zeros((8, 16), np.float32)
    given = options | ({"logit_bias": np.zeros(8, np.float32)} if "logit_bias" in options else {})
    with recording() as recorder:
        dense_router(x, weight, RoutingMethod(8, 2), return_logits=True, **given)
    assert [launch.function for launch in recorder.launches] == ["dense_router_decode" if n == 4 else "activation_topk"]


@pytest.mark.backends("reference")
@pytest.mark.parametrize("n", [4, 200])
def test_without_logits_kernels_are_those_without(n: int) -> None:
    x, weight = np.zeros((n, 16), np.float32), np.zeros((8, 16), np.float32)
    with recording() as recorder:
        dense_router(x, weight, RoutingMethod(8, 2))
    (launch,) = recorder.launches
    assert launch.macros["LOGITS_OUT"] == -1
    assert launch.arguments["logits_out"] == launch.arguments["logits_out_stride"] == 0


# -- What is refused ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("change", "error", "words"),
    [
        ({"logits_dtype": "float64"}, ValueError, "logits_dtype must be 'float32' or 'float16' or 'bfloat16', got 'fl"),
        ({"logits_dtype": None}, ValueError, "logits_dtype must be 'float32' or 'float16' or 'bfloat16', got None"),
        (
            {"logits_dtype": np.float32},
            ValueError,
            "logits_dtype must be 'float32' or 'float16' or 'bfloat16', got <cl",
        ),
        ({"return_logits": 1}, TypeError, "return_logits must be a bool, got 1"),
        ({"return_logits": False, "logits_dtype": "int8"}, ValueError, "logits_dtype must be .* got 'int8'"),
    ],
)
def test_refused_arguments(backend: Backend, change: dict[str, Any], error: type, words: str) -> None:
    x, weight = backend.array(exact((3, 16), 70)), backend.array(exact((8, 16), 71))
    with pytest.raises(error, match=f"^dense_router: {words}"):
        dense_router(x, weight, RoutingMethod(8, 2), **({"return_logits": True} | change))


@pytest.mark.parametrize(
    ("logits", "error", "words"),
    [
        (np.zeros((3, 7), np.float32), ValueError, r"out.logits must have shape .* = \[3, 8\]"),
        (np.zeros((3, 8), np.float16), TypeError, "out.logits must be float32, got float16"),
        (None, TypeError, "out.logits must be"),
    ],
)
def test_refused_out(backend: Backend, logits: Any, error: type, words: str) -> None:
    x, weight = backend.array(exact((3, 16), 70)), backend.array(exact((8, 16), 71))
    routed = dense_router(x, weight, RoutingMethod(8, 2))
    before = [backend.numpy(array).copy() for array in routed]
    into = RoutingWithLogits(*routed, None if logits is None else backend.array(logits))
    with pytest.raises(error, match=words):
        dense_router(x * 2, weight, RoutingMethod(8, 2), return_logits=True, out=into)
    with pytest.raises(TypeError, match=r"out must be RoutingWithLogits\(weights, indices, logits\), got Routing"):
        dense_router(x * 2, weight, RoutingMethod(8, 2), return_logits=True, out=routed)
    with pytest.raises(TypeError, match=r"out must be Routing\(weights, indices\), got RoutingWithLogits"):
        dense_router(x * 2, weight, RoutingMethod(8, 2), out=into)
    for array, values in zip(routed, before, strict=True):
        compare.assert_same_bits(backend.numpy(array), values)
