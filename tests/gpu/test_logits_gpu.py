# SPDX-License-Identifier: Apache-2.0
"""Logits of dense_router on a GPU: every framework, CUDA graphs, and gradients in PyTorch."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from cupy_router import RoutingWithLogits, dense_router
from tests import compare
from tests.backends import DTYPES
from tests.gpu.support import METHOD, Call, call, on_gpu, upload
from tests.gpu.test_graphs import capture, put

NAMES = ("dense_router", "dense_router prefill")


def logits_of(case: Call, dtype: str = "float32") -> np.ndarray:
    x, weight = (case.arrays[name].astype(np.float32) for name in ("x", "weight"))
    return (x @ weight.T).astype(DTYPES[dtype])  # exact in float32


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("logits_dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("framework", ["cupy", "torch", "jax"])
def test_every_framework(framework: str, logits_dtype: str, name: str) -> None:
    gpu, case = on_gpu(framework), call(name, dtype="bfloat16")
    result = case(upload(gpu, case.arrays), return_logits=True, logits_dtype=logits_dtype)
    assert type(result) is RoutingWithLogits
    weights, indices, logits = map(gpu.numpy, result)
    compare.assert_same_bits(logits, logits_of(case, logits_dtype))
    case.check(weights, indices)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("logits_dtype", ["float32", "float16"])
@pytest.mark.parametrize("framework", ["cupy", "torch"])
def test_replay_with_another_num_valid(framework: str, logits_dtype: str, name: str) -> None:
    gpu, case = on_gpu(framework), call(name)
    arrays, rows = upload(gpu, case.arrays), len(case.arrays["x"])
    count = gpu.array(np.full((1,), rows, np.int32))
    options = {"num_valid": count, "return_logits": True, "logits_dtype": logits_dtype}
    result, replay = capture(gpu, lambda: case(arrays, **options))
    want = logits_of(case, logits_dtype)
    for valid in (rows, 7, 0, rows - 1):
        put(gpu, count, np.full((1,), valid, np.int32))
        replay()
        logits, indices = gpu.numpy(result.logits), gpu.numpy(result.indices)
        compare.assert_same_bits(logits[:valid], want[:valid])
        assert not logits[valid:].any()
        assert (indices[valid:] == -1).all()


@pytest.mark.parametrize("compiled", [False, True])
@pytest.mark.parametrize("logits_dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("n", [5, 200])
def test_gradients_add_up(n: int, logits_dtype: str, compiled: bool) -> None:
    torch: Any = on_gpu("torch").torch
    torch.compiler.reset()
    case, generator = call("dense_router prefill", n=n), torch.Generator("cuda").manual_seed(0)
    given = [on_gpu("torch").array(case.arrays[name]).requires_grad_() for name in ("x", "weight")]
    upstream = torch.randn(n, 256, device="cuda", generator=generator)

    def loss(x: Any, weight: Any) -> Any:
        result = dense_router(x, weight, METHOD, return_logits=True, logits_dtype=logits_dtype)
        return result.weights.square().sum() + (result.logits.float() * upstream).sum()

    def apart(x: Any, weight: Any) -> Any:
        weights = dense_router(x, weight, METHOD).weights
        return weights.square().sum() + (torch.nn.functional.linear(x, weight) * upstream).sum()

    function = torch.compile(loss, fullgraph=True) if compiled else loss
    tolerance = {"float32": 1e-5, "bfloat16": 2.0**-7}[logits_dtype]  # the upstream gradient is rounded, too
    for got, want in zip(
        torch.autograd.grad(function(*given), given), torch.autograd.grad(apart(*given), given), strict=True
    ):
        torch.testing.assert_close(got, want, rtol=tolerance, atol=tolerance * float(want.abs().max()))
