# SPDX-License-Identifier: Apache-2.0
"""Tensors whose values do not lie at their address: refused by name, by cached calls on a GPU as well."""

from __future__ import annotations

import importlib
import re
from collections.abc import Callable
from typing import Any

import pytest

from cupy_router import Router, Routing, RoutingMethod, activation_topk, topk_select
from cupy_router.arrays import framework_of
from tests import inputs

torch = pytest.importorskip("torch", reason="PyTorch is not installed")

METHOD = RoutingMethod(16, 2)
X = torch.from_numpy(inputs.normal((3, 16), seed=190))


def freed(tensor: Any) -> Any:
    tensor.untyped_storage().resize_(0)
    return tensor


def cut(tensor: Any) -> Any:
    tensor.untyped_storage().resize_(100)
    return tensor


def leaked(transform: Any, x: Any) -> Any:
    """A wrapper of torch.func that has outlived its transform."""
    found = []
    transform(lambda x: (found.append(x), x.sum())[1])(x)
    return found[0]


Make = Callable[[Any], Any]
REFUSED: dict[str, tuple[Make, str]] = {
    "negated": (lambda x: torch._neg_view(x), r"plain tensor.*pass scores\.resolve_neg\(\)"),
    "imaginary part of a conjugated one": (
        lambda x: torch.complex(x, x).conj().imag,
        r"plain tensor.*pass scores\.resolve_neg\(\)",
    ),
    "zeros": (lambda x: torch._efficientzerotensor(x.shape, device=x.device), r"keeps none: pass scores \+ 0"),
    "some of zeros": (lambda x: torch._efficientzerotensor((6, 16), device=x.device)[3:], r"pass scores \+ 0"),
    "freed": (lambda x: freed(x.clone()), "got one with 0 of 192 bytes: .*call the module that"),
    "part of a freed one": (lambda x: freed(torch.cat([x, x])[3:]), "got one with 0 of 384 bytes"),
    "functional": (lambda x: torch._to_functional_tensor(x), "a wrapper of torch.func"),
    "leaked from grad": (lambda x: leaked(torch.func.grad, x), "a wrapper of torch.func"),
    "leaked from vmap": (lambda x: leaked(torch.func.vmap, x[None]), "a wrapper of torch.func"),
    "sparse": (lambda x: x.to_sparse(), r"dense tensor, got torch.sparse_coo: pass scores\.to_dense\(\)"),
    "sparse rows": (lambda x: x.to_sparse_csr(), r"dense tensor, got torch.sparse_csr: pass scores\.to_dense\(\)"),
    "nested": (lambda x: torch.nested.nested_tensor([x, x]), r"nested one: pass its parts, scores\.unbind\(\)"),
    "jagged": (
        lambda x: torch.nested.nested_tensor([x, x], layout=torch.jagged),
        r"got a NestedTensor: pass scores\.values\(\)",
    ),
    "meta": (lambda x: x.to("meta"), "tensor on cpu or cuda, got one on meta, which has no values: give"),
    "lazy": (lambda x: torch.nn.UninitializedParameter(), "lazy parameter without a shape"),
}
# No cached call takes their dtype, or `describe` would have to look at their storage.
REFUSED_AT_FIRST: dict[str, tuple[Make, str]] = {
    "conjugated": (lambda x: torch.complex(x, x).conj(), r"pass scores\.resolve_conj\(\)"),
    "quantized": (lambda x: torch.quantize_per_tensor(x, 0.1, 0, torch.quint8), r"pass scores\.dequantize\(\)"),
    "partly freed": (lambda x: cut(x.clone()), "got one with 100 of 192 bytes"),
}
if torch.backends.mkldnn.is_available():
    REFUSED["mkldnn"] = (lambda x: x.to_mkldnn(), r"dense tensor, got torch._mkldnn: pass scores\.to_dense\(\)")


def for_out(message: str) -> str:
    """A copy would get the results in the place of a tensor of `out`; parts and what is wrapped share its memory."""
    if "unbind" in message or "values" in message:
        return message.replace("scores", "out.weights")
    return re.sub(r"pass scores.*", r"pass a tensor made for it, as by torch\\.empty$", message)


@pytest.mark.filterwarnings("ignore")  # of sparse and quantized tensors
@pytest.mark.parametrize("name", REFUSED | REFUSED_AT_FIRST)
def test_tensors_without_plain_memory_are_refused_by_name(name: str) -> None:
    make, message = (REFUSED | REFUSED_AT_FIRST)[name]
    tensor = make(X)
    with pytest.raises(ValueError, match=f"^topk_select: scores must be a .*{message}"):
        topk_select(tensor, 2)
    with pytest.raises(ValueError, match=f"^activation_topk: bias must be a .*{message.replace('scores', 'bias')}"):
        activation_topk(X, METHOD, bias=tensor)
    with pytest.raises(ValueError, match=f"^Router: weight must be a .*{message.replace('scores', 'weight')}"):
        Router(METHOD, weight=tensor)
    out = Routing(tensor, torch.zeros(3, 2, dtype=torch.int32))
    with pytest.raises(ValueError, match=f"out.weights must be a .*{for_out(message)}"):
        activation_topk(X, METHOD, out=out)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", REFUSED)
def test_cached_calls_do_not_describe_them(name: str) -> None:
    """None makes a call look at the tensor in full. CUDA tensors of these kinds are described by the same lines."""
    tensor = REFUSED[name][0](X)
    assert framework_of("x", tensor).describe(tensor, 0, []) is None


def test_plain_tensors_are_described() -> None:
    plain = [X, X[1:], X[:0], X[0].expand(3, 16), torch.nn.Parameter(X), X.T]
    for tensor in plain:
        found = framework_of("x", tensor).describe(tensor, 0, [])
        assert found is not None
        assert found[0] == tensor.data_ptr()


@pytest.mark.parametrize("name", ["negated", "zeros"])
def test_the_remedy_works(name: str) -> None:
    tensor = REFUSED[name][0](X)
    plain = tensor.resolve_neg() if name == "negated" else tensor + 0
    want = -X if name == "negated" else torch.zeros_like(X)
    for got, expected in zip(topk_select(plain, 3), topk_select(want, 3), strict=True):
        assert torch.equal(got, expected)


LAZY: dict[str, tuple[Make, Make]] = {  # and the same values in memory
    "negated": (lambda x: torch._neg_view(x), lambda x: -x),
    "zeros": (lambda x: torch._efficientzerotensor(x.shape), torch.zeros_like),
}
ARRAYS = {"expert_scale": torch.linspace(0.5, 2, 16), "logit_bias": X[0]}


@pytest.mark.parametrize("name", LAZY)
@pytest.mark.parametrize("way", ["eager", "compiled", "create_graph", "a Router", "a Router of NumPy arrays, compiled"])
def test_an_incoming_gradient_may_be_lazy(name: str, way: str) -> None:
    importlib.import_module("cupy_router.torch")
    weight, of_numpy = (
        X[:, :4].T[:, :3].contiguous(),
        Router(RoutingMethod(4, 2), weight=X[:, :4].T[:, :3].contiguous().numpy()),
    )
    calls: dict[str, Callable[[Any, Any], Any]] = {
        "a Router": lambda x, scale: Router(RoutingMethod(4, 2), weight=weight)(x[:, :3]),
        "a Router of NumPy arrays, compiled": lambda x, scale: of_numpy(x[:, :3]),
    }
    torch.compiler.reset()
    call = calls.get(way, lambda x, scale: activation_topk(x, METHOD, expert_scale=scale))
    call = torch.compile(call, backend="aot_eager") if "compiled" in way else call
    found = []
    for make in LAZY[name]:
        inputs = X.clone().requires_grad_(), ARRAYS["expert_scale"].clone().requires_grad_()
        given = make(X[:, :2].contiguous())
        options = {"create_graph": way == "create_graph", "allow_unused": True}
        grads = torch.autograd.grad(call(*inputs).weights, inputs, given, **options)
        found.append([grad + 0 for grad in grads if grad is not None])
    for got, want in zip(*found, strict=True):
        assert torch.equal(got, want)


@pytest.mark.slow("seconds")
@pytest.mark.parametrize("name", LAZY)
@pytest.mark.parametrize("backend", ["eager", "aot_eager"])
def test_compiled_calls_resolve_lazy_tensors(name: str, backend: str) -> None:
    importlib.import_module("cupy_router.torch")
    lazy, plain = LAZY[name]
    torch.compiler.reset()
    select = torch.compile(lambda x: topk_select(x, 3).indices, backend=backend, fullgraph=True)
    assert torch.equal(select(lazy(X)), topk_select(plain(X), 3).indices)

    if backend != "eager" and name == "zeros":
        return  # PyTorch has no such inputs for functions that write

    def into(x: Any, out: Any) -> Any:
        return activation_topk(x, METHOD, out=Routing(out, torch.empty(3, 2, dtype=torch.int32))).weights

    fill = torch.compile(into, backend=backend, fullgraph=True)
    assert torch.equal(fill(lazy(X), torch.empty(3, 2)), activation_topk(plain(X), METHOD).weights)
    message = "out.weights must be a .*pass a tensor made for it" if name == "negated" else "out.weights|immutable"
    with pytest.raises(Exception, match=message):
        fill(X, lazy(torch.empty(3, 2)))
