# SPDX-License-Identifier: Apache-2.0
"""The ops inside jax.jit and related transformations, on the CPU: results equal those of eager calls."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import cupy_router
from cupy_router import Router, RoutingMethod, activation_topk, dense_router, hash_router, topk_select
from tests import compare, inputs
from tests.jax_calls import METHOD, NAMES, calls, same_bits
from tests.methods import METHODS, layer_of

jax = pytest.importorskip("jax", reason="JAX is not installed")
jnp = jax.numpy
if jax.__version_info__ < (0, 8):
    pytest.skip("calls inside jax.jit need JAX 0.8 or later", allow_module_level=True)

CALLS = calls()


def on_cpu(arrays: dict[str, np.ndarray]) -> dict[str, Any]:
    return {name: jnp.array(array) for name, array in arrays.items()}


# -- jax.jit -----------------------------------------------------------------------------------------------------------


@pytest.mark.slow("seconds", every=4)
@pytest.mark.parametrize("dtype", inputs.FLOATS)
@pytest.mark.parametrize("name", NAMES)
@pytest.mark.usefixtures("backend")
def test_a_traced_call_gives_what_an_eager_call_gives(name: str, dtype: str) -> None:
    """With --backend=simt kernels read and write XLA's buffers."""
    call = calls(dtype)[name]
    arrays = on_cpu(call.arrays)
    same_bits(jax.jit(call.function)(**arrays), call(arrays))


@pytest.mark.parametrize("name", NAMES)
def test_no_tokens(name: str) -> None:
    call = calls(n=0)[name]
    result = jax.jit(call.function)(**on_cpu(call.arrays))
    assert all(array.shape[0] == 0 for array in result)
    same_bits(result, call(on_cpu(call.arrays)))


@pytest.mark.slow("seconds", every=4)
@pytest.mark.parametrize("name", METHODS)
def test_every_step_of_a_method(name: str) -> None:
    """Including groups, custom scores and other dtypes of results."""
    method, kind = METHODS[name], list(METHODS).index(name)
    logits = inputs.distinct(5, method.num_logits)
    layer = layer_of(method, kind)
    with jax.enable_x64(method.index_dtype == "int64"):
        routed = jax.jit(lambda logits, layer: activation_topk(logits, method, **layer))
        weights, indices = routed(logits, layer.arguments(jnp.array))
    compare.assert_right((np.asarray(weights), np.asarray(indices)), logits, method, layer)


def test_int64_results_need_64_bit_numbers() -> None:
    method = RoutingMethod(16, 4, index_dtype="int64")
    with pytest.raises(ValueError, match="index_dtype 'int64' needs JAX's option jax_enable_x64"):
        jax.jit(lambda logits: activation_topk(logits, method))(jnp.zeros((3, 16)))


@pytest.mark.parametrize("shape", [(), (1,)])
def test_num_valid_is_clamped_and_no_constant(shape: tuple[int, ...]) -> None:
    call = CALLS["activation_topk"]
    logits = jnp.array(call.arrays["logits"])
    traced = []

    @jax.jit
    def padded(logits: Any, count: Any) -> Any:
        traced.append(1)
        return activation_topk(logits, METHOD, num_valid=count)

    whole = activation_topk(logits, METHOD)
    for count in (0, 4, 9, 100, -3):
        got = padded(logits, jnp.full(shape, count, jnp.int32))
        rows = min(max(count, 0), 9)
        np.testing.assert_array_equal(got.indices[:rows], whole.indices[:rows])
        assert (got.indices[rows:] == -1).all()
        assert (got.weights[rows:] == 0).all()
    assert len(traced) == 1
    # An int is a part of the graph, and may be checked while it is traced.
    same_bits(jax.jit(lambda a: activation_topk(a, METHOD, num_valid=np.int64(4)))(logits), padded(logits, 4))
    with pytest.raises(ValueError, match=r"activation_topk: num_valid must be in 0..9, got 10"):
        jax.jit(lambda a: activation_topk(a, METHOD, num_valid=10))(logits)


def test_a_second_call_is_not_traced_again() -> None:
    traced = []

    @jax.jit
    def both(x: Any, weight: Any) -> Any:
        traced.append(1)
        routing = dense_router(x, weight, METHOD)
        return routing, topk_select(routing.weights, 2)

    for seed in range(4):
        x = jnp.array(inputs.normal((6, 48), seed=seed))
        both(x, jnp.array(CALLS["dense_router"].arrays["weight"]))
    assert len(traced) == 1
    both(x[:3], jnp.array(CALLS["dense_router"].arrays["weight"]))
    assert len(traced) == 2


def test_calls_between_other_operations() -> None:
    """XLA may choose other layouts around the call and fuse its neighbours."""
    logits = jnp.array(inputs.normal((12, 32), seed=220))

    @jax.jit
    def layer(transposed: Any) -> Any:
        weights, indices = activation_topk(jnp.tanh(transposed.T), METHOD)
        return (weights[:, ::-1] * 2).T, indices[::2]

    weights, indices = activation_topk(jnp.tanh(logits), METHOD)
    got = layer(logits.T)
    np.testing.assert_array_equal(got[1], indices[::2])
    np.testing.assert_allclose(got[0], (weights[:, ::-1] * 2).T, rtol=1e-6)


@pytest.mark.slow("seconds")
def test_calls_in_loops_and_branches() -> None:
    logits = jnp.array(inputs.normal((7, 5, 32), seed=221))
    each = [activation_topk(step, METHOD) for step in logits]
    _, scanned = jax.lax.scan(lambda carry, step: (carry, activation_topk(step, METHOD)), 0, logits)
    same_bits(scanned, cupy_router.Routing(*(jnp.stack(parts) for parts in zip(*each, strict=True))))
    either = jax.jit(lambda first, a: jax.lax.cond(first, lambda a: topk_select(a, 2), lambda a: topk_select(-a, 2), a))
    same_bits(either(True, logits[0]), topk_select(logits[0], 2))
    same_bits(either(False, logits[0]), topk_select(-logits[0], 2))


def test_donated_arguments() -> None:
    """XLA may reuse an input's memory for another result once the call has read it."""
    for name in ("activation_topk", "dense_router", "topk_select"):
        call = CALLS[name]
        want = call(on_cpu(call.arrays))
        first = next(iter(call.arrays))
        rest = on_cpu({key: array for key, array in call.arrays.items() if key != first})

        def both(given: Any, call: Any = call, first: str = first, rest: Any = rest) -> Any:
            return call({first: given, **rest}), given * 2

        donated = jax.jit(both, donate_argnums=0)
        for _ in range(3):
            given = jnp.array(call.arrays[first])
            got, doubled = donated(given)
            same_bits(got, want)
            np.testing.assert_array_equal(doubled, call.arrays[first] * 2)
            assert given.is_deleted()


def test_inputs_are_never_written() -> None:
    for name, call in CALLS.items():
        arrays = on_cpu(call.arrays)
        before = {key: np.array(array) for key, array in arrays.items()}
        for _ in range(2):
            jax.block_until_ready(jax.jit(call.function)(**arrays))
        for key, array in arrays.items():
            np.testing.assert_array_equal(np.asarray(array), before[key], err_msg=f"{name}: {key}")


@pytest.mark.parametrize("wrap", [jax.jit, jax.vmap], ids=["jit", "vmap"])
def test_eager_calls_are_not_traced(wrap: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Arrays with values are computed eagerly, also while something else is traced."""
    from cupy_router.jax import _intercept

    monkeypatch.setattr(_intercept, "run", lambda *arguments: pytest.fail("was traced"))
    logits = jnp.array(inputs.normal((4, 32)))
    want = activation_topk(logits, METHOD)
    got = []
    wrap(lambda a: got.append(activation_topk(logits, METHOD)) or a)(jnp.zeros(3))
    np.testing.assert_array_equal(want.indices, activation_topk(np.asarray(logits), METHOD).indices)
    assert len(got) == 1


# -- Arguments ---------------------------------------------------------------------------------------------------------

LOGITS, BIAS = np.zeros((6, 32), np.float32), np.zeros(32, np.float32)

WRONG: dict[str, tuple[Callable[[Any], Any], Any, type[Exception], str]] = {
    "dtype": (lambda a: activation_topk(a, METHOD), LOGITS.astype(np.int32), TypeError, "logits must be float32 or"),
    "NumPy's dtype": (lambda a: activation_topk(a, METHOD, bias=np.zeros(32)), LOGITS, TypeError, "bias.*float64"),
    "rank": (lambda a: activation_topk(a, METHOD), BIAS, ValueError, r"logits must have shape \[num_tokens"),
    "columns": (
        lambda a: activation_topk(a, METHOD),
        LOGITS[:, 1:],
        ValueError,
        "logits must have shape .* = \\[num_tokens, 32\\]",
    ),
    "k": (lambda a: topk_select(a, 33), LOGITS, ValueError, "k must be in 1..32, got 33"),
    "no array": (lambda a: activation_topk(a, METHOD, bias=[0.0] * 32), LOGITS, TypeError, "bias must be an array"),
    "num_valid": (
        lambda a: activation_topk(a, METHOD, num_valid=a[0, 0]),
        LOGITS,
        TypeError,
        "num_valid must be int32",
    ),
    "strides": (
        lambda a: activation_topk(a, METHOD, bias=np.zeros(64, np.float32)[::2]),
        LOGITS,
        ValueError,
        r"bias must be contiguous.*\[2\]",
    ),
    "path": (lambda a: dense_router(a, a, METHOD, path="x"), LOGITS, ValueError, "path must be None"),
    "tokens for decode": (
        lambda a: dense_router(a, np.zeros((32, 32), np.float32), METHOD, path="decode"),
        np.zeros((65, 32), np.float32),
        ValueError,
        "'decode' takes at most 64 tokens",
    ),
    "out": (lambda a: topk_select(a, 1, out=(a, a)), LOGITS, ValueError, "out and stream cannot be given inside"),
    "stream": (lambda a: topk_select(a, 1, stream=0), LOGITS, ValueError, "out and stream cannot be given inside"),
    "no token ids": (
        lambda a: Router(METHOD, table=np.zeros((3, 4), np.int32))(a),
        LOGITS,
        TypeError,
        "Router: token_ids must be an array, got None",
    ),
}


@pytest.mark.parametrize("name", WRONG)
def test_errors_are_raised_while_tracing(name: str) -> None:
    function, array, error, message = WRONG[name]
    with pytest.raises(error, match=message):
        jax.jit(function).trace(jax.ShapeDtypeStruct(array.shape, array.dtype))


@pytest.mark.slow("seconds")
def test_a_tracer_in_any_argument_traces_the_call() -> None:
    """Other arrays, of JAX, NumPy or PyTorch, become constants of the graph."""
    call = CALLS["activation_topk of a layer"]
    want = call(on_cpu(call.arrays))
    torch = pytest.importorskip("torch")
    for of in (jnp.array, np.array, torch.tensor):
        for traced in call.arrays:
            constants = {name: of(array) for name, array in call.arrays.items() if name != traced}
            got = jax.jit(lambda array, c=constants, t=traced: call.function(**{**c, t: array}))(call.arrays[traced])
            same_bits(got, want)


def test_int64_constants_keep_their_meaning() -> None:
    """As int32 these would wrap around into valid token ids and experts."""
    table = np.array([[0, 1, 2, 3], [4, 5, 6, 2**32 + 7]])
    ids = np.array([0, 1, 2**32, -(2**32)])
    alone = jax.jit(lambda ids: hash_router(ids, table))(jnp.array([0, 1, 5], jnp.int32))
    assert alone.indices.tolist() == [[0, 1, 2, 3], [-1] * 4, [-1] * 4]
    logits = jnp.zeros((4, 32))
    of_logits = jax.jit(lambda logits: hash_router(ids, table, METHOD, logits=logits))(logits)
    assert of_logits.indices.tolist() == [[0, 1, 2, 3], [-1] * 4, [-1] * 4, [-1] * 4]


# -- Threads, errors of the handler ------------------------------------------------------------------------------------


def test_many_threads() -> None:
    compiled = {name: jax.jit(call.function) for name, call in CALLS.items()}
    arrays = {name: on_cpu(call.arrays) for name, call in CALLS.items()}
    wanted = {name: call(arrays[name]) for name, call in CALLS.items()}

    def work(turn: int) -> None:
        for name in (*NAMES[turn:], *NAMES[:turn]):
            for _ in range(3):
                same_bits(compiled[name](**arrays[name]), wanted[name])

    with ThreadPoolExecutor(8) as threads:
        for done in [threads.submit(work, turn) for turn in range(8)]:
            done.result(timeout=120)


@pytest.mark.parametrize("raised", [RuntimeError("broken"), ValueError("broken"), KeyboardInterrupt("broken")])
def test_handler_errors_become_jax_errors(raised: BaseException, monkeypatch: pytest.MonkeyPatch) -> None:
    from cupy_router.ops import _cached

    # XLA never launches so large a k by itself.
    compiled = jax.jit(lambda a: topk_select(a, 40)).lower(jnp.zeros((3, 50))).compile()

    def fail(*arguments: Any) -> None:
        raise raised

    with monkeypatch.context() as patch:
        patch.setattr(_cached, "work_for", fail)
        with pytest.raises(Exception, match=r"topk_select: (\w+: )?broken") as caught:
            jax.block_until_ready(compiled(jnp.zeros((3, 50))))
        code = "INVALID_ARGUMENT" if isinstance(raised, ValueError) else "INTERNAL"
        assert code in str(caught.value)
    assert compiled(jnp.zeros((3, 50))).indices.tolist() == [list(range(40))] * 3


@pytest.mark.slow("process")
@pytest.mark.parametrize("program", ["lazily", "eager_calls", "at_exit", "at_exit_of_threads"])
def test_in_a_process_of_its_own(program: str) -> None:
    done = subprocess.run(
        [sys.executable, "-c", PROGRAMS[program]],
        cwd=Path(cupy_router.__file__).parents[1],
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert (done.returncode, done.stdout) == (0, "done\n"), done.stderr


PROGRAMS = {
    # Nothing but the call itself has told cupy_router of JAX.
    "lazily": """
import sys
import cupy_router
assert "jax" not in sys.modules
import jax, jax.numpy as jnp
assert "cupy_router.jax" not in sys.modules
got = jax.jit(lambda a: cupy_router.topk_select(a, 1))(jnp.array([[1.0, 3.0, 2.0]]))
assert got.indices.tolist() == [[1]]
print("done")
""",
    # What an eager call reads is not there yet, and waits for a handler that needs the GIL.
    "eager_calls": """
import time
import cupy_router
import jax, jax.numpy as jnp
from cupy_router.ops import _cached
work_for = _cached.work_for
_cached.work_for = lambda *arguments: time.sleep(0.1) or work_for(*arguments)
select = jax.jit(lambda a: cupy_router.topk_select(jnp.sin(a) @ a.T, 20))
x = jnp.ones((200, 200))
for _ in range(5):
    values, indices = select(x)
    again = cupy_router.topk_select(values, 2)
    other = cupy_router.topk_select(jnp.sin(x) @ x, 2)
    assert (again.values == values[:, :2]).all()
print("done")
""",
    # The process ends while XLA's threads still run handlers, which need the interpreter.
    "at_exit": """
import cupy_router
import jax, jax.numpy as jnp
select = jax.jit(lambda a: cupy_router.topk_select(jnp.sin(a) @ a.T, 500))
for _ in range(30):
    result = select(jnp.ones((500, 500)))
print("done")
""",
    "at_exit_of_threads": """
import threading
import cupy_router
import jax, jax.numpy as jnp
select = jax.jit(lambda a: cupy_router.topk_select(jnp.sin(a) @ a.T, 300))
threads = [threading.Thread(target=lambda: [select(jnp.ones((300, 300))) for _ in range(20)]) for _ in range(3)]
for thread in threads:
    thread.start()
for thread in threads:
    thread.join()
print("done")
""",
}
