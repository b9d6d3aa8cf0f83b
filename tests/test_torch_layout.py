# SPDX-License-Identifier: Apache-2.0
"""Expert layouts in PyTorch, eagerly: gradients of permute and unpermute, routers with a layout, counts in place."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

from cupy_router import (
    ExpertLayout,
    LayoutSpec,
    Router,
    RoutingMethod,
    RoutingPlan,
    activation_topk,
    dense_router,
    expert_layout,
    hash_router,
    permute,
    unpermute,
)
from cupy_router.ops import _run
from tests import inputs

torch = pytest.importorskip("torch", reason="PyTorch is not installed")


from tests.torch_layouts import EXPERTS, IDS, LAYOUTS, Case, plain_permute, plain_unpermute  # noqa: E402

METHOD = RoutingMethod(EXPERTS, 3, "softmax")


def tensor(*shape: int, seed: int = 0) -> Any:
    return torch.from_numpy(inputs.normal(shape, seed=500 + seed))


# -- Gradients ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", inputs.FLOATS)
@pytest.mark.parametrize("name", LAYOUTS)
def test_gradients_are_those_of_gather_and_sum(name: str, dtype: str) -> None:
    for case in Case.all(name, dtype):
        case.check()


def test_weights_and_residuals_may_have_other_dtypes() -> None:
    """Their gradients are rounded once to them; those of weights are dot products in float32."""
    for dtype, other in itertools.product(inputs.FLOATS, inputs.FLOATS):
        for case in Case.all("aligned", "bfloat16", weights=dtype, residual=other):
            case.check()


@pytest.mark.parametrize("op", ["permute", "unpermute"])
def test_only_what_is_needed_is_computed_and_saved(op: str, monkeypatch: pytest.MonkeyPatch) -> None:
    wanted: list[Any] = []
    on_host = _run._run_on_host

    def watching(called: Any, options: Any, *others: Any) -> Any:
        wanted.append((called.name, getattr(options, "want", None)))
        return on_host(called, options, *others)

    monkeypatch.setattr(_run, "_run_on_host", watching)
    case = next(iter(Case.all("aligned", "float32", op=op)))
    results = {"x": "sums", "y": "rows", "weights": "dots", "residual": "scaled", "residual_scale": "residual_dots"}
    kept = {
        "x": {"positions", "weights"}, "y": {"order", "positions", "weights"},
        "residual": {"order", "positions", "residual", "residual_scale"},
        "residual_scale": {"order", "positions", "residual"},
    }  # fmt: skip
    kept["weights"] = {"positions", "x"} if op == "permute" else {"order", "positions", "y"}
    layout = {"order": case.layout.order, "positions": case.layout.positions}
    for name in case.arrays:
        saved: list[Any] = []
        arrays = {other: array.detach().requires_grad_(other == name) for other, array in case.arrays.items()}
        with torch.autograd.graph.saved_tensors_hooks(lambda t, into=saved: into.append(t) or t, lambda t: t):
            result = case.ours(arrays)
        assert {other for other, a in (arrays | layout).items() if any(a is t for t in saved)} == kept[name]
        wanted.clear()
        result.square().sum().backward()
        assert wanted == [(f"{op}_backward", (results[name],))]
        assert [other for other, array in arrays.items() if array.grad is not None] == [name]


def test_the_gradient_of_a_residual_without_scale_is_the_incoming_one() -> None:
    y, residual, upstream = tensor(20, 4), tensor(6, 4, seed=1).bfloat16().requires_grad_(), tensor(6, 4, seed=2)
    layout = expert_layout(IDS[:6], EXPERTS, capacity=20)
    (got,) = torch.autograd.grad(unpermute(y, layout, residual=residual), residual, upstream)
    assert got.equal(upstream.bfloat16())


def test_garbage_in_rows_without_a_pair_does_not_leak() -> None:
    for case in Case.all("aligned", "float32", op="unpermute"):
        unused = case.layout.row_experts < 0
        assert unused.any()
        with torch.no_grad():
            case.arrays["y"][unused] = float("nan")
        found = torch.autograd.grad(case.ours(case.arrays), list(case.arrays.values()), case.upstream)
        assert all(bool(gradient.isfinite().all()) for gradient in found)
        assert not found[list(case.arrays).index("y")][unused].any()


def test_there_and_back_through_experts() -> None:
    """Of the routed, weighted tokens: gradients of x and of the gate through both ops and the router."""
    x, gate, experts = tensor(9, 6), tensor(EXPERTS, 6, seed=1), tensor(EXPERTS, 6, 6, seed=2)

    def loss(x: Any, gate: Any, experts: Any, ours: bool) -> Any:
        weights, _, layout = dense_router(
            x, gate, METHOD, layout=LayoutSpec(4, want=(*LayoutSpec().want, "row_experts"))
        )
        moved, back = (permute, unpermute) if ours else (plain_permute, plain_unpermute)
        rows = moved(x, layout)
        rows = torch.einsum("ri,rio->ro", rows, experts[layout.row_experts.clamp(0).long()]).tanh()
        return back(rows, layout, weights, residual=x).square().sum()

    found = []
    for ours in (True, False):
        given = [a.clone().requires_grad_() for a in (x, gate, experts)]
        found.append(torch.autograd.grad(loss(*given, ours), given))
    for got, want in zip(*found, strict=True):
        torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-5)


def test_integers_and_other_dtypes_move_without_a_gradient() -> None:
    layout = expert_layout(IDS, EXPERTS)
    for x in (torch.arange(len(IDS) * 2).reshape(-1, 2), tensor(len(IDS), 2).double(), tensor(len(IDS), 2) > 0):
        rows = permute(x, layout)
        assert (rows.dtype, rows.requires_grad) == (x.dtype, False)
        assert rows.equal(plain_permute(x, layout))
    with pytest.raises(TypeError, match=r"^permute: x must be float32 or float16 or bfloat16 for a gradient, got .*64"):
        permute(tensor(len(IDS), 2).double().requires_grad_(), layout)


def test_a_layout_without_order_has_all_gradients_but_that_of_y() -> None:
    layout = expert_layout(IDS, EXPERTS, want=("positions",))
    y, weights = tensor(layout.capacity, 4).requires_grad_(), tensor(*IDS.shape, seed=1).requires_grad_()
    sentence = r"^unpermute: layout must have order for a gradient with respect to y, got None: name it in want="
    with pytest.raises(ValueError, match=sentence):
        unpermute(y, layout, weights)
    with torch.no_grad():
        unpermute(y, layout, weights)
    whole = expert_layout(IDS, EXPERTS)
    got, want = (
        torch.autograd.grad(unpermute(y.detach(), each, weights).square().sum(), weights)[0] for each in (layout, whole)
    )
    assert got.equal(want)


def test_gradients_that_are_expanded_transposed_strided_or_lazy() -> None:
    for case in Case.all("aligned", "float32"):
        shape, smooth = case.upstream.shape, list(case.arrays.values())
        for upstream in (
            torch.ones(()).expand(shape),
            tensor(*shape[::-1], seed=5).t(),
            tensor(shape[0], shape[1] + 3, seed=6)[:, 2:-1],
            torch._neg_view(tensor(*shape, seed=7)),
        ):
            got = torch.autograd.grad(case.ours(case.arrays), smooth, upstream)
            want = torch.autograd.grad(case.ours(case.arrays), smooth, upstream.resolve_neg().contiguous())
            assert all(map(torch.equal, got, want))


@pytest.mark.parametrize("op", ["permute", "unpermute"])
def test_a_batch_of_gradients(op: str) -> None:
    """Autograd goes back once for all of them, by `is_grads_batched`."""
    for case in Case.all("short", "float32", op=op):
        names = list(case.arrays)
        upstream = torch.stack([case.upstream, case.upstream.flip(0)])
        result = case.ours(case.arrays)
        both = torch.autograd.grad(
            result, [case.arrays[n] for n in names], upstream, is_grads_batched=True, retain_graph=True
        )
        for i, one in enumerate(upstream):
            each = torch.autograd.grad(result, [case.arrays[n] for n in names], one, retain_graph=True)
            for got, want in zip(both, each, strict=True):
                torch.testing.assert_close(got[i], want)


@pytest.mark.parametrize("op", ["permute", "unpermute"])
def test_a_second_derivative_is_refused(op: str) -> None:
    for case in Case.all("aligned", "float32", op=op):
        smooth = list(case.arrays.values())
        first = torch.autograd.grad(case.ours(case.arrays).square().sum(), smooth, create_graph=True)
        with pytest.raises(RuntimeError, match="permute and unpermute have first derivatives only, so this has no"):
            torch.autograd.grad(sum(gradient.sum() for gradient in first), smooth)


def test_out_is_refused_where_there_is_a_gradient() -> None:
    for case in Case.all("aligned", "float32"):
        out = torch.zeros_like(case.upstream)
        with pytest.raises(ValueError, match=rf"^{case.op}: out cannot be given where the result has a gradient"):
            case.ours(case.arrays, out=out)
        assert not out.any()
        with torch.no_grad():
            want, version = case.ours(case.arrays), out._version
            assert case.ours(case.arrays, out=out) is out
        assert out.equal(want)
        assert out._version > version


def test_arrays_of_other_frameworks_in_the_layout() -> None:
    layout = expert_layout(IDS.numpy(), EXPERTS, alignment=2)
    assert isinstance(layout.order, np.ndarray)
    for case in Case.all("aligned by 2", "float32"):
        smooth = list(case.arrays.values())
        mixed = torch.autograd.grad(case.ours(case.arrays, layout=layout), smooth, case.upstream)
        want = torch.autograd.grad(case.ours(case.arrays), smooth, case.upstream)
        assert all(map(torch.equal, mixed, want))


def test_autocast_changes_nothing() -> None:
    """Ops take arrays as they are; weights in float32 go with rows in bfloat16."""
    for case in Case.all("aligned", "bfloat16", weights="float32"):
        smooth = list(case.arrays.values())
        want = case.ours(case.arrays), *torch.autograd.grad(case.ours(case.arrays), smooth, case.upstream)
        with torch.autocast("cpu", torch.bfloat16):
            got = case.ours(case.arrays)
            got = got, *torch.autograd.grad(got, smooth, case.upstream)
        for a, b in zip(got, want, strict=True):
            assert a.dtype == b.dtype
            assert a.equal(b)


def test_no_tokens_no_capacity_and_no_experts() -> None:
    for ids, capacity in ((IDS[:0], None), (IDS, 0), (torch.full_like(IDS, -1), None)):
        layout = expert_layout(ids, EXPERTS, capacity=capacity)
        x, weights = tensor(len(ids), 4).requires_grad_(), tensor(*ids.shape, seed=1).requires_grad_()
        back = unpermute(permute(x, layout) * 2, layout, weights)
        assert back.shape == x.shape
        assert not back.any()
        for gradient in torch.autograd.grad(back.sum(), (x, weights)):
            assert not gradient.any()


# -- torch.func --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("op", ["permute", "unpermute"])
def test_torch_func_gives_autograds_gradients(op: str) -> None:
    for case in Case.all("aligned", "float32", op=op):
        names, arrays = list(case.arrays), [array.detach() for array in case.arrays.values()]

        def loss(*given: Any, case: Any = case, names: Any = names) -> Any:
            return (case.ours(dict(zip(names, given, strict=True))) * case.upstream).sum()

        got = torch.func.grad(loss, argnums=tuple(range(len(names))))(*arrays)
        want = torch.autograd.grad(loss(*case.arrays.values()), list(case.arrays.values()))
        assert all(map(torch.equal, got, want))
        many = [torch.stack([array, array.flip(0) * 2]) for array in arrays]
        mapped = torch.func.vmap(torch.func.grad(loss, argnums=tuple(range(len(names)))))(*many)
        for i in range(2):
            each = torch.func.grad(loss, argnums=tuple(range(len(names))))(*[array[i] for array in many])
            for got, want in zip(mapped, each, strict=True):
                torch.testing.assert_close(got[i], want)
        with pytest.raises(RuntimeError, match="first derivatives only"):
            torch.func.grad(lambda *g: torch.func.grad(lambda *g: loss(*g).square())(*g).sum())(*arrays)
        with pytest.raises(RuntimeError, match=f"{op}: there are no gradients in forward mode"):
            torch.func.jvp(loss, tuple(arrays), tuple(arrays))


def test_vmap_over_layouts_is_a_loop() -> None:
    many, x = torch.stack([IDS, IDS.flip(0)]), tensor(2, len(IDS), 4)

    def there_and_back(ids: Any, x: Any) -> Any:
        layout = expert_layout(ids, EXPERTS, alignment=4)
        return unpermute(permute(x, layout).tanh(), layout), layout.counts

    got = torch.func.vmap(there_and_back)(many, x)
    for i in range(2):
        for mapped, one in zip(got, there_and_back(many[i], x[i]), strict=True):
            assert mapped[i].equal(one)
    none = x[:0].requires_grad_()
    back, counts = torch.func.vmap(there_and_back)(many[:0], none)
    assert (back.shape, counts.shape) == ((0, len(IDS), 4), (0, EXPERTS))
    (gradient,) = torch.autograd.grad(back.sum(), none)
    assert gradient.shape == none.shape


def test_torch_func_writes_no_load() -> None:
    load = torch.zeros(EXPERTS, dtype=torch.int64)
    with pytest.raises(ValueError, match=r"^expert_layout: load cannot be written inside torch\.func"):
        torch.func.vmap(lambda ids: expert_layout(ids, EXPERTS, load=load).counts)(IDS[None])
    assert not load.any()


# -- Routers -----------------------------------------------------------------------------------------------------------

X, GATE = tensor(7, 6), tensor(EXPERTS, 6, seed=1)
TABLE = torch.from_numpy(np.stack([inputs.rng(501, r).permutation(EXPERTS)[:3] for r in range(9)]))
OF_NUMPY = Router(METHOD, weight=GATE.numpy())
ROUTERS: dict[str, Callable[..., Any]] = {
    "activation_topk": lambda x, **more: activation_topk(x @ GATE.T, METHOD, **more),
    "dense_router": lambda x, **more: dense_router(x, GATE, METHOD, **more),
    "hash_router": lambda x, **more: hash_router(
        torch.arange(len(x)), TABLE, METHOD, x=x, weight=GATE, **more
    ),
    "Router": lambda x, **more: Router(METHOD, weight=GATE)(x, **more),
    "Router of NumPy arrays": lambda x, **more: OF_NUMPY(x, **more),
    "hash Router": lambda x, **more: Router(METHOD, weight=GATE, table=TABLE)(x, torch.arange(len(x)), **more),
}  # fmt: skip


@pytest.mark.parametrize("name", ROUTERS)
def test_a_router_with_a_layout_has_the_same_gradients(name: str) -> None:
    route, spec = ROUTERS[name], LayoutSpec(4, want=ExpertLayout._fields[:7])
    found = []
    for layout in (None, spec):
        x = X.clone().requires_grad_()
        plan = route(x, layout=layout)
        found.append((plan.weights, plan.indices, *torch.autograd.grad(plan.weights.square().sum(), x)))
    assert all(map(torch.equal, *found))
    assert isinstance(plan, RoutingPlan)
    want = expert_layout(plan.indices, EXPERTS, alignment=4, want=spec.want)
    for got, right in zip(plan.layout, want, strict=True):
        assert np.array_equal(got, right)
        assert not isinstance(got, torch.Tensor) or not got.requires_grad
    total = torch.func.grad(lambda x: route(x, layout=spec).weights.square().sum())(X)
    assert total.equal(found[0][2])
