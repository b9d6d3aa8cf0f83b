# SPDX-License-Identifier: Apache-2.0
"""`out` of CUDA tensors: versions, gradients that would be wrong, CUDA graphs, compiled code, and `stream` there."""

from __future__ import annotations

import importlib
from typing import Any

import pytest

from cupy_router import RoutingMethod, activation_topk, topk_select
from cupy_router.results import Routing
from tests.gpu.support import on_gpu

METHOD = RoutingMethod(32, 4)


@pytest.fixture
def torch() -> Any:
    importlib.import_module("cupy_router.torch")
    return on_gpu("torch").torch


def logits(torch: Any, seed: int = 0) -> Any:
    return torch.randn(40, 32, generator=torch.Generator().manual_seed(seed)).cuda()


def buffers(torch: Any) -> Routing:
    return Routing(torch.zeros(40, 4, device="cuda"), torch.zeros(40, 4, dtype=torch.int32, device="cuda"))


def same(got: Any, want: Any) -> bool:
    return all(a.equal(b) for a, b in zip(got, want, strict=True))


@pytest.mark.parametrize("first", ["torch", "cupy"])
def test_versions_are_raised(torch: Any, first: str) -> None:
    """Also by calls whose first array is of another framework, and by those that reuse a cached call."""
    given, out = logits(torch), buffers(torch)
    if first == "cupy":
        given = on_gpu("cupy").cupy.from_dlpack(given)
    for calls in (1, 2, 3):
        activation_topk(given, METHOD, out=out)
        assert [array._version for array in out] == [calls, calls]
    torch.cuda.synchronize()
    assert same(out, activation_topk(logits(torch), METHOD))


def test_two_micro_batches_into_the_same_buffers_before_one_backward(torch: Any) -> None:
    out, expert = buffers(torch), torch.ones(4, device="cuda", requires_grad=True)
    losses = [
        (activation_topk(logits(torch, seed), METHOD, out=out).weights * expert).sum() for seed in (0, 1)
    ]  # fmt: skip
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        sum(losses).backward()


def test_tensors_that_require_grad_are_refused(torch: Any) -> None:
    out = buffers(torch)
    activation_topk(logits(torch), METHOD, out=out)
    out.weights.requires_grad_()
    with pytest.raises(ValueError, match=r"^activation_topk: out\.weights must not require grad"):
        activation_topk(logits(torch), METHOD, out=out)
    with torch.no_grad():
        activation_topk(logits(torch), METHOD, out=out)
    assert [array._version for array in out] == [2, 2]


def test_a_capture_raises_versions(torch: Any) -> None:
    given, out, graph = logits(torch), buffers(torch), torch.cuda.CUDAGraph()
    activation_topk(given, METHOD, out=out)
    with torch.cuda.graph(graph):
        activation_topk(given, METHOD, out=out)
    assert [array._version for array in out] == [2, 2]
    given.copy_(logits(torch, 1))
    graph.replay()
    assert same(out, activation_topk(logits(torch, 1), METHOD))


@pytest.mark.parametrize("mode", ["default", "reduce-overhead"])
def test_out_is_filled_in_one_graph(torch: Any, mode: str) -> None:
    torch.compiler.reset()
    compiled = torch.compile(
        lambda a, out: activation_topk(a + 0, METHOD, out=out).weights * 2, fullgraph=True, mode=mode
    )
    out = buffers(torch)
    for seed in range(4):
        want = activation_topk(logits(torch, seed), METHOD)
        assert compiled(logits(torch, seed), out).equal(want.weights * 2)
        assert same(out, want)
    assert all(array._version for array in out)


@pytest.mark.parametrize("op", ["activation_topk", "topk_select"])
def test_a_stream_breaks_the_graph(torch: Any, op: str) -> None:
    def call(a: Any) -> Any:
        routed = activation_topk(a + 0, METHOD, stream=handle) if op == "activation_topk" else None
        return (routed or topk_select(a + 0, 4, stream=handle)).indices * 2

    torch.compiler.reset()
    stream = torch.cuda.Stream()
    handle = stream.cuda_stream
    given = logits(torch)
    torch.cuda.synchronize()
    with torch.cuda.stream(stream):  # so that additions and products of PyTorch lie in the stream's order
        want = call(given)
        for _ in range(3):
            assert torch.compile(call)(given).equal(want)
    torch.compiler.reset()  # what was compiled would serve this call, too
    with pytest.raises(Exception, match="a graph holds no stream="):
        torch.compile(call, fullgraph=True)(given)
