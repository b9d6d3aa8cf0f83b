# SPDX-License-Identifier: Apache-2.0
"""Gradients of weights on CUDA tensors: the cases of tests/test_torch_autograd.py, streams, graphs, many tokens."""

from __future__ import annotations

from typing import Any

import pytest

from cupy_router import Router, RoutingMethod, activation_topk, dense_router
from tests import inputs
from tests.gpu.support import on_gpu, spin
from tests.gradient_cases import KINDS, SMALL
from tests.methods import METHODS
from tests.torch_gradients import Case, twin

METHOD = RoutingMethod(256, 6, renormalize_eps=1e-20, scale=1.5)


@pytest.fixture
def torch() -> Any:
    return on_gpu("torch").torch


def gradient(torch: Any, x: Any, weight: Any, **more: Any) -> tuple[Any, Any]:
    """Return the gradients of a loss with respect to x and weight."""
    weights = dense_router(x, weight, METHOD, **more).weights
    if "stream" in more:  # whoever gives a stream waits for it
        torch.cuda.current_stream().wait_stream(more["stream"])
    found = torch.autograd.grad(weights.square().sum(), [x, weight])
    return found[0], found[1]


def given(torch: Any, n: int = 65, dtype: str = "float32", seed: int = 0) -> tuple[Any, Any]:
    gpu = on_gpu("torch")
    hosts = inputs.normal((n, 512), dtype, seed=220 + seed), inputs.normal((256, 512), dtype, 230 + seed, scale=0.05)
    x, weight = (gpu.array(host).requires_grad_() for host in hosts)
    return x, weight


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", SMALL)
def test_gradients_are_those_of_plain_pytorch(torch: Any, name: str, kind: str) -> None:
    case = Case(kind, name, "cuda")
    case.check(case.call())


@pytest.mark.parametrize("name", [name for name in METHODS if name not in SMALL])
def test_gradients_of_many_experts(torch: Any, name: str) -> None:
    case = Case("activation_topk", name, "cuda")
    case.check(case.call())


@pytest.mark.parametrize("name", ["everything", "soft cap", "shared in the normaliser"])
@pytest.mark.parametrize("kind", KINDS)
def test_compiled_calls_have_the_same_gradients(torch: Any, name: str, kind: str) -> None:
    torch.compiler.reset()
    case = Case(kind, name, "cuda")
    if kind.endswith("Router"):
        arrays = dict(case.arrays)
        x, token_ids = arrays.pop("x"), arrays.pop("token_ids", None)
        router = Router(case.method, **arrays)
        case.check(torch.compile(lambda x: router(x, token_ids), fullgraph=True)(x))
    else:
        case.check(torch.compile(case.call, fullgraph=True)())


@pytest.mark.parametrize("dtype", inputs.FLOATS)
@pytest.mark.parametrize("n", [1, 64, 2049, 8192, 70_000])
def test_many_tokens(torch: Any, n: int, dtype: str) -> None:
    """Against autograd of the twin in float32: both row layouts, few rows and many."""
    logits = on_gpu("torch").array(inputs.normal((n, 256), dtype, seed=240)).requires_grad_()
    upstream = torch.randn(n, 6, device="cuda")
    weights, indices = activation_topk(logits, METHOD)
    (got,) = torch.autograd.grad((weights * upstream).sum(), logits)
    wide = logits.detach().float().requires_grad_()
    (want,) = torch.autograd.grad((twin(wide, indices, METHOD) * upstream).sum(), wide)
    rtol = {"float32": 1e-4, "float16": 2.0**-10, "bfloat16": 2.0**-7}[dtype]
    torch.testing.assert_close(got.float(), want, rtol=rtol, atol=2e-6)
    assert ((got != 0).sum(dim=1) <= 6).all()


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_16_bit_gates_keep_float32_logits(torch: Any, dtype: str) -> None:
    """In the backward pass as well: gradients are those of the exact products, rounded once."""
    x, weight = given(torch, dtype=dtype)
    got = gradient(torch, x, weight)
    wide = [array.detach().double().requires_grad_() for array in (x, weight)]
    indices = dense_router(x, weight, METHOD).indices
    weights = twin(wide[0] @ wide[1].t(), indices, METHOD)
    for a, b in zip(got, torch.autograd.grad(weights.square().sum(), wide), strict=True):
        assert str(a.dtype) == f"torch.{dtype}"
        smallest = 2.0**-24 if dtype == "float16" else 0.0
        torch.testing.assert_close(a.double(), b, rtol=2.0**-7, atol=1e-5 * float(b.abs().max()) + smallest)


def test_repeats_agree_bitwise(torch: Any) -> None:
    logits = on_gpu("torch").array(inputs.normal((8192, 256), seed=241)).requires_grad_()
    upstream, scale = torch.randn(8192, 6, device="cuda"), torch.rand(256, device="cuda", requires_grad=True)
    first: Any = None
    for _ in range(20):
        weights, _ = activation_topk(logits, METHOD, expert_scale=scale)
        found = torch.autograd.grad((weights * upstream).sum(), [logits, scale])
        first = first or found
        assert all(map(torch.equal, found, first))


@pytest.mark.parametrize("how", ["current stream", "stream="])
def test_backward_uses_the_stream_of_forward(torch: Any, how: str) -> None:
    """A slow producer before both, on another stream: read too early, its values would differ."""
    x, weight = given(torch)
    want = gradient(torch, x, weight)
    stream = torch.cuda.Stream()
    late = torch.zeros_like(x).requires_grad_()
    torch.cuda.synchronize()
    spin(0)
    with torch.cuda.stream(stream):
        spin(30, stream)
        with torch.no_grad():
            late.copy_(x)
        if how == "current stream":
            got = gradient(torch, late, weight)
    if how == "stream=":
        got = gradient(torch, late, weight, stream=stream)
    torch.cuda.synchronize()
    for a, b in zip(got, want, strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=0)


def test_the_host_does_not_wait(torch: Any) -> None:
    x, weight = given(torch)
    for _ in range(2):
        gradient(torch, x, weight)
    torch.cuda.synchronize()
    stream = torch.cuda.current_stream()
    spin(0, stream)
    spin(300, stream)
    gradient(torch, x, weight)
    assert not stream.query(), "the work before it is not done yet"
    torch.cuda.synchronize()


def test_a_captured_step_is_replayed_on_other_values(torch: Any) -> None:
    x, weight = given(torch)
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(2):
            gradient(torch, x, weight)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        got = gradient(torch, x, weight)
    for seed in (1, 2):
        other_x, other_weight = given(torch, seed=seed)
        with torch.no_grad():
            x.copy_(other_x)
            weight.copy_(other_weight)
        graph.replay()
        torch.cuda.synchronize()
        for a, b in zip(got, gradient(torch, other_x, other_weight), strict=True):
            torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-7)


def test_mixed_with_cupy_arrays(torch: Any, cupy: Any) -> None:
    x, weight = given(torch)
    on_cupy = cupy.from_dlpack(weight.detach())
    want = gradient(torch, x, weight)[0]
    for call in (lambda: dense_router(x, on_cupy, METHOD), lambda: Router(METHOD, weight=on_cupy)(x)):
        (got,) = torch.autograd.grad(call().weights.square().sum(), x)
        torch.testing.assert_close(got, want, rtol=0, atol=0)


def test_autocast_does_not_round_gradients(torch: Any) -> None:
    x, weight = given(torch)
    want = gradient(torch, x, weight)
    with torch.autocast("cuda", torch.bfloat16):
        got = gradient(torch, x, weight)
    for a, b in zip(got, want, strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=0)


@pytest.mark.parametrize("dtype", inputs.FLOATS)
def test_torch_func(torch: Any, dtype: str) -> None:
    """Per-example gradients of eager calls equal autograd's, one by one."""
    x, weight = (a.detach() for a in given(torch, 60, dtype))

    def loss(x: Any, weight: Any) -> Any:
        return dense_router(x, weight, METHOD).weights.square().sum()

    batch = x.unflatten(0, (3, 20))
    found = torch.func.vmap(torch.func.grad(loss, argnums=(0, 1)), in_dims=(0, None))(batch, weight)
    routed = torch.func.vmap(lambda a: tuple(dense_router(a, weight, METHOD)))(batch)
    for i, each in enumerate(batch):
        want = gradient(torch, each.clone().requires_grad_(), weight.clone().requires_grad_())
        for ours, theirs in zip(found, want, strict=True):
            torch.testing.assert_close(ours[i], theirs, rtol=2e-2 if dtype == "bfloat16" else 2e-3, atol=1e-4)
        assert routed[1][i].equal(dense_router(each, weight, METHOD).indices)


@pytest.mark.parametrize("unset", ["route", "empty"])
@pytest.mark.parametrize("n", [1000, 2048])
def test_gradients_of_many_replayed_tokens(torch: Any, n: int, unset: str) -> None:
    """From some size on, tensor cores multiply the bfloat16 parts of a gradient, as exactly as float32 GEMMs do."""
    x, weight = given(torch, n, "bfloat16")
    ids = torch.stack([torch.randperm(256)[:6] for _ in range(n)]).to(torch.int16).cuda()
    got = gradient(torch, x, weight, indices=ids, unset=unset)
    wide = [array.detach().double().requires_grad_() for array in (x, weight)]
    weights = twin(wide[0] @ wide[1].t(), ids.long(), METHOD)
    want = torch.autograd.grad(weights.square().sum(), wide)
    for a, b in zip(got, want, strict=True):
        torch.testing.assert_close(a.double(), b, rtol=2.0**-8, atol=1e-5 * float(b.abs().max()))
    again = gradient(torch, x, weight, indices=ids, unset=unset)
    assert all(torch.equal(a, b) for a, b in zip(got, again, strict=True))
