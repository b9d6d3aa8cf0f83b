# SPDX-License-Identifier: Apache-2.0
"""Calls of arrays that are sharded over several devices: python -m tests.jax_mesh NAME WHERE.

WHERE is "cpu", which has four devices then, or "gpu".
"""

from __future__ import annotations

import os
import re
import sys
from typing import Any

os.environ |= (
    {"XLA_PYTHON_CLIENT_PREALLOCATE": "false"}
    if sys.argv[2] == "gpu"
    else {"JAX_PLATFORMS": "cpu", "XLA_FLAGS": "--xla_force_host_platform_device_count=4"}
)

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

from cupy_router import (
    LayoutSpec,
    Router,
    Routing,
    activation_topk,
    dense_router,
    expert_layout,
    permute,
    topk_select,
    unpermute,
)
from tests.gradient_cases import KINDS
from tests.jax_calls import METHOD, SHARED, calls, same_bits
from tests.jax_gradients import Case
from tests.jax_layouts import EXPERTS, HIDDEN, TOP_K, ids

NUM_DEVICES = 4 if len(jax.devices()) >= 4 else 2
AUTO, EXPLICIT = AxisType.Auto, AxisType.Explicit
ROWS = ("logits", "x", "token_ids")


def mesh(**axes: AxisType) -> Any:
    sizes = (NUM_DEVICES,) if len(axes) == 1 else (2, NUM_DEVICES // 2)
    return jax.make_mesh(sizes, tuple(axes), axis_types=tuple(axes.values()), devices=jax.devices()[:NUM_DEVICES])


def put(array: Any, where: Any, *spec: Any) -> Any:
    return jax.device_put(array, NamedSharding(where, P(*spec)))


def spec_of(array: Any) -> Any:
    return jax.typeof(array).sharding.spec


def forward() -> None:
    """Rows are routed on their device, whether other arrays are sharded or not; num_valid counts global rows."""
    one, two, mixed = mesh(a=EXPLICIT), mesh(a=EXPLICIT, b=EXPLICIT), mesh(a=EXPLICIT, b=AUTO)
    for where, rows in ((one, "a"), (two, "b"), (two, ("b", "a")), (mixed, "a")):
        for name, call in calls(n=16).items():
            want = call({name: jnp.array(array) for name, array in call.arrays.items()})
            routed = jax.jit(call.function)
            placed = {name: put(a, where, *(() if name in SHARED else (rows,))) for name, a in call.arrays.items()}
            got = routed(**placed)  # JAX knows the mesh by its arrays
            same_bits(got, want)
            assert all(spec_of(array) == P(rows, None) for array in got), (name, got)
            assert "all-gather" not in routed.lower(**placed).compile().as_text(), name
            with jax.set_mesh(where):
                for other in ("weight", "bias", "table", "starts"):
                    if other in placed:  # each on another axis than rows are, or on none
                        placed[other] = put(call.arrays[other], where, None if other == "starts" else "a")
                got = routed(**placed)
                same_bits(got, want)
                assert spec_of(got.indices) == P(rows, None), (name, got)
                if "x" in placed:
                    same_bits(routed(**{**placed, "x": put(call.arrays["x"], where, None, "a")}), want)
    logits = jnp.array(calls(n=16)["activation_topk"].arrays["logits"])
    for number in (0, 5, 16, 2**31 - 1, -(2**31)):
        count = jnp.full(1, number, jnp.int32)
        want = activation_topk(logits, METHOD, num_valid=count)
        pad = jax.jit(lambda logits, count: activation_topk(logits, METHOD, num_valid=count))
        same_bits(pad(put(logits, one, "a"), count), want)
        if 0 <= number <= 16:
            same_bits(jax.jit(lambda a, n=number: activation_topk(a, METHOD, num_valid=n))(put(logits, one, "a")), want)


def gradients() -> None:
    """Gradients are sharded like their inputs."""
    for axes, spec in (({"a": EXPLICIT}, ("a",)), ({"a": EXPLICIT, "b": EXPLICIT}, ("b", "a"))):
        where = mesh(**axes)
        for i, kind in enumerate(KINDS):
            case = Case(kind, "soft cap" if i in (0, 1, 4, 5) else "logit scale", jnp.array)
            many = {n: np.concatenate([a, a[:2]]) for n, a in case.hosts.items() if n in ROWS}
            upstream = jnp.array(np.concatenate([case.upstream_host, case.upstream_host[:2]]))
            hosts = {name: jnp.array(array) for name, array in {**case.hosts, **many}.items()}
            smooth = {name: hosts[name] for name in case.smooth}
            fixed = {name: hosts[name] for name in case.fixed}

            def loss(smooth: Any, fixed: Any, case: Any = case, upstream: Any = upstream) -> Any:
                return (case.route({**fixed, **smooth}).weights * upstream).sum()

            specs = {name: P(*spec[: a.ndim]) if name in many else P() for name, a in hosts.items()}
            placed = {name: put(array, where, *specs[name]) for name, array in hosts.items()}
            want = jax.grad(loss)(smooth, fixed)
            with jax.set_mesh(where):
                grads = [jax.grad(loss), jax.jit(jax.grad(loss)), jax.jit(jax.grad(jax.checkpoint(loss)))]
                for grad in grads["Router" in kind :]:  # a Router is made of arrays of one device, or of tracers
                    got = grad({name: placed[name] for name in smooth}, {name: placed[name] for name in fixed})
                    for name in smooth:
                        array = placed[name]
                        assert jax.typeof(got[name]) == jax.typeof(array), (kind, name, jax.typeof(got[name]))
                        wide, right = (np.asarray(a).astype(np.float32) for a in (got[name], want[name]))
                        step = {"float32": 2.0**-20, "float16": 2.0**-9, "bfloat16": 2.0**-6}[str(array.dtype)]
                        np.testing.assert_allclose(wide, right, rtol=step, atol=step * abs(right).max(), err_msg=name)


def vmap() -> None:
    """vmap over a sharded axis, over others, and over both; also with a gate per call."""
    one, two = mesh(a=EXPLICIT), mesh(a=EXPLICIT, b=EXPLICIT)
    rng = np.random.default_rng(0)
    x = jnp.array(rng.integers(-4, 5, (4, 8, 16)) / 4, jnp.float32)
    gates = jnp.array(rng.integers(-8, 9, (4, 32, 16)) / 16, jnp.float32)
    counts = jnp.array([0, 3, 8, 5], jnp.int32)

    def route(x: Any, gate: Any, count: Any) -> Any:
        return dense_router(x, gate, METHOD, num_valid=count)

    def loss(x: Any, gate: Any) -> Any:
        return (dense_router(x, gate, METHOD).weights ** 2).sum()

    for axes in ((0, None, None), (0, None, 0), (0, 0, 0), (None, 0, None)):
        given = tuple(a if axis == 0 else a[1] for a, axis in zip((x, gates, counts), axes, strict=True))
        want = jax.vmap(route, in_axes=axes)(*given)
        by = jax.vmap(jax.grad(loss, argnums=(0, 1)), in_axes=axes[:2])
        want_by = by(*given[:2])
        for where, spec in ((one, "a"), (two, "a"), (one, None)):
            rows = {one: None if spec else "a", two: "b"}[where]
            with jax.set_mesh(where):
                placed = [put(a, where, *((spec,) if axis == 0 else ())) for a, axis in zip(given, axes, strict=True)]
                placed[0] = put(given[0], where, *((spec, rows) if axes[0] == 0 else (rows,)))
                for mapped in (jax.vmap(route, in_axes=axes), jax.jit(jax.vmap(route, in_axes=axes))):
                    got = mapped(*placed)
                    same_bits(got, want)
                    assert spec_of(got.indices) == P(spec, rows, None), (axes, spec, jax.typeof(got.indices))
                if 1 in where.axis_sizes:  # XLA refuses a sum over such an axis in a partly manual computation
                    continue
                for a, b in zip(jax.jit(by)(*placed[:2]), want_by, strict=True):
                    np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6)
    with jax.set_mesh(one):
        each = jax.jit(jax.vmap(lambda row: topk_select(row[None], 3).indices[0]))(put(x[0], one, "a"))
    assert spec_of(each) == P("a", None)
    np.testing.assert_array_equal(each, topk_select(x[0], 3).indices)


def inside_shard_map() -> None:
    """shard_map over some axes of a mesh; the others are explicit or automatic."""
    logits = jnp.array(calls(n=16)["activation_topk"].arrays["logits"])
    want = activation_topk(logits, METHOD)

    def loss(logits: Any) -> Any:
        return (activation_topk(logits, METHOD).weights ** 2).sum()

    for kind in (EXPLICIT, AUTO):
        where = mesh(a=EXPLICIT, b=kind)
        for check_vma in (True, False):
            options: dict[str, Any] = {"mesh": where, "axis_names": {"a"}, "check_vma": check_vma}
            options |= {"in_specs": P("a"), "out_specs": P("a")}
            with jax.set_mesh(where):
                placed = put(logits, where, "a")
                same_bits(jax.jit(jax.shard_map(lambda a: activation_topk(a, METHOD), **options))(placed), want)
                got = jax.jit(jax.shard_map(jax.grad(loss), **options))(placed)
            np.testing.assert_allclose(got, jax.grad(loss)(logits), rtol=1e-6, atol=1e-7)


def loops() -> None:
    one = mesh(a=EXPLICIT)
    logits = jnp.array(calls(n=16)["activation_topk"].arrays["logits"])
    want = activation_topk(logits, METHOD)
    twice = jax.tree.map(lambda array: array * 2, want)

    def step(total: Any, _: Any, logits: Any) -> Any:
        routed = activation_topk(logits, METHOD)
        return Routing(total.weights + routed.weights, total.indices + routed.indices), None

    with jax.set_mesh(one):
        placed = put(logits, one, "a")
        zero = jax.tree.map(lambda array: put(jnp.zeros_like(array), one, "a"), want)
        got = jax.jit(lambda a: jax.lax.scan(lambda t, x: step(t, x, a), zero, None, length=2)[0])(placed)
        same_bits(got, twice)
        with jax.disable_jit():
            grad = jax.grad(lambda a: (activation_topk(a, METHOD).weights ** 2).sum())(placed)
        assert jax.typeof(grad) == jax.typeof(placed)


def layouts() -> None:
    """Layouts of all rows where arrays are sharded, of local rows inside shard_map, and of local experts."""
    draw = np.random.default_rng(1)
    x, weights = jnp.array(draw.standard_normal((16, HIDDEN)), jnp.float32), jnp.array(draw.random((16, TOP_K)), "f4")
    indices, logits = jnp.array(ids(16)), jnp.array(draw.standard_normal((16, 32)), jnp.float32)

    def block(x: Any, indices: Any, weights: Any, **options: Any) -> Any:
        layout = expert_layout(indices, EXPERTS, alignment=2, **options)
        return unpermute(jnp.tanh(permute(x, layout)), layout, weights, residual=x), layout.positions

    def loss(x: Any, indices: Any, weights: Any) -> Any:
        return (block(x, indices, weights)[0] ** 2).sum()

    def plan(logits: Any) -> Any:
        return activation_topk(logits, METHOD, layout=LayoutSpec(alignment=2))

    def close(got: Any, want: Any) -> None:
        for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
            np.testing.assert_allclose(np.asarray(a), np.asarray(b), rtol=1e-6, atol=1e-6)

    given = x, indices, weights
    want, want_by, wanted_plan = block(*given), jax.grad(loss, (0, 2))(*given), plan(logits)
    size = 16 // NUM_DEVICES
    parts = [slice(size * i, size * i + size) for i in range(NUM_DEVICES)]
    local = [block(*(array[part] for array in given)) for part in parts]
    local_plans = [plan(logits[part]) for part in parts]
    for axes in ({"a": EXPLICIT}, {"a": AUTO}, {"a": EXPLICIT, "b": EXPLICIT}, {"a": EXPLICIT, "b": AUTO}):
        where = mesh(**axes)
        with jax.set_mesh(where):
            placed = [put(array, where, "a") for array in given]
            close(jax.jit(block)(*placed), want)
            by = jax.jit(jax.grad(loss, (0, 2)))(*placed)
            close(by, want_by)
            if AUTO not in axes.values():
                assert [jax.typeof(a) for a in by] == [jax.typeof(a) for a in (placed[0], placed[2])]
            routed = jax.jit(plan)
            close(routed(put(logits, where, "a")), wanted_plan)
            program = routed.lower(put(logits, where, "a")).compile().as_text()
            if axes["a"] == EXPLICIT:  # rows are routed where they are, and only indices are gathered
                assert "f32[16,32]" not in program
    for where in (mesh(a=EXPLICIT), mesh(a=AUTO)):
        for check_vma in (True, False):
            options: dict[str, Any] = {"mesh": where, "in_specs": P("a"), "out_specs": P("a"), "check_vma": check_vma}
            with jax.set_mesh(where):
                placed = [put(array, where, "a") for array in given]
                close(jax.jit(jax.shard_map(block, **options))(*placed), _joined(local))
                by = jax.jit(jax.shard_map(jax.grad(loss, (0, 2)), **options))(*placed)
                plans = jax.jit(jax.shard_map(lambda a: plan(a).layout.positions, **options))(put(logits, where, "a"))
            close(by, want_by)  # a token's gradient depends on its own rows
            close(plans, _joined([each.layout.positions for each in local_plans]))

    def of_local_experts(x: Any, indices: Any, weights: Any) -> Any:
        """Each device has as many experts, and gathers all tokens."""
        gathered = [jax.lax.all_gather(array, "a", tiled=True) for array in (x, indices, weights)]
        local = -(-EXPERTS // NUM_DEVICES)
        mine = jnp.arange(EXPERTS, dtype=jnp.int32) - local * jax.lax.axis_index("a")  # traced, so no `experts`
        layout = expert_layout(gathered[1], EXPERTS, alignment=2, expert_map=mine, num_local=local)
        part = unpermute(jnp.tanh(permute(gathered[0], layout)), layout, gathered[2])
        return x + jax.lax.psum_scatter(part, "a", tiled=True)

    where = mesh(a=AUTO)
    mapped = jax.shard_map(of_local_experts, mesh=where, in_specs=P("a"), out_specs=P("a"))
    placed = [put(array, where, "a") for array in given]
    close(jax.jit(mapped)(*placed), want[0])
    close(jax.jit(jax.grad(lambda x, i, w: (mapped(x, i, w) ** 2).sum(), (0, 2)))(*placed), want_by)


def _joined(parts: Any) -> Any:
    return jax.tree.map(lambda *arrays: np.concatenate([np.asarray(array) for array in arrays]), *parts)


def devices() -> None:
    """Eager results are on the device of the first array, and committed to it if that array is."""
    first, second, third, _ = jax.devices()
    host = calls()["activation_topk of a layer"].arrays
    want = activation_topk(host["logits"], METHOD, bias=host["bias"])
    bias = jnp.array(host["bias"])

    def right(got: Any, device: Any, committed: bool = True) -> None:
        for a, b in zip(got, want, strict=True):
            assert (a.devices(), a.committed) == ({device}, committed)
            np.testing.assert_array_equal(a, b)

    for device in (first, second):
        logits = jax.device_put(host["logits"], device)
        for other in (host["bias"], jax.device_put(bias, device)):  # NumPy's memory goes with that of any device
            for default in (first, third):
                with jax.default_device(default):
                    right(activation_topk(logits, METHOD, bias=other), device)
    with jax.default_device(third):
        logits = jnp.array(host["logits"])
    right(activation_topk(logits, METHOD, bias=host["bias"]), third, committed=False)
    assert isinstance(activation_topk(host["logits"], METHOD, bias=jax.device_put(bias, second)).weights, np.ndarray)

    said = (
        "activation_topk: all arrays must lie on one device, got logits float32 [9, 32] on cpu:1, bias float32 [32] on "
    )
    logits = jax.device_put(host["logits"], second)
    for device, its in ((third, "cpu:2"), (first, "cpu")):
        fails(said + its, lambda device=device: activation_topk(logits, METHOD, bias=jax.device_put(bias, device)))
    said = "Router: all arrays must lie on one device, got weight float32 [32, 8] on cpu:2, bias float32 [32] on cpu:1"
    weight = jax.device_put(jnp.ones((32, 8)), third)
    fails(said, lambda: Router(METHOD, weight=weight, bias=jax.device_put(bias, second)))


def several_devices() -> None:
    """Only traced calls take arrays on several devices; errors name the devices."""
    where, said = mesh(a=AUTO), "must lie on one device outside of jax.jit, got a JAX array on 4 devices"
    logits, bias = put(jnp.ones((8, 32)), where, "a"), put(jnp.zeros(32), where)
    fails(f"activation_topk: logits {said}", lambda: activation_topk(logits, METHOD))
    fails(f"activation_topk: bias {said}", lambda: activation_topk(jnp.ones((8, 32)), METHOD, bias=bias))
    fails(f"activation_topk: bias {said}", lambda: activation_topk(np.ones((8, 32), "f"), METHOD, bias=bias))
    fails(f"Router: weight {said}", lambda: Router(METHOD, weight=logits))
    fails(f"Router: bias {said}", lambda: Router(METHOD, weight=jnp.ones((32, 8)), bias=bias))
    # Beside a tracer they are right, whichever comes first.
    scale = jnp.ones(32)
    got = jax.grad(lambda scale: (activation_topk(logits, METHOD, expert_scale=scale).weights ** 2).sum())(scale)
    assert got.shape == (32,)


def fails(message: str, call: Any) -> None:
    with pytest.raises(ValueError, match=f"^{re.escape(message)}$"):
        call()


if __name__ == "__main__":
    assert len(jax.devices()) >= NUM_DEVICES
    globals()[sys.argv[1]]()
    sys.stdout.write("done\n")
