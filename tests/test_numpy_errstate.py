# SPDX-License-Identifier: Apache-2.0
"""Infinities, NaN and overflow raise nothing, also where NumPy is set to raise."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from cupy_router import RoutingMethod, ScoreFunction, activation_topk, dense_router, hash_router, topk_select
from cupy_router.ops.activation_topk_backward import activation_topk_backward
from cupy_router.ops.registry import OPS
from tests import inputs
from tests.methods import METHODS
from tests.test_every_op import arrays, call

EXTREMES = np.array([0.0, -0.0, np.inf, -np.inf, np.nan, 3e38, -3e38, 1e-45, 1e-38, 1e30, -90.0, 90.0], np.float32)


@pytest.fixture
def raising() -> Iterator[None]:
    with np.errstate(all="raise"):
        yield


def extremes(*shape: int, seed: int, dtype: Any = np.float32) -> np.ndarray:
    with np.errstate(all="ignore"):
        return inputs.rng(400 + seed).choice(EXTREMES, shape).astype(dtype)


@pytest.mark.parametrize("weight_dtype", ["float32", "float16", "bfloat16"])
@pytest.mark.parametrize("name", [name for name, method in METHODS.items() if method.num_experts < 1000])
def test_overflow_is_no_error(name: str, weight_dtype: str, raising: None) -> None:
    method = replace(METHODS[name], weight_dtype=weight_dtype)
    logits, scale = extremes(40, method.num_logits, seed=1), extremes(method.num_experts, seed=2)
    routing = activation_topk(logits, method, logit_bias=scale, expert_scale=scale)
    x, gate = extremes(40, 8, seed=3), extremes(method.num_logits, 8, seed=4)
    dense_router(x, gate, method)
    table = inputs.rng(5).integers(0, method.num_experts, (9, method.top_k), np.int32)
    hash_router(np.arange(9), table, method, logits=logits[:9], expert_scale=scale)
    score = method.score
    if not isinstance(score, ScoreFunction) or score.derivative is not None:
        upstream = extremes(*routing.weights.shape, seed=6, dtype=weight_dtype)
        activation_topk_backward(upstream, routing.indices, logits, method, expert_scale=scale)


def test_signalling_nan_is_no_error(raising: None) -> None:
    signalling = np.array([[0x7F800001, 0x3F800000, 0xFF800001]], np.uint32).view(np.float32)
    for scores in (signalling, (signalling.view(np.uint32) >> 16).astype(np.uint16).view(np.float16)):
        topk_select(scores, 2)
        activation_topk(scores, RoutingMethod(3, 2))


@pytest.mark.parametrize("op", OPS.values(), ids=str)
def test_every_op_takes_extremes(op: Any, raising: None) -> None:
    given = {
        name: extremes(*array.shape, seed=7, dtype=array.dtype) if array.dtype.kind == "f" else array
        for name, array in arrays(op).items()
    }
    call(op, given)
