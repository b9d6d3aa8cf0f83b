# SPDX-License-Identifier: Apache-2.0
"""Several biases in PyTorch: eager, compiled, and the gradients beside those of plain PyTorch."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from cupy_router import Router, Routing, RoutingMethod, activation_topk, dense_router, hash_router
from tests import inputs
from tests.bias_calls import KINDS, Call

torch = pytest.importorskip("torch", reason="PyTorch is not installed")

EVERY = pytest.mark.parametrize("kind", KINDS)
N, HIDDEN, EXPERTS, K = 9, 10, 16, 4
METHOD = RoutingMethod(EXPERTS, K, "sigmoid", scale=1.5)
INDEX = torch.tensor([0, 1, 2, 5, 1, -1, 0, 2, 1], dtype=torch.int32)


def tensor(*shape: int, seed: int) -> Any:
    return torch.from_numpy(inputs.normal(shape, seed=730 + seed))


def on_torch(call: Call) -> dict[str, Any]:
    return {name: torch.from_numpy(array) for name, array in call.arrays().items()}


def same(got: Any, want: Any) -> None:
    for a, b in zip(got, want, strict=True):
        torch.testing.assert_close(torch.as_tensor(a), torch.as_tensor(b), rtol=0, atol=0)


def plain(logits: Any, bias: Any, table: Any = None, token_ids: Any = None) -> Any:
    """Return weights [N, K] by operations of PyTorch, 0 for tokens whose bias does not exist."""
    exist = INDEX.clamp(0, len(bias) - 1) == INDEX
    scores = logits.float().sigmoid()
    experts = (scores + bias[torch.where(exist, INDEX, 0)]).argsort(dim=1, descending=True, stable=True)[:, :K]
    if table is not None:
        experts = torch.where((INDEX == 0)[:, None], table[token_ids].long(), experts)
    chosen = scores.gather(1, experts)
    return torch.where(exist[:, None], METHOD.scale * chosen / chosen.sum(1, keepdim=True), 0.0)


TABLE = torch.from_numpy(np.stack([inputs.rng(731, row).permutation(EXPERTS)[:K] for row in range(5)]))
IDS = torch.arange(N) % 5


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("kind", ["activation_topk", "dense_router", "Router", "of logits", "of x", "hash Router"])
def test_gradients_are_those_of_plain_pytorch(kind: str, dtype: Any) -> None:
    """A bias only selects, so it has none, even if it requires grad."""
    x, weight = tensor(N, HIDDEN, seed=0).to(dtype), tensor(EXPERTS, HIDDEN, seed=1).to(dtype)
    logits, bias = tensor(N, EXPERTS, seed=2).to(dtype), tensor(3, EXPERTS, seed=3)
    smooth = [
        array.requires_grad_() for array in ([logits] if kind in ("activation_topk", "of logits") else [x, weight])
    ]
    given: dict[str, Any] = {"bias": bias.requires_grad_(), "bias_index": INDEX}
    table = {"table": TABLE, "token_ids": IDS} if kind in ("of logits", "of x", "hash Router") else {}
    if kind == "activation_topk":
        weights = activation_topk(logits, METHOD, **given).weights
    elif kind == "dense_router":
        weights = dense_router(x, weight, METHOD, **given).weights
    elif kind == "of logits":
        weights = hash_router(IDS, TABLE, METHOD, logits=logits, **given).weights
    elif kind == "of x":
        weights = hash_router(IDS, TABLE, METHOD, x=x, weight=weight, **given).weights
    else:
        router = Router(METHOD, weight=weight, bias=bias, table=table.get("table"))
        weights = router(x, IDS, bias_index=INDEX).weights
    want = plain(logits if kind in ("activation_topk", "of logits") else x.float() @ weight.float().T, bias, **table)
    torch.testing.assert_close(weights, want)
    upstream = tensor(N, K, seed=4)
    got = torch.autograd.grad(weights, [*smooth, bias], upstream, allow_unused=True)
    assert got[-1] is None
    for a, b in zip(got[:-1], torch.autograd.grad(want, smooth, upstream), strict=True):
        assert a.dtype == b.dtype
        torch.testing.assert_close(a, b, rtol=1e-5 if dtype == torch.float32 else 2**-6, atol=1e-6)


@EVERY
def test_eager_results_are_those_of_the_host(kind: str) -> None:
    call = Call(kind, "two shared experts")
    same(call(on_torch(call)), call(call.arrays()))


@pytest.mark.slow("seconds", every=3)
@EVERY
def test_compiled_calls(kind: str) -> None:
    """Of another number of tokens, too, with one graph."""
    torch.compiler.reset()
    call = Call(kind, "two shared experts")
    arrays = on_torch(call)
    layer = {name: array for name, array in arrays.items() if name in ("weight", "bias", "table")}
    rows = {name: array for name, array in arrays.items() if name not in layer}
    shared = {name: rows.pop(name) for name in ("logit_bias", "expert_scale") if name in rows}

    def route(rows: dict[str, Any]) -> Routing:
        return call({**rows, **shared, **layer})

    compiled = torch.compile(route, backend="aot_eager", fullgraph=True, dynamic=True)
    for n in (call.n, 5):
        some = {name: array[:n] for name, array in rows.items()}
        same(compiled(some), route(some))


@pytest.mark.slow("seconds")
@pytest.mark.parametrize("kind", ["Router", "hash Router"])
def test_compiled_routers_of_numpy_arrays(kind: str) -> None:
    """They are an op that finds the Router by its key."""
    torch.compiler.reset()
    call = Call(kind, "two shared experts")
    arrays = call.arrays()
    rows = {name: torch.from_numpy(arrays.pop(name)) for name in ("x", "token_ids", "bias_index") if name in arrays}
    router = Router(call.method, **arrays)

    def route(x: Any, token_ids: Any = None, bias_index: Any = None) -> Any:
        return router(x, token_ids, bias_index=bias_index)

    compiled = torch.compile(route, backend="aot_eager", fullgraph=True)
    same(compiled(**rows), route(**rows))
    outs = Routing(*(torch.zeros_like(array) for array in route(**rows)))
    into = torch.compile(lambda rows, outs: router(**rows, out=outs).weights * 2, backend="aot_eager", fullgraph=True)
    same([into(rows, outs)], [route(**rows).weights * 2])


@pytest.mark.slow("seconds")
def test_what_is_wrong_is_refused_in_a_graph() -> None:
    compiled = torch.compile(lambda a, b: activation_topk(a, METHOD, bias=b), backend="eager")
    with pytest.raises(Exception, match="needs a bias_index"):
        compiled(tensor(N, EXPERTS, seed=2), tensor(3, EXPERTS, seed=3))
