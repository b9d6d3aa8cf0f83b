# SPDX-License-Identifier: Apache-2.0
"""Expert layouts in JAX: traced as on the host, a pytree whose ints are static, and layouts of routers."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import cupy_router
from cupy_router import (
    ExpertLayout,
    LayoutSpec,
    Router,
    RoutingPlan,
    activation_topk,
    expert_layout,
    layout_capacity,
    permute,
    unpermute,
)
from tests import inputs
from tests.jax_calls import METHOD, N, calls, same_bits
from tests.jax_gradients import enable_x64
from tests.jax_layouts import ARRAYS, EXPERTS, NAMES, TOP_K, cases, ids, planned, same_layout
from tests.pages import ROOT, between

jax = pytest.importorskip("jax", reason="JAX is not installed")
jnp = jax.numpy
if jax.__version_info__ < (0, 8):
    pytest.skip("calls inside jax.jit need JAX 0.8 or later", allow_module_level=True)

DTYPES = ("uint8", "int16", "uint16", "int32", "int64")
ALL = LayoutSpec(alignment=4, want=ARRAYS)


def laid_out(n: int = 6, **options: Any) -> Any:
    return expert_layout(jnp.array(ids(n)), EXPERTS, **options)


# -- Traced calls ------------------------------------------------------------------------------------------------------


@pytest.mark.slow("seconds", every=3)
@pytest.mark.parametrize("n", [0, 1, 13])
@pytest.mark.parametrize("name", NAMES)
def test_a_traced_layout_is_that_of_the_host(name: str, n: int) -> None:
    case = cases(n)[name]
    want = case(case.arrays)
    on_jax = {key: jnp.array(array) for key, array in case.arrays.items()}
    for got in (case(on_jax), jax.jit(case)(on_jax), jax.jit(case)(case.arrays)):
        same_layout(got, want)
        assert all(isinstance(array, jax.Array) for array in jax.tree.leaves(got))


@pytest.mark.parametrize("dtype", DTYPES)
def test_ids_of_every_dtype(dtype: str) -> None:
    case = cases(13, dtype)["all arrays"]
    same_layout(jax.jit(case)(case.arrays), case(case.arrays))
    with enable_x64():
        same_layout(jax.jit(case)(case.arrays), case(case.arrays))


def test_wide_ids_are_no_experts() -> None:
    """Ids of 64 bits that are experts in their lower 32: JAX holds them if it is told to, or they are constants."""
    wide = np.array([[1, 2**32 + 1, -(2**32)]], np.int64)
    want = expert_layout(wide, 4)
    assert want.counts.tolist() == [0, 1, 0, 0]
    with enable_x64():
        same_layout(jax.jit(lambda wide: expert_layout(wide, 4))(jnp.array(wide)), want)
    padded = jax.jit(lambda count: expert_layout(wide, 4, num_valid=count))
    same_layout(padded(np.int32(1)), want)


def test_num_valid_is_clamped_and_no_constant() -> None:
    traced = []

    @jax.jit
    def lay_out(indices: Any, count: Any) -> Any:
        traced.append(1)
        return expert_layout(indices, EXPERTS, num_valid=count)

    for count in (0, 5, 13, 14, -1, 2**31 - 1, -(2**31)):
        array = np.array(count, np.int32)
        same_layout(lay_out(ids(13), array), expert_layout(ids(13), EXPERTS, num_valid=array))
    assert len(traced) == 1


def test_no_array_is_computed_that_is_not_wanted() -> None:
    program = jax.jit(lambda a: expert_layout(a, EXPERTS, want=("order",))).lower(ids(5)).as_text()
    (call,) = re.findall(r"@cupy_router\.expert_layout\(.*?\) -> (.*)", program)
    assert call == "tensor<15xi32>"


# -- Errors ------------------------------------------------------------------------------------------------------------


def test_written_arrays_are_refused_with_the_remedy() -> None:
    indices, load = jnp.array(ids(5)), jnp.zeros(EXPERTS, jnp.int32)
    remedy = r": compute load \+ layout.counts$"
    for given in (indices, np.asarray(indices)):
        with pytest.raises(ValueError, match=rf"^expert_layout: load must be writable, got a read-only .*{remedy}"):
            expert_layout(given, EXPERTS, load=load)
    for traced in (load, np.asarray(load)):
        with pytest.raises(ValueError, match=rf"(?m)^expert_layout: load cannot be written inside jax.jit.*{remedy}"):
            jax.jit(lambda indices, load=traced: expert_layout(indices, EXPERTS, load=load))(indices)
    with pytest.raises(ValueError, match=rf"(?m)^expert_layout: load cannot be written inside jax.jit.*{remedy}"):
        jax.jit(lambda load: expert_layout(ids(5), EXPERTS, load=load))(load)
    total = jax.jit(lambda indices, load: load + expert_layout(indices, EXPERTS).counts)(indices, load)
    np.testing.assert_array_equal(total, np.bincount(ids(5).clip(-1, EXPERTS).ravel() + 1, minlength=11)[1:-1])


@pytest.mark.parametrize("row", [0, 1, 2])
def test_the_remedy_for_a_load_gives_what_other_frameworks_count(row: int) -> None:
    """By the page, whose formula the error has with the numbers of the call."""
    indices, expert_map = ids(5), np.arange(EXPERTS, dtype=np.int32) // 2 - 1  # two experts of each number, one of none
    question: dict[str, Any] = ({}, {"experts": (2, 3)}, {"expert_map": expert_map, "num_local": 2})[row]
    load = np.arange(EXPERTS, dtype=np.int32)
    names: dict[str, Any] = {
        "jnp": jnp,
        "load": jnp.asarray(load),
        "layout": expert_layout(jnp.array(indices), EXPERTS, **question),
    }
    names |= {"first": 2, "count": 3, "num_local": 2, "expert_map": jnp.asarray(expert_map)}
    names["counts"] = expert_layout(jnp.array(indices), EXPERTS).counts
    cell = between(ROOT / "docs/layout.md", "load").splitlines()[2 + row]
    formula = re.findall("`(.*?)`", cell.split("|")[2])[0]
    found = eval(formula, names)
    expert_layout(indices, EXPERTS, load=load, **question)
    np.testing.assert_array_equal(found, load)
    said = formula.replace("first:first + count", "2:5").replace("num_local", "2").replace("jnp.", "")
    for call in (expert_layout, jax.jit(expert_layout, static_argnums=1, static_argnames=("experts", "num_local"))):
        with pytest.raises(ValueError, match=rf"(?m)^expert_layout: load .*compute {re.escape(said)}(, with|$)"):
            call(jnp.array(indices), EXPERTS, load=names["load"], **question)


def test_the_load_of_another_framework_is_written() -> None:
    load = np.ones(EXPERTS, np.int64)
    layout = expert_layout(jnp.array(ids(5)), EXPERTS, load=load)
    np.testing.assert_array_equal(load, 1 + np.asarray(layout.counts))


def test_out_is_refused() -> None:
    layout = laid_out()
    rows = jnp.zeros((layout.capacity, 2))
    for name, call in {
        "expert_layout": lambda a, **out: expert_layout(a.astype(jnp.int32), EXPERTS, **out),
        "permute": lambda a, **out: permute(a, layout, **out),
        "unpermute": lambda a, **out: unpermute(a, layout, **out),
    }.items():
        first = rows if name == "unpermute" else jnp.ones((6, TOP_K))
        out = layout if name == "expert_layout" else rows[:6] if name == "unpermute" else jnp.zeros((18, TOP_K))
        with pytest.raises(ValueError, match=rf"^{name}: out and stream cannot be given inside jax.jit"):
            jax.jit(lambda a, call=call, out=out: call(a, out=out))(first)
        with pytest.raises(ValueError, match=rf"^{name}: out(\.counts)? must be writable, got a read-only"):
            call(first, out=out)


TRACED_INTS = {
    "expert_layout: num_experts": lambda n: expert_layout(ids(4), n),
    "expert_layout: alignment": lambda n: expert_layout(ids(4), EXPERTS, alignment=n),
    "expert_layout: capacity": lambda n: expert_layout(ids(4), EXPERTS, capacity=n),
    "expert_layout: the first of experts": lambda n: expert_layout(ids(4), EXPERTS, experts=(n, 1)),
    "expert_layout: num_local": lambda n: expert_layout(ids(4), 2, expert_map=np.zeros(2, np.int32), num_local=n),
    "expert_layout: pad": lambda n: expert_layout(ids(4), EXPERTS, pad=n),
    "LayoutSpec: capacity": lambda n: LayoutSpec(capacity=n),
    "layout_capacity: num_tokens": lambda n: layout_capacity(n, 2, 3),
}


@pytest.mark.parametrize("name", TRACED_INTS)
def test_traced_ints_are_refused(name: str) -> None:
    with pytest.raises(
        TypeError, match=rf"(?m)^{name} must be an int, got \w*Tracer: name it in the static_argnames of jax.jit$"
    ):
        jax.jit(TRACED_INTS[name])(2)


def test_layouts_that_do_not_fit_are_refused() -> None:
    layout, x = laid_out(), jnp.ones((6, 2))
    with pytest.raises(ValueError, match=r"^permute: layout.order must have shape \[capacity\] = \[18\], got"):
        jax.jit(lambda x: permute(x, layout._replace(order=layout.order[None])))(x)
    with pytest.raises(ValueError, match=r"^permute: layout.positions must have shape .* = \[6, 3\], got"):
        jax.jit(lambda x: permute(x, layout._replace(positions=layout.positions[:5])))(x)
    with pytest.raises(ValueError, match=r"^permute: layout must have order, got None"):
        jax.jit(lambda x: permute(x, layout._replace(order=None)))(x)
    with pytest.raises(ValueError, match=r"^unpermute: y must have the 18 rows of the layout, got \S+ \[6, 2\]"):
        jax.jit(lambda y: unpermute(y, layout))(x)
    with pytest.raises(TypeError, match=r"^permute: layout must be an ExpertLayout, got tuple"):
        jax.jit(lambda x: permute(x, tuple(layout)))(x)


# -- A pytree ----------------------------------------------------------------------------------------------------------


def test_a_layout_is_a_pytree_whose_ints_are_static() -> None:
    layout = laid_out(want=("counts", "order"))
    leaves = jax.tree.leaves(layout)
    assert [leaf.shape for leaf in leaves] == [(EXPERTS,), (18,)]
    paths = [jax.tree_util.keystr(path) for path, _ in jax.tree_util.tree_flatten_with_path(layout)[0]]
    assert paths == [".counts", ".order"]
    doubled = jax.tree.map(lambda array: array * 2, layout)
    same_layout(doubled, layout._replace(counts=layout.counts * 2, order=layout.order * 2))
    others = (laid_out(want=("counts", "positions")), laid_out(want=("counts", "order"), alignment=2), laid_out(7))
    for other in others:
        assert jax.tree.structure(other) != jax.tree.structure(layout)
    assert jax.tree.structure(laid_out(want=("counts", "order"))) == jax.tree.structure(layout)
    same_layout(jax.tree.unflatten(jax.tree.structure(layout), leaves), layout)
    assert jax.eval_shape(lambda a: expert_layout(a, EXPERTS), ids(6)).capacity == 18


def test_a_layout_is_an_argument_and_a_result_of_jit() -> None:
    traced = []

    @jax.jit
    def use(layout: Any) -> Any:
        traced.append((layout.capacity, layout.num_tokens, layout.top_k, layout.alignment))
        return layout._replace(counts=layout.counts + layout.capacity)

    for n in (6, 6, 7):
        layout = laid_out(n)
        same_layout(use(layout), layout._replace(counts=layout.counts + 3 * n))
        same_layout(use(jax.tree.map(np.asarray, layout)), layout._replace(counts=layout.counts + 3 * n))
    assert traced == [(18, 6, 3, 1), (21, 7, 3, 1)]


def test_a_layout_is_carried_by_loops() -> None:
    many = jnp.stack([jnp.array(ids(6, seed=seed)) for seed in range(4)])
    last, totals = jax.lax.scan(lambda layout, a: (expert_layout(a, EXPERTS), layout.counts.sum()), laid_out(), many)
    same_layout(last, expert_layout(many[3], EXPERTS))
    assert totals.shape == (4,)
    chosen = jax.jit(lambda flag, a, b: jax.lax.cond(flag, lambda: a, lambda: expert_layout(b, EXPERTS)))
    for flag in (True, False):
        same_layout(chosen(flag, laid_out(), many[1]), laid_out() if flag else expert_layout(many[1], EXPERTS))

    def step(state: Any) -> Any:
        i, _ = state
        return i + 1, expert_layout(many[i], EXPERTS)

    _, layout = jax.jit(lambda first: jax.lax.while_loop(lambda state: state[0] < 3, step, (0, first)))(laid_out())
    same_layout(layout, expert_layout(many[2], EXPERTS))


UNKNOWN = """
import numpy as np
from cupy_router import expert_layout, permute, unpermute
import jax
layout = expert_layout(np.array([[0, 1]], np.int32), 2)
x = np.ones((2, 3), np.float32)
for call in (lambda x, layout: permute(x[:1], layout), unpermute):
    try:
        jax.jit(call)(x, layout)
    except TypeError as error:
        print(len(jax.tree.leaves(layout)), str(error).splitlines()[0])
permute(jax.numpy.asarray(x[:1]), layout)
print(len(jax.tree.leaves(layout)), jax.jit(unpermute)(x, layout))
"""


@pytest.mark.slow("process")
def test_ints_are_static_once_an_op_saw_an_array_of_jax() -> None:
    """Until then JAX traces those of a layout on the host, as of any named tuple."""
    done = subprocess.run(
        [sys.executable, "-c", UNKNOWN],
        cwd=Path(cupy_router.__file__).parents[1], capture_output=True, text=True, timeout=120,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    *refused, works = done.stdout.splitlines()
    for name, line in zip(("permute", "unpermute"), refused, strict=True):
        assert re.match(
            rf"9 {name}: layout.num_tokens must be an int, got \w+Tracer: import cupy_router.jax before .*$", line
        )
    assert works == "5 [[2. 2. 2.]]"


# -- jax.vmap ----------------------------------------------------------------------------------------------------------


@pytest.mark.slow("seconds", every=3)
@pytest.mark.parametrize("mapped", [("indices",), ("expert_map",), ("num_valid",), ("indices", "num_valid")], ids=str)
@pytest.mark.parametrize("compiled", [False, True])
def test_vmap_equals_a_loop_of_calls(mapped: tuple[str, ...], compiled: bool) -> None:
    options = {"num_local": 2, "alignment": 4, "want": ARRAYS}
    one = {
        "indices": jnp.array(ids(6)),
        "expert_map": jnp.array([0, 1, 1, -1, 2, 0, 0, 1, 0], jnp.int32),
        "num_valid": jnp.array([4], jnp.int32),
    }
    many = {name: jnp.stack([a, jnp.roll(a, 1, 0) + (name == "num_valid"), a]) for name, a in one.items()}
    given = {name: many[name] if name in mapped else array for name, array in one.items()}

    def call(arrays: Any) -> Any:
        return expert_layout(num_experts=EXPERTS, **options, **arrays)

    over = jax.vmap(call, in_axes=({name: 0 if name in mapped else None for name in one},))
    got = (jax.jit(over) if compiled else over)(given)
    for i in range(3):
        want = call({name: array[i] if name in mapped else array for name, array in given.items()})
        same_layout(jax.tree.map(lambda array, i=i: array[i], got), want)


def test_vmap_over_the_last_axis_and_twice() -> None:
    many = np.stack([[ids(6, seed=3 * i + j) for j in range(3)] for i in range(2)])
    twice = jax.vmap(jax.vmap(lambda a: expert_layout(a, EXPERTS)))(jnp.array(many))
    last = jax.vmap(lambda a: expert_layout(a, EXPERTS), in_axes=-1, out_axes=-1)(jnp.array(many[1].transpose(1, 2, 0)))
    for j in range(3):
        want = expert_layout(many[1, j], EXPERTS)
        same_layout(jax.tree.map(lambda array, j=j: array[1, j], twice), want)
        same_layout(jax.tree.map(lambda array, j=j: array[..., j], last), want)


# -- Routers -----------------------------------------------------------------------------------------------------------

ROUTERS = ["activation_topk of a layer", "activation_topk, padded", "hash_router of logits", "hash_router of x, padded",
           "dense_router", "dense_router prefill, padded"]  # fmt: skip


@pytest.mark.parametrize("name", ROUTERS)
def test_a_router_returns_the_layout_of_its_indices(name: str) -> None:
    arrays = {key: jnp.array(array) for key, array in calls()[name].arrays.items()}
    routing = calls()[name](arrays)
    got = jax.jit(lambda arrays: planned(name, arrays, ALL))(arrays)
    assert type(got) is RoutingPlan
    same_bits(type(routing)(*got[:2]), routing)
    same_layout(got.layout, expert_layout(np.asarray(routing.indices), METHOD.num_experts, alignment=4, want=ARRAYS))
    eager = planned(name, arrays, ALL)
    same_layout(eager.layout, got.layout)
    assert len(jax.tree.leaves(got)) == 9


def test_calls_of_one_kernel_are_followed_by_the_layout() -> None:
    """So a handler that XLA may capture takes no scratch memory, and the gate's handler does all."""
    for name, targets in {
        "activation_topk, padded": ["activation_topk", "expert_layout"],
        "hash_router of logits": ["hash_router", "expert_layout"],
        "dense_router": ["dense_router"],
    }.items():
        program = jax.jit(lambda arrays, name=name: planned(name, arrays, ALL)).lower(calls()[name].arrays).as_text()
        assert re.findall(r"custom_call @cupy_router\.(\w+)", program) == targets


def test_routers_as_objects() -> None:
    arrays = {key: jnp.array(array) for key, array in calls()["a hash Router, padded"].arrays.items()}
    dense = Router(METHOD, weight=arrays["weight"])
    hashed = Router(METHOD, weight=arrays["weight"], table=arrays["table"])
    for route in (lambda r, a: r(a["x"], layout=ALL), lambda r, a: r(a["x"], num_valid=a["num_valid"], layout=ALL)):
        got, want = jax.jit(route)(dense, arrays), route(dense, arrays)
        same_layout(got.layout, want.layout)
        np.testing.assert_array_equal(got.weights, want.weights)
    got = jax.jit(lambda r, a: r(a["x"], a["token_ids"], layout=ALL))(hashed, arrays)
    routing = hashed(arrays["x"], arrays["token_ids"])
    same_layout(got.layout, expert_layout(np.asarray(routing.indices), METHOD.num_experts, alignment=4, want=ARRAYS))


@pytest.mark.slow("seconds", every=3)
@pytest.mark.parametrize("name", ["activation_topk of a layer", "hash_router of logits", "dense_router"])
def test_weights_have_the_same_gradients_with_a_layout(name: str) -> None:
    arrays = {key: jnp.array(array) for key, array in calls()[name].arrays.items()}
    smooth = {key: array for key, array in arrays.items() if array.dtype == jnp.float32}
    fixed = {key: array for key, array in arrays.items() if key not in smooth}

    def loss(smooth: Any, route: Any) -> Any:
        plan = route({**smooth, **fixed})
        order = () if len(plan) == 2 else plan.layout.order  # has no gradient
        return (plan.weights**2).sum() + (0 * jnp.asarray(order, jnp.float32)).sum()

    want = jax.grad(lambda smooth: loss(smooth, calls()[name]))(smooth)
    for transform in (lambda f: f, jax.jit, jax.checkpoint):
        got = jax.grad(transform(lambda smooth: loss(smooth, lambda arrays: planned(name, arrays, ALL))))(smooth)
        for key in smooth:
            np.testing.assert_allclose(got[key], want[key], rtol=1e-6, atol=1e-7, err_msg=key)


def test_vmap_over_routers_with_a_layout() -> None:
    logits = np.ascontiguousarray(inputs.distinct(3 * N, 32, seed=540)).reshape(3, N, 32)
    got = jax.vmap(lambda logits: activation_topk(logits, METHOD, layout=ALL))(jnp.array(logits))
    per_example = jax.vmap(jax.grad(lambda a: (activation_topk(a, METHOD, layout=ALL).weights ** 2).sum()))
    by = per_example(jnp.array(logits))
    for i in range(3):
        want = activation_topk(logits[i], METHOD, layout=ALL)
        same_layout(jax.tree.map(lambda array, i=i: array[i], got.layout), want.layout)
        np.testing.assert_array_equal(got.indices[i], want.indices)
        one = jax.grad(lambda a: (activation_topk(a, METHOD).weights ** 2).sum())(jnp.array(logits[i]))
        np.testing.assert_allclose(by[i], one, rtol=1e-6, atol=1e-7)


def test_an_empty_layout_is_a_pytree() -> None:
    empty = ExpertLayout()
    assert jax.tree.leaves(empty) == []
    assert jax.jit(lambda layout: layout)(empty) == empty
