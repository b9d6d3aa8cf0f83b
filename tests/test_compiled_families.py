# SPDX-License-Identifier: Apache-2.0
"""torch.compile of swapped models: no family has a graph break more than by its own code."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest

from tests import frameworks

torch = pytest.importorskip("torch", reason="PyTorch is not installed")
transformers = frameworks.transformers_with_models()

from cupy_router.torch import replace_routers, restore_routers  # noqa: E402
from cupy_router.torch._swapped import InlineRouter, Router  # noqa: E402
from tests import moe_configs, moe_families  # noqa: E402
from tests.moe_gradients import with_our_routers  # noqa: E402
from tests.moe_values import inputs_of  # noqa: E402


@pytest.fixture(autouse=True)
def _quiet() -> Iterator[None]:
    with moe_configs.seeded_on_one_thread():
        yield
    torch.compiler.reset()


def routers_and_blocks(model: Any) -> list[Any]:
    """Return the swapped routers of a model and the blocks around them."""
    routers = [module for module in model.modules() if isinstance(module, Router | InlineRouter)]
    blocks = [module for module in model.modules() if any(child in routers for child in module.children())]
    return [*routers, *blocks]


def number_of_graphs(module: Any, args: Any, kwargs: Any) -> int:
    """Return the number of graphs that one call of a module is compiled to."""
    graphs: list[Any] = []

    def backend(graph: Any, _: Any) -> Any:
        graphs.append(graph)
        return graph.forward

    torch.compiler.reset()
    with torch.no_grad():
        torch.compile(module, backend=backend, dynamic=False)(*args, **kwargs)
    return len(graphs)


@pytest.mark.filterwarnings("ignore:replace_routers left")
@pytest.mark.slow("seconds")
@pytest.mark.parametrize("family", moe_configs.families())
def test_graphs(family: str) -> None:
    model = next(filter(None, map(with_our_routers, moe_configs.model_classes(family))), None)
    if model is None:
        pytest.skip("no router of this family is swapped")
    calls: dict[type, Any] = {}

    def note(module: Any, args: Any, kwargs: Any) -> None:
        calls.setdefault(type(module), (module, args, kwargs))

    hooks = [module.register_forward_pre_hook(note, with_kwargs=True) for module in routers_and_blocks(model)]
    with torch.no_grad():
        model(**inputs_of(model, "cpu", torch.float32))
    for hook in hooks:
        hook.remove()
    assert calls
    ours = [number_of_graphs(*call) for call in calls.values()]
    assert restore_routers(model) > 0
    theirs = [number_of_graphs(*call) for call in calls.values()]
    assert all(our <= their for our, their in zip(ours, theirs, strict=True)), (ours, theirs, list(calls))


@pytest.mark.slow("seconds")
@pytest.mark.parametrize("family", [name for name in moe_configs.families() if moe_families.registered(name)])
def test_graphs_of_experts(family: str) -> None:
    """Experts are one graph, as by grouped_mm of transformers, with the same results as without a compiler."""
    for model in moe_families.models(family):
        moe_families.swap(model)
        calls = {type(module): (module, *given) for module, given in moe_families.calls_of_experts(model)}
        assert calls
        for call in calls.values():
            assert number_of_graphs(*call) == 1
            module, args, kwargs = call
            with torch.no_grad():
                got = torch.compile(module, backend="aot_eager", fullgraph=True)(*args, **kwargs)
                torch.testing.assert_close(got, module(*args, **kwargs), rtol=1e-5, atol=1e-6)


@pytest.mark.slow("seconds")
@pytest.mark.parametrize("name", ["JetMoeForCausalLM", "MixtralForCausalLM"])
def test_fullgraph(name: str) -> None:
    model = moe_configs.build(getattr(transformers, name))
    block, x = model.model.layers[0].mlp, torch.randn(1, 5, 64)
    with torch.no_grad():
        torch.compile(block, backend="eager", fullgraph=True, dynamic=False)(x)
        assert replace_routers(model) > 0
        expected = block(x)
        got = torch.compile(block, backend="eager", fullgraph=True, dynamic=False)(x)
    torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-5)
