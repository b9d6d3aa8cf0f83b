# SPDX-License-Identifier: Apache-2.0
"""Gradients of weights by jax.grad on a GPU: every kind of call, streams, command buffers, many tokens, devices."""

from __future__ import annotations

import time
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest

from cupy_router import RoutingMethod, activation_topk, dense_router
from tests import inputs
from tests.gpu.support import COMMAND_BUFFER_FLAGS, LAUNCHED_BY, launched_by, on_gpu, printed
from tests.gradient_cases import KINDS, SMALL
from tests.jax_gradients import Case, twin
from tests.methods import METHODS

METHOD = RoutingMethod(256, 6, renormalize_eps=1e-20, scale=1.5)


@pytest.fixture(scope="module", params=LAUNCHED_BY)
def gpu(request: pytest.FixtureRequest) -> Iterator[Any]:
    framework = on_gpu("jax")
    with launched_by(request.param, framework.jax):
        yield framework


def loss(x: Any, weight: Any) -> Any:
    return (dense_router(x, weight, METHOD).weights ** 2).sum()


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", SMALL)
def test_gradients_are_those_of_plain_jax(gpu: Any, name: str, kind: str) -> None:
    case = Case(kind, name, gpu.array)
    with case.wide, gpu.jax.default_matmul_precision("highest"):
        found, indices = gpu.jax.jit(gpu.jax.grad(case.loss, has_aux=True))(case.smooth)
    case.check(found, indices)


@pytest.mark.parametrize("name", [name for name in METHODS if name not in SMALL])
def test_gradients_of_many_experts(gpu: Any, name: str) -> None:
    case = Case("activation_topk", name, gpu.array)
    case.check(*gpu.jax.grad(case.loss, has_aux=True)(case.smooth))


@pytest.mark.parametrize("dtype", inputs.FLOATS)
@pytest.mark.parametrize("n", [1, 64, 2049, 8192])
def test_many_tokens(gpu: Any, n: int, dtype: str) -> None:
    """Against the twin in float32 on the GPU: both row layouts, few rows and many."""
    jax, jnp = gpu.jax, gpu.jax.numpy
    logits = gpu.array(inputs.normal((n, 256), dtype, seed=240))
    upstream = gpu.array(inputs.normal((n, 6), seed=242))
    indices = activation_topk(logits, METHOD).indices
    got = jax.jit(jax.grad(lambda a: (activation_topk(a, METHOD).weights * upstream).sum()))(logits)
    want = jax.jit(jax.grad(lambda a: (twin(a, indices, METHOD) * upstream).sum()))(logits.astype(jnp.float32))
    rtol = {"float32": 1e-4, "float16": 2.0**-10, "bfloat16": 2.0**-7}[dtype]
    np.testing.assert_allclose(np.asarray(got).astype(np.float32), np.asarray(want), rtol=rtol, atol=2e-6)
    assert ((got != 0).sum(axis=1) <= 6).all()


def test_eager_jitted_and_mapped_gradients_agree(gpu: Any) -> None:
    jax = gpu.jax
    x, weight = gpu.array(inputs.normal((3, 40, 128), seed=243)), gpu.array(inputs.normal((256, 128), seed=244))
    back = jax.grad(loss, argnums=(0, 1))
    with jax.default_matmul_precision("highest"):
        each = [back(one, weight) for one in x]
        for found in (
            [jax.jit(back)(one, weight) for one in x],
            list(zip(*jax.jit(jax.vmap(back, in_axes=(0, None)))(x, weight), strict=True)),
            [jax.grad(jax.checkpoint(loss), argnums=(0, 1))(one, weight) for one in x],
        ):
            for got, want in zip(found, each, strict=True):
                for a, b in zip(got, want, strict=True):
                    np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5)


def test_repeats_agree_bitwise(gpu: Any) -> None:
    logits, scale = gpu.array(inputs.normal((8192, 256), seed=241)), gpu.array(np.exp(inputs.normal((256,), seed=245)))
    upstream = gpu.array(inputs.normal((8192, 6), seed=246))
    back = gpu.jax.jit(
        gpu.jax.grad(lambda a, s: (activation_topk(a, METHOD, expert_scale=s).weights * upstream).sum(), argnums=(0, 1))
    )
    first = [np.asarray(a) for a in back(logits, scale)]
    for _ in range(20):
        for a, b in zip(back(logits, scale), first, strict=True):
            np.testing.assert_array_equal(np.asarray(a).view(np.uint32), b.view(np.uint32))


def test_gradients_after_a_slow_producer(gpu: Any) -> None:
    """Forward and backward are enqueued while the producer runs; read too early, its values would differ."""
    jax = gpu.jax
    square = gpu.array(np.eye(8192, dtype=np.float32))
    x, weight = gpu.array(inputs.normal((64, 128), seed=247)), gpu.array(inputs.normal((256, 128), seed=248))

    @jax.jit
    def slow(square: Any, x: Any, weight: Any) -> Any:
        for _ in range(30):
            square = square @ square
        return jax.grad(loss, argnums=(0, 1))(x * square[0, 0], weight)

    with jax.default_matmul_precision("highest"):
        want = jax.jit(jax.grad(loss, argnums=(0, 1)))(x, weight)
        jax.block_until_ready(slow(square, x, weight))
        begin = time.perf_counter()
        got = slow(square, x, weight)
        dispatched = time.perf_counter() - begin
        jax.block_until_ready(got)
        whole = time.perf_counter() - begin
    for a, b in zip(got, want, strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-6)
    assert dispatched < whole / 3, "the host waited"


TRAINING = """
import jax, jax.numpy as jnp, numpy as np
from cupy_router.ops import _cached
from cupy_router import activation_topk
from tests import inputs
from tests.gpu.test_jax_gradients_gpu import METHOD

logits = jnp.array(inputs.normal((64, 256), seed=249))

def step(logits):
    for _ in range(6):
        logits = logits - jax.grad(lambda a: (activation_topk(a, METHOD).weights ** 2).sum())(logits)
    return logits

asked = []
work_for = _cached.work_for
_cached.work_for = lambda *arguments: asked.append(1) or work_for(*arguments)
compiled = jax.jit(step)
want = step(logits)
before = len(asked)
for turn in range(30):
    held = [jnp.ones(100_000 * turn) for _ in range(turn % 3)]  # so that buffers move
    np.testing.assert_allclose(compiled(logits), want, rtol=1e-5, atol=1e-6)
print("done", len(asked) - before)
"""


@pytest.mark.parametrize("how", LAUNCHED_BY)
@pytest.mark.parametrize("flag", COMMAND_BUFFER_FLAGS)
def test_with_and_without_command_buffers(flag: str, how: str) -> None:
    on_gpu("jax")
    calls = printed(TRAINING, flag, how)
    print(f"{flag or 'by default'}: {calls} of {30 * 12} calls passed through the handlers")
    assert calls == 0 or how == "handlers"


def test_two_devices(gpu: Any) -> None:
    jax = gpu.jax
    devices = jax.devices("gpu")
    if len(devices) < 2:
        pytest.skip("needs two CUDA devices")
    mesh, spec = jax.sharding.Mesh(np.array(devices[:2]), ("tokens",)), jax.sharding.PartitionSpec
    x, weight = inputs.normal((80, 128), seed=250), inputs.normal((256, 128), seed=251)
    specs = {"in_specs": (spec("tokens"), spec()), "out_specs": (spec("tokens"), spec())}
    back = jax.grad(loss, argnums=(0, 1))
    with jax.default_matmul_precision("highest"):
        got = jax.jit(jax.shard_map(back, mesh=mesh, **specs))(x, weight)
        for a, b in zip(got, back(gpu.array(x), gpu.array(weight)), strict=True):
            np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5)
