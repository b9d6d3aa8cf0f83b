# SPDX-License-Identifier: Apache-2.0
"""Replicas of experts on a GPU in PyTorch and JAX: values and gradients, CUDA graphs whose maps change, chunks."""

from __future__ import annotations

from functools import partial
from typing import Any

import numpy as np
import pytest

from cupy_router import LayoutSpec, RoutingMethod, dense_router
from tests.compare import assert_same_bits
from tests.gpu.support import LAUNCHED_BY, assert_graph_follows, launched_by, on_gpu, upload
from tests.replica_calls import KINDS, NAMES, Call

EVERY = pytest.mark.parametrize("kind", KINDS)
GIVEN = pytest.mark.parametrize("given", ["", "route", "empty"])
SMOOTH = ("logits", "x", "weight", "logit_bias", "expert_scale")


@pytest.fixture
def torch() -> Any:
    return on_gpu("torch").torch


def on_torch(torch: Any, call: Call) -> tuple[dict[str, Any], list[Any]]:
    arrays = {name: torch.from_numpy(array).cuda() for name, array in call.arrays().items()}
    return arrays, [array.requires_grad_() for name, array in arrays.items() if name in SMOOTH]


@pytest.mark.parametrize("name", NAMES)
@GIVEN
@EVERY
def test_values_and_gradients(torch: Any, kind: str, given: str, name: str) -> None:
    for n in (23, 200, 5000):
        if n > 64 and kind.endswith("decode"):
            continue
        call = Call(kind, name, n, given=given, dtype="int64" if n == 200 else "int32")
        arrays, smooth = on_torch(torch, call)
        found, experts = call(arrays), call.logical(arrays)
        assert torch.equal(found.weights, experts.weights)
        assert (found.indices.cpu().numpy() == call.physical(experts.indices.cpu().numpy())).all()
        upstream = torch.randn_like(found.weights)
        for a, b in zip(
            *(torch.autograd.grad(each.weights, smooth, upstream) for each in (found, experts)), strict=True
        ):
            assert torch.equal(a, b)


@EVERY
def test_a_captured_call_follows_maps_that_change(torch: Any, kind: str) -> None:
    call = Call(kind, "two shared experts")
    with torch.no_grad():
        arrays, _ = on_torch(torch, call)
        replicas, counts = arrays["replicas"], arrays["replica_counts"]
        call_with_layout = partial(call, layout=LayoutSpec(4))
        assert_graph_follows(torch, call, arrays, "replicas", replicas, replicas.flip(0), replicas * 0 + 7)
        assert_graph_follows(torch, call, arrays, "replica_counts", counts, counts.flip(0), counts * 0 - 1)
        plan = call_with_layout(arrays)
        counted = torch.bincount(plan.indices[plan.indices >= 0].long(), minlength=call.num_physical + 2)
        assert torch.equal(plan.layout.counts.long(), counted)


def test_tokens_of_all_chunks(torch: Any) -> None:
    method, n = RoutingMethod(256, 8, "sigmoid"), 300_000
    x, weight = torch.randn(n, 64, device="cuda").bfloat16(), torch.randn(256, 64, device="cuda").bfloat16()
    replicas = torch.arange(768, dtype=torch.int32, device="cuda").view(256, 3)
    counts = torch.full((256,), 3, dtype=torch.int32, device="cuda")
    maps = {"replicas": replicas, "replica_counts": counts, "num_physical": 768, "replica_offset": 5}
    got, experts = dense_router(x, weight, method, **maps), dense_router(x, weight, method)
    turns = (torch.arange(n, device="cuda") + 5) % 3
    assert torch.equal(got.indices.long(), 3 * experts.indices.long() + turns[:, None])


@pytest.fixture(scope="module", params=LAUNCHED_BY)
def jax_gpu(request: pytest.FixtureRequest) -> Any:
    framework = on_gpu("jax")
    with launched_by(request.param, framework.jax):
        yield framework


@EVERY
def test_traced_results_are_those_of_eager_calls(jax_gpu: Any, kind: str) -> None:
    for n in (1, 23, 64, 300):
        if n <= 64 or not kind.endswith("decode"):
            call = Call(kind, "two shared experts", n)
            arrays = upload(jax_gpu, call.arrays())
            for layout in (None, LayoutSpec(4)):
                counted = partial(call, num_valid=n - 1, layout=layout)
                traced, eager = (
                    jax_gpu.jax.tree.leaves(route(arrays)) for route in (jax_gpu.jax.jit(counted), counted)
                )
                for got, want in zip(traced, eager, strict=True):
                    assert_same_bits(np.asarray(got), np.asarray(want))
