# SPDX-License-Identifier: Apache-2.0
"""hash_router: experts from the table; weights uniform, from given logits, or from x and weight."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import Any
from unittest import mock

import numpy as np
import pytest

from cupy_router import Routing, RoutingMethod, hash_router, tuning
from cupy_router.ops import _cached
from cupy_router.reference.hash_router import hash_router as reference
from cupy_router.tuning import DEFAULT
from tests import compare, inputs, oracle
from tests.backends import DTYPES, Backend

ITEM = pytest.mark.acceptance
VOCABULARY = 1000


def tables(experts: int, k: int, dtype: str = "int32", vocabulary: int = VOCABULARY) -> np.ndarray:
    """Return a row of k different experts per token id."""
    ordered = np.broadcast_to(np.arange(experts), (vocabulary, experts))
    return inputs.rng(40, experts).permuted(ordered, axis=1)[:, :k].astype(DTYPES[dtype])


def token_ids(n: int, dtype: str = "int32", vocabulary: int = VOCABULARY) -> np.ndarray:
    return inputs.rng(41, n).integers(0, vocabulary, n).astype(DTYPES[dtype])


def look_up(
    backend: Backend,
    ids: np.ndarray,
    table: np.ndarray,
    method: RoutingMethod | None = None,
    *,
    logits: np.ndarray | None = None,
    x: np.ndarray | None = None,
    weight: np.ndarray | None = None,
    num_valid: Any = None,
    valid_rows: int | None = None,
    **layout: int,
) -> Routing:
    """Return the op's result on this backend, checked against the reference (the reference against the oracle)."""
    floats = {"logits": logits, "x": x, "weight": weight}
    given = {name: None if a is None else backend.array(a, **layout) for name, a in floats.items()}
    device_ids, device_table = backend.array(ids), backend.array(table, **layout)
    result = hash_router(device_ids, device_table, method, num_valid=num_valid, **given)
    assert type(result) is Routing
    got = Routing(backend.numpy(result.weights), backend.numpy(result.indices))
    n = ids.size if valid_rows is None else valid_rows

    rtol: Any = 2e-6
    if x is not None and weight is not None:
        logits = (x.astype(np.float64) @ weight.astype(np.float64).T).astype(np.float32)
    if backend.runs_kernels:
        want = reference(ids, table, method, floats["logits"], x, weight, num_valid=n)
    else:
        want = oracle.hash_route(ids, table, method, logits, n)
    np.testing.assert_array_equal(got.indices, want[1])
    assert got.indices.dtype == np.int32
    if logits is not None:
        chosen = np.clip(got.indices, 0, logits.shape[1] - 1)
        rtol = compare.tolerance(logits, chosen, method)
        if x is not None and weight is not None:
            rtol += dot_tolerance(x, weight)[:, None]
    compare.assert_weights_close(got.weights, want[0], rtol, method.scale if method else 1)
    for name, a in (*floats.items(), ("table", table)):
        if a is not None:
            compare.assert_same_bits(backend.numpy(device_table if name == "table" else given[name]), a)
    return got


def dot_tolerance(x: np.ndarray, weight: np.ndarray) -> np.ndarray:
    """Return the effect of float32 accumulation on a weight: a random walk of roundings in the logit, doubled."""
    terms = np.sqrt((x.astype(np.float64) ** 2) @ (weight.astype(np.float64) ** 2).T).max(-1, initial=0)
    return np.asarray(2 * np.finfo(np.float32).eps * 8 * terms)


# -- Uniform weights ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("n", inputs.TOKEN_CASES)
def test_number_of_tokens(backend: Backend, n: int) -> None:
    n = backend.rows(n, 64, exactly=True)
    ids, table = token_ids(n), tables(64, 6)
    got = look_up(backend, ids, table)
    np.testing.assert_array_equal(got.indices, table[ids])
    look_up(backend, ids, table, RoutingMethod(64, 6), logits=inputs.normal((n, 64)))


@pytest.mark.many_kernels
@pytest.mark.parametrize(
    ("k", "id_dtype", "table_dtype"),
    [
        pytest.param(k, ("int32", "int64")[k % 2], ("int32", "int64")[k // 2 % 2], marks=ITEM(f"k = {k}"), id=f"{k}")
        for k in range(1, 33)
    ],
)
def test_every_k_and_the_integer_dtypes(backend: Backend, k: int, id_dtype: str, table_dtype: str) -> None:
    got = look_up(backend, token_ids(50, id_dtype), tables(64, k, table_dtype))
    np.testing.assert_array_equal(got.weights, np.full((50, k), np.float32(1 / k)))


@pytest.mark.acceptance("k = E")
@pytest.mark.parametrize("k", [64, 300])
def test_wide_tables(backend: Backend, k: int) -> None:
    look_up(backend, token_ids(9), tables(k, k))
    look_up(backend, token_ids(9), tables(k, k), RoutingMethod(k, k), logits=inputs.normal((9, k)))


def test_a_method_alone_keeps_weights_uniform(backend: Backend) -> None:
    got = look_up(backend, token_ids(20), tables(256, 6), RoutingMethod(256, 6, scale=2.5))
    np.testing.assert_array_equal(got.weights, np.full((20, 6), np.float32(1 / 6)))


def test_experts_keep_the_order_of_the_table(backend: Backend) -> None:
    table = np.array([[5, 1, 3], [7, 7, 0]], np.int32)
    got = look_up(backend, np.array([1, 0, 1], np.int32), table, RoutingMethod(8, 3), logits=inputs.normal((3, 8)))
    np.testing.assert_array_equal(got.indices, [[7, 7, 0], [5, 1, 3], [7, 7, 0]])


# -- Given logits ------------------------------------------------------------------------------------------------------


def pairs() -> Iterator[Any]:
    for i in range(2 * len(inputs.EXPERTS)):
        experts = inputs.EXPERTS[i % len(inputs.EXPERTS)]
        k, turn = min(1 + i * 13 % 32, experts), i // len(inputs.EXPERTS)
        score, dtype = inputs.SCORES[(i + turn) % 4], inputs.FLOATS[(i + i // 3 + turn) % 3]
        renormalize = (i // 4 + turn) % 3 != 0
        items = [f"E = {experts}", f"k = {k}", f"score {score}", dtype]
        items.append("renormalised" if renormalize else "not renormalised")
        name = f"{experts}-{k}-{score}-{dtype}{'-renormalise' if renormalize else ''}"
        yield pytest.param(experts, k, score, dtype, renormalize, id=name, marks=ITEM(*items))


@pytest.mark.many_kernels
@pytest.mark.parametrize(("experts", "k", "score", "dtype", "renormalize"), list(pairs()))
def test_given_logits(backend: Backend, experts: int, k: int, score: str, dtype: str, renormalize: bool) -> None:
    method = RoutingMethod(experts, k, score, renormalize=renormalize, scale=2.5)
    n = backend.rows(65, experts)
    look_up(backend, token_ids(n), tables(experts, k), method, logits=inputs.normal((n, experts), dtype, seed=42))


@pytest.mark.parametrize("kind", [pytest.param(kind, marks=ITEM(kind), id=kind) for kind in inputs.LOGITS])
@pytest.mark.parametrize("score", inputs.SCORES)
@pytest.mark.parametrize("renormalize", [False, True])
def test_every_kind_of_logits(backend: Backend, kind: str, score: str, renormalize: bool) -> None:
    method = RoutingMethod(64, 6, score, renormalize=renormalize)
    look_up(backend, token_ids(21), tables(64, 6), method, logits=inputs.LOGITS[kind](21, 64))


@pytest.mark.parametrize(
    "field",
    [{"renormalize_eps": 1e-20}, {"renormalize_eps": 0.5}, {"renormalize_min": 1e-12}, {"renormalize_min": 9.0}],
    ids=str,
)
def test_eps_and_minimum_of_the_sum(backend: Backend, field: dict[str, Any]) -> None:
    method = RoutingMethod(64, 6, scale=1.5, **field)
    look_up(backend, token_ids(21), tables(64, 6), method, logits=inputs.normal((21, 64)))


def test_a_sum_of_zero_gives_weights_zero(backend: Backend) -> None:
    logits = np.full((5, 64), -400, np.float32)
    got = look_up(backend, token_ids(5), tables(64, 6), RoutingMethod(64, 6), logits=logits)
    np.testing.assert_array_equal(got.weights, np.zeros((5, 6)))


HELD = {
    "plain": RoutingMethod(100, 6, scale=1.5),
    "softmax of the row": RoutingMethod(100, 3, "softmax"),
    "shared experts": RoutingMethod(70, 5, "sigmoid", num_shared_experts=2, shared_in_normalizer=True),
    "wide": RoutingMethod(300, 20, "identity", score_after_topk=True),
}


@pytest.mark.parametrize("dtype", inputs.FLOATS)
@pytest.mark.parametrize("name", HELD)
@ITEM("strided rows", "misaligned base")
def test_a_row_is_the_same_among_few_tokens_and_many(backend: Backend, name: str, dtype: str) -> None:
    """Among few, a warp reads all logits of its token."""
    method, n = HELD[name], 37
    ids, table = token_ids(n), tables(method.num_experts, method.top_k)
    ids[[0, 9, 36]] = -1, VOCABULARY, 2**31 - 1
    table[ids[5], -1], table[ids[6], 0] = method.num_experts, -1
    logits = inputs.normal((n, method.num_logits)).astype(DTYPES[dtype])
    logits[3, ::3], logits[4, ::2] = np.nan, np.inf
    given = {"method": method, "logits": logits, "row_pad": 3, "offset": 1, "valid_rows": 35, "num_valid": 35}
    few = look_up(backend, ids, table, **given)
    tuned = DEFAULT.table
    no_tokens = replace(tuned, hash_router=replace(tuned.hash_router, max_tokens_held=0))
    with mock.patch.object(tuning.gpu, "nearest", return_value=no_tokens):
        _cached.forget()
        many = look_up(backend, ids, table, **given)
    _cached.forget()
    compare.assert_same_bits(few.weights, many.weights)


# -- X and weight ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("hidden", [1, 7, 33, 64, 100, 384, 1000, 4096])
@pytest.mark.parametrize("dtype", inputs.FLOATS)
@pytest.mark.acceptance("x and weight")
def test_dot_products(backend: Backend, hidden: int, dtype: str) -> None:
    n, experts, k = backend.rows(40, hidden), 32, 6
    x = inputs.normal((n, hidden), dtype, seed=43)
    weight = inputs.normal((experts, hidden), dtype, seed=44, scale=hidden**-0.5)
    look_up(backend, token_ids(n), tables(experts, k), RoutingMethod(experts, k, scale=1.5), x=x, weight=weight)


@pytest.mark.parametrize("k", [1, 2, 7, 8, 9, 20, 32, 33])
@pytest.mark.parametrize("hidden", [200, 5000])
@pytest.mark.acceptance("x and weight")
def test_dot_products_of_any_number_of_experts(backend: Backend, hidden: int, k: int) -> None:
    """Read in groups, by warps that have one part of hidden or two."""
    n, experts = backend.rows(20, hidden), 40
    x = inputs.normal((n, hidden), "bfloat16", seed=43)
    weight = inputs.normal((experts, hidden), "float16" if k == 9 else "bfloat16", seed=44, scale=hidden**-0.5)
    method = RoutingMethod(experts, k, scale=1.5, num_shared_experts=int(k < 32))
    look_up(backend, token_ids(n), tables(experts, k), method, x=x, weight=weight)


@pytest.mark.parametrize("score", inputs.SCORES)
@pytest.mark.parametrize("renormalize", [False, True])
@pytest.mark.acceptance("x and weight")
def test_dot_products_of_every_score(backend: Backend, score: str, renormalize: bool) -> None:
    n, experts, k, hidden = 12, 40, 4, 96
    x = np.abs(inputs.normal((n, hidden), seed=45))
    weight = np.abs(inputs.normal((experts, hidden), seed=46, scale=hidden**-0.5))
    method = RoutingMethod(experts, k, score, renormalize=renormalize)
    look_up(backend, token_ids(n), tables(experts, k), method, x=x, weight=weight)


@pytest.mark.parametrize("n", [1, 7, 65, 300])
@pytest.mark.acceptance("x and weight")
def test_dot_products_of_deepseek_v4_flash(backend: Backend, n: int) -> None:
    n, hidden = backend.rows(n, 4096, exactly=True), 4096
    x = inputs.normal((n, hidden), "bfloat16", seed=47)
    weight = inputs.normal((256, hidden), "bfloat16", seed=48, scale=hidden**-0.5)
    method = RoutingMethod(256, 6, renormalize_eps=1e-20, scale=1.5)
    look_up(backend, token_ids(n, "int64"), tables(256, 6, "int64"), method, x=x, weight=weight)


@pytest.mark.acceptance("x and weight")
def test_only_needed_experts_are_read(backend: Backend) -> None:
    """NaN in the gate's other rows does not reach the weights."""
    table = np.array([[1, 3], [3, 5]], np.int32)
    weight = inputs.normal((8, 32))
    weight[[0, 2, 4, 6, 7]] = np.nan
    x = inputs.normal((3, 32), seed=49)
    result = hash_router(
        backend.array(np.array([0, 1, 0], np.int32)),
        backend.array(table),
        RoutingMethod(8, 2),
        x=backend.array(x),
        weight=backend.array(weight),
    )
    assert np.isfinite(backend.numpy(result.weights)).all()


# -- What is out of range ----------------------------------------------------------------------------------------------

BAD_IDS = [
    pytest.param(-1, "int32", marks=ITEM("token id -1")),
    pytest.param(VOCABULARY, "int32", marks=ITEM("token id vocab")),
    pytest.param(2**31 - 1, "int32", marks=ITEM("token id 2**31-1")),
    pytest.param(-(2**31), "int32"),
    pytest.param(2**31, "int64"),
    pytest.param(2**32, "int64"),  # its low half is the id 0
    pytest.param(-(2**63), "int64"),
    pytest.param(2**63 - 1, "int64"),
]


def way(name: str, n: int, experts: int) -> dict[str, Any]:
    """Return the arguments of one of four ways to call the op."""
    if name in ("alone", "method"):
        return {} if name == "alone" else {"method": RoutingMethod(experts, 6)}
    method = RoutingMethod(experts, 6, scale=1.5)
    if name == "logits":
        return {"method": method, "logits": inputs.normal((n, experts))}
    return {"method": method, "x": inputs.normal((n, 24)), "weight": inputs.normal((experts, 24), seed=50)}


WAYS = ("alone", "method", "logits", "x and weight")


@pytest.mark.parametrize(("bad", "dtype"), BAD_IDS)
@pytest.mark.parametrize("how", WAYS)
def test_token_ids_outside_the_table(backend: Backend, bad: int, dtype: str, how: str) -> None:
    ids = token_ids(40, dtype)
    ids[[0, 7, 39]] = bad
    got = look_up(backend, ids, tables(64, 6), **way(how, 40, 64))
    assert (got.indices[[0, 7, 39]] == -1).all()
    assert (got.weights[[0, 7, 39]] == 0).all()
    assert (got.indices[[1, 8, 38]] >= 0).all()


BAD_ENTRIES = [
    pytest.param(-1, "int32", marks=ITEM("table entry -1")),
    pytest.param(64, "int32", marks=ITEM("table entry E")),
    pytest.param(2**31 - 1, "int32"),
    pytest.param(-(2**31), "int32"),
    pytest.param(2**32, "int64"),  # its low half is expert 0
    pytest.param(-(2**63), "int64"),
]


@pytest.mark.parametrize(("bad", "dtype"), BAD_ENTRIES)
@pytest.mark.parametrize("how", WAYS)
def test_invalid_table_entries(backend: Backend, bad: int, dtype: str, how: str) -> None:
    table = tables(64, 6, dtype)
    ids = np.array([0, 3, 5, 9, 3], np.int32)
    table[3, 5], table[9, 0] = bad, bad
    got = look_up(backend, ids, table, **way(how, 5, 64))
    known = how != "alone" or bad < 0 or bad >= 2**31
    assert (got.indices[[1, 3, 4]] == -1).all() == known
    assert (got.weights[[1, 3, 4]] == 0).all() == known
    assert (got.indices[[0, 2]] >= 0).all()


def test_an_empty_table(backend: Backend) -> None:
    got = look_up(backend, np.array([0, 1, -1], np.int32), np.empty((0, 4), np.int32))
    assert (got.indices == -1).all()


# -- Padding and layout ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("how", WAYS)
@pytest.mark.parametrize(
    "valid",
    [pytest.param(v, marks=ITEM(f"num_valid {name}"), id=name) for v, name in ((0, "0"), (13, "some"), (30, "all"))],
)
def test_padding_by_num_valid(backend: Backend, valid: int, how: str) -> None:
    ids, table, arguments = token_ids(30), tables(64, 6), way(how, 30, 64)
    look_up(backend, ids, table, **arguments, num_valid=valid, valid_rows=valid)
    for shape in ((), (1,)):
        count = backend.array(np.full(shape, valid, np.int32))
        look_up(backend, ids, table, **arguments, num_valid=count, valid_rows=valid)


@pytest.mark.acceptance("num_valid clamped")
@pytest.mark.parametrize(("given", "valid"), [(-3, 0), (31, 30), (2**31 - 1, 30)])
def test_num_valid_in_an_array_is_clamped(backend: Backend, given: int, valid: int) -> None:
    count = backend.array(np.array([given], np.int32))
    look_up(backend, token_ids(30), tables(64, 6), num_valid=count, valid_rows=valid)


@pytest.mark.many_kernels
@pytest.mark.parametrize("how", WAYS)
@pytest.mark.parametrize(
    ("row_pad", "offset"),
    [
        pytest.param(8, 0, marks=ITEM("strided rows"), id="row-stride-of-8-more"),
        pytest.param(3, 0, marks=ITEM("strided rows"), id="odd-row-stride"),
        pytest.param(0, 1, marks=ITEM("misaligned base"), id="base-one-element-off"),
        pytest.param(1, 1, marks=ITEM("strided rows", "misaligned base"), id="both"),
    ],
)
@pytest.mark.parametrize("dtype", inputs.FLOATS)
def test_layout(backend: Backend, how: str, dtype: str, row_pad: int, offset: int) -> None:
    arguments = {
        name: value if name == "method" else value.astype(DTYPES[dtype]) for name, value in way(how, 20, 64).items()
    }
    look_up(backend, token_ids(20), tables(64, 6), **arguments, row_pad=row_pad, offset=offset)


@pytest.mark.parametrize("how", WAYS)
def test_out_is_filled_and_returned(backend: Backend, how: str) -> None:
    out = Routing(backend.array(np.zeros((20, 6), np.float32)), backend.array(np.zeros((20, 6), np.int32)))
    arguments = {name: value if name == "method" else backend.array(value) for name, value in way(how, 20, 64).items()}
    given = backend.array(token_ids(20)), backend.array(tables(64, 6))
    result = hash_router(*given, **arguments, out=out)
    assert result.weights is out.weights
    assert result.indices is out.indices
    for a, b in zip(out, hash_router(*given, **arguments), strict=True):
        compare.assert_same_bits(backend.numpy(a), backend.numpy(b))


@pytest.mark.acceptance("bitwise repeats")
@pytest.mark.parametrize("how", WAYS)
def test_repeats_agree_bitwise(backend: Backend, how: str) -> None:
    arguments = {name: value if name == "method" else backend.array(value) for name, value in way(how, 65, 64).items()}
    given = backend.array(token_ids(65)), backend.array(tables(64, 6))
    first = [backend.numpy(a) for a in hash_router(*given, **arguments)]
    for _ in range(100 if backend.name != "simt" else 5):
        for a, b in zip(first, hash_router(*given, **arguments), strict=True):
            compare.assert_same_bits(backend.numpy(b), a)
