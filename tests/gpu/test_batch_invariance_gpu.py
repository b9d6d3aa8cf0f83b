# SPDX-License-Identifier: Apache-2.0
"""batch_invariant=True on a GPU: 5000 tokens at once, alone, in splits, permuted, on two streams and in a graph."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from cupy_router import Routing, dense_router
from tests import compare, inputs
from tests.gpu.support import on_gpu
from tests.gpu.test_graphs import capture

N, HIDDEN = 5000, 4096


@pytest.fixture(scope="module", params=["bfloat16", "float16", "float32"])
def problem(request: pytest.FixtureRequest) -> tuple[np.ndarray, np.ndarray]:
    """Return x and the gate."""
    x = inputs.normal((N, HIDDEN), request.param, seed=90)
    return x, inputs.normal((256, HIDDEN), request.param, seed=91, scale=HIDDEN**-0.5)


def route(gpu: Any, x: Any, gate: Any, **options: Any) -> Any:
    return dense_router(x, gate, "deepseek-v4-flash", batch_invariant=True, **{"return_logits": True} | options)


def assert_rows(gpu: Any, results: Any, whole: list[np.ndarray], tokens: Any) -> None:
    for array, expected in zip(results, whole, strict=False):
        compare.assert_same_bits(gpu.numpy(array), expected[tokens])


@pytest.mark.parametrize("framework", ["cupy", "torch", "jax"])
def test_any_batch(framework: str, problem: tuple[np.ndarray, np.ndarray]) -> None:
    gpu, (x, gate) = on_gpu(framework), problem
    on_device = gpu.array(gate)
    whole = [gpu.numpy(array) for array in route(gpu, gpu.array(x), on_device)]
    rng = np.random.default_rng(0)
    batches = [np.arange(token, token + 1) for token in rng.choice(N, 50)]
    batches += np.split(np.arange(N), np.sort(rng.choice(N, 12, replace=False)))
    batches += [np.arange(n) for n in (2, 16, 17, 63, 64, 65, 128, 512, 513, 1024, 2049)] + [rng.permutation(N)]
    for tokens in batches:
        assert_rows(gpu, route(gpu, gpu.array(x[tokens]), on_device), whole, tokens)
    for path in ("decode", "prefill"):
        assert_rows(gpu, route(gpu, gpu.array(x[:40]), on_device, path=path), whole, slice(40))


def test_streams_and_graphs(problem: tuple[np.ndarray, np.ndarray]) -> None:
    gpu, (x, gate) = on_gpu("torch"), problem
    torch: Any = gpu.torch
    some, on_device = gpu.array(x[:700]), gpu.array(gate)
    whole = [gpu.numpy(array) for array in route(gpu, gpu.array(x), on_device)]
    torch.cuda.synchronize()
    for stream in (torch.cuda.Stream(), torch.cuda.Stream()):
        with torch.cuda.stream(stream):
            results = route(gpu, some, on_device)
        stream.synchronize()
        assert_rows(gpu, results, whole, slice(700))
    result, replay = capture(gpu, lambda: route(gpu, some, on_device, return_logits=False))
    for _ in range(3):
        replay()
        assert type(result) is Routing
        assert_rows(gpu, result, whole, slice(700))


def test_gradients_of_tokens(problem: tuple[np.ndarray, np.ndarray]) -> None:
    gpu, (x, gate) = on_gpu("torch"), problem
    torch: Any = gpu.torch
    on_device = gpu.array(gate)

    def gradient(tokens: slice) -> Any:
        rows = gpu.array(x[tokens]).requires_grad_()
        weights, *_ = route(gpu, rows, on_device)
        (weights * torch.arange(1, 7, device="cuda")).sum().backward()
        return rows.grad

    whole = gradient(slice(None))
    for tokens in (slice(0, 1), slice(5, 70), slice(100, 1500)):
        assert torch.equal(gradient(tokens), whole[tokens])
