# SPDX-License-Identifier: Apache-2.0
"""Methods and Routers that are made in traced code: one graph for the same arguments, another one for others."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

import cupy_router
from cupy_router import Router, RoutingMethod, ScoreFunction, activation_topk, dense_router, hash_router, presets
from tests import inputs

torch = pytest.importorskip("torch", reason="PyTorch is not installed")
from torch._dynamo.testing import CompileCounter  # noqa: E402

import cupy_router.torch  # noqa: E402

METHOD = RoutingMethod(8, 2)
SOFTSIGN = ScoreFunction("softsign", cuda="x / (1.0f + fabsf(x))", numpy=lambda x: x / (1 + abs(x)))
WEIGHT = torch.from_numpy(inputs.normal((8, 16), seed=180))
TABLE = torch.from_numpy(np.stack([inputs.rng(181, r).permutation(8)[:2] for r in range(30)]))
IDS = torch.arange(4)
LOGITS = torch.from_numpy(inputs.normal((4, 8), seed=182))
X = torch.from_numpy(inputs.normal((4, 16), seed=183))
needs_replace = pytest.mark.skipif(torch.__version__ < "2.5", reason="PyTorch 2.4 does not trace dataclasses.replace")


@functools.cache
def cached(top_k: int, renormalize: bool) -> RoutingMethod:
    return RoutingMethod(8, top_k, renormalize=renormalize)


def with_every_field(top_k: int, renormalize: bool) -> RoutingMethod:
    return RoutingMethod(
        8, top_k, "sigmoid", logit_scale=2, logit_softcap=30.0, score_after_topk=True, bias_on="logits", num_groups=2,
        top_groups=2, group_score="top2", renormalize=renormalize, renormalize_min=1e-12, scale=2.5,
        num_shared_experts=1, shared_weight=0.5, weight_dtype="bfloat16", index_dtype="int64",
    )  # fmt: skip


def from_a_dict(top_k: int, renormalize: bool) -> RoutingMethod:
    names = {"num_experts": 8, "num_experts_per_tok": top_k, "norm_topk_prob": renormalize}
    return RoutingMethod.from_config({"model_type": "olmoe", **names})


class Layer(torch.nn.Module):  # type: ignore[misc]
    def __init__(self) -> None:
        super().__init__()
        self.weight = torch.nn.Parameter(WEIGHT.clone())
        self.register_buffer("bias", LOGITS[0].clone())

    def forward(self, x: Any, top_k: int = 3, renormalize: bool = True) -> Any:
        method = RoutingMethod(8, top_k, renormalize=renormalize, logit_scale=self.weight.shape[1] ** -0.5)
        return tuple(Router(method, weight=self.weight, bias=self.bias)(x))


LAYER = Layer()

Call = Callable[[Any, int, bool], Any]
MADE: dict[str, Call] = {
    "RoutingMethod": lambda x, k, r: activation_topk(x, RoutingMethod(8, k, renormalize=r)),
    "by the package": lambda x, k, r: activation_topk(x, cupy_router.RoutingMethod(8, k, renormalize=r)),
    "of the shape": lambda x, k, r: activation_topk(x, RoutingMethod(x.shape[1], k, scale=x.shape[1] ** -0.5)),
    "every field": lambda x, k, r: activation_topk(x, with_every_field(k, r)),
    "functools.cache": lambda x, k, r: activation_topk(x, cached(k, r)),
    "a ScoreFunction": lambda x, k, r: activation_topk(x, RoutingMethod(8, k, SOFTSIGN, renormalize=r)),
    "compared": lambda x, k, r: activation_topk(x, RoutingMethod(8, k if RoutingMethod(8, 2) == METHOD else 1)),
    "dense_router": lambda x, k, r: dense_router(X, WEIGHT, RoutingMethod(8, k, renormalize=r)),
    "Router": lambda x, k, r: Router(RoutingMethod(8, k, renormalize=r), weight=WEIGHT)(X),
    "Router of a module's tensors": lambda x, k, r: LAYER(X, k, r),
    "Router of graph inputs": lambda x, k, r: Router(RoutingMethod(4, k, renormalize=r), weight=x)(LOGITS),
}
MADE_BY_REPLACE: dict[str, Call] = {
    "dataclasses.replace": lambda x, k, r: activation_topk(x, dataclasses.replace(METHOD, top_k=k, renormalize=r)),
    "replaced twice": lambda x, k, r: activation_topk(
        x, dataclasses.replace(dataclasses.replace(METHOD, top_k=k), renormalize=r)
    ),
    "a preset, replaced": lambda x, k, r: activation_topk(x, dataclasses.replace(presets()["mixtral"], top_k=k)),
}
BY_CONFIG: dict[str, Call] = {
    "from_config of a dict": lambda x, k, r: activation_topk(x, from_a_dict(k, r)),
}
FIXED: dict[str, Call] = {
    "the name of a preset": lambda x, k, r: activation_topk(x, "mixtral"),
    "a Router of a preset": lambda x, k, r: Router("mixtral", weight=WEIGHT)(X),
    "hash_router": lambda x, k, r: hash_router(IDS, TABLE, RoutingMethod(8, 2), logits=x),
    "a hash Router": lambda x, k, r: Router(RoutingMethod(8, 2), weight=WEIGHT, table=TABLE)(X, IDS),
}


def number_of_graphs(call: Call, x: Any, dynamic: bool | None) -> list[int]:
    """The graphs so far, after each of five calls, whose results have to be those of eager calls."""
    torch.compiler.reset()
    graphs = CompileCounter()
    compiled, numbers = torch.compile(call, backend=graphs, fullgraph=True, dynamic=dynamic), []
    for arguments in ((2, True), (2, True), (3, False), (3, False), (2, True)):
        for got, want in zip(compiled(x, *arguments), call(x, *arguments), strict=True):
            torch.testing.assert_close(got, want, rtol=0, atol=0)
        numbers.append(graphs.frame_count)
    return numbers


@pytest.mark.slow("seconds", every=5)
@pytest.mark.parametrize("dynamic", [None, True])
@pytest.mark.parametrize("name", MADE)
def test_a_method_made_in_traced_code(name: str, dynamic: bool | None) -> None:
    assert number_of_graphs(MADE[name], LOGITS, dynamic) == [1, 1, 2, 2, 2]


@needs_replace
@pytest.mark.slow("seconds", every=4)
@pytest.mark.parametrize("name", MADE_BY_REPLACE)
def test_a_method_made_of_another_in_traced_code(name: str) -> None:
    assert number_of_graphs(MADE_BY_REPLACE[name], LOGITS, None) == [1, 1, 2, 2, 2]


@pytest.mark.skipif(torch.__version__ < "2.11", reason="this PyTorch does not trace `from_config`")
@pytest.mark.slow("seconds")
@pytest.mark.parametrize("name", BY_CONFIG)
def test_a_method_of_a_configuration_in_traced_code(name: str) -> None:
    assert number_of_graphs(BY_CONFIG[name], LOGITS, None) == [1, 1, 2, 2, 2]


@pytest.mark.slow("seconds", every=4)
@pytest.mark.parametrize("name", FIXED)
def test_traced_code_that_always_makes_the_same(name: str) -> None:
    assert number_of_graphs(FIXED[name], LOGITS, None) == [1, 1, 1, 1, 1]


@pytest.mark.slow("seconds")
def test_a_number_that_torch_compile_takes_for_symbolic() -> None:
    torch.compiler.reset()
    graphs, found = CompileCounter(), []

    def call(x: Any, scale: float) -> Any:
        return activation_topk(x, RoutingMethod(8, 2, scale=scale)).weights

    compiled = torch.compile(call, backend=graphs, fullgraph=True)
    for scale in (1.5, 2.5, 3.5, 2.5, 1.5, 3):
        assert torch.equal(compiled(LOGITS, scale), call(LOGITS, scale))
        found.append(graphs.frame_count)
    assert found == [1, 2, 3, 3, 3, 4]


@pytest.mark.slow("seconds", every=2)
@pytest.mark.parametrize("strict", [False, True])
def test_a_module_that_makes_its_router_exports(strict: bool) -> None:
    dynamic = ({0: torch.export.Dim("num_tokens", min=2, max=100)},)
    program = torch.export.export(LAYER, (X,), dynamic_shapes=dynamic, strict=strict)
    x = torch.from_numpy(inputs.normal((7, 16), seed=184))
    for got, want in zip(program.module()(x), LAYER(x), strict=True):
        assert torch.equal(got, want)


ERRORS: dict[str, tuple[Callable[[Any], Any], str]] = {
    "a field": (
        lambda x: dense_router(x, WEIGHT, RoutingMethod(8, 9)),
        "^RoutingMethod: top_k is 9, but must be from 1 to num_experts = 8$",
    ),
    "two fields": (
        lambda x: dense_router(x, WEIGHT, RoutingMethod(8, 2, num_groups=3)),
        "^RoutingMethod: num_groups is 3, but must divide num_experts = 8 evenly$",
    ),
    "a preset": (lambda x: dense_router(x, WEIGHT, "mixtrall"), "^method is 'mixtrall', but must be the name of a"),
    "no gate": (lambda x: Router(RoutingMethod(8, 2))(x), "^Router: weight must be an array, got None$"),
    "two arrays": (
        lambda x: Router(RoutingMethod(8, 2), weight=WEIGHT, table=TABLE, bias=WEIGHT[:, 0])(x),
        "^Router: bias and table do not go together",
    ),
    "the shape of an array": (lambda x: Router(RoutingMethod(8, 2), weight=WEIGHT[:7])(x), "weight must have shape"),
}


@pytest.mark.slow("seconds", every=3)
@pytest.mark.parametrize("name", ERRORS)
def test_errors_of_traced_code_are_those_of_eager_calls(name: str) -> None:
    call, message = ERRORS[name]
    for function in (call, torch.compile(call, backend="eager")):
        torch.compiler.reset()
        with pytest.raises((TypeError, ValueError), match=message):
            function(X)
    torch.compiler.reset()
    with pytest.raises(Exception):  # noqa: B017, PT011  # PyTorch decides which
        torch.compile(call, backend="eager", fullgraph=True)(X)


def test_a_method_that_traced_code_returns_or_keeps_over_a_graph_break() -> None:
    def call(x: Any) -> Any:
        method, router = RoutingMethod(8, 3), Router(RoutingMethod(8, 3), weight=WEIGHT)
        torch._dynamo.graph_break()
        return activation_topk(x, method).weights, router(X).weights, method

    torch.compiler.reset()
    *weights, method = torch.compile(call, backend="eager")(LOGITS)
    assert method == RoutingMethod(8, 3)
    assert hash(method) == hash(RoutingMethod(8, 3))
    assert repr(method) == repr(RoutingMethod(8, 3))
    for got, want in zip(weights, call(LOGITS), strict=False):
        assert torch.equal(got, want)


BY_METHOD = {RoutingMethod(8, 2, "sigmoid"): 2.0, RoutingMethod(8, 2, SOFTSIGN): 4.0}
KEYS: dict[str, Callable[[Any, int], Any]] = {
    "get": lambda x, k: x * BY_METHOD.get(RoutingMethod(8, k, "sigmoid"), 3.0),
    "item": lambda x, k: x * BY_METHOD[RoutingMethod(8, k, "sigmoid", scale=1)],
    "in": lambda x, k: x * (5.0 if RoutingMethod(8, k, "sigmoid") in BY_METHOD else 6.0),
    "not in": lambda x, k: x * (5.0 if RoutingMethod(8, k, "softmax") in BY_METHOD else 6.0),
    "a ScoreFunction": lambda x, k: x * BY_METHOD.get(RoutingMethod(8, k, SOFTSIGN), 3.0),
    "made in the same code": lambda x, k: x * {RoutingMethod(8, k): 2.0}.get(RoutingMethod(8, k), 3.0),
    "used before": lambda x, k: used(x, RoutingMethod(8, k, "sigmoid")),
    "in a set": lambda x, k: x * len({RoutingMethod(8, k), RoutingMethod(8, 2), RoutingMethod(8, 3)}),
}


def used(x: Any, method: RoutingMethod) -> Any:
    return activation_topk(x, method).weights * BY_METHOD.get(method, 3.0)


@pytest.mark.slow("seconds", every=4)
@pytest.mark.parametrize("name", KEYS)
def test_a_method_made_in_traced_code_is_found_as_a_key(name: str) -> None:
    call = KEYS[name]
    torch.compiler.reset()
    for fullgraph in (False, True) if torch.__version__ >= "2.11" else (False,):
        compiled = torch.compile(call, backend="eager", fullgraph=fullgraph)
        assert torch.equal(compiled(LOGITS, 2), call(LOGITS, 2))


@pytest.mark.parametrize("fullgraph", [False, True])
def test_a_router_of_numpy_arrays_made_in_traced_code(fullgraph: bool) -> None:
    """NumPy's arrays become constants or inputs of the graph, as those of `dense_router` do."""
    weight, table = WEIGHT.numpy(), TABLE.numpy()
    for call in (
        lambda x: tuple(Router(METHOD, weight=weight)(x)),
        lambda x: tuple(Router(METHOD, weight=WEIGHT, logit_bias=weight[:, 0].copy())(x)),
        lambda x: tuple(Router(METHOD, weight=weight, table=table)(x, IDS)),
    ):
        torch.compiler.reset()
        for got, want in zip(torch.compile(call, backend="eager", fullgraph=fullgraph)(X), call(X), strict=True):
            assert torch.equal(got, want)


@pytest.mark.usefixtures("jax_on_the_cpu")
def test_a_router_of_jax_arrays_made_in_traced_code_breaks_the_graph() -> None:
    jnp = pytest.importorskip("jax.numpy", reason="JAX is not installed")
    weight = jnp.asarray(WEIGHT.numpy())

    def call(x: Any) -> Any:
        return tuple(Router(METHOD, weight=weight)(x))

    torch.compiler.reset()
    for got, want in zip(torch.compile(call, backend="eager")(X), call(X), strict=True):
        assert torch.equal(got, want)
    torch.compiler.reset()
    with pytest.raises(Exception, match=r"arrays_that_no_graph_can_hold|no arrays but PyTorch's: leave out"):
        torch.compile(call, backend="eager", fullgraph=True)(X)


def test_what_traced_code_cannot_make_is_refused() -> None:
    torch.compiler.reset()
    with pytest.raises(Exception):  # noqa: B017, PT011  # PyTorch decides which
        torch.compile(
            lambda x: activation_topk(x, RoutingMethod(8, 2, ScoreFunction("tanh", cuda="tanhf(x)", numpy=np.tanh))),
            backend="eager",
            fullgraph=True,
        )(LOGITS)
