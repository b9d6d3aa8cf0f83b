# SPDX-License-Identifier: Apache-2.0
"""Layouts, permute and unpermute on CUDA tensors: gradients, streams, graphs of both kinds, counts in place."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import numpy as np
import pytest

from cupy_router import LayoutSpec, RoutingMethod, activation_topk, dense_router, expert_layout, permute, unpermute
from tests import inputs
from tests.gpu.support import on_gpu, spin

torch = pytest.importorskip("torch", reason="PyTorch is not installed")
if not torch.cuda.is_available():
    pytest.skip("this PyTorch has no CUDA", allow_module_level=True)

from torch.utils.checkpoint import checkpoint  # noqa: E402  # imports PyTorch

from tests.torch_layouts import (  # noqa: E402  # imports PyTorch
    ALL,
    EXPERTS,
    IDS,
    LAYOUTS,
    Case,
    Moe,
    plain_permute,
    plain_unpermute,
)
from tests.torch_samples import NODES, samples  # noqa: E402  # imports PyTorch

METHOD = RoutingMethod(64, 6, "sigmoid", renormalize_eps=1e-20)
ROWS = sorted(
    name for name, (op, _) in NODES.items() if name.endswith("_layout") or op.name in ("permute", "unpermute")
)


def tensor(*shape: int, seed: int = 0, dtype: str = "float32") -> Any:
    return on_gpu("torch").array(inputs.normal(shape, dtype, seed=700 + seed))


def same(got: Any, want: Any) -> None:
    for a, b in zip(torch.utils._pytree.tree_leaves(got), torch.utils._pytree.tree_leaves(want), strict=True):
        assert a.equal(b) if isinstance(b, torch.Tensor) else a == b


def close(got: Any, want: Any, rtol: float = 1e-4) -> None:
    for a, b in zip(got, want, strict=True):
        torch.testing.assert_close(a, b, rtol=rtol, atol=1e-5)


@pytest.mark.parametrize("name", [*ROWS, "expert_layout_write", "permute_backward", "unpermute_backward"])
def test_opcheck(name: str) -> None:
    for given in samples("cuda")[name]:
        results = torch.library.opcheck(getattr(torch.ops.cupy_router, name).default, given)
        assert set(results.values()) == {"SUCCESS"}


# -- Gradients ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", inputs.FLOATS)
@pytest.mark.parametrize("name", LAYOUTS)
def test_gradients_are_those_of_gather_and_sum(name: str, dtype: str) -> None:
    for weights in inputs.FLOATS:
        for case in Case.all(name, dtype, weights=weights, device="cuda"):
            case.check()


@pytest.mark.parametrize("dtype", inputs.FLOATS)
@pytest.mark.parametrize(("n", "hidden"), [(1, 7168), (65, 1000), (1025, 4096), (8192, 513)])
def test_gradients_of_many_tokens(n: int, hidden: int, dtype: str) -> None:
    """Through both ops, with weights and a residual, against gather and sum in float64."""
    ids = torch.from_numpy(inputs.rng(701, n).integers(-1, 64, (n, 6)).astype(np.int32)).cuda()
    layout = expert_layout(ids, 64, alignment=16)
    x, weights = tensor(n, hidden, dtype=dtype), tensor(n, 6, seed=1)
    scale, upstream = tensor(n, seed=2), tensor(n, hidden, seed=3, dtype=dtype)
    found = []
    for moved, back, wide in ((permute, unpermute, False), (plain_permute, plain_unpermute, True)):
        given = [(a.double() if wide else a.clone()).requires_grad_() for a in (x, weights, scale)]
        rows = moved(given[0], layout, weights=given[1])
        if wide:
            rows = rows.to(x.dtype).double()
        result = back(rows, layout, given[1], residual=given[0], residual_scale=given[2])
        found.append((result, *torch.autograd.grad(result, given, upstream.double() if wide else upstream)))
    rtol = {"float32": 1e-4, "float16": 2.0**-8, "bfloat16": 2.0**-5}[dtype]
    for got, want in zip(*found, strict=True):
        torch.testing.assert_close(got.double(), want, rtol=rtol, atol=rtol * float(want.abs().max()))


def test_garbage_in_rows_without_a_pair_does_not_leak() -> None:
    for case in Case.all("aligned", "bfloat16", op="unpermute", device="cuda"):
        unused = case.layout.row_experts < 0
        with torch.no_grad():
            case.arrays["y"][unused] = float("nan")
        found = torch.autograd.grad(case.ours(case.arrays), list(case.arrays.values()), case.upstream)
        assert all(bool(gradient.isfinite().all()) for gradient in found)
        assert not found[list(case.arrays).index("y")][unused].any()


def test_strided_rows_factors_and_gradients() -> None:
    """Rows, weights and residuals may lie apart; so may incoming gradients."""
    for case in Case.all("aligned", "bfloat16", weights="float32", device="cuda"):
        apart = {
            name: torch.cat([a.detach(), a.detach()], dim=1)[:, : a.shape[1]].requires_grad_() if a.ndim == 2 else a
            for name, a in case.arrays.items()
        }
        upstream = torch.cat([case.upstream, case.upstream], dim=1)[:, : case.upstream.shape[1]]
        same(case.ours(apart), case.ours(case.arrays))
        got = torch.autograd.grad(case.ours(apart), list(apart.values()), upstream)
        same(got, torch.autograd.grad(case.ours(case.arrays), list(case.arrays.values()), case.upstream))


def test_repeats_agree_bitwise() -> None:
    x, gate = tensor(1025, 512, dtype="bfloat16").requires_grad_(), tensor(64, 512, seed=1, dtype="bfloat16")
    first = step(x, gate)
    for _ in range(30):
        same(step(x, gate), first)


def step(x: Any, gate: Any, **more: Any) -> tuple[Any, ...]:
    """Return the result of a layer, its layout and the gradient of x."""
    weights, _, layout = dense_router(x, gate, METHOD, layout=LayoutSpec(8), **more)
    result = unpermute(permute(x, layout).tanh(), layout, weights, residual=x)
    return result, layout, *torch.autograd.grad(result.float().square().sum(), x)


def test_a_router_with_a_layout_has_the_same_results() -> None:
    for n in (1, 33, 64, 65, 1025):
        logits = tensor(n, 64, seed=n).requires_grad_()
        plain = activation_topk(logits, METHOD)
        plan = activation_topk(logits, METHOD, layout=LayoutSpec(8, want=ALL))
        same(plan[:2], plain)
        same(plan.layout, expert_layout(plain.indices, 64, alignment=8, want=ALL))
        got, want = (torch.autograd.grad(r.weights.square().sum(), logits) for r in (plan, plain))
        same(got, want)


def test_autocast_changes_nothing() -> None:
    for case in Case.all("aligned", "bfloat16", weights="float32", device="cuda"):
        smooth = list(case.arrays.values())
        want = case.ours(case.arrays), *torch.autograd.grad(case.ours(case.arrays), smooth, case.upstream)
        with torch.autocast("cuda", torch.float16):
            result = case.ours(case.arrays)
            same((result, *torch.autograd.grad(result, smooth, case.upstream)), want)


def test_torch_func() -> None:
    for case in Case.all("aligned", "float32", device="cuda"):
        names = list(case.arrays)

        def loss(*given: Any, case: Any = case, names: Any = names) -> Any:
            return (case.ours(dict(zip(names, given, strict=True))) * case.upstream).sum()

        arrays = [array.detach() for array in case.arrays.values()]
        got = torch.func.grad(loss, argnums=tuple(range(len(names))))(*arrays)
        same(got, torch.autograd.grad(loss(*case.arrays.values()), list(case.arrays.values())))


# -- Compiled ----------------------------------------------------------------------------------------------------------


def test_a_compiled_layer_for_any_number_of_tokens() -> None:
    torch.compiler.reset()

    def layer(x: Any, gate: Any) -> Any:
        weights, _, layout = dense_router(x, gate, METHOD, layout=LayoutSpec(8))
        return unpermute(permute(x, layout).tanh(), layout, weights, residual=x), layout.counts

    compiled, gate = torch.compile(layer, fullgraph=True, dynamic=True), tensor(64, 128, seed=1).requires_grad_()
    for n in (7, 40, 129):
        found = []
        for function in (compiled, layer):
            x = tensor(n, 128, seed=n).requires_grad_()
            result, counts = function(x, gate)
            found.append((result, counts, *torch.autograd.grad(result.square().sum(), (x, gate))))
        close(*found)


def test_grouped_mm() -> None:
    """Experts by PyTorch's grouped product in bfloat16, against a loop in float32."""
    grouped_mm = getattr(torch.nn.functional, "grouped_mm", None) or getattr(torch, "_grouped_mm", None)
    if grouped_mm is None:
        pytest.skip("this PyTorch has no grouped_mm")
    x, experts = tensor(100, 128, dtype="bfloat16"), tensor(64, 128, 64, seed=1, dtype="bfloat16")
    weights, ids = activation_topk(tensor(100, 64, seed=2), METHOD)
    layout = expert_layout(ids, 64)
    x.requires_grad_(), experts.requires_grad_()
    result = unpermute(grouped_mm(permute(x, layout), experts, offs=layout.ends), layout, weights)
    got = result, *torch.autograd.grad(result.float().square().sum(), (x, experts))
    wide = [a.detach().float().requires_grad_() for a in (x, experts)]
    each = torch.einsum("nh,nkho->nko", wide[0], wide[1][ids.long()])
    right = (each * weights[:, :, None]).sum(1)
    want = right, *torch.autograd.grad(right.square().sum(), wide)
    for a, b in zip(got, want, strict=True):
        torch.testing.assert_close(a.float(), b, rtol=0.05, atol=0.03 * float(b.abs().max()))


@pytest.mark.parametrize("backward", [False, True])
def test_reduce_overhead_replays_a_graph(backward: bool) -> None:
    from torch._dynamo.utils import counters

    torch.compiler.reset()
    counters.clear()
    gate = tensor(64, 128, seed=1)

    def layer(x: Any) -> Any:
        weights, _, layout = dense_router(x, gate, METHOD, layout=LayoutSpec(8))
        return unpermute(permute(x, layout).tanh(), layout, weights, residual=x)

    compiled = torch.compile(layer, fullgraph=True, mode="reduce-overhead")
    for seed in range(5):
        found = []
        for function in (compiled, layer):
            x = tensor(40, 128, seed=seed).requires_grad_(backward)
            torch.compiler.cudagraph_mark_step_begin()
            result = function(x)
            gradients = torch.autograd.grad(result.square().sum(), x) if backward else ()
            found.append([result.detach().clone(), *[gradient.clone() for gradient in gradients]])
        close(*found)
    assert counters["inductor"]["cudagraph_skips"] == 0


# -- Streams and CUDA graphs -------------------------------------------------------------------------------------------


def on_a_side_stream(function: Callable[[], Any]) -> Any:
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(2):
            function()
    torch.cuda.synchronize()


def test_a_captured_step_is_replayed_on_other_values() -> None:
    """Tokens, ids, num_valid and what has been counted change in place."""
    ids, count = IDS.cuda(), torch.tensor([8], dtype=torch.int32, device="cuda")
    load = torch.zeros(EXPERTS, dtype=torch.int64, device="cuda")
    x, weights = tensor(len(IDS), 64).requires_grad_(), tensor(*IDS.shape, seed=1).requires_grad_()

    def train(ids: Any, x: Any, weights: Any, count: Any, load: Any = None) -> tuple[Any, ...]:
        layout = expert_layout(ids, EXPERTS, alignment=4, num_valid=count, load=load, want=ALL)
        result = unpermute(permute(x, layout).tanh(), layout, weights, residual=x)
        return result, layout, *torch.autograd.grad(result.square().sum(), (x, weights))

    captured = partial(train, ids, x, weights, count, load)
    on_a_side_stream(captured)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        got = captured()
    for seed, valid in ((1, 8), (2, 3), (3, 0), (4, 7)):
        with torch.no_grad():
            ids.copy_(IDS.flip(0).roll(seed, dims=1))
            x.copy_(tensor(*x.shape, seed=seed))
            count.fill_(valid)
            load.fill_(seed)
        graph.replay()
        torch.cuda.synchronize()
        want = train(ids, x, weights, valid)
        same(got, want)
        assert load.equal(seed + want[1].counts)


def test_a_captured_router_with_a_layout() -> None:
    x, gate, count = tensor(40, 128), tensor(64, 128, seed=1), torch.tensor([40], dtype=torch.int32, device="cuda")
    route = partial(dense_router, x, gate, METHOD, layout=LayoutSpec(8, want=ALL), num_valid=count)
    on_a_side_stream(route)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        got = route()
    for seed, valid in ((1, 40), (2, 11), (3, 0)):
        x.copy_(tensor(40, 128, seed=seed))
        count.fill_(valid)
        graph.replay()
        torch.cuda.synchronize()
        same(got, dense_router(x, gate, METHOD, layout=LayoutSpec(8, want=ALL), num_valid=valid))


def test_a_step_on_a_side_stream_does_not_wait() -> None:
    """Forward and backward come after a slow producer, and the host goes on."""
    right, late, gate = tensor(65, 128), tensor(65, 128, seed=1).requires_grad_(), tensor(64, 128, seed=2)
    want = step(right.clone().requires_grad_(), gate)
    step(late, gate)
    stream = torch.cuda.Stream()
    spin(0)
    torch.cuda.synchronize()
    with torch.cuda.stream(stream):
        step(late, gate)
        stream.synchronize()
        spin(100, stream)
        with torch.no_grad():
            late.copy_(right)
        got = step(late, gate)
    assert not stream.query(), "the host waited"
    stream.synchronize()
    same(got, want)


def test_a_given_stream() -> None:
    x, ids = tensor(len(IDS), 64).requires_grad_(), IDS.cuda()
    layout = expert_layout(ids, EXPERTS)
    want = permute(x, layout)
    (gradient,) = torch.autograd.grad(want.square().sum(), x)
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    rows = permute(x, expert_layout(ids, EXPERTS, stream=stream), stream=stream)
    torch.cuda.current_stream().wait_stream(stream)
    same((rows, *torch.autograd.grad(rows.square().sum(), x)), (want, gradient))


# -- Counts in place ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("compiled", [False, True])
@pytest.mark.parametrize("reentrant", [False, True])
def test_recomputation_adds_nothing(reentrant: bool, compiled: bool) -> None:
    """Autograd runs backward passes of CUDA tensors on a thread of its own."""
    found = []
    for again in (False, True):
        torch.compiler.reset()
        module = Moe("cuda")
        function: Any = partial(checkpoint, module, use_reentrant=reentrant) if again else module
        if compiled and again:
            function = torch.compile(function, fullgraph=True)
        batches = [tensor(5, 6, seed=10 + i).requires_grad_() for i in range(2)]
        outputs = [function(x) for x in batches]
        counted = module.load.clone()
        assert counted.sum() == 2 * 5 * 3
        for output in outputs:
            output.square().sum().backward()
        assert module.load.equal(counted)
        found.append((counted, *[x.grad for x in batches], module.gate.grad))
    close(*found)
