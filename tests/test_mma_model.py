# SPDX-License-Identifier: Apache-2.0
"""The model of tensor cores gives the bits that an H200 gave, and the logits of batch-invariant calls."""

from __future__ import annotations

from typing import Any

import ml_dtypes
import numpy as np
import pytest

from cupy_router import RoutingMethod, dense_router
from tests import compare, inputs, mma_model
from tests.backends import Backend
from tests.mma_probes import recorded

DTYPES = ("bfloat16", "float16")


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("k", [16, 32, 64])
def test_recorded_products(dtype: str, k: int) -> None:
    """Subnormal numbers, overflow, infinities, NaN and zeros of both signs are among the recorded ones."""
    tiles, expected = recorded(dtype, k)
    compare.assert_same_bits(mma_model.multiply(*tiles), expected)


def test_terms_that_are_all_below_the_least_alignment() -> None:
    """What an H200 gave for two rows of which each keeps bits of its small terms only down to 2**-158."""
    a, b = np.zeros((2, 2, 16), np.uint16)
    a[0, :3], b[0, :3] = (0x9C75, 0x1A9D, 0x1B6D), (0x9A1F, 0x17C0, 0x9DB9)
    a[1, :3], b[1, :3] = (0x9C2B, 0x9C82, 0x1A7A), (0x98AA, 0x1D79, 0x99AA)
    sums = mma_model.multiply(
        a.view(ml_dtypes.bfloat16)[:, None], b.view(ml_dtypes.bfloat16)[:, None], np.zeros((2, 1, 1), np.float32)
    )
    assert sums.view(np.uint32).ravel().tolist() == [0x8000029A, 0x800007E6]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("hidden", [1, 33, 1031])
def test_logits_are_near_the_exact_ones(dtype: str, hidden: int) -> None:
    x, weight = (inputs.normal((rows, hidden), dtype, seed=rows) for rows in (5, 9))
    exact, bound = (f(x.astype(np.float64)) @ f(weight.astype(np.float64)).T for f in (lambda array: array, np.abs))
    assert (np.abs(mma_model.gate_logits(x, weight) - exact) <= 2.0**-22 * bound).all()


@pytest.mark.needs_kernels
@pytest.mark.many_kernels
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("hidden", [33, 1031, 4096])
def test_logits(backend: Backend, dtype: str, hidden: int) -> None:
    x = inputs.normal((200, hidden), dtype, seed=95)
    weight = inputs.normal((40, hidden), dtype, seed=96)
    for n in (1, 200):
        assert_logits(backend, x[: backend.rows(n, hidden)], weight)


@pytest.mark.needs_kernels
@pytest.mark.parametrize("dtype", DTYPES)
def test_logits_that_cancel(backend: Backend, dtype: str) -> None:
    """Rows of the gate whose second half cancels the first."""
    x = inputs.normal((30, 1024), dtype, seed=97)
    weight = inputs.normal((40, 1024), dtype, seed=98)
    x[:, 512:], weight[:, 512:] = x[:, :512], -weight[:, :512]
    weight[:, ::7] *= 1.5
    assert_logits(backend, x, weight)


def assert_logits(backend: Backend, x: Any, weight: Any) -> None:
    if backend.name == "gpu" and backend.xp.cuda.Device().compute_capability != "90":
        pytest.skip("the model is of compute capability 9.0")
    arrays = backend.array(x), backend.array(weight)
    routed = dense_router(*arrays, RoutingMethod(40, 4), batch_invariant=True, return_logits=True)
    compare.assert_same_bits(backend.numpy(routed.logits), mma_model.gate_logits(x, weight))
