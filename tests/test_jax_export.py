# SPDX-License-Identifier: Apache-2.0
"""Programs of jax.export with what the functions take and return, loaded by another process."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import cupy_router
from cupy_router import (
    LayoutSpec,
    Router,
    RoutingMethod,
    ScoreFunction,
    activation_topk,
    expert_layout,
    hash_router,
    permute,
    topk_select,
    unpermute,
)
from cupy_router.ops.registry import OPS
from tests import jax_layouts
from tests.jax_calls import METHOD, NAMES, calls, same_bits
from tests.jax_layouts import EXPERTS, TOP_K

jax = pytest.importorskip("jax", reason="JAX is not installed")
jnp = jax.numpy
if jax.__version_info__ < (0, 8):
    pytest.skip("calls inside jax.jit need JAX 0.8 or later", allow_module_level=True)
pytest.importorskip("flatbuffers", reason="flatbuffers is not installed, in which JAX writes programs")

CALLS = calls()
ROOT = Path(cupy_router.__file__).parents[1]


def programs() -> dict[str, tuple[Any, tuple[Any, ...]]]:
    """Return functions with their arguments: arrays by name, and Routers. Both processes call this."""
    found = {
        name: (lambda arrays, f=call.function: f(**arrays), ({k: jnp.array(a) for k, a in call.arrays.items()},))
        for name, call in CALLS.items()
    }
    arrays = {name: jnp.array(a) for call in CALLS.values() for name, a in call.arrays.items()}
    x, ids = jnp.array(CALLS["dense_router"].arrays["x"]), arrays["token_ids"]
    layer = {name: arrays[name] for name in ("weight", "logit_bias", "expert_scale")}
    indices = jnp.array(jax_layouts.ids(9))
    layout = expert_layout(indices, EXPERTS, alignment=2)
    grouped = RoutingMethod(32, 4, "sigmoid", num_groups=4, top_groups=2, scale=2.5)
    dense, hashed = Router(grouped, bias=arrays["bias"], **layer), Router(METHOD, table=arrays["table"], **layer)
    return found | {
        "topk_select of indices": (lambda a: topk_select(a, 3, return_values=False), (arrays["scores"],)),
        "of a Router": (lambda router, x: router(x), (dense, x)),
        "of a hash Router": (lambda router, x, ids: router(x, ids), (hashed, x, ids)),
        "of a hash Router alone": (lambda r, x, ids: r(x, ids), (Router(METHOD, table=arrays["table"]), x, ids)),
        "of a hash layer to logits": (
            lambda x, ids, table, gate: hash_router(ids, table, METHOD, x=x, weight=gate, return_logits=True),
            (x, ids, arrays["table"], arrays["weight"]),
        ),
        "to Routers": (lambda routers: jax.tree.map(lambda a: a + 1, routers), ([dense, hashed],)),
        "to a layout": (lambda a: expert_layout(a, EXPERTS, alignment=4), (indices,)),
        "of a layout": (lambda x, layout: unpermute(permute(x, layout), layout), (x, layout)),
        "to a plan": (
            lambda a: activation_topk(a, METHOD, layout=LayoutSpec(want="row_experts")),
            (arrays["logits"],),
        ),
        "of named tuples": (lambda routing: routing._replace(weights=0 * routing.weights), (dense(x),)),
    }


PROGRAMS = (*NAMES, *(name for name in programs() if name not in NAMES))


def written(function: Any, *arguments: Any, ops: Any = OPS, vjp_order: int = 0) -> bytes:
    safe = [jax.export.DisabledSafetyCheck.custom_call(f"cupy_router.{op}") for op in ops]
    exported = jax.export.export(jax.jit(function), disabled_checks=safe)(*arguments)
    return bytes(exported.serialize(vjp_order=vjp_order))


def load(folder: Path) -> list[str]:
    """Run all programs in a folder, write the leaves of their results beside them, and return their structures."""
    structures = []
    for number, (name, (_, arguments)) in enumerate(programs().items()):
        program = jax.export.deserialize(bytearray((folder / f"{number}").read_bytes()))
        result = program.call(*arguments)
        np.savez(folder / f"{number}.npz", *map(np.asarray, jax.tree.leaves(result)))
        structures.append(f"{name} {jax.tree.structure(result)}")
    return structures


def run(program: str, *arguments: str, folder: Path = ROOT) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])}
    return subprocess.run(
        [sys.executable, "-c", program, *arguments],
        cwd=folder, capture_output=True, text=True, timeout=120, env=environment,
    )  # fmt: skip


@pytest.mark.slow("process")
def test_programs_of_all_calls_run_in_another_process(tmp_path: Path) -> None:
    wanted = {}
    for number, (name, (function, arguments)) in enumerate(programs().items()):
        (tmp_path / f"{number}").write_bytes(written(function, *arguments))
        wanted[name] = function(*arguments)
    code = "import sys, pathlib, tests.test_jax_export as t; print(*t.load(pathlib.Path(sys.argv[1])), sep='\\n')"
    done = run(code, str(tmp_path))
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines() == [f"{name} {jax.tree.structure(want)}" for name, want in wanted.items()]
    for number, want in enumerate(wanted.values()):
        found, leaves = np.load(tmp_path / f"{number}.npz"), jax.tree.leaves(want)
        assert len(found.files) == len(leaves)
        for key, leaf in zip(found.files, leaves, strict=True):
            assert (found[key].dtype, found[key].tobytes()) == (leaf.dtype, np.asarray(leaf).tobytes())


@pytest.mark.slow("seconds", every=3)
@pytest.mark.parametrize("name", PROGRAMS)
def test_what_a_program_returns_has_its_type(name: str) -> None:
    function, arguments = programs()[name]
    got = jax.export.deserialize(bytearray(written(function, *arguments))).call(*arguments)
    want = function(*arguments)
    assert jax.tree.structure(got) == jax.tree.structure(want)
    if name in NAMES:
        same_bits(got, want)


def test_a_router_with_a_score_function_is_not_written() -> None:
    """Nobody else could read its method. Its arrays can be arguments."""
    own = ScoreFunction("own", cuda="-x", numpy=lambda x: -x)
    router = Router(RoutingMethod(32, 4, own), weight=jnp.ones((32, 8)))
    x = jnp.ones((2, 8))
    message = r"^Router: ScoreFunction\('own'\) exists in this process only, so .* pass the arrays of the router"
    for function, arguments in ((lambda r, x: r(x), (router, x)), (lambda r: r, (router,))):
        with pytest.raises(ValueError, match=message):
            written(function, *arguments)
    program = written(lambda weight, x: Router(router.method, weight=weight)(x), router.weight, x)
    same_bits(jax.export.deserialize(bytearray(program)).call(router.weight, x), router(x))


def rows_of(x: Any, indices: Any, weights: Any) -> Any:
    layout = expert_layout(indices, EXPERTS, alignment=4)
    rows = jnp.tanh(permute(x, layout, weights=weights))
    return unpermute(rows, layout, weights, residual=x), layout.positions, layout.offsets


def test_layouts_of_any_number_of_tokens() -> None:
    """With sizes that JAX knows as expressions only. What depends on them is checked when the program runs."""
    (n,) = jax.export.symbolic_shape("n")
    shapes = jax.ShapeDtypeStruct((n, 8), "f4"), jax.ShapeDtypeStruct((n, TOP_K), "i4")
    shapes += (jax.ShapeDtypeStruct((n, TOP_K), "f4"),)

    def loss(*given: Any) -> Any:
        return (rows_of(*given)[0] ** 2).sum()

    for function in (rows_of, jax.grad(loss, (0, 2))):
        program = jax.export.deserialize(bytearray(written(function, *shapes)))
        for number in (1, 5, 33):
            draw = np.random.default_rng(number)
            x, weights = (draw.standard_normal((number, width), np.float32) for width in (8, TOP_K))
            given = jnp.array(x), jnp.array(jax_layouts.ids(number)), jnp.array(weights)
            for got, want in zip(program.call(*given), function(*given), strict=True):
                np.testing.assert_allclose(got, want, rtol=1e-5, atol=1e-6)
    program = jax.export.deserialize(
        bytearray(written(lambda indices: expert_layout(indices, EXPERTS, pad=7).order, shapes[1]))
    )
    assert (np.asarray(program.call(jax_layouts.ids(2))) < 8).all()
    with pytest.raises(Exception, match=r"expert_layout: pad must lie outside of the pairs 0..8 of indices, got 7"):
        jax.block_until_ready(program.call(jax_layouts.ids(3)))
    with pytest.raises(ValueError, match=r"^ExpertLayout: a program for any number of tokens cannot .* the size n:"):
        written(lambda indices: expert_layout(indices, EXPERTS), shapes[1])


# -- The example of the documents --------------------------------------------------------------------------------------


def section() -> str:
    text = (ROOT / "docs" / "frameworks.md").read_text()
    return re.split(r"^## ", text.partition("\n## Programs of jax.export\n")[2], maxsplit=1, flags=re.M)[0]


@pytest.mark.slow("process")
def test_the_example_of_the_documents(tmp_path: Path) -> None:
    """Two programs: one writes, the other reads, and needs its import."""
    writes, reads = re.findall(r"```python\n(.*?)```", section(), re.S)
    for program in (writes, reads):
        done = run(program, folder=tmp_path)
        assert done.returncode == 0, done.stderr
    assert done.stdout == "[[0, 1], [1, 0]]\n"
    without = re.sub(r"^import cupy_router\.jax\n", "", reads, flags=re.M)
    assert without != reads
    done = run(without, folder=tmp_path)
    assert done.returncode != 0
    assert "cupy_router.Routing" in done.stderr
    unsafe = writes.replace(", disabled_checks=safe", "")
    assert "no compatibility guarantees" in run(unsafe, folder=tmp_path).stderr


def test_the_documents_name_the_calls() -> None:
    """Those of gradients are checked where they are exported, in test_jax_transforms."""
    rows = dict(re.findall(r"^\| (.*?) \| (.*?) \|$", section(), re.M))
    assert "the name of the function" in rows["one of the functions"]
    hash_layers = "a Router with a table, `hash_router` with `return_logits`"
    names = ("a Router", "of a Router"), (hash_layers, "of a hash Router"), (hash_layers, "of a hash layer to logits")
    for row, name in names:
        function, arguments = programs()[name]
        written(function, *arguments, ops=re.findall(r"`(\w+)`", rows[row]))
    function, arguments = programs()["to a plan"]
    (layout,) = re.findall(r"`(\w+)`", rows["`layout=` of `activation_topk` or `hash_router`"])
    written(function, *arguments, ops=["activation_topk", layout])
    function, arguments = programs()["of a layout"]
    ops = re.findall(r"`(\w+)`", rows["gradients of `permute`, of `unpermute`"])
    written(function, *arguments, ops=["permute", "unpermute", *ops], vjp_order=1)
    assert ops == ["permute_backward", "unpermute_backward"]
    for name in ("activation_topk", "hash_router of logits", "dense_router", "topk_select"):
        function, arguments = programs()[name]
        written(function, *arguments, ops=[name.split()[0]])
    (logits,) = (jnp.array(array) for array in CALLS["activation_topk"].arrays.values())
    ops = ["activation_topk", *re.findall(r"`(activation_topk_backward)`", section())]
    program = written(lambda logits: activation_topk(logits, METHOD), logits, ops=ops, vjp_order=1)
    call = jax.export.deserialize(bytearray(program)).call
    got, want = (
        jax.grad(lambda a, route=route: (route(a).weights ** 2).sum())(logits)
        for route in (call, lambda a: activation_topk(a, METHOD))
    )
    np.testing.assert_allclose(got, want, rtol=1e-5, atol=1e-6)
