# SPDX-License-Identifier: Apache-2.0
"""Every step of a routing method in every op that takes one, against tests/oracle.py."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from cupy_router import Router, RoutingMethod, ScoreFunction, activation_topk, dense_router, hash_router, nvrtc
from cupy_router.compiler import CompileError
from tests import compare, inputs
from tests.backends import Backend
from tests.fuzz.case import call
from tests.methods import METHODS, M, layer_of


def products(n: int, method: RoutingMethod, hidden: int, dtype: str) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """x, weight and logits, exact in float32 whatever the order of the sums."""
    draw = inputs.rng(63, n, method.num_experts, hidden)
    x = inputs.cast(draw.integers(-2, 3, (n, hidden)), dtype)
    weight = inputs.cast(draw.integers(-8, 9, (method.num_logits, hidden)) / 8, dtype)
    return x, weight, (x.astype(np.float64) @ weight.astype(np.float64).T).astype(np.float32)


def host(backend: Backend, routing: Any) -> tuple[np.ndarray, np.ndarray]:
    return backend.numpy(routing.weights), backend.numpy(routing.indices)


@pytest.mark.parametrize("name", METHODS)
def test_activation_topk(backend: Backend, name: str) -> None:
    method = METHODS[name]
    kind = list(METHODS).index(name)
    n = backend.rows(9, method.num_experts)
    logits = inputs.distinct(n, method.num_logits, inputs.FLOATS[kind % 3] if method.num_experts < 200 else "float32")
    if name == "groups of negative scores":
        logits = logits - 5
    layer = layer_of(method, kind)
    got = activation_topk(backend.array(logits), method, **layer.arguments(backend.array))
    compare.assert_right(host(backend, got), logits, method, layer)


@pytest.mark.needs_kernels
@pytest.mark.parametrize("name", [name for name, method in METHODS.items() if method.num_experts < 1000])
def test_rows_that_share_a_warp(backend: Backend, name: str) -> None:
    method = METHODS[name]
    kind = list(METHODS).index(name)
    if backend.name == "simt" and kind % 3 and method.bias_on == "score":
        pytest.skip("g++ takes seconds for each kernel: every third is enough here")
    logits = inputs.distinct(9, method.num_logits) - 5 * (name == "groups of negative scores")
    layer = layer_of(method, kind)
    got = call("activation_topk", 5000, logits=backend.array(logits), method=method, **layer.arguments(backend.array))
    compare.assert_right(host(backend, got), logits, method, layer)


@pytest.mark.parametrize("path", ["decode", "prefill"])
@pytest.mark.parametrize("name", [name for name, method in METHODS.items() if method.num_experts < 1000])
def test_dense_router(backend: Backend, name: str, path: str) -> None:
    method = METHODS[name]
    kind = 1 + list(METHODS).index(name)
    if backend.name == "simt" and kind % 3 and path == "decode":
        pytest.skip("g++ takes seconds for each kernel: every third is enough here")
    x, weight, logits = products(5, method, 40, inputs.FLOATS[kind % 3])
    layer = layer_of(method, kind)
    given = layer.arguments(backend.array)
    arrays = backend.array(x), backend.array(weight)
    if path == "decode" and (method.num_columns > 32 or name in ("groups of 1", "groups of 2")):
        with pytest.raises(ValueError, match="path 'decode' takes at most"):
            dense_router(*arrays, method, path=path, **given)
        return
    got = dense_router(*arrays, method, path=path, **given)
    compare.assert_right(host(backend, got), logits, method, layer)


@pytest.mark.parametrize("source", ["logits", "x", "router"])
@pytest.mark.parametrize("name", [name for name, method in METHODS.items() if method.num_experts < 1000])
def test_hash_router(backend: Backend, name: str, source: str) -> None:
    method = METHODS[name]
    kind = 2 + list(METHODS).index(name)
    if backend.name == "simt" and kind % 3 and source != "logits":
        pytest.skip("g++ takes seconds for each kernel: every third is enough here")
    x, weight, logits = products(5, method, 40, "float16")
    layer = replace(layer_of(method, kind), bias=None)  # a table alone decides
    given = layer.arguments(backend.array)
    rows = [inputs.rng(64, row).permutation(method.num_experts)[: method.top_k] for row in range(7)]
    table, ids = np.stack(rows).astype(np.int32), np.array([3, 6, 0, 3, 1], np.int32)
    uploaded = backend.array(table)
    if source == "router":
        router = Router(method, weight=backend.array(weight), table=uploaded, **given)
        got = router(backend.array(x), backend.array(ids))
    else:
        arrays = {"logits": logits} if source == "logits" else {"x": x, "weight": weight}
        arrays = {name: backend.array(array) for name, array in arrays.items()}
        got = hash_router(backend.array(ids), uploaded, method, **arrays, **given)
    compare.assert_right(host(backend, got), logits, method, layer, table[ids])


def test_uniform_weights_come_with_shared_experts(backend: Backend) -> None:
    method = M(8, 2, num_shared_experts=2, shared_weight=0.25, weight_dtype="float16", index_dtype="int64")
    ids, table = backend.array(np.array([1, 9], np.int32)), backend.array(np.array([[5, 0], [7, 3]], np.int32))
    weights, indices = host(backend, hash_router(ids, table, method))
    assert indices.tolist() == [[7, 3, 8, 9], [-1, -1, -1, -1]]
    assert weights.tolist() == [[0.5, 0.5, 0.25, 0.25], [0, 0, 0, 0]]
    assert (str(weights.dtype), str(indices.dtype)) == ("float16", "int64")


# -- Rules -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("experts", [64, 2048])
def test_the_lower_of_equal_groups_wins(backend: Backend, experts: int) -> None:
    for group_score in ("max", "top2"):
        method = M(experts, 4, "identity", num_groups=8, top_groups=2, group_score=group_score)
        got = host(backend, activation_topk(backend.array(np.ones((2, experts), np.float32)), method))
        assert got[1].tolist() == [[0, 1, 2, 3]] * 2
        logits = np.ones((1, experts), np.float32)
        logits[0, -1] = 2  # the last group is best, and of the equal ones the first is next
        got = host(backend, activation_topk(backend.array(logits), method))
        assert got[1].tolist() == [[experts - 1, 0, 1, 2]]


@pytest.mark.parametrize("experts", [8, 2048])
def test_a_group_whose_sum_is_flushed_ties_with_zero(backend: Backend, experts: int) -> None:
    size, unit = experts // 4, np.float32(2.0**-126)
    logits = np.full((1, experts), -9, np.float32)
    logits[0, [0, 1, size, size + 1]] = 1, -1.5, 0, 0  # the first group's best two add up to -0.5 units, which is 0
    method = M(experts, 1, "identity", num_groups=4, top_groups=1, group_score="top2", renormalize=False)
    got = host(backend, activation_topk(backend.array(logits * unit), method))
    assert got[1].tolist() == [[0]]


@pytest.mark.parametrize("experts", [64, 2048])
def test_nan_ranks_a_group_last(backend: Backend, experts: int) -> None:
    """NaN is below -inf, so a group of NaN comes last, and with top2 a group that has only one number as well."""
    size = experts // 4
    logits = np.full((3, experts), -np.inf, np.float32)
    logits[0, :size] = np.nan
    logits[1, :] = np.nan
    logits[2, : 2 * size] = np.nan
    logits[2, 0] = 100
    for group_score in ("max", "top2"):
        method = M(experts, 3, "identity", num_groups=4, top_groups=1, group_score=group_score, renormalize=False)
        got = host(backend, activation_topk(backend.array(logits), method))
        compare.assert_right(got, logits, method)
        assert got[1][1].tolist() == [0, 1, 2]
        assert got[1][2].tolist() == ([0, 1, 2] if group_score == "max" else [2 * size, 2 * size + 1, 2 * size + 2])


@pytest.mark.parametrize("columns", [64, 2000])
def test_infinite_logits_after_topk(backend: Backend, columns: int) -> None:
    """Two +inf share a softmax over the chosen; NaN takes no part and weighs NaN; a row of -inf is uniform."""
    logits = np.full((4, columns), -np.inf, np.float32)
    logits[0, [3, 5]] = np.inf
    logits[1, :2] = 1, 2
    logits[2] = np.nan
    logits[3] = np.nan
    logits[3, 7] = 1.5
    method = M(columns, 4, "softmax", score_after_topk=True)
    weights, indices = host(backend, activation_topk(backend.array(logits), method))
    np.testing.assert_array_equal(indices, [[3, 5, 0, 1], [1, 0, 2, 3], [0, 1, 2, 3], [7, 0, 1, 2]])
    np.testing.assert_allclose(weights[0], [0.5, 0.5, 0, 0])
    np.testing.assert_allclose(weights[1], [0.731058578, 0.268941421, 0, 0], rtol=1e-6)
    np.testing.assert_array_equal(weights[2], [np.nan] * 4)
    np.testing.assert_array_equal(weights[3], [1, np.nan, np.nan, np.nan])


def test_shared_experts_far_below_one_keep_their_ratio(backend: Backend) -> None:
    """sigmoid(-100) is no normal float32, yet its ratio to sigmoid(-101) is e."""
    method = M(4, 1, "sigmoid", num_shared_experts=1, shared_in_normalizer=True)
    logits = np.array([[-100, -200, -200, -200, -101]], np.float32)
    weights, indices = host(backend, activation_topk(backend.array(logits), method))
    assert indices.tolist() == [[0, 4]]
    np.testing.assert_allclose(weights, [[0.7310586, 0.2689414]], rtol=1e-5)


def test_padding_has_the_dtypes_and_columns_of_the_method(backend: Backend) -> None:
    method = replace(METHODS["everything"], num_shared_experts=2)
    x, weight, logits = products(6, method, 16, "bfloat16")
    for got in (
        activation_topk(backend.array(logits), method, num_valid=4),
        dense_router(backend.array(x), backend.array(weight), method, num_valid=4),
    ):
        weights, indices = host(backend, got)
        assert (weights[4:] == 0).all()
        assert (indices[4:] == -1).all()
        compare.assert_right((weights[:4], indices[:4]), logits[:4], method)


@pytest.mark.parametrize("weight_dtype", ["float16", "bfloat16"])
def test_weights_are_rounded_to_even(backend: Backend, weight_dtype: str) -> None:
    """Every bit pattern's neighbourhood: halves, one bit beside them, overflow, subnormals of the result."""
    step = {"float16": 2.0**-10, "bfloat16": 2.0**-7}[weight_dtype]
    odd = np.arange(1, 64, 2) * step / 2
    beside = np.nextafter(np.float32(1 + odd), np.float32(9))
    values = np.concatenate([1 + odd, beside, [65519.9, 65520.0, 3e38, np.nan]])
    values = np.concatenate([values, -values, 2.0**-14 - odd * 2.0**-13]).astype(np.float32)
    method = M(values.size, values.size, "identity", renormalize=False, weight_dtype=weight_dtype)
    weights, indices = host(backend, activation_topk(backend.array(values[None]), method))
    with np.errstate(over="ignore"):
        want = values[indices[0]].astype(weights.dtype)
    np.testing.assert_array_equal(weights[0].astype(np.float32), want.astype(np.float32))


# -- Bad input ---------------------------------------------------------------------------------------------------------


def test_results_of_another_dtype_are_refused(backend: Backend) -> None:
    method = METHODS["bfloat16 weights"]
    logits = backend.array(np.zeros((2, 64), np.float32))
    out = activation_topk(logits, replace(method, weight_dtype="float32"))
    with pytest.raises(TypeError, match=r"activation_topk: out.weights must be bfloat16, got float32 \[2, 6\]"):
        activation_topk(logits, method, out=out)


BAD: list[tuple[Callable[..., Any], str]] = [
    (lambda a: activation_topk(a(2, 64), M(64, 4), logit_bias=a(63)), r"logit_bias must have shape \[num_experts\]"),
    (lambda a: activation_topk(a(2, 64), M(64, 4), expert_scale=a(1, 64)), r"expert_scale must have shape \[num_exp"),
    (
        lambda a: activation_topk(a(2, 64), METHODS["shared in the normaliser"]),
        r"logits must have shape .* = \[num_tokens, 66\], got float32 \[2, 64\]",
    ),
    (
        lambda a: activation_topk(a(2, 64), METHODS["softmax after top-k"], bias=a(64)),
        "bias has no scores to go to where score_after_topk is set, unless bias_on is 'logits'",
    ),
    (lambda a: dense_router(a(2, 8), a(64, 8), M(64, 4), expert_scale=a(63)), "expert_scale must have shape"),
    (lambda a: dense_router(a(2, 8), a(64, 8), METHODS["shared in the normaliser"]), r"= \[66, 8\], got float32 \[64"),
    (lambda a: Router(M(64, 4), weight=a(64, 8), logit_bias=a(64, 1)), "Router: logit_bias must have shape"),
]


@pytest.mark.parametrize(("call", "message"), BAD, ids=lambda value: value[:30] if isinstance(value, str) else "")
def test_bad_input(backend: Backend, call: Callable[..., Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        call(lambda *shape: backend.array(np.zeros(shape, np.float32)))


# -- Own scores --------------------------------------------------------------------------------------------------------


@pytest.mark.needs_kernels
@pytest.mark.parametrize(
    ("cuda", "line", "word"), [("x *\n\nnonsense(x)", 3, "nonsense"), ("float y = 1.0f;\nreturn y + z;", 2, "z")]
)
def test_an_error_in_a_custom_score_names_its_line(
    backend: Backend, cuda: str, line: int, word: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Without NVRTC the first call finds it."""
    monkeypatch.setattr(nvrtc, "errors", lambda *args: None)
    logits = backend.array(np.zeros((2, 64), np.float32))
    broken = ScoreFunction("mine", cuda=cuda, numpy=lambda x: x)
    with pytest.raises(CompileError) as caught:
        activation_topk(logits, M(64, 4, broken))
    first = next(text for text in str(caught.value).splitlines() if "error" in text)
    assert "ScoreFunction mine" in first
    assert f"({line})" in first or f":{line}:" in first
    assert word in first
    fine = replace(broken, cuda="x")
    assert host(backend, activation_topk(logits, M(64, 4, fine)))[1].tolist() == [[0, 1, 2, 3]] * 2


class Unhashable:
    __hash__ = None  # type: ignore[assignment]

    def __call__(self, x: Any) -> Any:
        return x


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"name": "two words"}, ValueError, "name is 'two words', but must be of letters"),
        ({"name": 'a"\n#error'}, ValueError, "name is "),
        ({"name": 3}, TypeError, "name is 3, but must be a str"),
        ({"cuda": " \n"}, ValueError, "cuda is empty"),
        ({"cuda": b"x"}, TypeError, "cuda is b'x', but must be a str"),
        (
            {"cuda": "x /* \ud800 */"},
            ValueError,
            r"cuda has '\\ud800', but must be text without zero bytes and surrogates",
        ),
        ({"cuda": "x\0 + 1"}, ValueError, r"cuda has '\\x00', but must be text"),
        ({"numpy": "x"}, TypeError, "numpy is 'x', but must be a function of a float64 array"),
        ({"numpy": Unhashable()}, TypeError, "numpy is <.*>, which has no hash, but must be hashable"),
    ],
)
def test_a_bad_custom_score(changes: dict[str, Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=f"ScoreFunction: {message}"):
        ScoreFunction(**{"name": "f", "cuda": "x", "numpy": abs, **changes})


@pytest.mark.backends("reference")
def test_a_custom_score_of_the_wrong_shape(backend: Backend) -> None:
    wrong = ScoreFunction("wrong", cuda="x", numpy=lambda x: x.sum())
    with pytest.raises(ValueError, match=r"ScoreFunction\('wrong'\) made shape \(\) of an array of shape \(2, 4\)"):
        activation_topk(np.zeros((2, 4), np.float32), M(4, 2, wrong))


@pytest.mark.backends("reference")
def test_jax_without_x64_refuses_int64_indices(backend: Backend) -> None:
    jax = pytest.importorskip("jax", reason="JAX is not installed")
    logits = jax.numpy.zeros((2, 8), "float32")
    with pytest.raises(
        ValueError, match="activation_topk: int64 results need JAX's option jax_enable_x64, which is off"
    ):
        activation_topk(logits, M(8, 2, index_dtype="int64"))
    with jax.enable_x64(True) if hasattr(jax, "enable_x64") else jax.experimental.enable_x64():
        indices = activation_topk(logits, M(8, 2, index_dtype="int64")).indices
    assert str(indices.dtype) == "int64"
