# SPDX-License-Identifier: Apache-2.0
"""The forward of a swapped router is one op and a tuple of its results."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest

from tests import cuda_path, frameworks

torch = pytest.importorskip("torch", reason="PyTorch is not installed")
transformers = frameworks.transformers_with_models()

from torch._dynamo.backends.common import aot_autograd  # noqa: E402
from torch.overrides import TorchFunctionMode  # noqa: E402

from cupy_router.arrays import _torch as tensors  # noqa: E402
from cupy_router.torch import replace_routers  # noqa: E402
from cupy_router.torch._swapped import Router  # noqa: E402
from tests import moe_configs, moe_values  # noqa: E402
from tests.cuda_path import Launches  # noqa: E402

HASH = "DeepseekV4ForCausalLM"  # its first layer
NAMES = ["Qwen3MoeForCausalLM", "DeepseekV3ForCausalLM", "GptOssForCausalLM", "MixtralForCausalLM"]
FLOATS = ["float32", "float16", "bfloat16"]


@pytest.fixture(autouse=True)
def _quiet() -> Iterator[None]:
    with moe_configs.seeded_on_one_thread():
        yield


@pytest.fixture
def record(monkeypatch: pytest.MonkeyPatch) -> Callable[[], Launches]:
    """Return a function that begins to record launches, after a swap: the trial before it needs results."""

    def begin() -> Launches:
        monkeypatch.setattr(tensors, "_LOWEST_ADDRESS", 0)
        return cuda_path.record_launches(monkeypatch)

    return begin


def router_of(name: str, dtype: str = "float32") -> Any:
    """Return the first router of a model, with random tensors; those of one entry per expert stay in float32."""
    model = moe_configs.build(getattr(transformers, name)).eval()
    assert replace_routers(model) > 0
    router = next(module for module in model.modules() if isinstance(module, Router))
    with torch.no_grad():
        moe_values.fill(model, [router])
    router.weight.data = router.weight.data.to(getattr(torch, dtype))
    return router


def others(router: Any) -> tuple[Any, ...]:
    """Return what the forward of a router takes besides hidden states."""
    return (torch.arange(5),) if "table" in router._cupy_router.tensors else ()


def hidden_states(shape: tuple[int, ...] = (5, 64), dtype: str = "float32") -> Any:
    return torch.randn(shape).to(getattr(torch, dtype))


class Functions(TorchFunctionMode):  # type: ignore[misc]  # PyTorch is untyped to us
    """Names of the functions of PyTorch that are called, without the attributes of tensors that are read."""

    def __init__(self) -> None:
        super().__init__()
        self.found: list[str] = []

    def __torch_function__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.found.append(function.__name__)
        return function(*args, **(kwargs or {}))


READ = {"__get__", "data_ptr", "is_neg", "stride", "get_device", "is_contiguous"}


# -- Eager calls -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("name", [*NAMES, HASH])
def test_results_are_those_that_the_kernel_writes(name: str, dtype: str, record: Callable[[], Launches]) -> None:
    router, x = router_of(name, dtype), hidden_states(dtype=dtype)
    given, launches = (x, *others(router)), record()
    with torch.no_grad():
        router(*given)
        launches.clear()
        with Functions() as called:
            logits, weights, indices = router(*given)
    (launch,) = launches
    assert launch["x"] == x.data_ptr()
    assert launch["weight"] == router.weight.data_ptr()
    written = (launch["logits_out"], launch["weights"], launch["indices"])
    assert written == tuple(result.data_ptr() for result in (logits, weights, indices))
    assert indices.dtype == torch.int64
    assert [name for name in called.found if name not in READ] == ["empty_like"] * 3


def test_rows_that_lie_apart_are_not_copied(record: Callable[[], Launches]) -> None:
    router, x = router_of("MixtralForCausalLM"), hidden_states((6, 64))
    launches = record()
    with torch.no_grad():
        router(x[::2])
        router(x.t().contiguous().t())
    assert [launch["x"] == x.data_ptr() for launch in launches] == [True, False]


@pytest.mark.parametrize("name", [*NAMES, HASH])
def test_other_layouts_of_inputs_and_tensors(name: str) -> None:
    router, x, given = router_of(name), hidden_states(), []
    want = router(x, *others(router))
    for tensor in (router.weight, *(getattr(router, path) for path in router._cupy_router.tensors.values())):
        tensor.data = torch.stack((tensor.data, tensor.data), dim=-1)[..., 0]
    for argument in others(router):
        given += [torch.stack((argument, argument), dim=-1)[None, :, 0]]
    for result, expected in zip(router(torch.stack((x, x), dim=-1)[..., 0], *given), want, strict=True):
        assert torch.equal(result, expected)


def test_a_gradient_has_one_node() -> None:
    router, x = router_of("DeepseekV3ForCausalLM"), hidden_states()
    logits, weights, _ = router(x)
    assert logits.grad_fn is weights.grad_fn
    assert [type(function).__name__ for function, _ in weights.grad_fn.next_functions if function] == ["AccumulateGrad"]


# -- What changes after the swap ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("name", NAMES)
def test_dtypes_that_change(name: str, dtype: str) -> None:
    """Plans are chosen in each call, also by copies, whose parameters others may convert."""
    router, x = router_of(name), hidden_states()
    with torch.no_grad():
        router(x)
        router.to(getattr(torch, dtype))
        x = x.to(getattr(torch, dtype))
        got = router(x)
        want = router.original.forward(router, x)
    assert [result.dtype for result in got] == [result.dtype for result in want]
    torch.testing.assert_close(got[0].float(), want[0].float(), rtol=2e-2, atol=2e-2)
    router.float()
    with torch.no_grad():
        assert router(x.float())[1].dtype == torch.float32


def test_requires_grad_and_training_that_change() -> None:
    router, x = router_of("Qwen3MoeForCausalLM"), hidden_states()
    for training, needs in ((False, True), (True, True), (True, False), (False, False), (False, True)):
        router.train(training).requires_grad_(needs)
        logits, weights, indices = router(x)
        assert logits.requires_grad == weights.requires_grad == needs
        assert not indices.requires_grad
        with torch.no_grad():
            assert not router(x)[0].requires_grad


@pytest.mark.parametrize("way", ["in place", "assigned", "data", "deleted and set"])
def test_tensors_that_change(way: str) -> None:
    router, x = router_of("DeepseekV3ForCausalLM"), hidden_states()
    with torch.no_grad():
        before = router(x)[2]
        changed = router.e_score_correction_bias + torch.arange(moe_configs.NUM_EXPERTS) * 10.0
        if way == "in place":
            router.e_score_correction_bias.copy_(changed)
        elif way == "assigned":
            router.e_score_correction_bias = changed
        elif way == "data":
            router.e_score_correction_bias.data = changed
        else:
            del router.e_score_correction_bias
            router.e_score_correction_bias = changed
        after = router(x)[2]
        router.weight = torch.nn.Parameter(-router.weight)
        turned = router(x)[0]
        want = router.original.forward(router, x)
    assert not torch.equal(before, after)
    assert torch.equal(after.sort().values, want[2].sort().values)
    torch.testing.assert_close(turned, want[0])


def test_a_bias_of_16_bits() -> None:
    router, x = router_of("DeepseekV3ForCausalLM"), hidden_states()
    router.e_score_correction_bias = router.e_score_correction_bias.bfloat16()
    with torch.no_grad():
        got, want = router(x)[2], router.original.forward(router, x)[2]
    assert torch.equal(got.sort().values, want.sort().values)


# -- Compiled ----------------------------------------------------------------------------------------------------------


def compiled_ops(module: Any, *args: Any) -> list[str]:
    """Return the ops in the graph of a module that torch.compile passes to its backend."""
    graphs: list[list[str]] = []

    def compiler(graph: Any, _: Any) -> Any:
        names = [str(node.target) for node in graph.graph.nodes if node.op == "call_function"]
        graphs.append([name for name in names if "getitem" not in name])
        return graph.forward

    torch.compiler.reset()
    torch.compile(module, backend=aot_autograd(fw_compiler=compiler), fullgraph=True, dynamic=False)(*args)
    torch.compiler.reset()
    (ops,) = graphs
    return ops


@pytest.mark.slow("seconds", every=4)
@pytest.mark.parametrize("grad", [False, True])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("name", [*NAMES, HASH])
def test_one_op_in_a_graph(name: str, dtype: str, grad: bool) -> None:
    router, x = router_of(name, dtype), hidden_states(dtype=dtype)
    with torch.set_grad_enabled(grad):
        ops = compiled_ops(router, x, *others(router))
    op = "hash_router" if name == HASH else "dense_router"
    assert [op for op in ops if op != "aten.detach.default"] == [f"cupy_router.{op}_logits.default"]


@pytest.mark.slow("seconds", every=4)
def test_hidden_states_of_sequences_in_a_graph() -> None:
    router, x = router_of("DeepseekV3ForCausalLM"), hidden_states((2, 5, 64))
    with torch.no_grad():
        assert compiled_ops(router, x) == ["aten.view.default", "cupy_router.dense_router_logits.default"]


@pytest.mark.slow("seconds")
def test_a_compiled_block_has_few_more_guards_than_before() -> None:
    """Each call of a compiled model checks them: 724 more, of a router and its experts, took 46 us for 4 layers."""
    model = moe_configs.build(transformers.Qwen3MoeForCausalLM).eval()
    found: list[int] = []

    def keep_all(guards: Any) -> list[bool]:
        found.append(len(guards))
        return [True] * len(guards)

    for options in (None, {}, {"experts": True}):
        if options is not None:
            replace_routers(model, **options)
        torch._dynamo.reset()
        try:
            block = torch.compile(
                model.model.layers[0].mlp, backend="eager", fullgraph=True, options={"guard_filter_fn": keep_all}
            )
        except (RuntimeError, TypeError):
            pytest.skip("this PyTorch does not show guards")
        with torch.no_grad():
            block(torch.randn(1, 5, model.config.hidden_size))
    own, routers, experts = found
    assert routers < own + 60
    assert experts < own + 120
