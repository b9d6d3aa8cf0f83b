# SPDX-License-Identifier: Apache-2.0
"""Several biases on a GPU in PyTorch and JAX: values, CUDA graphs whose indices change, many tokens, traced calls."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from cupy_router import hash_router
from tests.bias_calls import KINDS, Call
from tests.gpu.support import LAUNCHED_BY, assert_graph_follows, launched_by, on_gpu, upload
from tests.jax_calls import same_bits

EVERY = pytest.mark.parametrize("kind", KINDS)


@pytest.fixture
def torch() -> Any:
    return on_gpu("torch").torch


def on_torch(torch: Any, call: Call) -> dict[str, Any]:
    return {name: torch.from_numpy(array).cuda() for name, array in call.arrays().items()}


@pytest.mark.parametrize("name", ["two shared experts", "8 groups, best 4, top 2", "sigmoid, bias on logits"])
@EVERY
def test_results_are_those_of_the_host(torch: Any, kind: str, name: str) -> None:
    many = 3000 if "logits" in name else 300  # where no rounding decides
    for n in (1, 23, 64, many):
        if n <= 64 or "decode" not in kind:
            call = Call(kind, name, n)
            got, want = call(on_torch(torch, call)), call(call.arrays())
            np.testing.assert_array_equal(got.indices.cpu().numpy(), want.indices)
            np.testing.assert_allclose(got.weights.cpu().numpy(), want.weights, rtol=1e-5, atol=1e-6)


@EVERY
def test_a_captured_call_follows_indices_that_change(torch: Any, kind: str) -> None:
    call = Call(kind, "two shared experts")
    arrays = on_torch(torch, call)
    which = arrays["bias_index"]
    others = torch.zeros_like(which), torch.ones_like(which), which.flip(0), which - 2
    assert_graph_follows(torch, call, arrays, "bias_index", which, *others)


@pytest.mark.parametrize("returned", [False, True])
def test_many_tokens_in_chunks(torch: Any, returned: bool) -> None:
    """More tokens than the logits of one chunk hold, whose indices and token ids move along."""
    method, n = Call("hash Router", "bfloat16 weights").method, 300_000
    experts = method.num_experts
    x, weight = torch.randn(n, 16, device="cuda"), torch.randn(experts, 16, device="cuda")
    table = torch.rand(50, experts, device="cuda").argsort(dim=1)[:, : method.top_k].int()
    ids, which = torch.randint(0, 50, (n,), device="cuda"), torch.randint(0, 3, (n,), device="cuda").int()
    given = {"bias": torch.randn(3, experts, device="cuda"), "bias_index": which}
    got = hash_router(ids, table, method, x=x, weight=weight, **given, return_logits=returned)
    assert torch.equal(got.indices[which == 0], table[ids[which == 0]].to(got.indices.dtype))
    some = torch.cat((torch.arange(40), torch.arange(n - 40, n))).cuda()
    given["bias_index"] = which[some]
    want = hash_router(ids[some], table, method, x=x[some], weight=weight, **given)
    same = (got.indices[some] == want.indices).all(dim=1)
    assert same.float().mean() > 0.9  # the product of few tokens is rounded in another order


@pytest.fixture(scope="module", params=LAUNCHED_BY)
def jax_gpu(request: pytest.FixtureRequest) -> Any:
    framework = on_gpu("jax")
    with launched_by(request.param, framework.jax):
        yield framework


@EVERY
def test_traced_results_are_those_of_eager_calls(jax_gpu: Any, kind: str) -> None:
    for n in (1, 23, 64, 300):
        if n <= 64 or "decode" not in kind:
            call = Call(kind, "two shared experts", n)
            arrays = upload(jax_gpu, call.arrays())
            got = jax_gpu.jax.jit(lambda arrays, call=call, n=n: call(arrays, num_valid=n - 1))(arrays)
            same_bits(got, call(arrays, num_valid=n - 1))
