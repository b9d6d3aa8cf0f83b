# SPDX-License-Identifier: Apache-2.0
"""batch_invariant=True on a GPU: 5000 tokens alone, padded, strided, on two streams, compiled, jitted, and in training.

The same calls by default are counted: they show that the tokens can differ.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from cupy_router import RoutingWithLogits, dense_router
from tests import compare, inputs
from tests.gpu.support import on_gpu

N, HIDDEN, METHOD = 5000, 4096, "deepseek-v4-flash"


@pytest.fixture(scope="module")
def problem() -> tuple[np.ndarray, np.ndarray, list[np.ndarray]]:
    """Return x, the gate, and what a call with all tokens gives."""
    x = inputs.normal((N, HIDDEN), "bfloat16", seed=90)
    gate = inputs.normal((256, HIDDEN), "bfloat16", seed=91, scale=HIDDEN**-0.5)
    gpu = on_gpu("cupy")
    return x, gate, [gpu.numpy(array) for array in route(gpu.array(x), gpu.array(gate))]


def route(x: Any, gate: Any, **options: Any) -> Any:
    return dense_router(x, gate, METHOD, **{"return_logits": True, "batch_invariant": True} | options)


def assert_rows(gpu: Any, results: Any, whole: list[np.ndarray], tokens: Any = slice(None)) -> None:
    for array, expected in zip(results, whole, strict=True):
        compare.assert_same_bits(gpu.numpy(array), expected[tokens])


@pytest.mark.parametrize("batch_invariant", [True, False])
def test_every_token_alone(problem: Any, batch_invariant: bool, record_property: Any) -> None:
    gpu, (x, gate, whole) = on_gpu("cupy"), problem
    x, gate = gpu.array(x), gpu.array(gate)
    if not batch_invariant:
        whole = [gpu.numpy(array) for array in route(x, gate, batch_invariant=False)]
    alone = [gpu.array(np.zeros_like(array)) for array in whole]
    for token in range(N):
        rows = slice(token, token + 1)
        out = RoutingWithLogits(*(array[rows] for array in alone))
        route(x[rows], gate, out=out, batch_invariant=batch_invariant)
    different = [(gpu.numpy(a).view("u4") != b.view("u4")).any(1).sum() for a, b in zip(alone, whole, strict=True)]
    record_property("different tokens: weights, indices, logits", list(map(int, different)))
    assert (different[2] == 0) == batch_invariant
    assert sum(different[:2]) == 0 or not batch_invariant


def test_padded_and_strided(problem: Any) -> None:
    gpu, (x, gate, whole) = on_gpu("torch"), problem
    torch, x, gate = gpu.torch, gpu.array(x), gpu.array(gate)
    for left, right in ((0, 8), (1, 0), (3, 5)):
        wide_x, wide_gate = (torch.full((len(a), left + HIDDEN + right), torch.inf).to(a) for a in (x, gate))
        for wide, array in ((wide_x, x), (wide_gate, gate)):
            wide[:, left : left + HIDDEN] = array
        strided_x, strided_gate = (wide[:, left : left + HIDDEN] for wide in (wide_x, wide_gate))
        for n in (1, 64, N):
            assert_rows(gpu, route(strided_x[:n], strided_gate), whole, slice(n))
        assert_rows(gpu, route(strided_x[::7], strided_gate), whole, slice(None, None, 7))
    for n, valid in ((64, 1), (64, 50), (512, 65), (N, 4000)):
        for num_valid in (valid, gpu.array(np.array([valid], np.int32))):
            padded = route(x[:n], gate, num_valid=num_valid)
            assert_rows(gpu, [array[:valid] for array in padded], whole, slice(valid))


def test_two_streams_at_once(problem: Any) -> None:
    gpu, (x, gate, whole) = on_gpu("torch"), problem
    torch, x, gate = gpu.torch, gpu.array(x), gpu.array(gate)
    streams = torch.cuda.Stream(), torch.cuda.Stream()
    torch.cuda.synchronize()
    results = []
    for begin, end in ((0, 1), (1, 65), (65, 129), (129, 1000), (1000, 2000), (2000, N)) * 5:
        for stream in streams:
            with torch.cuda.stream(stream):
                results.append((slice(begin, end), route(x[begin:end], gate)))
    torch.cuda.synchronize()
    for tokens, found in results:
        assert_rows(gpu, found, whole, tokens)


def test_compiled_with_autograd_and_checkpoints(problem: Any) -> None:
    gpu, (x, gate, whole) = on_gpu("torch"), problem
    torch, x, gate = gpu.torch, gpu.array(x), gpu.array(gate)
    from tests.trainer_checks import trained

    grad = torch.randn(N, whole[0].shape[1], device="cuda", generator=torch.Generator("cuda").manual_seed(0))
    *results, x_gradient = trained(lambda x: route(x, gate), x, grad)
    assert_rows(gpu, results, whole)
    torch.compiler.reset()
    compiled = torch.compile(lambda x: route(x, gate), fullgraph=True, dynamic=True)
    for tokens in (slice(0, 1), slice(0, 2), slice(10, 74), slice(100, 800), slice(None)):
        with torch.no_grad():
            assert_rows(gpu, compiled(x[tokens]), whole, tokens)
        *results, gradient = trained(compiled, x[tokens], grad[tokens])
        assert_rows(gpu, results, whole, tokens)
        assert torch.equal(gradient, x_gradient[tokens])


def test_gradients_of_the_gate_repeat(problem: Any) -> None:
    gpu, (x, gate, _) = on_gpu("torch"), problem
    torch, x = gpu.torch, gpu.array(x)
    found = []
    for _ in range(3):
        weight = gpu.array(gate).requires_grad_()
        results = route(x, weight)
        (results.weights.square().sum() + results.logits.square().sum()).backward()
        found.append(weight.grad)
    assert all(torch.equal(found[0], other) for other in found[1:])


def test_jitted(problem: Any) -> None:
    gpu, (x, gate, whole) = on_gpu("jax"), problem
    jitted = gpu.jax.jit(route)
    for tokens in (slice(0, 1), slice(10, 74), slice(100, 800), slice(None)):
        assert_rows(gpu, jitted(gpu.array(x[tokens]), gpu.array(gate)), whole, tokens)


@pytest.mark.parametrize("batch_invariant", [True, False])
def test_checks_of_trainers(problem: Any, batch_invariant: bool, record_property: Any) -> None:
    gpu, (x, gate, whole) = on_gpu("torch"), problem
    torch, x, gate = gpu.torch, gpu.array(x), gpu.array(gate)
    from tests.trainer_checks import CHECKS

    lengths = (1, 700, 64, 1500, 35, 2000, 200, 500)
    assert sum(lengths) == N
    grad = torch.randn(N, whole[0].shape[1], device="cuda", generator=torch.Generator("cuda").manual_seed(0))
    changed = [check(lambda x: route(x, gate, batch_invariant=batch_invariant), x, grad, lengths) for check in CHECKS]
    record_property("tokens with other bits", changed)
    assert not any(changed) if batch_invariant else all(changed)
