# SPDX-License-Identifier: Apache-2.0
"""cupy_router.jax.expert_parallel on one to four devices, against one: tests/jax_expert_parallel.py."""

from __future__ import annotations

import doctest
import os
import subprocess
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest

jax = pytest.importorskip("jax", reason="JAX is not installed")
if jax.__version_info__ < (0, 8):
    pytest.skip("calls inside jax.jit need JAX 0.8 or later", allow_module_level=True)

import jax.numpy as jnp  # noqa: E402
from jax.sharding import AxisType  # noqa: E402
from jax.sharding import PartitionSpec as P  # noqa: E402

from cupy_router.jax import _expert_parallel, expert_parallel  # noqa: E402

pytestmark = pytest.mark.backends("reference", "gpu")
ROOT = Path(__file__).parents[1]


@pytest.fixture
def run(backend: Any) -> Callable[[str], None]:
    """Return a function that runs one of `tests.jax_expert_parallel`, with four devices of a CPU or with all GPUs."""
    if backend.name == "gpu" and len(jax.devices()) < 2:
        pytest.skip("needs two CUDA devices")
    return partial(run_on, "gpu" if backend.name == "gpu" else "cpu")


def run_on(where: str, check: str) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "tests.jax_expert_parallel", check, where],
        cwd=ROOT, capture_output=True, text=True, timeout=300, env=os.environ,
    )  # fmt: skip
    assert (done.returncode, done.stdout) == (0, "done\n"), done.stderr[-3000:]


@pytest.mark.slow("process")
@pytest.mark.parametrize(
    "check",
    ["against_one_device", "kinds_of_meshes", "the_same_tokens", "transformations", "capacity", "two_hundred_steps"],
)
def test_devices_do_what_one_does(check: str, run: Callable[[str], None]) -> None:
    run(check)


@pytest.mark.slow("process")
@pytest.mark.parametrize("check", ["one_device", "experts_of_devices"])
def test_what_devices_have_and_move(check: str, run: Callable[[str], None]) -> None:
    run(check)


@pytest.mark.slow("process")
def test_the_example_learns_on_a_mesh_what_it_learns_on_one_device(run: Callable[[str], None]) -> None:
    run("training")


def test_examples_of_docstrings() -> None:
    assert doctest.testmod(_expert_parallel).failed == 0


# -- Errors, to which JAX adds a line ----------------------------------------------------------------------------------


def on_one_device(function: Callable[[], Any]) -> None:
    """Trace a function inside of shard_map."""
    mesh = jax.make_mesh((1,), ("a",), axis_types=(AxisType.Auto,), devices=jax.devices()[:1])

    def body(x: Any) -> Any:
        function()
        return x

    jax.eval_shape(jax.shard_map(body, mesh=mesh, in_specs=P("a"), out_specs=P("a")), jnp.zeros(1))


@pytest.mark.parametrize(
    ("options", "error", "words"),
    [
        ({"num_experts": 0}, ValueError, "num_experts must be in"),
        ({"num_experts": 8.0}, TypeError, "num_experts must be an int"),
        ({"exact": 1}, TypeError, "exact must be a bool"),
        ({"capacity": -1}, ValueError, "capacity must be in"),
        ({"axis": "b"}, ValueError, "axis must be an axis of a jax.shard_map around the call, got 'b'"),
        ({"axis": ("a", "b")}, ValueError, r"axis must be an axis .* around the call, got \('a', 'b'\)"),
        ({"axis": None}, ValueError, "axis must be an axis of a jax.shard_map around the call, got None"),
        ({"axis": 0}, ValueError, "axis must be an axis of a jax.shard_map around the call, got 0"),
        ({"axis": 8, "num_experts": "a"}, TypeError, "num_experts must be an int, got str"),
    ],
)
def test_refused_options(options: dict[str, Any], error: type[Exception], words: str) -> None:
    given = {"axis": "a", "num_experts": 8, **options}
    with pytest.raises(error, match=f"^expert_parallel: {words}"):
        on_one_device(lambda: expert_parallel(**given))


def test_outside_of_shard_map() -> None:
    with pytest.raises(ValueError, match=r"^expert_parallel: axis must be an axis "):
        expert_parallel("a", 8)


X, WEIGHTS, INDICES = jnp.ones((3, 4)), jnp.ones((3, 2)), jnp.zeros((3, 2), "int32")


@pytest.mark.parametrize(
    ("arguments", "error", "words"),
    [
        (([[1.0]], WEIGHTS, INDICES), TypeError, "x must be an array of JAX, got list"),
        ((INDICES, WEIGHTS, INDICES), TypeError, "x must be float32 or float16 or bfloat16, got int32"),
        ((X[0], WEIGHTS, INDICES), ValueError, r"x must have shape \[num_tokens, hidden\], got \[4\]"),
        ((X, WEIGHTS[:2], INDICES), ValueError, r"weights must have shape \[num_tokens, top_k\], got \[2, 2\]"),
        ((X, WEIGHTS, WEIGHTS), TypeError, "indices must be uint8 or .*, got float32"),
        ((X, WEIGHTS[:, :1], INDICES), ValueError, r"weights must have the shape of indices, \[3, 2\], got \[3, 1\]"),
    ],
)
def test_refused_tokens(arguments: tuple[Any, ...], error: type[Exception], words: str) -> None:
    with pytest.raises(error, match=rf"^expert_parallel: {words}(\n|$)"):
        on_one_device(lambda: expert_parallel("a", 8).dispatch(*arguments))


def test_refused_rows() -> None:
    def combine(y: Any, ticket: Any = None) -> None:
        parallel = expert_parallel("a", 8)
        parallel.combine(y, parallel.dispatch(X, WEIGHTS, INDICES)[2] if ticket is None else ticket)

    for error, words, given in (
        (ValueError, r"y must have the 6 rows of the layout, got shape \[3, 4\]", (X,)),
        (TypeError, "y must be float32 or float16 or bfloat16, got int32", (jnp.ones((6, 4), "int32"),)),
        (TypeError, "ticket must be the one of a dispatch, got int", (X, 3)),
    ):
        with pytest.raises(error, match=rf"^expert_parallel: {words}(\n|$)"):
            on_one_device(lambda given=given: combine(*given))
