# SPDX-License-Identifier: Apache-2.0
"""activation_topk: which experts, in which order, with what weights; ties, infinities, NaN, padding and layout."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest

from cupy_router import Routing, RoutingMethod, activation_topk, presets
from cupy_router.reference.activation_topk import activation_topk as reference
from tests import compare, inputs, methods, oracle
from tests.backends import Backend

ITEM = pytest.mark.acceptance


def route(
    backend: Backend,
    logits: np.ndarray,
    method: RoutingMethod,
    bias: np.ndarray | None = None,
    *,
    exact: bool = False,
    num_valid: Any = None,
    valid_rows: int | None = None,
    **layout: int,
) -> Routing:
    """Return the op's result on this backend, checked against the reference (the reference against the oracle)."""
    on_device = backend.array(logits, **layout)
    result = activation_topk(on_device, method, bias=None if bias is None else backend.array(bias), num_valid=num_valid)
    assert type(result) is Routing
    got = oracle.Routing(backend.numpy(result.weights), backend.numpy(result.indices))
    n = len(logits) if valid_rows is None else valid_rows
    assert (got.indices[n:] == -1).all()
    assert (got.weights[n:] == 0).all()
    want = (reference if backend.runs_kernels else oracle.route)(logits[:n], method, bias)
    head = oracle.Routing(got.weights[:n], got.indices[:n])
    compare.assert_routes(head, oracle.Routing(*want), logits[:n], method, bias, exact)
    compare.assert_same_bits(backend.numpy(on_device), logits)
    return Routing(got.weights, got.indices)


# -- Sizes -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("n", inputs.TOKEN_CASES)
@pytest.mark.parametrize(("experts", "k"), [(8, 2), (64, 6)])
def test_number_of_tokens(backend: Backend, n: int, experts: int, k: int) -> None:
    n = backend.rows(n, experts, exactly=True)
    route(backend, inputs.normal((n, experts)), RoutingMethod(experts, k))


def test_many_tokens_with_several_warps_per_block(backend: Backend) -> None:
    n = backend.rows(1090, 256, exactly=True)
    route(backend, inputs.normal((n, 256), seed=29), RoutingMethod(256, 6))


def pairs() -> Iterator[Any]:
    """Every number of experts with every score and dtype, every k from 1 to 32, bias and renormalisation mixed in."""
    for i in range(4 * len(inputs.EXPERTS)):
        experts = inputs.EXPERTS[i % len(inputs.EXPERTS)]
        k = min(1 + i * 13 % 32, experts)
        turn = i // len(inputs.EXPERTS)
        score, dtype = inputs.SCORES[(i + turn) % 4], inputs.FLOATS[(i + i // 3 + turn) % 3]
        biased, renormalize = (i // 2 + turn) % 2 == 0, (i // 4 + turn) % 3 != 0
        items = [f"E = {experts}", f"k = {k}", f"score {score}", "with bias" if biased else "without bias"]
        items += ["renormalised" if renormalize else "not renormalised", dtype]
        name = f"{experts}-{k}-{score}-{dtype}{'-bias' if biased else ''}{'-renormalise' if renormalize else ''}"
        yield pytest.param(experts, k, score, dtype, biased, renormalize, id=name, marks=ITEM(*items))


@pytest.mark.many_kernels
@pytest.mark.parametrize(("experts", "k", "score", "dtype", "biased", "renormalize"), list(pairs()))
def test_experts_k_score_and_dtype(
    backend: Backend, experts: int, k: int, score: str, dtype: str, biased: bool, renormalize: bool
) -> None:
    method = RoutingMethod(experts, k, score, renormalize=renormalize, scale=2.5)
    bias = inputs.normal((experts,), seed=30, scale=0.1) if biased else None
    route(backend, inputs.normal((backend.rows(65, experts), experts), dtype, seed=31), method, bias)


@pytest.mark.many_kernels
@pytest.mark.parametrize(
    "experts", [pytest.param(e, marks=ITEM("k = E", f"E = {e}"), id=str(e)) for e in inputs.EXPERTS]
)
def test_k_is_the_number_of_experts(backend: Backend, experts: int) -> None:
    method = RoutingMethod(experts, experts, inputs.SCORES[experts % 4])
    route(backend, inputs.distinct(backend.rows(9, experts), experts), method, exact=True)


@pytest.mark.parametrize(("experts", "k"), [(1025, 40), (4096, 8), (20_000, 64)])
def test_more_experts_than_any_model_has(backend: Backend, experts: int, k: int) -> None:
    route(backend, inputs.normal((backend.rows(5, experts), experts)), RoutingMethod(experts, k, "sigmoid"))


@pytest.mark.parametrize("name", sorted(presets()))
def test_presets(backend: Backend, name: str) -> None:
    method = presets()[name]
    if method.num_groups > 1 or method.score_after_topk:
        logits = inputs.distinct(backend.rows(40, method.num_experts), method.num_experts)
        layer = methods.layer_of(method, 1)
        got = activation_topk(backend.array(logits), name, **layer.arguments(backend.array))
        compare.assert_right((backend.numpy(got.weights), backend.numpy(got.indices)), logits, method, layer)
        return
    logits = inputs.normal((backend.rows(200, method.num_experts), method.num_experts), "bfloat16", seed=32)
    bias = np.float32(8.08) + inputs.normal((method.num_experts,), seed=33, scale=0.01)
    by_method = route(backend, logits, method, bias)
    by_name = activation_topk(backend.array(logits), name, bias=backend.array(bias))
    compare.assert_same_bits(backend.numpy(by_name.indices), by_method.indices)
    compare.assert_same_bits(backend.numpy(by_name.weights), by_method.weights)


# -- What logits and bias hold -----------------------------------------------------------------------------------------

STRUCTURES = [(8, 2), (60, 4), (256, 8), (384, 6), (1000, 31)]


@pytest.mark.parametrize("kind", [pytest.param(kind, marks=ITEM(kind), id=kind) for kind in inputs.LOGITS])
@pytest.mark.parametrize("score", inputs.SCORES)
@pytest.mark.parametrize(("experts", "k"), STRUCTURES)
def test_every_kind_of_logits(backend: Backend, kind: str, score: str, experts: int, k: int) -> None:
    logits = inputs.LOGITS[kind](backend.rows(21, experts), experts)
    got = route(backend, logits, RoutingMethod(experts, k, score), exact=True)
    if kind in ("all logits equal", "logits all -100", "logits all +inf", "logits all -inf"):
        np.testing.assert_array_equal(got.indices, np.broadcast_to(np.arange(k), got.indices.shape))


@pytest.mark.parametrize("kind", [pytest.param(kind, marks=ITEM(kind), id=kind) for kind in inputs.BIAS])
@pytest.mark.parametrize("logits_kind", ["quantised logits", "one NaN", "logits at +-inf"])
@pytest.mark.parametrize(
    ("experts", "k", "score"), [(*shape, inputs.SCORES[i % 4]) for i, shape in enumerate(STRUCTURES)]
)
def test_every_kind_of_bias(backend: Backend, kind: str, logits_kind: str, experts: int, k: int, score: str) -> None:
    logits = inputs.LOGITS[logits_kind](backend.rows(21, experts), experts)
    route(backend, logits, RoutingMethod(experts, k, score), inputs.BIAS[kind](experts))


@pytest.mark.acceptance("bias near 8.08", "all logits equal")
def test_equal_scores_follow_the_bias_exactly(backend: Backend) -> None:
    bias = inputs.BIAS["bias near 8.08"](256)
    got = route(backend, np.full((3, 256), 0.5, np.float32), RoutingMethod(256, 8, "identity"), bias)
    np.testing.assert_array_equal(got.indices[0], oracle.ranking(bias + np.float32(0.5))[:8])


def test_a_bias_selects_but_does_not_weigh(backend: Backend) -> None:
    logits = np.array([[3, 2, 1, 0]], np.float32)
    bias = np.array([0, 0, 0, 1e4], np.float32)
    got = route(backend, logits, RoutingMethod(4, 2, "identity", renormalize=False), bias)
    np.testing.assert_array_equal(got.indices, [[3, 0]])
    np.testing.assert_array_equal(got.weights, [[0, 3]])


@pytest.mark.parametrize("dtype", inputs.FLOATS)
@pytest.mark.parametrize("kind", ["quantised logits", "NaN and +-inf", "logits at +-100"])
def test_special_logits_in_every_dtype(backend: Backend, dtype: str, kind: str) -> None:
    logits = inputs.cast(inputs.LOGITS[kind](21, 256), dtype)
    route(backend, logits, RoutingMethod(256, 8, "sqrtsoftplus"))
    route(backend, logits, RoutingMethod(256, 8, "softmax"))


@pytest.mark.acceptance("subnormal scores are 0")
def test_subnormal_scores_are_zero(backend: Backend) -> None:
    """A score that is subnormal in float32 is 0 on every path, so the lower index wins."""
    steps = np.arange(64, dtype=np.float32)[None]
    for score, logits in (
        ("identity", np.float32(2.0**-140) * steps),
        ("sigmoid", -90 - steps / 8),
        ("softmax", np.where(steps == 63, 0, -90 - steps / 8).astype(np.float32)),
        ("sqrtsoftplus", -180 - steps),
    ):
        got = route(backend, logits, RoutingMethod(64, 4, score), exact=True)
        expected = [63, 0, 1, 2] if score == "softmax" else [0, 1, 2, 3]
        np.testing.assert_array_equal(got.indices, [expected])


@pytest.mark.acceptance("subnormal scores are 0")
def test_a_subnormal_bias_does_not_select(backend: Backend) -> None:
    bias = np.float32(2.0**-140) * np.arange(64, dtype=np.float32)
    got = route(backend, np.zeros((1, 64), np.float32), RoutingMethod(64, 4, "identity"), bias)
    np.testing.assert_array_equal(got.indices, [[0, 1, 2, 3]])


@pytest.mark.parametrize("experts", [4, 2000])
@pytest.mark.acceptance("subnormal scores are 0", "+0.0 and -0.0")
def test_a_flushed_sum_with_the_bias_has_no_sign(backend: Backend, experts: int) -> None:
    """-1.5 + 1 is negative and subnormal in these units, and ties with 0 then."""
    unit = np.float32(2.0**-126)
    logits, bias = np.full((1, experts), -9, np.float32), np.zeros(experts, np.float32)
    logits[0, :4], bias[:4] = [0, 1, 1, -1], [-1, -1.5, -1, 0]
    got = route(backend, logits * unit, RoutingMethod(experts, 2, "identity", renormalize=False), bias * unit)
    np.testing.assert_array_equal(got.indices, [[1, 2]])


@pytest.mark.acceptance("small scores are exact")
def test_small_scores_keep_their_order(backend: Backend) -> None:
    """Down to x = -170 neither sqrt(softplus) nor its order is lost, where log(1 + exp(x)) would be 0 from -16.6."""
    logits = inputs.rng(34).permuted(np.linspace(-170, -10, 256, dtype=np.float32)[None], axis=1)
    got = route(backend, logits, RoutingMethod(256, 256, "sqrtsoftplus", renormalize=False), exact=True)
    np.testing.assert_array_equal(got.indices[0], oracle.ranking(logits[0]))
    assert (got.weights > 0).all()


# -- Weights -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "field",
    [{"renormalize_eps": 1e-20}, {"renormalize_eps": 0.5}, {"renormalize_min": 1e-12}, {"renormalize_min": 3.0}],
    ids=str,
)
@pytest.mark.parametrize("score", inputs.SCORES)
def test_eps_and_minimum_of_the_sum(backend: Backend, field: dict[str, Any], score: str) -> None:
    logits = np.abs(inputs.normal((20, 64), seed=35))
    route(backend, logits, RoutingMethod(64, 4, score, scale=1.5, **field))


@pytest.mark.parametrize("field", [{}, {"renormalize_eps": 1e-20}, {"renormalize_min": 1e-12}], ids=str)
def test_a_sum_of_zero_gives_weights_zero(backend: Backend, field: dict[str, Any]) -> None:
    for score, value in (("sigmoid", -200.0), ("sqrtsoftplus", -400.0), ("identity", 0.0)):
        got = route(backend, np.full((2, 64), value, np.float32), RoutingMethod(64, 4, score, **field))
        np.testing.assert_array_equal(got.weights, np.zeros((2, 4)))


@pytest.mark.acceptance("one NaN")
def test_a_chosen_nan_weighs_nan_and_leaves_the_others_finite(backend: Backend) -> None:
    logits = np.array([[1, np.nan, 3], [np.nan, np.nan, np.nan]], np.float32)
    got = route(backend, logits, RoutingMethod(3, 3, "identity"))
    np.testing.assert_array_equal(got.indices, [[2, 0, 1], [0, 1, 2]])
    np.testing.assert_array_equal(got.weights, [[0.75, 0.25, np.nan], [np.nan] * 3])


@pytest.mark.acceptance("logits at +-inf")
def test_an_infinite_score_weighs_nan_and_the_others_zero(backend: Backend) -> None:
    logits = np.array([[1, np.inf, 3], [np.inf, 1, np.inf]], np.float32)
    for score in ("identity", "sqrtsoftplus"):
        got = route(backend, logits, RoutingMethod(3, 2, score))
        np.testing.assert_array_equal(got.indices, [[1, 2], [0, 2]])
        np.testing.assert_array_equal(got.weights, [[np.nan, 0], [np.nan, np.nan]])
    shared = route(backend, logits, RoutingMethod(3, 3, "softmax", renormalize=False))
    np.testing.assert_array_equal(shared.weights, [[1, 0, 0], [0.5, 0.5, 0]])


def test_large_scores_do_not_overflow(backend: Backend) -> None:
    logits = np.array([[3e38, 3e38, 2e38, -3e38]], np.float32)
    for score in inputs.SCORES:
        route(backend, logits, RoutingMethod(4, 3, score), exact=True)


# -- Padding -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("n", [1, 33, 130])
@pytest.mark.parametrize(
    "share",
    [pytest.param(s, marks=ITEM(f"num_valid {name}"), id=name) for s, name in ((0, "0"), (0.5, "some"), (1, "all"))],
)
def test_padding_by_num_valid(backend: Backend, n: int, share: float) -> None:
    valid = int(n * share)
    logits, method = inputs.normal((n, 256)), RoutingMethod(256, 6)
    route(backend, logits, method, num_valid=valid, valid_rows=valid)
    route(backend, logits, method, num_valid=np.int64(valid), valid_rows=valid)
    for shape in ((), (1,)):
        count = backend.array(np.full(shape, valid, np.int32))
        route(backend, logits, method, num_valid=count, valid_rows=valid)


@pytest.mark.parametrize(("given", "valid"), [(-5, 0), (-(2**31), 0), (34, 33), (2**31 - 1, 33)])
@pytest.mark.acceptance("num_valid clamped")
def test_num_valid_in_an_array_is_clamped(backend: Backend, given: int, valid: int) -> None:
    count = backend.array(np.array([given], np.int32))
    route(backend, inputs.normal((33, 64)), RoutingMethod(64, 4), num_valid=count, valid_rows=valid)


def test_padding_does_not_affect_results(backend: Backend) -> None:
    logits = inputs.normal((10, 64))
    logits[6:] = np.nan
    route(backend, logits, RoutingMethod(64, 4), num_valid=6, valid_rows=6)


# -- Layout and repeats ------------------------------------------------------------------------------------------------


@pytest.mark.many_kernels
@pytest.mark.parametrize(("experts", "k"), [(60, 4), (256, 8), (4100, 8)])
@pytest.mark.parametrize("dtype", inputs.FLOATS)
@pytest.mark.parametrize(
    ("row_pad", "offset"),
    [
        pytest.param(8, 0, marks=ITEM("strided rows"), id="row-stride-of-8-more"),
        pytest.param(3, 0, marks=ITEM("strided rows"), id="odd-row-stride"),
        pytest.param(0, 1, marks=ITEM("misaligned base"), id="base-one-element-off"),
        pytest.param(1, 1, marks=ITEM("strided rows", "misaligned base"), id="both"),
    ],
)
def test_layout(backend: Backend, experts: int, k: int, dtype: str, row_pad: int, offset: int) -> None:
    logits = inputs.normal((backend.rows(7, experts), experts), dtype, seed=36)
    route(backend, logits, RoutingMethod(experts, k), row_pad=row_pad, offset=offset)


@pytest.mark.acceptance("misaligned base")
def test_a_misaligned_bias(backend: Backend) -> None:
    logits, bias = inputs.normal((9, 256)), inputs.normal((256,), seed=37)
    result = activation_topk(backend.array(logits), RoutingMethod(256, 8), bias=backend.array(bias, offset=1))
    want = oracle.route(logits, RoutingMethod(256, 8), bias)
    np.testing.assert_array_equal(backend.numpy(result.indices), want.indices)


@pytest.mark.acceptance("strided rows")
def test_reversed_rows_and_a_repeated_row(backend: Backend) -> None:
    logits = inputs.distinct(6, 64)
    for view, host in zip(
        inputs.row_views(backend.xp, backend.array(logits)), inputs.row_views(np, logits), strict=True
    ):
        method = RoutingMethod(host.shape[1], 1, "sigmoid")
        result = activation_topk(view, method)
        np.testing.assert_array_equal(backend.numpy(result.indices), oracle.route(host, method).indices)


@pytest.mark.parametrize("dtype", inputs.FLOATS)
def test_out_is_filled_and_returned(backend: Backend, dtype: str) -> None:
    logits, method = inputs.normal((9, 256), dtype), RoutingMethod(256, 6, "softmax")
    out = Routing(backend.array(np.zeros((9, 6), np.float32)), backend.array(np.zeros((9, 6), np.int32)))
    result = activation_topk(backend.array(logits), method, out=out)
    assert result.weights is out.weights
    assert result.indices is out.indices
    fresh = activation_topk(backend.array(logits), method)
    compare.assert_same_bits(backend.numpy(out.weights), backend.numpy(fresh.weights))
    compare.assert_same_bits(backend.numpy(out.indices), backend.numpy(fresh.indices))


@pytest.mark.acceptance("bitwise repeats")
def test_a_hundred_repeats_agree_bitwise(backend: Backend) -> None:
    logits = backend.array(inputs.normal((backend.rows(65, 384), 384), seed=38))
    first = [backend.numpy(a) for a in activation_topk(logits, "deepseek-v4-pro")]
    for _ in range(100 if backend.name != "simt" else 5):
        for a, b in zip(first, activation_topk(logits, "deepseek-v4-pro"), strict=True):
            compare.assert_same_bits(backend.numpy(b), a)


# A kernel for few rows, for some and for many.
@pytest.mark.parametrize("n", [70, 2049, pytest.param(16385, marks=pytest.mark.slow("seconds"))])
@pytest.mark.parametrize(
    "method",
    [
        *(RoutingMethod(experts, 5, "softmax") for experts in (36, 256, 3000)),
        *(RoutingMethod(256, 6, score, renormalize=False) for score in ("sqrtsoftplus", "sigmoid")),
        RoutingMethod(256, 8, "sigmoid", num_groups=8, top_groups=4, group_score="top2"),
    ],
    ids=lambda method: f"{method.score}-{method.num_experts}-{method.num_groups}",
)
def test_a_row_does_not_depend_on_the_others(backend: Backend, method: RoutingMethod, n: int) -> None:
    n = backend.rows(n, method.num_experts, exactly=True)
    logits = inputs.normal((n, method.num_experts), seed=39)
    bias = backend.array(inputs.normal((method.num_experts,), seed=40, scale=0.1))
    weights, indices = map(backend.numpy, activation_topk(backend.array(logits), method, bias=bias))
    for chosen in (slice(0, 1), slice(33, 69), slice(n - 1, n)):
        alone = activation_topk(backend.array(logits[chosen]), method, bias=bias)
        compare.assert_same_bits(backend.numpy(alone.weights), weights[chosen])
        compare.assert_same_bits(backend.numpy(alone.indices), indices[chosen])
