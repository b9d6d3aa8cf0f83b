# SPDX-License-Identifier: Apache-2.0
"""batch_invariant=True: a token's logits, weights and experts are the same to the bit in any batch."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import pytest

from cupy_router import LayoutSpec, Router, RoutingMethod, dense_router, hash_router, tuning
from cupy_router.ops import _cached
from tests import compare, inputs
from tests.backends import Backend

ROWS = ("x", "token_ids", "indices", "bias_index")
FLOATS = ("float32", "float16", "bfloat16")
KINDS = ("dense", "given", "biases", "hash", "hash with biases", "Router", "hash Router", "hash Router, given")
METHODS = {
    "sqrtsoftplus": RoutingMethod(40, 6, scale=1.5),
    "softmax": RoutingMethod(72, 4, "softmax", logit_scale=0.5, weight_dtype="bfloat16"),
    "groups": RoutingMethod(128, 8, "sigmoid", num_groups=8, top_groups=4, group_score="top2", index_dtype="int64"),
    "after top-k": RoutingMethod(33, 3, "softmax", score_after_topk=True, bias_on="logits", num_shared_experts=1),
}


@dataclass
class Problem:
    """Tokens of one call, of which any may be taken, in any order."""

    kind: str
    method: RoutingMethod
    n: int
    hidden: int = 200
    dtype: str = "bfloat16"
    weight_dtype: str = ""
    rows: dict[str, np.ndarray] = field(init=False)
    layer: dict[str, np.ndarray] = field(init=False)

    def __post_init__(self) -> None:
        method, n, kind = self.method, self.n, self.kind
        rng = np.random.default_rng(7)
        self.rows = {"x": inputs.normal((n, self.hidden), self.dtype, seed=70)}
        shape, scale = (method.num_logits, self.hidden), 2 * self.hidden**-0.5
        self.layer = {"weight": inputs.normal(shape, self.weight_dtype or self.dtype, seed=71, scale=scale)}
        if kind == "dense":
            self.layer["logit_bias"] = inputs.normal((method.num_experts,), seed=72)
        if "given" in kind:
            given = rng.permuted(np.tile(np.arange(method.num_experts, dtype=np.int32), (n, 1)), axis=1)
            self.rows["indices"] = np.ascontiguousarray(given[:, : method.top_k])
            self.rows["indices"][1::3] = -1
        if "biases" in kind:
            self.layer["bias"] = inputs.normal((3, method.num_experts), seed=73)
            self.rows["bias_index"] = rng.integers(0, 4, n, dtype=np.int32)
        if "hash" in kind:
            table = rng.permuted(np.tile(np.arange(method.num_experts, dtype=np.int32), (50, 1)), axis=1)
            self.layer["table"] = np.ascontiguousarray(table[:, : method.top_k])
            self.rows["token_ids"] = rng.integers(0, 52, n, dtype=np.int64)

    def __call__(self, backend: Backend, tokens: Any = slice(None), pad: int = 0, **options: Any) -> list[np.ndarray]:
        rows = {name: np.ascontiguousarray(array[tokens]) for name, array in self.rows.items()}
        arrays = {name: backend.array(array, pad, pad) for name, array in (rows | self.layer).items()}
        options = {"batch_invariant": True} | options
        if "Router" in self.kind:
            layer = {name: arrays.pop(name) for name in self.layer}
            results = Router(self.method, **layer)(arrays.pop("x"), **arrays, **options)
        elif "hash" in self.kind:
            results = hash_router(arrays.pop("token_ids"), arrays.pop("table"), self.method, **arrays, **options)
        else:
            results = dense_router(arrays.pop("x"), arrays.pop("weight"), self.method, **arrays, **options)
        return [backend.numpy(array).copy() for array in results[:3] if not hasattr(array, "order")]


def batches(n: int) -> Iterator[Any]:
    """Yield tokens: single ones, few, many, those of random splits, and all in another order."""
    rng = np.random.default_rng(8)
    yield from ([token] for token in (0, n // 2))
    yield from (range(5), range(n - 33, n))
    yield from np.split(np.arange(n), np.sort(rng.choice(n, 2, replace=False)))
    yield rng.permutation(n)


def assert_rows(results: list[np.ndarray], whole: list[np.ndarray], tokens: Any) -> None:
    for array, expected in zip(results, whole, strict=True):
        compare.assert_same_bits(array, expected[np.asarray(tokens, int)])


@pytest.mark.many_kernels
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", METHODS)
def test_tokens_do_not_depend_on_their_batch(kind: str, name: str, backend: Backend) -> None:
    problem = Problem(kind, METHODS[name], 90)
    whole = problem(backend, return_logits=True)
    for tokens in batches(problem.n):
        assert_rows(problem(backend, tokens, return_logits=True), whole, tokens)
    assert_rows(problem(backend), whole[:2], range(problem.n))  # also without logits


@pytest.mark.many_kernels
@pytest.mark.parametrize("dtypes", [("float16", ""), ("float32", ""), ("bfloat16", "float32")], ids="-".join)
@pytest.mark.parametrize("hidden", [1, 33, 40, 520, 1031])
def test_dtypes_and_sizes_of_hidden(dtypes: tuple[str, str], hidden: int, backend: Backend) -> None:
    problem = Problem("dense", METHODS["sqrtsoftplus"], 100, hidden, *dtypes)
    whole = problem(backend, return_logits=True)
    exact = oracle_logits(problem)
    np.testing.assert_allclose(whole[2], exact, rtol=1e-5, atol=1e-5)
    for tokens, pads in (([3], (0, 3)), (range(60), (8,)), (range(9, 99), (3, 8))):
        for pad in pads:
            assert_rows(problem(backend, tokens, pad, return_logits=True), whole, tokens)


@pytest.mark.backends("reference", "gpu")
@pytest.mark.parametrize("x_dtype", FLOATS)
@pytest.mark.parametrize("weight_dtype", FLOATS)
def test_pairs_of_dtypes(x_dtype: str, weight_dtype: str, backend: Backend) -> None:
    problem = Problem("dense", METHODS["softmax"], 70, 264, x_dtype, weight_dtype)
    whole = problem(backend, return_logits=True)
    np.testing.assert_allclose(whole[2], oracle_logits(problem), rtol=1e-5, atol=1e-5)
    for tokens in ([3], range(9, 29), range(65)):
        assert_rows(problem(backend, tokens, return_logits=True), whole, tokens)


def oracle_logits(problem: Problem) -> np.ndarray:
    x, weight = problem.rows["x"].astype(np.float64), problem.layer["weight"].astype(np.float64)
    return x @ weight.T + problem.layer["logit_bias"]  # type: ignore[no-any-return]


@pytest.mark.many_kernels
@pytest.mark.parametrize("kind", ["dense", "hash"])
def test_paths_padding_and_layouts(kind: str, backend: Backend) -> None:
    problem = Problem(kind, METHODS["sqrtsoftplus"], 70)
    whole = problem(backend, return_logits=True)
    for path in ("decode", "prefill") if kind == "dense" else ():
        assert_rows(problem(backend, range(40), path=path, return_logits=True), whole, range(40))
    for num_valid in (0, 9, backend.array(np.array([66], np.int32))):
        valid = num_valid if isinstance(num_valid, int) else 66
        weights, indices = problem(backend, num_valid=num_valid)
        assert_rows([weights[:valid], indices[:valid]], whole[:2], range(valid))
        assert (indices[valid:] == -1).all()
        assert not weights[valid:].any()
    for tokens in (range(3), range(70)):
        results = problem(backend, tokens, layout=LayoutSpec(alignment=4))
        assert_rows(results, whole[:2], tokens)


@pytest.mark.needs_kernels
def test_tilings_and_chunks_do_not_change_bits(backend: Backend, monkeypatch: pytest.MonkeyPatch) -> None:
    """Groups of other sizes, experts in other blocks, chunks of 64 tokens, and a GPU without clusters."""
    problem = Problem("biases", METHODS["groups"], 90)
    whole = problem(backend, return_logits=True)
    table = tuning.DEFAULT.table
    with tuning.assume(replace(tuning.DEFAULT, capability=(8, 0))):
        _cached.forget()
        assert_rows(problem(backend, return_logits=True), whole, range(90))
    for changes in (
        {"clusters": ((72, 256, 1, 8),)},
        {"clusters": ((72, 192, 1, 4),)},
        {"clusters": ((128, 128, 1, 1),)},
        {"invariant_groups": ((2**31, 64, 64, 16),), "invariant_shapes": ((64, 64, 32, 1),)},
        {"invariant_groups": ((2**31, 32, 16, 16),), "invariant_shapes": ((64, 32, 32, 2),), "min_shared_tokens": 99},
        {"clusters": ((64, 64, 2, 8),), "clusters_at_once": (1,) * 8},
    ):
        changed = replace(table, decode=replace(table.decode, **changes))
        monkeypatch.setattr(tuning.Gpu, "table", property(lambda gpu, changed=changed: changed))
        _cached.forget()
        for tokens in (range(90), range(20, 29)):
            assert_rows(problem(backend, tokens, return_logits=True), whole, tokens)
    _cached.forget()


def test_bits_are_those_of_the_parts_of_hidden(backend: Backend) -> None:
    """Cancellation between parts shows their order: a large number, twice with opposite signs, and small ones."""
    hidden = 16 * 32
    x, weight = np.ones((1, hidden), np.float32), np.zeros((4, hidden), np.float32)
    weight[:, 0], weight[:, 96] = 2.0**24, -(2.0**24)  # of parts 0 and 3
    weight[0, 32] = weight[1, 64] = weight[2, 128] = 1.0  # of parts 1, 2 and 4
    logits = dense_router(
        backend.array(x), backend.array(weight), RoutingMethod(4, 1), batch_invariant=True, return_logits=True
    ).logits
    # 2^24 + 1 is 2^24; -2^24 + 1 is exact.
    np.testing.assert_array_equal(backend.numpy(logits), [[0.0, 1.0, 1.0, 0.0]])


@pytest.mark.backends("simt")
@pytest.mark.parametrize("kind", KINDS)
def test_older_gpus_are_refused(kind: str, backend: Backend) -> None:
    """Not only by the path "decode": no other has a fixed order of sums."""
    _cached.forget()
    with tuning.assume(replace(tuning.DEFAULT, capability=(7, 5))):
        for n in (9, 90):
            with pytest.raises(ValueError, match=r"batch_invariant takes a GPU of compute capability 8\.0 or later"):
                Problem(kind, METHODS["sqrtsoftplus"], n)(backend)
    _cached.forget()


def test_refused() -> None:
    x, weight = np.ones((2, 8), np.float32), np.ones((1040, 8), np.float32)
    with pytest.raises(ValueError, match="batch_invariant takes at most 1024 experts, 32 columns"):
        dense_router(x, weight, RoutingMethod(1040, 2), batch_invariant=True)
    table, ids = np.zeros((2, 40), np.int32), np.zeros(2, np.int32)
    with pytest.raises(ValueError, match="batch_invariant takes at most 1024 experts, 32 columns"):
        hash_router(ids, table, RoutingMethod(64, 40), x=x, weight=weight[:64], batch_invariant=True)
    with pytest.raises(TypeError, match="batch_invariant must be a bool, got 1"):
        dense_router(x, weight[:8], RoutingMethod(8, 2), batch_invariant=1)
