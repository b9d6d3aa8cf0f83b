# SPDX-License-Identifier: Apache-2.0
"""batch_invariant=True in PyTorch: gradients, graphs, checkpointing, modules and swapped routers."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

from cupy_router import Router, RoutingMethod, dense_router

torch = pytest.importorskip("torch", reason="PyTorch is not installed")
from torch.utils.checkpoint import checkpoint  # noqa: E402  # it may be missing

from cupy_router.torch import Gate, replace_routers  # noqa: E402  # after importorskip
from tests.trainer_checks import CHECKS  # noqa: E402  # after importorskip

N, HIDDEN = 90, 96
METHODS = {
    "of the chosen": RoutingMethod(24, 4, renormalize_eps=1e-20, scale=1.5),
    "of all": RoutingMethod(24, 4, "softmax"),
}
SPLITS = [slice(0, 1), slice(1, 40), slice(40, 41), slice(41, N)]


def problem(method: RoutingMethod, dtype: Any) -> tuple[Any, Any, Any]:
    """Return x, the gate and a gradient of the weights."""
    random = torch.Generator().manual_seed(0)
    x = torch.randn(N, HIDDEN, generator=random).to(dtype)
    gate = (torch.randn(method.num_logits, HIDDEN, generator=random) / 5).to(dtype)
    return x, gate, torch.randn(N, method.top_k, generator=random)


def differentiated(call: Callable[[Any], Any], x: Any, grad: Any, of_logits: bool = False) -> list[Any]:
    """Return the results of a call, and the gradient with respect to x."""
    x = x.clone().requires_grad_()
    results = call(x)
    loss = (results.weights * grad).sum()
    if of_logits:
        loss = loss + results.logits.square().sum()
    loss.backward()
    return [*(result.detach() for result in results), x.grad]


def assert_split(call: Callable[[Any], Any], method: RoutingMethod, dtype: Any, of_logits: bool = False) -> list[Any]:
    """Assert that the bits of tokens are the same in parts of the batch, and return the results of the whole."""
    x, _, grad = problem(method, dtype)
    whole = differentiated(call, x, grad, of_logits)
    parts = [differentiated(call, x[rows], grad[rows], of_logits) for rows in SPLITS]
    for array, split in zip(whole, zip(*parts, strict=True), strict=True):
        assert torch.equal(array, torch.cat(split))
    return whole


@pytest.mark.parametrize("of_logits", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", METHODS)
def test_gradients_of_tokens_do_not_depend_on_their_batch(name: str, dtype: Any, of_logits: bool) -> None:
    method = METHODS[name]
    x, gate, grad = problem(method, dtype)

    def call(x: Any, **options: Any) -> Any:
        return dense_router(x, gate, method, return_logits=of_logits, **options)

    found = assert_split(lambda x: call(x, batch_invariant=True), method, dtype, of_logits)
    plain = differentiated(call, x, grad, of_logits)
    rounding = 1e-5 if dtype == torch.float32 else 2e-2
    torch.testing.assert_close(found[-1], plain[-1], rtol=rounding, atol=rounding)
    again = checkpoint(lambda x: call(x, batch_invariant=True), x.clone().requires_grad_(), use_reentrant=False)
    assert torch.equal(again[0], found[0])


@pytest.mark.parametrize("name", METHODS)
def test_gradients_of_given_experts(name: str) -> None:
    """A row may have an expert twice, or none."""
    method = METHODS[name]
    x, gate, grad = problem(method, torch.float32)
    ids = torch.stack([torch.randperm(24, generator=torch.Generator().manual_seed(row))[:4] for row in range(N)])
    ids[::5, 1], ids[7] = ids[::5, 0], -1
    number = torch.arange(N)[:, None].float()  # of a token, as its last column, which the gate leaves out
    wide_gate = torch.nn.functional.pad(gate, (0, 1))

    def call(x: Any, **options: Any) -> Any:
        rows = ids[x[:, -1].detach().long()]
        return dense_router(x, wide_gate, method, indices=rows, unset="empty", **options)

    with_number = torch.cat([x, number], 1)
    whole = differentiated(lambda x: call(x, batch_invariant=True), with_number, grad)
    parts = [differentiated(lambda x: call(x, batch_invariant=True), with_number[r], grad[r]) for r in SPLITS]
    for array, split in zip(whole, zip(*parts, strict=True), strict=True):
        assert torch.equal(array, torch.cat(split))
    torch.testing.assert_close(whole[-1], differentiated(call, with_number, grad)[-1], rtol=1e-5, atol=1e-5)


def test_graphs_have_the_bits_of_eager_calls() -> None:
    method = METHODS["of the chosen"]
    x, gate, grad = problem(method, torch.bfloat16)
    router = Router(method, weight=gate.float().numpy())  # a node of its own

    def call(x: Any) -> Any:
        return dense_router(x, gate, method, return_logits=True, batch_invariant=True)

    def by_router(x: Any) -> Any:
        return router(x, return_logits=True, batch_invariant=True)

    # The gate in float32 is not that of the first call, whose products have another order.
    for function in (call, by_router):
        compiled = torch.compile(function, fullgraph=True, backend="aot_eager")
        if function is by_router:
            with torch.no_grad():
                expected, found = function(x), compiled(x)
        else:
            expected = assert_split(function, method, torch.bfloat16, True)
            found = differentiated(compiled, x, grad, True)
        for array, want in zip(found, expected, strict=True):
            assert torch.equal(array, want)


def test_modules() -> None:
    method = METHODS["of all"]
    x, *_ = problem(method, torch.bfloat16)
    table = torch.arange(40, dtype=torch.int32).reshape(10, 4) % 24
    token_ids = torch.arange(N) % 10
    for more in ({}, {"table": table}):
        gate = Gate(HIDDEN, method, dtype=torch.bfloat16, **more)

        def ids(rows: slice, is_hash: bool = bool(more)) -> tuple[Any, ...]:
            return (token_ids[rows],) if is_hash else ()

        whole = gate(x, *ids(slice(None)), batch_invariant=True)
        for rows in SPLITS:
            for array, want in zip(gate(x[rows], *ids(rows), batch_invariant=True), whole, strict=True):
                assert torch.equal(array, want[rows])
    with pytest.raises(TypeError, match="batch_invariant must be a bool"):
        gate(x, token_ids, batch_invariant="yes")


def swapped(family: str) -> list[Any]:
    """Return the swapped modules of a model."""
    transformers = pytest.importorskip("transformers", reason="transformers is not installed")
    sizes = {"hidden_size": 32, "intermediate_size": 32, "num_attention_heads": 2, "num_key_value_heads": 2}
    sizes |= {"num_hidden_layers": 1, "vocab_size": 100}
    if family == "Mixtral":
        model = transformers.MixtralModel(transformers.MixtralConfig(num_local_experts=8, **sizes))
    else:
        sizes |= {"moe_intermediate_size": 16, "n_routed_experts": 8, "first_k_dense_replace": 0}
        sizes |= {"n_group": 1, "topk_group": 1, "num_experts_per_tok": 2}
        model = transformers.Glm4MoeModel(transformers.Glm4MoeConfig(**sizes))
    assert replace_routers(model.eval(), batch_invariant=True) == 1
    return [module for module in model.modules() if hasattr(module, "_cupy_router")]


@pytest.mark.parametrize("family", ["Mixtral", "Glm4Moe"])
def test_swapped_routers(family: str) -> None:
    x = torch.randn(N, 32, generator=torch.Generator().manual_seed(0))
    modules = swapped(family)
    assert all(module._cupy_router.batch_invariant for module in modules)
    with torch.no_grad():
        whole = modules[0](x)
        for rows in SPLITS:
            for array, want in zip(modules[0](x[rows]), whole, strict=True):
                assert torch.equal(array, want[rows])


@pytest.mark.parametrize("check", CHECKS, ids=lambda check: check.__name__)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_checks_of_trainers(dtype: Any, check: Any) -> None:
    method, lengths = METHODS["of the chosen"], (1, 30, 7, 40, 12)
    x, gate, grad = problem(method, dtype)
    assert (
        check(lambda x: dense_router(x, gate, method, return_logits=True, batch_invariant=True), x, grad, lengths) == 0
    )
    # A router that depends on the number of tokens is found.
    assert check(
        lambda x: dense_router(x + len(x) / 64, gate, method, return_logits=True, batch_invariant=True),
        x,
        grad,
        lengths,
    )
