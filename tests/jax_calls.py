# SPDX-License-Identifier: Apache-2.0
"""Calls of every op as functions of JAX arrays, for tests of jax.jit on the CPU and on a GPU."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np

from cupy_router import Router, RoutingMethod, activation_topk, dense_router, hash_router, topk_select
from tests import inputs
from tests.backends import DTYPES

METHOD = RoutingMethod(32, 4, renormalize_eps=1e-20, scale=1.5)
N, HIDDEN, VOCABULARY = 9, 48, 40


class Call(NamedTuple):
    """A function of JAX arrays, and its arguments as NumPy arrays; their first axis is tokens unless in `shared`."""

    function: Callable[..., Any]
    arrays: dict[str, np.ndarray]

    def __call__(self, arrays: dict[str, Any]) -> Any:
        return self.function(**arrays)


SHARED = ("weight", "bias", "biases", "logit_bias", "expert_scale", "table", "num_valid")


def _arrays(*names: str, dtype: str = "float32", n: int = N) -> dict[str, np.ndarray]:
    """Return arrays whose products x @ weight.T are sums of small integers, exact in any order."""
    ids = inputs.rng(203).integers(0, VOCABULARY, n).astype(np.int32)
    ids[::5] = -1
    made: dict[str, np.ndarray] = {
        "scores": inputs.normal((n, 70), dtype, seed=200),
        "lengths": inputs.rng(201).integers(0, 71, n).astype(np.int32),
        "starts": inputs.rng(202).integers(0, 60, n).astype(np.int32),
        "logits": inputs.distinct(n, 32, dtype, seed=204),
        "x": (inputs.rng(205).integers(-4, 5, (n, HIDDEN)) / 4).astype(DTYPES[dtype]),
        "token_ids": ids,
        "table": np.stack([inputs.rng(206, row).permutation(32)[:4] for row in range(VOCABULARY)]).astype(np.int32),
        "weight": (inputs.rng(207).integers(-8, 9, (32, HIDDEN)) / 16).astype(DTYPES[dtype]),
        "bias": inputs.normal((32,), seed=208, scale=0.1),
        "biases": inputs.normal((3, 32), seed=211),
        "bias_index": inputs.rng(212).integers(-1, 4, n).astype(np.int32),
        "logit_bias": inputs.normal((32,), seed=209, scale=0.1),
        "expert_scale": np.exp(inputs.normal((32,), seed=210)),
        "num_valid": np.array(n // 2, np.int32),
    }
    return {name: np.ascontiguousarray(made[name]) for name in names}


def _router(x: Any, weight: Any, bias: Any, **others: Any) -> Any:
    return Router(METHOD, weight=weight, bias=bias)(x, **others)


def _hash_layer(x: Any, token_ids: Any, table: Any, weight: Any, **others: Any) -> Any:
    return Router(METHOD, weight=weight, table=table)(x, token_ids, **others)


LAYER = ("bias", "logit_bias", "expert_scale")


def calls(dtype: str = "float32", n: int = N) -> dict[str, Call]:
    def call(function: Callable[..., Any], *names: str) -> Call:
        return Call(function, _arrays(*names, dtype=dtype, n=n))

    return {
        "topk_select": call(lambda scores: topk_select(scores, 5), "scores"),
        "topk_select with lengths": call(lambda scores, **rows: topk_select(scores, 5, **rows), "scores", "lengths"),
        "topk_select with starts": call(
            lambda scores, **rows: topk_select(scores, 80, **rows), "scores", "lengths", "starts"
        ),
        "activation_topk": call(lambda logits: activation_topk(logits, METHOD), "logits"),
        "activation_topk of a layer": call(
            lambda logits, **layer: activation_topk(logits, METHOD, **layer), "logits", *LAYER
        ),
        "activation_topk, padded": call(
            lambda logits, **more: activation_topk(logits, METHOD, **more), "logits", "bias", "num_valid"
        ),
        "activation_topk of biases, padded": call(
            lambda logits, biases, **more: activation_topk(logits, METHOD, bias=biases, **more),
            "logits", "biases", "bias_index", "num_valid",
        ),
        "hash_router alone": call(lambda token_ids, table: hash_router(token_ids, table), "token_ids", "table"),
        "hash_router of logits": call(
            lambda token_ids, table, **more: hash_router(token_ids, table, METHOD, **more),
            "token_ids", "table", "logits", "logit_bias",
        ),
        "hash_router of x, padded": call(
            lambda token_ids, table, **more: hash_router(token_ids, table, METHOD, **more),
            "token_ids", "table", "x", "weight", "num_valid",
        ),
        "hash_router of logits and biases": call(
            lambda token_ids, table, biases, **more: hash_router(token_ids, table, METHOD, bias=biases, **more),
            "token_ids", "table", "logits", "biases", "bias_index", "logit_bias",
        ),
        "hash_router of x and biases, padded": call(
            lambda token_ids, table, biases, **more: hash_router(token_ids, table, METHOD, bias=biases, **more),
            "token_ids", "table", "x", "weight", "biases", "bias_index", "num_valid",
        ),
        "dense_router": call(lambda x, weight, **more: dense_router(x, weight, METHOD, **more), "x", "weight", *LAYER),
        "dense_router decode": call(
            lambda x, weight, **more: dense_router(x, weight, METHOD, path="decode", **more), "x", "weight", "bias"
        ),
        "dense_router of biases": call(
            lambda x, weight, biases, **more: dense_router(x, weight, METHOD, bias=biases, **more),
            "x", "weight", "biases", "bias_index",
        ),
        "dense_router prefill, padded": call(
            lambda x, weight, **more: dense_router(x, weight, METHOD, path="prefill", **more),
            "x", "weight", "num_valid",
        ),
        "dense_router with logits": call(
            lambda x, weight, **more: dense_router(x, weight, METHOD, return_logits=True, **more), "x", "weight", *LAYER
        ),
        "hash_router with logits, padded": call(
            lambda token_ids, table, **more: hash_router(token_ids, table, METHOD, return_logits=True, **more),
            "token_ids", "table", "x", "weight", "logit_bias", "num_valid",
        ),
        "a dense Router": call(_router, "x", "weight", "bias"),
        "a dense Router of biases": call(
            lambda x, weight, biases, **more: Router(METHOD, weight=weight, bias=biases)(x, **more),
            "x", "weight", "biases", "bias_index",
        ),
        "a hash Router, padded": call(_hash_layer, "x", "token_ids", "table", "weight", "num_valid"),
        "a hash Router of biases": call(
            lambda x, token_ids, table, weight, biases, **more: Router(METHOD, weight=weight, table=table, bias=biases)(
                x, token_ids, **more
            ),
            "x", "token_ids", "table", "weight", "biases", "bias_index",
        ),
        "a hash Router with logits": call(
            lambda *arrays, **named: _hash_layer(*arrays, **named, return_logits=True),
            "x", "token_ids", "table", "weight",
        ),
    }  # fmt: skip


NAMES = tuple(calls())


def batch(arrays: dict[str, np.ndarray], size: int) -> dict[str, np.ndarray]:
    """Return `size` variants of each array, stacked for jax.vmap."""
    return {
        name: np.stack([np.roll(array, turn, axis=0) if array.ndim else array + turn for turn in range(size)])
        for name, array in arrays.items()
    }


def same_bits(got: Any, want: Any) -> None:
    assert type(got) is type(want)
    for name, a, b in zip(want._fields, got, want, strict=True):
        assert (a.dtype, a.shape) == (b.dtype, b.shape), name
        word = f"u{b.dtype.itemsize}"
        np.testing.assert_array_equal(np.asarray(a).view(word), np.asarray(b).view(word), err_msg=name)
