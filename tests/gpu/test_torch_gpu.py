# SPDX-License-Identifier: Apache-2.0
"""The PyTorch ops on CUDA tensors: opcheck, compiled code, graphs of both kinds, streams, a second device."""

from __future__ import annotations

import ctypes
import importlib
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from cupy_router import RoutingMethod, activation_topk, dense_router
from cupy_router.ops import _cached
from cupy_router.ops.registry import OPS
from tests import generated_code, inputs
from tests.gpu.support import NAMES, call, on_gpu, spin, upload
from tests.jax_calls import METHOD

SMALL = RoutingMethod(16, 4, renormalize_eps=1e-20, scale=1.5)
KERNEL = 0  # CU_GRAPH_NODE_TYPE_KERNEL


@pytest.fixture
def torch() -> Any:
    importlib.import_module("cupy_router.torch")  # the first call of all may be one that torch.compile traces
    return on_gpu("torch").torch


def same(got: Any, want: Any) -> None:
    assert all(a.equal(b) for a, b in zip(got, want, strict=True))


def distinct(torch: Any, seed: int) -> Any:
    """Return dense logits whose order no rounding changes."""
    return torch.from_numpy(np.ascontiguousarray(inputs.distinct(40, 32, seed=seed))).cuda()


@pytest.mark.parametrize("op", sorted({*OPS, "router", "router_backward"}))
def test_opcheck(torch: Any, op: str) -> None:
    from tests.torch_samples import samples

    for given in samples("cuda")[op]:
        results = torch.library.opcheck(getattr(torch.ops.cupy_router, op).default, given)
        assert set(results.values()) == {"SUCCESS"}


@pytest.mark.parametrize("name", NAMES)
def test_compiled_for_any_number_of_tokens(torch: Any, name: str) -> None:
    gpu = on_gpu("torch")
    torch.compiler.reset()
    op, options = call(name).op, call(name).options
    compiled = torch.compile(lambda given: tuple(op(**given, **options)), fullgraph=True, dynamic=True)
    for n in (33, 64, 60):
        case = call(name, n=n)
        case.check(*map(gpu.numpy, compiled(upload(gpu, case.arrays))))


def test_generated_code_has_the_ops_and_no_copy(torch: Any) -> None:
    from torch._inductor.utils import run_and_get_code

    torch.compiler.reset()
    function, wide = generated_code.strided_call(torch, "cuda")
    got, (code, *others) = run_and_get_code(torch.compile(function, fullgraph=True, dynamic=True), wide)
    assert not others, "more than one graph"
    generated_code.assert_nothing_but_ops(code, {"activation_topk": 1, "dense_router": 1})
    same(got, function(wide))


def test_reduce_overhead_replays_a_graph(torch: Any) -> None:
    from torch._dynamo.utils import counters

    torch.compiler.reset()
    counters.clear()
    _cached.forget()  # what a plan remembers must not lie in the graph's pool either
    compiled = torch.compile(lambda a: tuple(activation_topk(a * 2, METHOD)), fullgraph=True, mode="reduce-overhead")
    for seed in range(6):
        logits = distinct(torch, seed)
        torch.compiler.cudagraph_mark_step_begin()
        same(compiled(logits), activation_topk(logits * 2, METHOD))
    assert counters["inductor"]["cudagraph_skips"] == 0
    with torch.profiler.profile() as profile:
        compiled(logits)
        torch.cuda.synchronize()
    launched = {event.name for event in profile.events()}
    assert any("cudaGraphLaunch" in name or "cuGraphLaunch" in name for name in launched), launched
    assert not any("cuLaunchKernel" in name for name in launched), launched


def kinds_of_nodes(graph: int) -> list[int]:
    driver = ctypes.CDLL("libcuda.so.1")
    count = ctypes.c_size_t()
    assert driver.cuGraphGetNodes(ctypes.c_void_p(graph), None, ctypes.byref(count)) == 0
    nodes = (ctypes.c_void_p * count.value)()
    assert driver.cuGraphGetNodes(ctypes.c_void_p(graph), nodes, ctypes.byref(count)) == 0
    kinds = []
    for node in nodes:
        kind = ctypes.c_int()
        assert driver.cuGraphNodeGetType(ctypes.c_void_p(node), ctypes.byref(kind)) == 0
        kinds.append(kind.value)
    return kinds


@pytest.mark.parametrize("name", ["topk_select", "activation_topk", "hash_router", "dense_router"])
def test_a_captured_call_is_one_kernel(torch: Any, name: str) -> None:
    """No copy, memset or event: inside a CUDA graph a call is its kernel."""
    gpu, case = on_gpu("torch"), call(name)
    arrays = upload(gpu, case.arrays)
    case(arrays)
    torch.cuda.synchronize()
    try:
        graph = torch.cuda.CUDAGraph(keep_graph=True)
    except TypeError:
        pytest.skip("this PyTorch does not show what it captured")
    with torch.cuda.graph(graph):
        result = case(arrays)
    assert kinds_of_nodes(graph.raw_cuda_graph()) == [KERNEL]
    graph.instantiate()
    graph.replay()
    torch.cuda.synchronize()
    case.check(*map(gpu.numpy, result))


@pytest.mark.parametrize("name", NAMES)
def test_inference_mode_and_tensors_that_require_grad(torch: Any, name: str) -> None:
    gpu, case = on_gpu("torch"), call(name)
    arrays = upload(gpu, case.arrays)
    for array in arrays.values():
        if array.is_floating_point():
            array.requires_grad_()
    with torch.inference_mode():
        result = case(arrays)
    assert result[0].is_inference()
    case.check(*map(gpu.numpy, result))
    case.check(*map(gpu.numpy, case(arrays)))


@pytest.mark.parametrize("mode", ["no_grad", "inference_mode", "enable_grad"])
def test_results_are_what_pytorch_allocates(torch: Any, mode: str) -> None:
    with getattr(torch, mode)():
        for rows in (0, 3):
            got = activation_topk(torch.ones(rows, 16, device="cuda"), SMALL).weights
            want = torch.empty(rows, 4, device="cuda")
            facts = [(a.shape, a.stride(), a.dtype, a.device, a.is_inference(), a.is_leaf) for a in (got, want)]
            assert facts[0] == facts[1]
            assert not got.requires_grad
            before = -1 if mode == "inference_mode" else got._version
            assert got.add_(1) is got
            assert mode == "inference_mode" or got._version == before + 1


def test_a_compiled_call_on_a_side_stream_does_not_wait(torch: Any) -> None:
    torch.compiler.reset()
    compiled = torch.compile(lambda a: tuple(activation_topk(a + 0.0, METHOD)), fullgraph=True)
    right, late = distinct(torch, 1), distinct(torch, 2)
    compiled(late)
    want = activation_topk(right, METHOD)
    stream = torch.cuda.Stream()
    spin(0)
    torch.cuda.synchronize()
    with torch.cuda.stream(stream):
        compiled(late)
        spin(100, stream)
        late.copy_(right)
        got = compiled(late)
    assert not stream.query(), "the host waited"
    stream.synchronize()
    same(got, want)


CACHED = """
import sys, torch
from cupy_router import RoutingMethod, activation_topk
method = RoutingMethod(8, 2, "sigmoid", renormalize=False, weight_dtype=sys.argv[1])
logits = torch.arange(24.0, device="cuda").reshape(3, 8)
route = lambda logits: activation_topk(logits, method).weights * 2
assert route(logits).equal(torch.compile(route, fullgraph=True)(logits))
"""


def test_inductors_cache_distinguishes_methods(tmp_path: Path) -> None:
    """Two processes with different methods: the second one finds the first one's code."""
    environment = {**os.environ, "TORCHINDUCTOR_CACHE_DIR": str(tmp_path)}
    for dtype in ("float32", "float16"):
        program = [sys.executable, "-c", CACHED, dtype]
        done = subprocess.run(program, capture_output=True, text=True, env=environment, timeout=300)
        assert done.returncode == 0, done.stderr[-3000:]


def test_a_device_that_is_not_current(torch: Any) -> None:
    if torch.cuda.device_count() < 2:
        pytest.skip("needs two CUDA devices")
    gpu = on_gpu("torch")
    other = type(gpu)("cuda:1")
    for name in NAMES:
        case = call(name)
        result = case(upload(other, case.arrays))
        assert torch.cuda.current_device() == 0
        assert all(a.device.index == 1 for a in result)
        torch.cuda.synchronize(1)
        case.check(*map(gpu.numpy, result))
    x = torch.from_numpy(inputs.normal((5, 8), seed=280)).to("cuda:1").requires_grad_()
    weight = torch.from_numpy(inputs.normal((16, 8), seed=281)).to("cuda:1")
    (got,) = torch.autograd.grad(dense_router(x, weight, SMALL).weights.square().sum(), x)
    (want,) = torch.autograd.grad(
        dense_router(x.cpu(), weight.cpu(), SMALL).weights.square().sum(), x
    )  # fmt: skip
    torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-6)


NOT_PLAIN = {
    "negated": lambda torch, x: torch._neg_view(x),
    "zeros": lambda torch, x: torch._efficientzerotensor(x.shape, device="cuda"),
    "freed": lambda torch, x: freed(x.clone()),
    "part of a freed one": lambda torch, x: freed(torch.cat([x, x])[len(x) :]),
    "functional": lambda torch, x: torch._to_functional_tensor(x),
    "sparse": lambda torch, x: x.to_sparse(),
    "nested": lambda torch, x: torch.nested.nested_tensor([x, x]),
}


def freed(tensor: Any) -> Any:
    tensor.untyped_storage().resize_(0)
    return tensor


@pytest.mark.parametrize("name", NOT_PLAIN)
def test_tensors_without_plain_memory_are_refused_where_plain_ones_have_a_cached_call(torch: Any, name: str) -> None:
    logits, bias = distinct(torch, 7), torch.zeros(32, device="cuda")
    method = RoutingMethod(32, 4)
    want = activation_topk(logits, method, bias=bias)
    with pytest.raises(ValueError, match="logits must be a "):
        activation_topk(NOT_PLAIN[name](torch, logits), method, bias=bias)
    with pytest.raises(ValueError, match="bias must be a "):
        activation_topk(logits, method, bias=NOT_PLAIN[name](torch, bias))
    out = type(want)(NOT_PLAIN[name](torch, torch.zeros_like(want.weights)), torch.zeros_like(want.indices))
    with pytest.raises(ValueError, match=r"out\.weights must be a "):
        activation_topk(logits, method, bias=bias, out=out)
    same(activation_topk(logits, method, bias=bias), want)
    torch.cuda.synchronize()


def test_a_negated_tensor_is_taken_after_its_resolution_and_in_compiled_code(torch: Any) -> None:
    logits, method = distinct(torch, 8), RoutingMethod(32, 4)
    negated, want = torch._neg_view(logits), activation_topk(-logits, method)
    same(activation_topk(negated.resolve_neg(), method), want)
    torch.compiler.reset()
    # Not with Inductor, which loses the sign of such an input of the graph, whatever the graph computes.
    compiled = torch.compile(lambda x: tuple(activation_topk(x, method)), fullgraph=True, backend="aot_eager")
    same(compiled(negated), want)
    gradients = []
    for gradient in (torch._neg_view(torch.ones_like(want.weights)), -torch.ones_like(want.weights)):
        x = logits.clone().requires_grad_()
        activation_topk(x, RoutingMethod(32, 4, renormalize=False)).weights.backward(gradient)
        gradients.append(x.grad)
    assert torch.equal(*gradients)


def test_a_compiled_function_that_makes_its_method(torch: Any) -> None:
    def route(logits: Any, top_k: int, renormalize: bool) -> Any:
        return tuple(activation_topk(logits, RoutingMethod(logits.shape[1], top_k, renormalize=renormalize)))

    torch.compiler.reset()
    compiled, logits = torch.compile(route, fullgraph=True), distinct(torch, 9)
    for arguments in ((4, True), (4, False), (5, True), (4, True)):
        same(compiled(logits, *arguments), route(logits, *arguments))
