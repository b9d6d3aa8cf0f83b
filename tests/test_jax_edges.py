# SPDX-License-Identifier: Apache-2.0
"""JAX arrays that are unusual, or no arrays at all, and JAX's strict options, on the CPU."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import ml_dtypes
import numpy as np
import pytest

from cupy_router import Router, Routing, activation_topk, dense_router, hash_router, topk_select
from tests import inputs
from tests.jax_calls import METHOD, NAMES, SHARED, batch, calls, same_bits

jax = pytest.importorskip("jax", reason="JAX is not installed")
jnp = jax.numpy
if jax.__version_info__ < (0, 8):
    pytest.skip("calls inside jax.jit need JAX 0.8 or later", allow_module_level=True)

pytestmark = pytest.mark.usefixtures("jax_on_the_cpu")

CALLS = calls()
with jax.default_device(jax.devices("cpu")[0]):
    LOGITS = jnp.array(inputs.normal((6, 32), seed=400))
    X, WEIGHT = jnp.array(inputs.normal((6, 8), seed=401)), jnp.array(inputs.normal((32, 8), seed=402))


def on_cpu(arrays: dict[str, np.ndarray]) -> dict[str, Any]:
    return {name: jnp.array(array) for name, array in arrays.items()}


def route(logits: Any, **others: Any) -> Any:
    return activation_topk(logits, METHOD, **others)


# -- Arrays that are refused -------------------------------------------------------------------------------------------


class Place(NamedTuple):
    """Where an array is passed, and the name that errors have for it there."""

    name: str
    call: Callable[[Any], Any]


PLACES = {
    "eager": Place("activation_topk: logits", route),
    "eager, another argument": Place("activation_topk: bias", lambda a: route(LOGITS, bias=a)),
    "beside NumPy": Place("activation_topk: bias", lambda a: route(np.asarray(LOGITS), bias=a)),
    "num_valid": Place("activation_topk: num_valid", lambda a: route(LOGITS, num_valid=a)),
    "another op": Place("topk_select: scores", lambda a: topk_select(a, 2)),
    "out": Place("activation_topk: out.weights", lambda a: route(LOGITS, out=Routing(a, a))),
    "out of NumPy": Place("activation_topk: out.weights", lambda a: route(np.asarray(LOGITS), out=Routing(a, a))),
    "Router": Place("Router: weight", lambda a: Router(METHOD, weight=a)),
    "constant of jit": Place("activation_topk: bias", lambda a: jax.jit(lambda b: route(b, bias=a))(LOGITS)),
    "constant of grad": Place(
        "activation_topk: bias", lambda a: jax.grad(lambda b: route(b, bias=a).weights.sum())(LOGITS)
    ),
}
TRACED = {
    "jit": Place("activation_topk: logits", jax.jit(route)),
    "jit, another argument": Place("activation_topk: bias", jax.jit(lambda a: route(LOGITS, bias=a))),
    "Router in jit": Place("Router: weight", jax.jit(lambda a: Router(METHOD, weight=a)(X))),
    "out in jit": Place("activation_topk: out.weights", jax.jit(lambda a: route(LOGITS, out=Routing(a, a)))),
}
with jax.default_device(jax.devices("cpu")[0]):
    KEYS = jax.random.split(jax.random.key(0), (6, 32))
    OF_JAX = {
        "int4": jnp.zeros((6, 32), jnp.int4),
        "float8_e4m3fn": jnp.zeros((6, 32), jnp.float8_e4m3fn),
        "bool": jnp.zeros((6, 32), bool),
        "complex64": jnp.zeros((6, 32), complex),
        "key<fry>": KEYS,
    }
OF_NUMPY = {
    "float0": np.zeros((6, 32), jax.dtypes.float0),
    "<U1": np.full((6, 32), "a"),
    "object": np.full((6, 32), None),
    "int4": np.zeros((6, 32), ml_dtypes.int4),
}


@pytest.mark.parametrize("place", [*PLACES, *TRACED])
@pytest.mark.parametrize("dtype", OF_JAX)
def test_other_dtypes_are_refused_by_name(place: str, dtype: str) -> None:
    name, call = {**PLACES, **TRACED}[place]
    with pytest.raises((TypeError, ValueError)) as caught:
        call(OF_JAX[dtype])
    message = str(caught.value)
    assert message.startswith(f"{name} must be ")
    assert f"got {dtype} [6, 32]" in message or "got a read-only" in message, "JAX arrays cannot be written either"
    assert isinstance(caught.value, TypeError) or "out.weights" in name


@pytest.mark.parametrize("place", PLACES)
@pytest.mark.parametrize("dtype", OF_NUMPY)
def test_dtypes_that_jax_does_not_have_are_refused_by_name(place: str, dtype: str) -> None:
    name, call = PLACES[place]
    with pytest.raises((TypeError, ValueError), match=rf"^{name} must be ") as caught:
        call(OF_NUMPY[dtype])
    assert dtype in str(caught.value)


@pytest.mark.parametrize("place", PLACES)
def test_arrays_without_values_are_refused_by_name(place: str) -> None:
    """Donated arguments are the usual ones."""
    name, call = PLACES[place]
    deleted = jnp.zeros((6, 32))
    deleted.delete()
    with pytest.raises(ValueError, match=rf"^{name} must have values, got a deleted or donated float32 \[6, 32\]"):
        call(deleted)


@pytest.mark.parametrize("inputs_of", [np.asarray, jnp.asarray], ids=["NumPy", "JAX"])
def test_a_tracer_in_out_is_refused(inputs_of: Any) -> None:
    logits = inputs_of(LOGITS)

    def into(given: Any) -> Any:
        return route(logits, out=Routing(given, given.astype(jnp.int32)))

    for traced in (jax.jit(into), jax.vmap(into)):
        with pytest.raises(ValueError, match=r"^activation_topk: out\.weights must be writable, got a read-only float"):
            traced(jnp.zeros((6, 4)))


def test_out_and_stream_inside_transformations() -> None:
    with pytest.raises(ValueError, match=r"out and stream cannot be given inside jax\.jit, jax\.grad or jax\.vmap"):
        jax.grad(lambda a: route(a, stream=0).weights.sum())(LOGITS)


@pytest.mark.skipif(not hasattr(jax, "new_ref"), reason="this JAX has no public Ref")
def test_a_ref_is_refused_but_its_value_is_not() -> None:
    ref = jax.new_ref(LOGITS)
    with pytest.raises(TypeError, match=r"^activation_topk: logits must be an array, got Ref\{float32\[6,32\]\}: pass"):
        jax.jit(route)(ref)
    with pytest.raises(TypeError, match=r"^activation_topk: bias must be an array of .* got Ref"):
        route(LOGITS, bias=ref)
    same_bits(jax.jit(lambda ref: route(ref[...]))(ref), route(LOGITS))


@pytest.mark.parametrize(
    "leaf", [None, object(), "text", jax.ShapeDtypeStruct((32, 8), np.float32)], ids=lambda leaf: type(leaf).__name__
)
def test_a_router_whose_leaves_are_no_arrays(leaf: Any) -> None:
    """Functions of pytrees make such Routers; only a call needs arrays."""
    router = jax.tree.map(lambda array: leaf, Router(METHOD, weight=WEIGHT))
    assert isinstance(router, Router)
    assert repr(router).startswith("Router(RoutingMethod(")
    with pytest.raises(TypeError, match=r"^Router: weight must be an array"):
        router(X)
    if isinstance(leaf, jax.ShapeDtypeStruct):
        shapes = jax.eval_shape(lambda router, x: router(x), router, X)
        assert shapes == jax.eval_shape(lambda: Router(METHOD, weight=WEIGHT)(X))


@pytest.mark.parametrize("name", ["grad", "grad in jit", "grad in vmap", "jvp"])
def test_the_gradient_of_topk_select_names_the_remedy(name: str) -> None:
    lengths = jnp.full(6, 9, jnp.int32)

    def loss(scores: Any) -> Any:
        return topk_select(scores, 2, lengths=lengths).values.sum()

    ways = {
        "grad": lambda: jax.grad(loss)(LOGITS),
        "grad in jit": lambda: jax.jit(jax.grad(loss))(LOGITS),
        "grad in vmap": lambda: jax.vmap(jax.grad(loss))(LOGITS[None]),
        "jvp": lambda: jax.jvp(loss, (LOGITS,), (LOGITS,)),
    }
    remedy = r"^topk_select: results have no gradient, pass scores as jax\.lax\.stop_gradient\(scores\)"
    with pytest.raises(ValueError, match=remedy):
        ways[name]()


# -- Objects with __jax_array__ ----------------------------------------------------------------------------------------


class Holder:
    """Stand-in for a parameter of Flax: not an array, but JAX can convert it to one."""

    def __init__(self, value: Any) -> None:
        self.value = value

    def __jax_array__(self) -> Any:
        return self.value


def held(arrays: dict[str, Any]) -> dict[str, Any]:
    return {name: Holder(array) for name, array in arrays.items()}


@pytest.mark.slow("seconds", every=4)
@pytest.mark.parametrize("name", NAMES)
def test_holders_are_taken_for_their_arrays(name: str) -> None:
    call, arrays = CALLS[name], on_cpu(CALLS[name].arrays)
    want = call(arrays)
    for given in (held(arrays), held(call.arrays)):  # what they hold may be an array of NumPy
        got = call(given)
        assert all(isinstance(array, jax.Array) for array in got)
        same_bits(got, want)
    for one in arrays:
        same_bits(call({**arrays, **held({one: arrays[one]})}), want)
    same_bits(jax.jit(lambda arrays: call(held(arrays)))(arrays), want)
    first = next(iter(arrays))
    same_bits(jax.jit(lambda array: call({**held(arrays), first: array}))(arrays[first]), want)


def test_results_belong_to_the_framework_of_the_first_array() -> None:
    got = route(np.asarray(LOGITS), bias=Holder(jnp.zeros(32)))
    assert isinstance(got.weights, np.ndarray)
    same_bits(got, Routing(*map(np.asarray, route(LOGITS))))
    assert isinstance(route(Holder(np.asarray(LOGITS))).weights, jax.Array)
    out = Routing(np.empty((6, 4), np.float32), np.empty((6, 4), np.int32))
    assert route(Holder(LOGITS), out=out) is out
    same_bits(out, got)


@pytest.mark.slow("seconds")
def test_gradients_of_what_holders_hold() -> None:
    scale = jnp.full(32, 2.0)

    def loss(x: Any, weight: Any, scale: Any, of: Any) -> Any:
        return (dense_router(of(x), of(weight), METHOD, expert_scale=of(scale)).weights ** 2).sum()

    for transform in (lambda f: f, jax.jit):
        got, want = (
            transform(jax.grad(lambda *a, of=of: loss(*a, of), (0, 1, 2)))(X, WEIGHT, scale)
            for of in (Holder, lambda a: a)
        )
        for a, b in zip(got, want, strict=True):
            np.testing.assert_array_equal(a, b)


def test_a_router_keeps_holders() -> None:
    """So it sees later values."""
    holder = Holder(WEIGHT)
    router = Router(METHOD, weight=holder, bias=Holder(np.zeros(32, np.float32)))
    assert "weight=float32 [32, 8] on cpu" in repr(router)
    same_bits(router(X), Router(METHOD, weight=WEIGHT)(X))
    same_bits(router(Holder(X)), router(X))
    same_bits(jax.jit(router)(X), router(X))
    holder.value = WEIGHT[::-1]
    same_bits(router(X), Router(METHOD, weight=WEIGHT[::-1])(X))


def test_a_state_dict_of_holders() -> None:
    """Biases of other dtypes and shapes are converted."""
    for dtype, shape in ((jnp.float32, (32,)), (jnp.bfloat16, (32,)), (jnp.float32, (1, 32)), (jnp.bfloat16, (1, 32))):
        bias = jnp.linspace(-2, 2, 32).astype(dtype)
        state = {"mlp.gate.weight": Holder(WEIGHT), "mlp.gate.e_score_correction_bias": Holder(bias.reshape(shape))}
        want = Router(METHOD, weight=WEIGHT, bias=bias.astype(jnp.float32))(X)
        same_bits(Router.from_state_dict(state, "mlp", METHOD)(X), want)


def test_numbers_and_ids_in_holders() -> None:
    same_bits(route(LOGITS, num_valid=Holder(2)), route(LOGITS, num_valid=2))
    table = Holder(np.array([[0, 1, 2, 3], [4, 5, 6, 2**32 + 7]]))
    assert hash_router(Holder(np.array([0, 1, 2**32])), table).indices.tolist() == [[0, 1, 2, 3], [-1] * 4, [-1] * 4]


@pytest.mark.parametrize(
    ("value", "error", "message"),
    [
        (None, TypeError, "logits must hold an array of numbers, got NoneType"),
        ("a", TypeError, "logits must hold an array of numbers, got str"),
        (KEYS, TypeError, r"logits must be an array of numbers, got key<fry> \[6, 32\]"),
        (LOGITS[:, 1:], ValueError, r"logits must have shape .* = \[num_tokens, 32\], got float32 \[6, 31\]"),
    ],
)
def test_what_a_holder_holds_is_checked(value: Any, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=f"^activation_topk: {message}"):
        route(Holder(value))
    with pytest.raises(ValueError, match=r"^activation_topk: out\.weights must be writable, got a read-only float32"):
        route(LOGITS, out=Routing(Holder(LOGITS), Holder(LOGITS)))


def test_parameters_of_flax() -> None:
    nnx = pytest.importorskip("flax.nnx", reason="Flax is not installed")

    class Gate(nnx.Module):  # type: ignore[misc]
        def __init__(self) -> None:
            self.weight, self.bias = nnx.Param(WEIGHT), nnx.Variable(jnp.zeros(32))

        def __call__(self, x: Any) -> Any:
            return dense_router(x, self.weight, METHOD, bias=self.bias)

    gate, want = Gate(), dense_router(X, WEIGHT, METHOD)
    same_bits(gate(X), want)
    same_bits(nnx.jit(lambda gate, x: gate(x))(gate, X), want)
    same_bits(Router(METHOD, weight=gate.weight)(nnx.Variable(X)), want)

    def loss(weight: Any) -> Any:
        return (dense_router(X, weight, METHOD).weights ** 2).sum()

    got = nnx.grad(lambda gate: (gate(X).weights ** 2).sum())(gate)
    np.testing.assert_array_equal(got.weight[...], jax.grad(loss)(WEIGHT))
    np.testing.assert_array_equal(jax.grad(loss)(gate.weight)[...], jax.grad(loss)(WEIGHT))


# -- JAX's strict options ----------------------------------------------------------------------------------------------


@pytest.mark.slow("seconds", every=4)
@pytest.mark.parametrize("name", NAMES)
def test_the_transfer_guard(name: str, capfd: pytest.CaptureFixture[str]) -> None:
    """Eager calls, those inside jax.vmap too, transfer nothing that JAX counts as implicit."""
    call, arrays = CALLS[name], {name: jax.device_put(array) for name, array in CALLS[name].arrays.items()}
    axes = {key: None if key in SHARED else 0 for key in arrays}
    many = {key: a if key in SHARED else batch({key: a}, 2)[key] for key, a in call.arrays.items()}
    many = {key: jax.device_put(array) for key, array in many.items()}
    want = call(arrays)
    same_bits(call(jax.device_put(arrays, jax.devices("cpu")[0])), want)  # committed to the device
    for mode in ("disallow", "log"):
        with jax.transfer_guard(mode):
            same_bits(call(arrays), want)
            same_bits(call(held(arrays)), want)
            same_bits(jax.jit(call.function)(**arrays), want)
            jax.vmap(lambda arrays: call(arrays), in_axes=(axes,))(many)
    assert "transfer" not in capfd.readouterr().err


def test_the_transfer_guard_with_constants() -> None:
    bias = inputs.normal((32,), seed=403)
    upstream, two = jax.device_put(np.ones((6, 4), np.float32)), jax.device_put(np.int32(2))
    many = jax.device_put(np.stack([LOGITS] * 2))

    def gradient(logits: Any, upstream: Any) -> Any:
        return jax.vjp(lambda logits: route(logits, bias=bias, num_valid=2).weights, logits)[1](upstream)

    want, ways = route(LOGITS, bias=bias), jax.jit(gradient)(LOGITS, upstream)
    with jax.transfer_guard("disallow"):
        same_bits(route(LOGITS, bias=bias), want)
        same_bits(jax.jit(lambda logits: route(logits, bias=bias))(LOGITS), want)
        got = jax.vmap(lambda logits: route(logits, bias=bias, num_valid=2))(many)
        again = jax.vmap(lambda count: route(LOGITS, bias=bias, num_valid=count))(two[None])
        assert isinstance(jax.jit(gradient)(LOGITS, upstream)[0], jax.Array)
    np.testing.assert_array_equal(got.indices[1], route(LOGITS, bias=bias, num_valid=2).indices)
    np.testing.assert_array_equal(got.indices[:1], again.indices)
    np.testing.assert_array_equal(ways[0], gradient(LOGITS, upstream)[0])


@pytest.mark.slow("seconds")
@pytest.mark.parametrize("option", ["rank", "dtype"])
def test_nothing_is_promoted(option: str) -> None:
    strict = jax.numpy_rank_promotion("raise") if option == "rank" else jax.numpy_dtype_promotion("strict")
    scale = jnp.ones(32)
    with strict:
        for count in (None, 2, jnp.int32(2)):
            jax.vmap(lambda logits, count=count: route(logits, num_valid=count))(LOGITS[None])
            jax.grad(
                lambda x, w, b, s, n=count: dense_router(
                    x, w, METHOD, logit_bias=b, expert_scale=s, num_valid=n
                ).weights.sum(),
                argnums=(0, 1, 2, 3),
            )(X.astype(jnp.bfloat16), WEIGHT, scale, scale)
        jax.vmap(lambda count: route(LOGITS, num_valid=count))(jnp.array([1, 2, 9], jnp.int32))
