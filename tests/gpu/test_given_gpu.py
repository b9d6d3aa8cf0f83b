# SPDX-License-Identifier: Apache-2.0
"""Given experts on a GPU in PyTorch and JAX: values and gradients, CUDA graphs, many tokens."""

from __future__ import annotations

from functools import partial
from typing import Any

import numpy as np
import pytest

from cupy_router import RoutingMethod, dense_router
from tests.given_calls import KINDS, UNSET, Call, read_gates
from tests.gpu.support import LAUNCHED_BY, assert_graph_follows, launched_by, on_gpu, upload
from tests.jax_calls import same_bits

EVERY = pytest.mark.parametrize("kind", KINDS)
BOTH = pytest.mark.parametrize("unset", UNSET)


@pytest.fixture
def torch() -> Any:
    return on_gpu("torch").torch


@pytest.mark.parametrize("name", ["soft cap", "8 groups, best 3, max", "two shared experts", "bfloat16 weights"])
@BOTH
@EVERY
def test_weights_and_gradients_are_those_of_a_plain_router(torch: Any, kind: str, unset: str, name: str) -> None:
    from tests.test_torch_given import check_against_twin, on_torch

    for n in (23, 200):
        if n == 23 or not kind.endswith("decode"):
            call = Call(kind, name, unset, "int16", n)
            arrays, smooth = on_torch(call, "cuda")
            check_against_twin(call, call(arrays), smooth)


@pytest.mark.parametrize("name", ["sigmoid, bias on logits", "two shared experts", "uint8 indices", "everything"])
@pytest.mark.parametrize("most", [0, 1 << 40])
def test_gradients_by_the_chosen_experts_and_by_all(
    torch: Any, most: int, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Both are right, and repeatable to the bit."""
    from tests.test_torch_given import check_against_twin, on_torch

    read_gates(monkeypatch, most)
    for n, dtype in ((1, "float32"), (23, "bfloat16"), (300, "float32"), (300, "float16")):
        call = Call("dense_router", name, "route", "int32", n, dtype)
        arrays, smooth = on_torch(call, "cuda")
        frozen = {key: smooth.pop(key).requires_grad_(False) for key in ("expert_scale",) if key in smooth}
        weights = call(arrays).weights
        check_against_twin(call, call(arrays), smooth, **frozen)
        both = [torch.autograd.grad(weights.sum(), list(smooth.values()), retain_graph=True) for _ in range(2)]
        assert all(torch.equal(a, b) for a, b in zip(*both, strict=True))


@BOTH
@EVERY
def test_a_captured_call_follows_ids_that_change(torch: Any, kind: str, unset: str) -> None:
    """Nothing depends on the values: the same launches serve rows of experts, rows of -1, and ids that are none."""
    from tests.test_torch_given import on_torch

    call = Call(kind, "two shared experts", unset)
    with torch.no_grad():
        arrays, _ = on_torch(call, "cuda")
        ids = arrays["indices"]
        assert_graph_follows(torch, call, arrays, "indices", ids, ids.flip(0), torch.full_like(ids, -1), ids * 0 + 99)


@BOTH
def test_many_tokens_in_chunks(torch: Any, unset: str) -> None:
    """More tokens than the logits of one chunk hold, whose ids move along."""
    method = RoutingMethod(256, 8, "sigmoid", index_dtype="int16")
    x, weight = torch.randn(100_000, 64, device="cuda").bfloat16(), torch.randn(256, 64, device="cuda").bfloat16()
    ids = torch.rand(100_000, 256, device="cuda").argsort(dim=1)[:, :8].to(torch.int16)
    weights, indices = dense_router(x, weight, method, indices=ids, unset=unset)
    assert torch.equal(indices, ids)
    scores = (x.float() @ weight.float().t()).sigmoid().gather(1, ids.long())
    torch.testing.assert_close(weights, scores / scores.sum(1, keepdim=True), rtol=1e-4, atol=1e-6)


@pytest.fixture(scope="module", params=LAUNCHED_BY)
def jax_gpu(request: pytest.FixtureRequest) -> Any:
    framework = on_gpu("jax")
    with launched_by(request.param, framework.jax):
        yield framework


@pytest.mark.parametrize("dtype", ["uint8", "int16", "int32"])
@BOTH
@EVERY
def test_traced_results_are_those_of_eager_calls(jax_gpu: Any, kind: str, unset: str, dtype: str) -> None:
    for n in (1, 23, 64, 300):
        if n <= 64 or not kind.endswith("decode"):
            call = Call(kind, "two shared experts", unset, dtype, n)
            arrays = upload(jax_gpu, call.arrays())
            counted = partial(call, num_valid=n - 1)
            same_bits(jax_gpu.jax.jit(counted)(arrays), counted(arrays))


@BOTH
@pytest.mark.parametrize("kind", ["activation_topk", "dense_router"])
def test_jax_gradients_are_those_of_pytorch(jax_gpu: Any, torch: Any, kind: str, unset: str) -> None:
    from tests.test_torch_given import on_torch

    call = Call(kind, "two shared experts", unset)
    arrays, smooth = on_torch(call, "cuda")
    want = torch.autograd.grad(call(arrays).weights.square().sum(), list(smooth.values()))
    hosts = upload(jax_gpu, call.arrays())
    given = {name: hosts[name] for name in smooth}
    with jax_gpu.jax.default_matmul_precision("highest"):
        loss = jax_gpu.jax.jit(jax_gpu.jax.grad(lambda some: (call(hosts | some).weights ** 2).sum()))
        found = loss(given)
    for (name, _), right in zip(smooth.items(), want, strict=True):
        np.testing.assert_allclose(np.asarray(found[name]), right.cpu().numpy(), rtol=1e-4, atol=1e-5, err_msg=name)
