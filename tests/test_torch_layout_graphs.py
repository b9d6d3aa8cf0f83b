# SPDX-License-Identifier: Apache-2.0
"""Expert layouts in what PyTorch traces: one graph for any number of tokens, exported programs, counts in place."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest

import cupy_router
from cupy_router import (
    ExpertLayout,
    LayoutSpec,
    Router,
    RoutingMethod,
    RoutingPlan,
    activation_topk,
    dense_router,
    expert_layout,
    permute,
    unpermute,
)
from tests import inputs

torch = pytest.importorskip("torch", reason="PyTorch is not installed")


from tests.torch_layouts import ALL, EXPERTS, IDS, Case, leaves, same  # noqa: E402

MANY = 64  # experts: 3 of them for each of 21 tokens are fewer pairs, for 22 more
METHOD = RoutingMethod(MANY, 3, "softmax")
VERSION = tuple(map(int, torch.__version__.split(".")[:2]))  # before 2.7, PyTorch does not show what was raised


def tensor(*shape: int, seed: int = 0) -> Any:
    return torch.from_numpy(inputs.normal(shape, seed=600 + seed))


def ids_of(n: int, seed: int = 0) -> Any:
    return torch.from_numpy(inputs.rng(610 + seed, n).integers(-1, MANY + 1, (n, 3)).astype("int32"))


GATE = tensor(MANY, 6)
OF_TENSORS, OF_NUMPY = Router(METHOD, weight=GATE), Router(METHOD, weight=GATE.numpy())


def layer(x: Any, gate: Any, spec: LayoutSpec = LayoutSpec(4)) -> Any:  # noqa: B008  # it is immutable
    weights, _, layout = dense_router(x, gate, METHOD, layout=spec)
    return unpermute(permute(x, layout).tanh(), layout, weights, residual=x), layout


class Graphs:
    """A backend that counts its graphs."""

    def __init__(self, backend: str = "aot_eager") -> None:
        from torch._dynamo.testing import CompileCounterWithBackend

        torch.compiler.reset()
        self.counter = CompileCounterWithBackend(backend)

    def of(self, function: Any, **more: Any) -> Any:
        return torch.compile(function, backend=self.counter, fullgraph=True, **more)

    @property
    def number(self) -> int:
        return int(self.counter.frame_count)


# -- One graph ---------------------------------------------------------------------------------------------------------


@pytest.mark.slow("seconds")
@pytest.mark.parametrize("how", ["dynamic=True", "mark_dynamic"])
@pytest.mark.parametrize("alignment", [1, 4])
def test_a_layer_is_one_graph_for_any_number_of_tokens(alignment: int, how: str) -> None:
    """Forward and backward, also where the number of pairs passes that of the experts."""
    graphs, spec = Graphs(), LayoutSpec(alignment)
    compiled = graphs.of(partial(layer, spec=spec), dynamic=True if how == "dynamic=True" else None)
    for n in (5, 21, 22, 40, 2):
        found = []
        for function in (compiled, partial(layer, spec=spec)):
            x, gate = tensor(n, 6, seed=n).requires_grad_(), GATE.clone().requires_grad_()
            if how == "mark_dynamic":
                torch._dynamo.mark_dynamic(x, 0)
            result, layout = function(x, gate)
            assert isinstance(layout, ExpertLayout)
            assert layout.capacity == cupy_router.layout_capacity(n, 3, MANY, alignment)
            found.append((result, layout, torch.autograd.grad(result.square().sum(), (x, gate))))
        same(*found)
    assert graphs.number <= (2 if VERSION < (2, 5) else 1)  # PyTorch 2.4 makes one for each branch of a minimum


@pytest.mark.slow("seconds")
@pytest.mark.parametrize("backend", ["eager", "inductor"])
def test_other_backends(backend: str) -> None:
    compiled = Graphs(backend).of(layer)
    for n in (5, 7, 30):
        found = []
        for function in (compiled, layer):
            x = tensor(n, 6, seed=n).requires_grad_()
            result, layout = function(x, GATE)
            found.append((result, layout, torch.autograd.grad(result.square().sum(), x)))
        same(*found)


@pytest.mark.slow("seconds")
def test_grouped_mm() -> None:
    """The experts as one product of PyTorch, which takes the ends of their rows."""
    grouped_mm = getattr(torch.nn.functional, "grouped_mm", None)
    if grouped_mm is None:
        pytest.skip("this PyTorch has no grouped_mm")
    experts = tensor(MANY, 16, 16, seed=1).bfloat16().requires_grad_()

    def moe(x: Any, gate: Any) -> Any:
        weights, _, layout = dense_router(x, gate, METHOD, layout=LayoutSpec())
        return unpermute(grouped_mm(permute(x, layout), experts, offs=layout.ends), layout, weights)

    graphs, gate = Graphs(), tensor(MANY, 16, seed=2).requires_grad_()
    compiled = graphs.of(moe, dynamic=True)
    for n in (5, 40):
        x = tensor(n, 16, seed=n).bfloat16().requires_grad_()
        found = []
        for function in (compiled, moe):
            result = function(x, gate)
            found.append((result, torch.autograd.grad(result.float().square().sum(), (x, gate, experts))))
        same(*found)
    assert graphs.number == 1


ROUTERS: dict[str, Callable[..., Any]] = {
    "activation_topk": lambda x, **more: activation_topk(x @ GATE.T, METHOD, **more),
    "a Router": lambda x, **more: OF_TENSORS(x, **more),
    "a Router of NumPy arrays": lambda x, **more: OF_NUMPY(x, **more),
}


@pytest.mark.slow("seconds")
@pytest.mark.parametrize("name", ROUTERS)
def test_routers_with_a_layout(name: str) -> None:
    """Results, gradients and `out`, with padding by a number and by a tensor."""
    spec, route, count = LayoutSpec(4, want=ALL), ROUTERS[name], torch.tensor([3], dtype=torch.int32)
    for num_valid in (None, 4, count):
        more = {"layout": spec, "num_valid": num_valid}
        found = []
        for function in (Graphs().of(lambda x, more=more: route(x, **more)), lambda x, more=more: route(x, **more)):
            x = tensor(6, 6).requires_grad_()
            plan = function(x)
            assert isinstance(plan, RoutingPlan)
            assert [leaf.requires_grad for leaf in leaves(plan) if isinstance(leaf, torch.Tensor)] == [True] + [
                False
            ] * 7
            found.append((plan, torch.autograd.grad(plan.weights.square().sum(), x)))
        same(*found)
        x = tensor(6, 6)
        out = torch.utils._pytree.tree_map(lambda a: torch.zeros_like(a) if isinstance(a, torch.Tensor) else a, plan)
        Graphs().of(lambda x, out, more=more: route(x, out=out, **more).indices + 1)(x, out)
        same(out, plan)


@pytest.mark.slow("seconds")
def test_layouts_and_rows_into_the_callers_tensors() -> None:
    ids, x = ids_of(5), tensor(5, 4)
    weights = tensor(5, 3, seed=1)

    def into(ids: Any, x: Any, out: Any, rows: Any, sums: Any) -> Any:
        layout = expert_layout(ids, MANY, alignment=4, out=out)
        permute(x, layout, weights=weights, out=rows)
        return unpermute(rows, layout, weights, out=sums) + 0

    want = expert_layout(ids, MANY, alignment=4)
    moved = permute(x, want, weights=weights)
    back = unpermute(moved, want, weights)
    out = ExpertLayout(*[None if a is None else torch.zeros_like(a) for a in want[:7]])
    rows, sums = torch.zeros_like(moved), torch.zeros_like(back)
    got = Graphs().of(into)(ids, x, out, rows, sums)
    same((out[:7], rows, sums, got), (want[:7], moved, back, back))
    filled = Graphs().of(lambda ids, out: (expert_layout(ids, MANY, alignment=4, out=out), ids + 1)[0])(ids, out)
    assert filled[7:] == want[7:]  # the caller left the ints out
    assert all(array._version for array in (rows, sums, out.order))


@pytest.mark.slow("seconds")
def test_layouts_that_a_graph_gets_and_returns() -> None:
    function = lambda x, layout: (unpermute(permute(x, layout) * 2, layout), layout)  # noqa: E731
    compiled = Graphs().of(function)
    for n in (4, 5, 30):
        layout, x = expert_layout(ids_of(n), MANY, alignment=4), tensor(n, 4)
        got = compiled(x, layout)
        assert isinstance(got[1], ExpertLayout)
        same(got, function(x, layout))


@pytest.mark.slow("seconds")
def test_the_compiled_gradients() -> None:
    for case in (case for name in ("short", "of some experts") for case in Case.all(name, "float32")):
        case.check(Graphs().of(lambda arrays, case=case: case.ours(arrays))(case.arrays))


@pytest.mark.slow("seconds")
def test_vmap_in_a_graph() -> None:
    def both(ids: Any, x: Any) -> Any:
        def one(ids: Any, x: Any) -> Any:
            layout = expert_layout(ids, MANY, alignment=4)
            return unpermute(permute(x, layout).tanh(), layout)

        return torch.func.vmap(one)(ids, x)

    given = torch.stack([ids_of(5), ids_of(5, 1)]), tensor(2, 5, 4)
    same(Graphs().of(both)(*given), both(*given))
    load = torch.zeros(MANY, dtype=torch.int32)
    mapped = Graphs().of(lambda ids: torch.func.vmap(lambda a: expert_layout(a, MANY, load=load).counts)(ids))
    with pytest.raises(Exception, match=None if VERSION < (2, 7) else r"load cannot be written inside torch\.func"):
        mapped(given[0])
    assert not load.any()


@pytest.mark.slow("seconds")
def test_errors_in_graphs() -> None:
    bare = expert_layout(IDS, EXPERTS, want=("positions",))
    y = tensor(bare.capacity, 4).requires_grad_()
    sentence = None if VERSION < (2, 7) else "layout must have order for a gradient with respect to y"
    with pytest.raises(Exception, match=sentence):
        Graphs().of(lambda y: unpermute(y, bare))(y)
    same(Graphs().of(lambda y: unpermute(y, bare))(y.detach()), unpermute(y.detach(), bare))


@pytest.mark.slow("seconds")
@pytest.mark.parametrize("wrong", [{"capacity": 12}, {"num_tokens": 4}])
def test_a_graph_refuses_a_layout_whose_ints_contradict_its_arrays(wrong: dict[str, int]) -> None:
    layout = expert_layout(ids_of(5), MANY)._replace(**wrong)
    for function, array in ((permute, tensor(5, 4)), (unpermute, tensor(15, 4))):
        torch.compiler.reset()
        graph = torch.compile(partial(function, layout=layout), backend="eager", fullgraph=True)
        sentence = None if VERSION < (2, 7) else rf"{function.__name__}: layout\.(order|positions) must have shape "
        with pytest.raises(Exception, match=sentence):
            graph(array)


def share(x: Any) -> int:
    """Return how many rows a layer has if its capacity is a share of the pairs, symbolic where sizes are."""
    return (x.shape[0] * 3 * 3 // 4 + 3) // 4 * 4


@pytest.mark.slow("seconds")
@pytest.mark.parametrize("how", ["dynamic=True", "mark_dynamic"])
def test_a_capacity_made_of_sizes(how: str) -> None:
    """Nor a pad. They are no constants of the graph: of expert_layout, routers, a Router that is a node of its own."""
    spec = lambda x: LayoutSpec(4, share(x))  # noqa: E731
    for function in (
        lambda x, ids: expert_layout(ids, MANY, alignment=4, capacity=share(x), pad=ids.numel()),
        lambda x, ids: layer(x, GATE, spec(x)),
        lambda x, ids: OF_NUMPY(x, layout=spec(x)),
    ):
        graphs = Graphs()
        compiled = graphs.of(function, dynamic=True if how == "dynamic=True" else None)
        for n in (5, 22, 40):
            x, ids = tensor(n, 6, seed=n), ids_of(n)
            if how == "mark_dynamic":
                torch._dynamo.mark_dynamic(x, 0)
                torch._dynamo.mark_dynamic(ids, 0)
            same(compiled(x, ids), function(x, ids))
        assert graphs.number == 1


# -- Traces and programs -----------------------------------------------------------------------------------------------


def test_traces_have_ops_and_no_constants() -> None:
    """make_fx, in each of its modes, also for another number of tokens, and torch.jit.trace."""
    from torch.fx.experimental.proxy_tensor import make_fx

    def function(x: Any, gate: Any) -> Any:
        result, layout = layer(x, gate)
        return result, layout.counts, layout.order

    x = tensor(5, 6)
    for mode in ("real", "fake", "symbolic"):
        traced = make_fx(function, tracing_mode=mode)(x, GATE)
        for n in (5, 30) if mode == "symbolic" else (5,):
            same(traced(tensor(n, 6, seed=3), GATE), function(tensor(n, 6, seed=3), GATE))
    traced = torch.jit.trace(function, (x, GATE), check_trace=False)
    same(traced(tensor(5, 6, seed=3), GATE), function(tensor(5, 6, seed=3), GATE))


def test_a_capacity_made_of_sizes_is_traced() -> None:
    from torch.fx.experimental.proxy_tensor import make_fx

    def function(x: Any, gate: Any) -> Any:
        ids = dense_router(x, gate, METHOD).indices
        return layer(x, gate, LayoutSpec(4, share(x)))[0], expert_layout(ids, MANY, pad=ids.numel() + 1).order

    traced = make_fx(function, tracing_mode="symbolic")(tensor(5, 6), GATE)
    for n in (5, 30):
        same(traced(tensor(n, 6, seed=3), GATE), function(tensor(n, 6, seed=3), GATE))


def test_fake_tensors() -> None:
    from torch._subclasses.fake_tensor import FakeTensorMode

    with FakeTensorMode():
        layout = expert_layout(torch.empty(5, 3, dtype=torch.int16), MANY, alignment=8, want=ExpertLayout._fields[:7])
        rows = permute(torch.empty(5, 7, dtype=torch.bfloat16), layout)
        back = unpermute(rows, layout, torch.empty(5, 3))
    want = expert_layout(ids_of(5), MANY, alignment=8, want=ExpertLayout._fields[:7])
    assert [(a.shape, a.dtype) for a in layout[:7]] == [(a.shape, a.dtype) for a in want[:7]]
    assert layout[7:] == want[7:]
    assert (rows.shape, rows.dtype, back.shape) == ((want.capacity, 7), torch.bfloat16, (5, 7))


class Layer(torch.nn.Module):  # type: ignore[misc]
    def __init__(self) -> None:
        super().__init__()
        self.gate = torch.nn.Parameter(GATE.clone())
        self.register_buffer("load", torch.zeros(MANY, dtype=torch.int64))

    def forward(self, x: Any) -> Any:
        result, layout = layer(x, self.gate, LayoutSpec(4, share(x)))
        ids = dense_router(x, self.gate, METHOD).indices
        return result, layout, expert_layout(ids, MANY, alignment=4, pad=ids.numel(), load=self.load)


LOADED = """
import sys
import torch
import cupy_router, cupy_router.torch
leaves = torch.utils._pytree.tree_leaves
program = torch.export.load(sys.argv[1]).module()
for x, want in torch.load(sys.argv[2], weights_only=True):
    result = program(x)
    assert type(result[1]) is cupy_router.ExpertLayout
    for a, b in zip(leaves(result), want, strict=True):
        assert torch.allclose(a, b) if isinstance(a, torch.Tensor) else a == b
assert program.load.sum() == 3 * 45, program.load
"""


@pytest.mark.slow("process")
@pytest.mark.skipif(VERSION < (2, 5), reason="PyTorch 2.4 specialises sizes that are minima")
@pytest.mark.parametrize("strict", [False, True])
def test_an_exported_layer_runs_for_any_number_of_tokens_in_another_process(strict: bool, tmp_path: Path) -> None:
    """The ints of its layout are sizes there."""
    tokens, model = torch.export.Dim("tokens", min=2, max=10_000), Layer()
    program = torch.export.export(model, (tensor(5, 6),), dynamic_shapes=({0: tokens},), strict=strict)
    torch.export.save(program, tmp_path / "layer.pt2")
    cases = [(x, leaves(model(x))) for x in (tensor(n, 6, seed=n) for n in (5, 38, 2))]
    torch.save(cases, tmp_path / "cases.pt")
    done = subprocess.run(
        [sys.executable, "-c", LOADED, tmp_path / "layer.pt2", tmp_path / "cases.pt"], capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr


@pytest.mark.slow("seconds")
@pytest.mark.parametrize("strict", [False, True])
def test_a_program_that_takes_a_layout(strict: bool, tmp_path: Path) -> None:
    class Experts(torch.nn.Module):  # type: ignore[misc]
        def forward(self, x: Any, layout: Any) -> Any:
            return unpermute(permute(x, layout) * 2, layout)

    given = tensor(5, 4), expert_layout(ids_of(5), MANY, alignment=4)
    program = torch.export.export(Experts(), given, strict=strict)
    torch.export.save(program, tmp_path / "experts.pt2")
    loaded = torch.export.load(tmp_path / "experts.pt2").module()
    other = tensor(5, 4, seed=1), expert_layout(ids_of(5, 1), MANY, alignment=4)
    same(loaded(*other), Experts()(*other))
