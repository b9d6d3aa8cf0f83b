# SPDX-License-Identifier: Apache-2.0
"""permute and unpermute in JAX: traced as on the host, their gradients, and experts by jax.lax.ragged_dot."""

from __future__ import annotations

import re
from typing import Any

import ml_dtypes
import numpy as np
import pytest

from cupy_router import LayoutSpec, RoutingMethod, dense_router, expert_layout, permute, unpermute
from tests import inputs
from tests.jax_gradients import enable_x64, twin
from tests.jax_layouts import EXPERTS, HIDDEN, ROWS, TOP_K, arrays_of_rows, ids, plain

jax = pytest.importorskip("jax", reason="JAX is not installed")
jnp = jax.numpy
if jax.__version_info__ < (0, 8):
    pytest.skip("calls inside jax.jit need JAX 0.8 or later", allow_module_level=True)

N = 7
ROUNDING = {"float32": 1e-6, "float16": 2.0**-10, "bfloat16": 2.0**-7}
LAYOUTS: dict[str, dict[str, Any]] = {"dense": {}, "aligned": {"alignment": 8}, "little room": {"capacity": 9}}


def lay_out(n: int = N, **options: Any) -> Any:
    return expert_layout(jnp.array(ids(n)), EXPERTS, **options)


def on_jax(name: str, layout: Any, dtype: str = "float32") -> dict[str, Any]:
    """Return the arrays of `ROWS[name]` for this layout."""
    arrays = arrays_of_rows(layout.num_tokens, dtype)
    arrays["y"] = inputs.normal((layout.capacity, HIDDEN), dtype, seed=520)
    return {key: jnp.array(arrays[key]) for key in ROWS[name][1]}


def wants(function: Any, *arrays: Any) -> list[list[str]]:
    """Return the wanted results of each gradient in a program."""
    text = jax.jit(function).lower(*arrays).as_text().replace("\\22", '"')
    return [re.findall(r"\w+", found) for found in re.findall(r'"want": \[(.*?)\]', text)]


# -- Values ------------------------------------------------------------------------------------------------------------


@pytest.mark.slow("seconds", every=4)
@pytest.mark.parametrize("dtype", inputs.FLOATS)
@pytest.mark.parametrize("options", LAYOUTS.values(), ids=LAYOUTS)
@pytest.mark.parametrize("name", ROWS)
def test_a_traced_call_is_that_of_the_host(name: str, options: dict[str, Any], dtype: str) -> None:
    call, _ = ROWS[name]
    for n in (0, 1, N):
        layout = lay_out(n, **options)
        arrays = on_jax(name, layout, dtype)
        host = jax.tree.map(np.asarray, layout)
        want = call(host, **{key: np.asarray(array) for key, array in arrays.items()})
        for got in (jax.jit(lambda layout, arrays: call(layout, **arrays))(layout, arrays), call(layout, **arrays)):
            assert (got.dtype, got.shape) == (want.dtype, want.shape)
            np.testing.assert_array_equal(np.asarray(got).view(np.uint8), want.view(np.uint8))


BYTES = ("bool", "int8", "uint8", "int16", "uint32", "complex64", "float8_e4m3fn", "float8_e5m2", "float8_e8m0fnu")


@pytest.mark.parametrize("dtype", BYTES)
def test_permute_moves_any_dtype(dtype: str) -> None:
    layout = lay_out()
    bits = inputs.rng(530).integers(0, 2, (N, HIDDEN * jnp.dtype(dtype).itemsize), np.uint8)
    x = jnp.array((bits if dtype == "bool" else bits + 55).view(jnp.dtype(dtype)))
    used = np.asarray(layout.order) >= 0
    for got in (jax.jit(permute)(x, layout), permute(x, layout)):
        assert got.dtype == x.dtype
        rows = np.asarray(x)[np.asarray(layout.order) // TOP_K]
        assert np.asarray(got)[used].tobytes() == rows[used].tobytes()
        assert not np.asarray(got)[~used].view(np.uint8).any()


def test_dtypes_that_jax_packs_or_narrows_are_refused() -> None:
    layout = lay_out()
    with pytest.raises(
        TypeError, match=r"permute: x must have a dtype of numbers of 8 bits or more, got int4 \[7, 8\]"
    ):
        jax.jit(permute)(jnp.zeros((N, HIDDEN), "int4"), layout)
    for dtype in ("float64", "int64", "complex128"):
        x = np.zeros((N, HIDDEN), dtype)  # a constant beside traced arrays
        with pytest.raises(TypeError, match=rf"permute: x needs JAX's option jax_enable_x64, .* got {dtype} \[7, 8\]"):
            jax.jit(lambda layout, x=x: permute(x, layout))(layout)
    with enable_x64():
        assert jax.jit(lambda layout: permute(x, layout))(layout).dtype == x.dtype


def test_rows_without_a_pair_are_not_read() -> None:
    layout = lay_out(alignment=8)
    arrays = on_jax("unpermute with all", layout)
    used = np.asarray(layout.order) >= 0
    y = jnp.where(used[:, None], arrays["y"], jnp.nan)

    def loss(y: Any, weights: Any) -> Any:
        return (unpermute(y, layout, weights) ** 2).sum()

    by_y, by_weights = jax.jit(jax.grad(loss, (0, 1)))(y, arrays["weights"])
    assert np.isfinite(by_weights).all()
    assert (np.asarray(by_y)[~used] == 0).all()
    assert (np.asarray(by_weights)[np.asarray(layout.positions) < 0] == 0).all()
    assert np.isfinite(unpermute(y, layout)).all()


# -- Gradients ---------------------------------------------------------------------------------------------------------


@pytest.mark.slow("seconds", every=4)
@pytest.mark.parametrize("dtype", inputs.FLOATS)
@pytest.mark.parametrize("options", LAYOUTS.values(), ids=LAYOUTS)
@pytest.mark.parametrize("name", ROWS)
def test_gradients_are_those_of_gathers_and_sums(name: str, options: dict[str, Any], dtype: str) -> None:
    """Of float64, with what comes in rounded as the result is."""
    call, names = ROWS[name]
    layout = lay_out(**options)
    arrays = on_jax(name, layout, dtype)
    shape = call(layout, **arrays).shape
    upstream = inputs.normal(shape, dtype, seed=521)

    def loss(arrays: Any, of: Any = call, upstream: Any = upstream) -> Any:
        return (of(layout, **arrays).astype(upstream.dtype) * upstream).astype(jnp.float32).sum()

    with enable_x64():
        wide = {key: jnp.array(np.asarray(array).astype(np.float64)) for key, array in arrays.items()}
        exact = lambda arrays: (plain(name, layout, arrays) * upstream.astype(np.float64)).sum()  # noqa: E731
        want = {key: np.asarray(array) for key, array in jax.jit(jax.grad(exact))(wide).items()}
    for grad in (jax.grad(loss), jax.jit(jax.grad(loss)), jax.grad(jax.checkpoint(loss)), jax.grad(jax.jit(loss))):
        found = grad(arrays)
        for key in names:
            assert (found[key].dtype, found[key].shape) == (arrays[key].dtype, arrays[key].shape)
            step = ROUNDING[str(found[key].dtype)]
            got = np.asarray(found[key]).astype(np.float64)
            np.testing.assert_allclose(got, want[key], rtol=2 * step, atol=2 * step * abs(want[key]).max(), err_msg=key)


def test_dtypes_of_factors_are_their_own() -> None:
    """Gradients of weights, residual and scale are cast, whatever the dtype of the rows is."""
    layout = lay_out()
    arrays = on_jax("unpermute with all", layout, "bfloat16")
    arrays |= {"weights": arrays["weights"].astype(jnp.float16), "residual": arrays["residual"].astype(jnp.float32)}
    for left_out in ((), ("residual_scale",)):
        given = {key: array for key, array in arrays.items() if key not in left_out}
        loss = lambda given: ROWS["unpermute"][0](layout, **given).astype(jnp.float32).sum()  # noqa: E731
        found = jax.grad(loss)(given)
        assert {key: str(a.dtype) for key, a in found.items()} == {key: str(a.dtype) for key, a in given.items()}
    x, weights = jnp.ones((N, HIDDEN), jnp.float16), arrays["weights"].astype(jnp.bfloat16)
    by_x, by_weights = jax.grad(
        lambda x, weights: permute(x, layout, weights=weights).astype(jnp.float32).sum(), (0, 1)
    )(x, weights)
    assert (by_x.dtype, by_weights.dtype) == (jnp.float16, jnp.bfloat16)
    np.testing.assert_array_equal(by_weights, np.where(np.asarray(layout.positions) >= 0, HIDDEN, 0))


@pytest.mark.skipif(jax.__version_info__ < (0, 8, 2), reason="JAX 0.8.0 computes all gradients")
def test_only_what_is_asked_for_is_computed() -> None:
    layout = lay_out()
    a = on_jax("unpermute with all", layout)
    x, w = jnp.ones((N, HIDDEN)), a["weights"]

    def rows(x: Any, weights: Any) -> Any:
        return (permute(x, layout, weights=weights) ** 2).sum()

    def sums(y: Any, weights: Any, residual: Any, scale: Any) -> Any:
        return (unpermute(y, layout, weights, residual=residual, residual_scale=scale) ** 2).sum()

    for transform in (lambda f: f, jax.jit, jax.checkpoint):
        by = [wants(jax.grad(transform(rows), asked), x, w) for asked in (0, 1, (0, 1))]
        assert by == [[["sums"]], [["dots"]], [["sums", "dots"]]]
        given = tuple(a[name] for name in ("y", "weights", "residual", "residual_scale"))
        each = ("rows", "dots", "scaled", "residual_dots")
        for i, result in enumerate(each):
            assert wants(jax.grad(transform(sums), i), *given) == [[result]]
        assert wants(jax.grad(transform(sums), (0, 1, 2, 3)), *given) == [[*each]]
        without = transform(lambda y, residual: (unpermute(y, layout, residual=residual) ** 2).sum())
        assert wants(jax.grad(without, 1), given[0], given[2]) == [], "the incoming gradient, as it is"


def test_the_gradient_of_rows_needs_the_order() -> None:
    layout = lay_out(want=("positions",))
    a = on_jax("unpermute with all", layout)
    run = jax.jit(lambda y, weights, residual: (unpermute(y, layout, weights, residual=residual) ** 2).sum())
    given = a["y"], a["weights"], a["residual"]
    assert np.isfinite(run(*given))
    with pytest.raises(
        ValueError, match=r"^unpermute: layout must have order for a gradient with respect to y, got None"
    ):
        jax.grad(run)(*given)
    if jax.__version_info__ < (0, 8, 2):
        return  # all gradients are computed
    whole = lay_out()
    want = jax.grad(lambda w, r: (unpermute(given[0], whole, w, residual=r) ** 2).sum(), (0, 1))(*given[1:])
    for got, right in zip(jax.grad(run, (1, 2))(*given), want, strict=True):
        np.testing.assert_array_equal(got, right)


def test_what_has_no_gradient() -> None:
    layout = lay_out()
    x, y = jnp.ones((N, HIDDEN)), jnp.ones((layout.capacity, HIDDEN))
    count = jnp.arange(N * HIDDEN, dtype=jnp.int32).reshape(N, HIDDEN)
    _, backward = jax.vjp(lambda count: permute(count, layout), count)
    assert backward(np.zeros(y.shape, jax.dtypes.float0))[0].dtype == jax.dtypes.float0
    scaled = jax.grad(lambda x, count: (permute(count, layout).sum() * x).sum(), allow_int=True, argnums=(0, 1))
    assert (np.asarray(scaled(x, count)[0]) == np.asarray(permute(count, layout)).sum()).all()
    refused = r"^permute: x must be float32 or float16 or bfloat16 for a gradient, got float8_e4m3fn \[7, 8\]"
    with pytest.raises(TypeError, match=refused):
        jax.grad(lambda x: permute(x, layout).astype(jnp.float32).sum())(x.astype(jnp.float8_e4m3fn))
    for loss, array in (
        (lambda x: (permute(x, layout) ** 2).sum(), x),
        (lambda y: (unpermute(y, layout) ** 2).sum(), y),
    ):
        with pytest.raises(RuntimeError, match=r"^cupy_router: permute and unpermute have first derivatives only"):
            jax.grad(lambda a, loss=loss: (jax.grad(loss)(a) ** 2).sum())(array)
        with pytest.raises(TypeError, match="jvp"):
            jax.jvp(loss, (array,), (array,))
    stopped = jax.grad(lambda x: (permute(jax.lax.stop_gradient(x), layout) * 1.0).sum())(x)
    assert not np.asarray(stopped).any()


# -- Transformations ---------------------------------------------------------------------------------------------------


@pytest.mark.slow("seconds", every=4)
@pytest.mark.parametrize("mapped", [("x",), ("weights",), ("indices",), ("x", "indices", "weights")], ids=str)
def test_vmap_and_grad_in_both_orders(mapped: tuple[str, ...]) -> None:
    draw = inputs.rng(522)
    one: dict[str, Any] = {
        "x": jnp.array(draw.standard_normal((N, HIDDEN), np.float32)),
        "weights": jnp.array(draw.random((N, TOP_K), np.float32)),
        "indices": jnp.array(ids(N)),
    }
    many = {key: jnp.stack([a, jnp.roll(a, 1, 0), a[::-1]]) for key, a in one.items()}
    given = {key: many[key] if key in mapped else a for key, a in one.items()}
    axes = {key: 0 if key in mapped else None for key in one}
    indices, axis = given.pop("indices"), axes.pop("indices")

    def loss(smooth: Any, indices: Any) -> Any:
        layout = expert_layout(indices, EXPERTS, alignment=2)
        rows = jnp.tanh(permute(smooth["x"], layout, weights=smooth["weights"]))
        return (unpermute(rows, layout, smooth["weights"], residual=smooth["x"]) ** 2).sum()

    each = [
        jax.grad(loss)(
            {key: a[i] if key in mapped else a for key, a in given.items()}, indices[i] if axis == 0 else indices
        )
        for i in range(3)
    ]
    of_maps = jax.jit(jax.vmap(jax.grad(loss), in_axes=(axes, axis)))(given, indices)
    summed = jax.jit(jax.grad(lambda given: jax.vmap(loss, in_axes=(axes, axis))(given, indices).sum()))(given)
    for key in given:
        wanted = np.stack([by[key] for by in each])
        np.testing.assert_allclose(of_maps[key], wanted, rtol=1e-6, atol=1e-6)
        wanted = wanted if key in mapped else wanted.sum(0)
        np.testing.assert_allclose(summed[key], wanted, rtol=1e-6, atol=1e-5)


@pytest.mark.slow("seconds")
def test_a_scan_over_layers_with_recomputation() -> None:
    """jax.checkpoint computes layouts and rows again in the backward pass, with the same gradients."""
    draw = inputs.rng(523)
    x = jnp.array(draw.standard_normal((N, HIDDEN), np.float32))
    indices = jnp.stack([jnp.array(ids(N, seed=seed)) for seed in range(3)])
    weights = jnp.array(draw.random((3, N, TOP_K), np.float32))

    def block(x: Any, layer: Any) -> Any:
        indices, weights = layer
        layout = expert_layout(indices, EXPERTS, alignment=4)
        rows = jnp.tanh(permute(x, layout))
        return unpermute(rows, layout, weights, residual=x), None

    def loss(x: Any, weights: Any, block: Any) -> Any:
        return (jax.lax.scan(block, x, (indices, weights))[0] ** 2).sum()

    def unrolled(x: Any, weights: Any) -> Any:
        for layer in zip(indices, weights, strict=True):
            x, _ = block(x, layer)
        return (x**2).sum()

    want = jax.grad(unrolled, (0, 1))(x, weights)
    saved = jax.checkpoint_policies.nothing_saveable
    for inner in (block, jax.checkpoint(block), jax.checkpoint(block, policy=saved)):
        for got, right in zip(jax.jit(jax.grad(loss, (0, 1)), static_argnums=2)(x, weights, inner), want, strict=True):
            np.testing.assert_allclose(got, right, rtol=1e-5, atol=1e-6)


# -- Experts -----------------------------------------------------------------------------------------------------------

METHOD = RoutingMethod(EXPERTS, TOP_K, "sigmoid", scale=1.5)
SHAPES = {"x": (33, 16), "gate": (EXPERTS, 16), "up": (EXPERTS, 16, 24), "down": (EXPERTS, 24, 16)}


def experts(arrays: Any, **spec: Any) -> Any:
    """Return the outputs of the experts of each token, by grouped products."""
    plan = dense_router(arrays["x"], arrays["gate"], METHOD, layout=LayoutSpec(**spec))
    layout = plan.layout
    rows = permute(arrays["x"], layout)
    sizes = jnp.diff(layout.offsets)  # the counts, and padding up to the alignment
    hidden = jax.nn.silu(jax.lax.ragged_dot(rows, arrays["up"], sizes))
    outputs = jax.lax.ragged_dot(hidden, arrays["down"], sizes)
    return unpermute(outputs, layout, plan.weights, residual=arrays["x"]), plan.indices


def dense(arrays: Any, indices: Any) -> Any:
    """Return the same by computing every expert for every token."""
    weights = twin(arrays["x"] @ arrays["gate"].T, indices, METHOD)
    hidden = jax.nn.silu(jnp.einsum("nh,ehf->enf", arrays["x"], arrays["up"]))
    outputs = jnp.einsum("enf,efh->neh", hidden, arrays["down"])
    chosen = jnp.take_along_axis(outputs, indices[..., None], axis=1)
    return (chosen * weights[..., None]).sum(1) + arrays["x"]


@pytest.mark.slow("seconds", every=2)
@pytest.mark.parametrize("spec", [{}, {"alignment": 8}], ids=str)
def test_experts_by_ragged_dot_are_dense_experts(spec: dict[str, Any]) -> None:
    arrays = {name: inputs.normal(shape, seed=550 + i, scale=0.5) for i, (name, shape) in enumerate(SHAPES.items())}
    upstream = inputs.normal(SHAPES["x"], seed=560)

    def loss(arrays: Any) -> Any:
        outputs, indices = experts(arrays, **spec)
        return (outputs * upstream).sum(), (outputs, indices)

    with jax.default_matmul_precision("highest"):
        by, (outputs, indices) = jax.jit(jax.grad(loss, has_aux=True))({k: jnp.array(a) for k, a in arrays.items()})
    with enable_x64():
        wide = {name: jnp.array(array.astype(np.float64)) for name, array in arrays.items()}
        want = np.asarray(dense(wide, indices))
        exact = jax.jit(jax.grad(lambda wide: (dense(wide, indices) * upstream.astype(np.float64)).sum()))
        want_by = {name: np.asarray(array) for name, array in exact(wide).items()}
    np.testing.assert_allclose(outputs, want, rtol=1e-5, atol=1e-5)
    for name in SHAPES:
        atol = 1e-5 * abs(want_by[name]).max()
        np.testing.assert_allclose(by[name], want_by[name], rtol=1e-4, atol=atol, err_msg=name)


@pytest.mark.slow("seconds")
def test_bfloat16_rows_through_ragged_dot() -> None:
    """The same in bfloat16, as models do it: within its rounding of float32."""
    arrays = {name: inputs.normal(shape, seed=570 + i, scale=0.5) for i, (name, shape) in enumerate(SHAPES.items())}
    narrow = {name: jnp.array(array.astype(ml_dtypes.bfloat16)) for name, array in arrays.items()}
    outputs, indices = jax.jit(experts)(narrow)
    assert outputs.dtype == jnp.bfloat16
    want = dense({name: array.astype(jnp.float32) for name, array in narrow.items()}, indices)
    np.testing.assert_allclose(np.asarray(outputs, np.float32), want, rtol=0.05, atol=0.05)
