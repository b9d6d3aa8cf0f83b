# SPDX-License-Identifier: Apache-2.0
"""Tensor cores give the bits of tests/mma_model.py, and so do the logits of batch-invariant calls."""

from __future__ import annotations

from typing import Any

import pytest

from cupy_router import RoutingMethod, dense_router
from tests import compare, inputs, mma_model
from tests.gpu import mma_chains
from tests.gpu.support import on_gpu
from tests.mma_probes import probes

DTYPES = ("bfloat16", "float16")


@pytest.fixture(autouse=True)
def hopper(cupy: Any) -> None:
    if cupy.cuda.Device().compute_capability != "90":
        pytest.skip("the model is of compute capability 9.0")


@pytest.mark.parametrize("dtype", DTYPES)
def test_chains(dtype: str) -> None:
    for _name, tiles in probes(dtype, 32):
        compare.assert_same_bits(mma_chains.multiply(tiles), mma_model.multiply(*tiles))


@pytest.mark.parametrize("hidden", [1, 33, 520, 1031, 4096])
@pytest.mark.parametrize("dtype", DTYPES)
def test_logits(dtype: str, hidden: int) -> None:
    gpu = on_gpu("cupy")
    x = inputs.normal((200, hidden), dtype, seed=95)
    weight = inputs.normal((40, hidden), dtype, seed=96)
    for n in (1, 40, 200):
        routed = dense_router(
            gpu.array(x[:n]), gpu.array(weight), RoutingMethod(40, 4), batch_invariant=True, return_logits=True
        )
        compare.assert_same_bits(gpu.numpy(routed.logits), mma_model.gate_logits(x[:n], weight))


@pytest.mark.parametrize("dtype", DTYPES)
def test_logits_that_cancel(dtype: str) -> None:
    """Rows of the gate whose second half cancels the first."""
    gpu = on_gpu("cupy")
    x = inputs.normal((30, 1024), dtype, seed=97)
    weight = inputs.normal((40, 1024), dtype, seed=98)
    x[:, 512:], weight[:, 512:] = x[:, :512], -weight[:, :512]
    weight[:, ::7] *= 1.5
    routed = dense_router(
        gpu.array(x), gpu.array(weight), RoutingMethod(40, 4), batch_invariant=True, return_logits=True
    )
    compare.assert_same_bits(gpu.numpy(routed.logits), mma_model.gate_logits(x, weight))
