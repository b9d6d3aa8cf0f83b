# SPDX-License-Identifier: Apache-2.0
"""cupy_router.jax.expert_parallel on meshes of up to four devices: python -m tests.jax_expert_parallel NAME WHERE.

WHERE is "cpu", which has four devices then, or "gpu".
"""

from __future__ import annotations

import os
import sys
from dataclasses import dataclass
from functools import partial
from itertools import pairwise
from typing import Any

os.environ |= (
    {"XLA_PYTHON_CLIENT_PREALLOCATE": "false", "JAX_DEFAULT_MATMUL_PRECISION": "highest"}
    if sys.argv[2] == "gpu"
    else {"JAX_PLATFORMS": "cpu", "XLA_FLAGS": "--xla_force_host_platform_device_count=4", "NPROC": "16"}
)  # NPROC: threads of XLA, in which devices wait for each other

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

from cupy_router import expert_layout, permute, unpermute
from cupy_router.jax import expert_parallel
from examples import moe_jax, moe_jax_mesh

ON_GPU = sys.argv[2] == "gpu"
NUM_DEVICES = min(len(jax.devices()), 4)
HIDDEN = 8
TOLERANCE = {"float32": 1e-5, "float16": 5e-3, "bfloat16": 3e-2}
NAMES = ("x", "weights", "matrices")  # with gradients


@dataclass(frozen=True)
class Problem:
    """Tokens of all devices, and their experts."""

    num_tokens: int
    num_experts: int
    top_k: int
    dtype: str = "float32"
    weight_dtype: str = "float32"
    index_dtype: str = "int32"

    def arrays(self) -> dict[str, Any]:
        draw, n = np.random.default_rng(0), self.num_tokens
        indices = draw.random((n, self.num_experts)).argsort(axis=1)[:, : self.top_k].astype(self.index_dtype)
        weights = draw.standard_normal((n, self.top_k))
        if n > 4:
            indices[1, 0] = indices[1, -1]  # an expert twice
            indices[3, -1], weights[3, -1] = self.num_experts, np.inf  # no expert
        return {
            "x": jnp.array(draw.standard_normal((n, HIDDEN)), self.dtype),
            "weights": jnp.array(weights, self.weight_dtype),
            "indices": jnp.array(indices),
            "matrices": jnp.array(draw.standard_normal((self.num_experts, HIDDEN, HIDDEN)), "float32"),
            "target": jnp.array(draw.standard_normal((n, HIDDEN)), self.dtype),
        }


def experts(rows: Any, layout: Any, matrices: Any) -> Any:
    """Return what experts return for their rows, each row by itself, and NaN for rows without a pair."""
    expert = jnp.searchsorted(layout.ends, jnp.arange(layout.capacity), side="right")
    chosen = matrices[jnp.minimum(expert, len(matrices) - 1)]
    y = sum(rows.astype(jnp.float32)[:, i, None] * chosen[:, i] for i in range(HIDDEN))
    return jnp.where((expert < len(matrices))[:, None], y.clip(-1.5, 1.5).astype(rows.dtype), jnp.nan)


def train(layer: Any, given: tuple[Any, ...], target: Any, steps: int) -> dict[str, Any]:
    """Return the sums of all steps, and the gradients of the last one.

    The loss of several steps is half the squared distance to the target. That of one step is linear, so that gradients
    do not depend on how sums are rounded.
    """

    @jax.jit
    def step(*given: Any) -> Any:
        out, back = jax.vjp(layer, *given)
        return out, *back(target if steps == 1 else out - target)

    outs = []
    for _ in range(steps):
        out, *gradients = step(*given)
        outs.append(out)
        given = tuple(a - g / 64 for a, g in zip(given, gradients, strict=True))
    return dict(zip(("out", *NAMES), (jnp.stack(outs), *gradients), strict=True))


def of_one_device(problem: Problem, steps: int = 1) -> dict[str, Any]:
    """Return the sums and gradients of all tokens and experts."""
    arrays = problem.arrays()

    def layer(x: Any, weights: Any, matrices: Any) -> Any:
        layout = expert_layout(arrays["indices"], problem.num_experts)
        return unpermute(experts(permute(x, layout), layout, matrices), layout, weights)

    return train(layer, tuple(arrays[name] for name in NAMES), arrays["target"], steps)


def rows_of_devices(num_experts: int, num_devices: int) -> Any:
    """Return the experts whose parameters each device has, num_local of them, some for nothing but their shape."""
    local = np.arange(-(-num_experts // num_devices))
    firsts = np.arange(num_devices)[:, None] * num_experts // num_devices
    return np.minimum(firsts + local, num_experts - 1).ravel()


def of_devices(
    problem: Problem,
    mesh: Any,
    spec: Any = "a",
    axis: Any = "a",
    check_vma: bool = True,
    steps: int = 1,
    **options: Any,
) -> dict[str, Any]:
    """Return the same, computed on a mesh. spec: how tokens are sharded. axis: over which experts are."""
    arrays = problem.arrays()
    size = int(np.prod([mesh.shape[name] for name in np.atleast_1d(axis)]))

    def local(x: Any, weights: Any, indices: Any, matrices: Any) -> Any:
        parallel = expert_parallel(axis, problem.num_experts, **options)
        rows, layout, ticket = parallel.dispatch(x, weights, indices)
        assert rows.dtype == x.dtype
        assert rows.shape == (layout.capacity, HIDDEN)
        assert layout.counts.shape == (parallel.num_local,) == (len(matrices),)
        return parallel.combine(experts(rows, layout, matrices), ticket)

    in_specs = P(spec), P(spec), P(spec), P(axis)
    mapped = jax.shard_map(local, mesh=mesh, in_specs=in_specs, out_specs=P(spec), check_vma=check_vma)
    chosen = rows_of_devices(problem.num_experts, size)

    def layer(x: Any, weights: Any, blocks: Any) -> Any:
        return mapped(x, weights, put(arrays["indices"], mesh, spec), blocks)

    x, weights, target = (put(arrays[name], mesh, spec) for name in ("x", "weights", "target"))
    with jax.set_mesh(mesh):
        named = train(layer, (x, weights, put(arrays["matrices"][chosen], mesh, axis)), target, steps)
    blocks, named["matrices"] = np.asarray(named["matrices"]), np.zeros_like(arrays["matrices"])
    np.add.at(named["matrices"], chosen, blocks)
    return named


def mesh(sizes: tuple[int, ...], *types: AxisType) -> Any:
    devices = jax.devices()[: int(np.prod(sizes))]
    return jax.make_mesh(sizes, ("a", "b")[: len(sizes)], axis_types=types, devices=devices)


def put(array: Any, where: Any, spec: Any) -> Any:
    return jax.device_put(array, NamedSharding(where, P(spec)))


def same(got: dict[str, Any], want: dict[str, Any], exact: bool, dtype: str, case: str) -> None:
    assert got.keys() == want.keys()
    for name, array in got.items():
        assert array.dtype == want[name].dtype, (case, name)
        if name == "matrices":
            assert (np.asarray(array) != 0).any(), case
        a, b = (np.asarray(each).astype(np.float32) for each in (array, want[name]))
        if exact and not (ON_GPU and name == "matrices"):  # there, XLA adds their gradients up in any order
            np.testing.assert_array_equal(a, b, err_msg=f"{case}, {name}")
        else:
            np.testing.assert_allclose(a, b, rtol=TOLERANCE[dtype], atol=TOLERANCE[dtype], err_msg=f"{case}, {name}")


def against_one_device() -> None:
    """Several devices, which divide the experts or not, or are more than there are experts."""
    problems = [
        Problem(12, 12, 3),
        Problem(12, 9, 3, weight_dtype="bfloat16", index_dtype="uint8"),
        Problem(24, 3, 2, dtype="bfloat16"),
        Problem(12, 1, 1),
        Problem(24, 10, 4, dtype="float16", index_dtype="int16"),
    ]
    for problem in problems:
        want = of_one_device(problem)
        for num_devices in range(2, NUM_DEVICES + 1):
            for exact in (False, True):
                got = of_devices(problem, mesh((num_devices,), AxisType.Auto), exact=exact)
                same(got, want, exact, problem.dtype, f"{problem} on {num_devices} devices, exact={exact}")


def kinds_of_meshes() -> None:
    """Explicit axes, two axes of experts, experts that several devices have, and unchecked types."""
    problem = Problem(16, 6, 3)
    want = of_one_device(problem)
    explicit, auto = AxisType.Explicit, AxisType.Auto
    for exact in (False, True):
        for check_vma in (False, True):
            for kind in (explicit, auto):
                got = of_devices(problem, mesh((NUM_DEVICES,), kind), check_vma=check_vma, exact=exact)
                same(got, want, exact, "float32", f"{kind}, check_vma={check_vma}, exact={exact}")
                if NUM_DEVICES < 4:
                    continue
                both = mesh((2, 2), kind, auto)
                got = of_devices(problem, both, ("a", "b"), ("a", "b"), check_vma, exact=exact)
                same(got, want, exact, "float32", f"two axes of experts, {kind}, check_vma={check_vma}, exact={exact}")
                got = of_devices(problem, both, ("a", "b"), "b", check_vma, exact=exact)
                matrices = got.pop("matrices"), want["matrices"]  # two devices add their gradients
                same(got, {n: a for n, a in want.items() if n != "matrices"}, exact, "float32", "experts twice")
                np.testing.assert_allclose(*matrices, rtol=1e-5, atol=1e-5)


def the_same_tokens() -> None:
    """Devices with the same tokens and different experts for them: gradients of the tokens are added up."""
    problem, where = Problem(16, 6, 3), mesh((NUM_DEVICES,), AxisType.Auto)
    arrays = problem.arrays()
    x, blocks = arrays["x"][: 16 // NUM_DEVICES], arrays["matrices"][rows_of_devices(6, NUM_DEVICES)]

    def plain(x: Any) -> Any:
        layout = expert_layout(arrays["indices"], 6)
        rows = permute(jnp.tile(x, (NUM_DEVICES, 1)), layout)
        return unpermute(experts(rows, layout, arrays["matrices"]), layout, arrays["weights"])

    want, back = jax.vjp(plain, x)
    (wanted,) = back(arrays["target"])
    for exact in (False, True):

        def layer(x: Any, weights: Any, indices: Any, blocks: Any, exact: bool = exact) -> Any:
            parallel = expert_parallel("a", 6, exact=exact)
            rows, layout, ticket = parallel.dispatch(x, weights, indices)
            return parallel.combine(experts(rows, layout, blocks), ticket)

        specs = P(), P("a"), P("a"), P("a")
        mapped = jax.jit(jax.shard_map(layer, mesh=where, in_specs=specs, out_specs=P("a")))
        got, back = jax.vjp(lambda x, f=mapped: f(x, arrays["weights"], arrays["indices"], blocks), x)
        np.testing.assert_allclose(got, want, rtol=1e-5, atol=1e-5)
        np.testing.assert_allclose(back(arrays["target"])[0], wanted, rtol=1e-4, atol=1e-4)


def one_device() -> None:
    """No collective, and the bits of plain calls."""
    problem = Problem(9, 8, 3, weight_dtype="bfloat16")
    for exact in (False, True):
        got = of_devices(problem, mesh((1,), AxisType.Auto), exact=exact)
        same(got, of_one_device(problem), True, "float32", f"exact={exact}")
    for size, wanted in ((1, set()), (2, {"all_gather", "reduce_scatter"})):
        assert primitives_on(size) & {"all_gather", "reduce_scatter", "psum", "all_to_all", "ppermute"} == wanted


def primitives_on(num_devices: int) -> set[str]:
    where = mesh((num_devices,), AxisType.Auto)

    def layer(x: Any, weights: Any, indices: Any) -> Any:
        parallel = expert_parallel("a", 8)
        rows, _, ticket = parallel.dispatch(x, weights, indices)
        return parallel.combine(rows, ticket)

    arrays = Problem(8, 8, 3).arrays()
    mapped = jax.shard_map(layer, mesh=where, in_specs=P("a"), out_specs=P("a"))
    text = str(jax.make_jaxpr(mapped)(*(arrays[name] for name in ("x", "weights", "indices"))))
    return {name for name in ("all_gather", "reduce_scatter", "psum", "all_to_all", "ppermute") if f"{name}[" in text}


def capacity() -> None:
    """Too few rows leave pairs out by the rule of layouts; layout.counts says what was wanted."""
    problem, where, rows = Problem(16, 8, 2), mesh((NUM_DEVICES,), AxisType.Auto), 5
    arrays = problem.arrays()
    x, weights, indices = (np.asarray(arrays[name]) for name in ("x", "weights", "indices"))
    want, lost, count = np.zeros_like(x), 0, 8 // NUM_DEVICES
    for device in range(NUM_DEVICES):
        layout = expert_layout(indices, 8, experts=(count * device, count), capacity=rows)
        want += unpermute(permute(x, layout), layout, weights)
        lost += int(layout.counts.sum() - (layout.ends - layout.offsets[:-1]).sum())
    assert lost > 0

    for exact in (False, True):

        def layer(x: Any, weights: Any, indices: Any, exact: bool = exact) -> Any:
            parallel = expert_parallel("a", 8, exact=exact, capacity=rows)
            found, layout, ticket = parallel.dispatch(x, weights, indices)
            assert found.shape == (rows, HIDDEN)
            left_out = layout.counts - (layout.ends - layout.offsets[:-1])
            return parallel.combine(found, ticket), left_out, jnp.stack(parallel.experts)

        mapped = jax.shard_map(layer, mesh=where, in_specs=P("a"), out_specs=P("a"))
        got, left_out, shards = jax.jit(mapped)(x, weights, indices)
        np.testing.assert_allclose(got, want, rtol=1e-5, atol=1e-6)
        assert left_out.sum() == lost
        assert shards.reshape(-1, 2).tolist() == [[count * device, count] for device in range(NUM_DEVICES)]


def experts_of_devices() -> None:
    """(first, count) is that of cupy_router.torch."""
    for num_experts, num_devices in ((9, 4), (3, 4), (12, 3), (2**31 - 2, 3), (9, 2), (1, 2)):
        if num_devices > NUM_DEVICES:
            continue
        where = mesh((num_devices,), AxisType.Auto)

        def own(_: Any, num_experts: int = num_experts) -> Any:
            return jnp.stack(expert_parallel("a", num_experts).experts)

        found = jax.jit(jax.shard_map(own, mesh=where, in_specs=P("a"), out_specs=P("a")))(jnp.zeros(num_devices))
        starts = [device * num_experts // num_devices for device in range(num_devices + 1)]
        wanted = [[a, b - a] for a, b in pairwise(starts)]
        assert found.reshape(-1, 2).tolist() == wanted, (num_experts, num_devices)


def transformations() -> None:
    """Layers one after the other, recomputed, and in a loop: the bits of one device."""
    problem, where = Problem(8, 8, 3), mesh((NUM_DEVICES,), AxisType.Explicit)
    arrays = problem.arrays()

    def plain(x: Any, weights: Any, indices: Any) -> Any:
        layout = expert_layout(indices, 8)
        rows = permute(x, layout)
        return unpermute(jnp.where(rows > 0, rows, rows / 4), layout, weights)

    def parallel(x: Any, weights: Any, indices: Any) -> Any:
        there = expert_parallel("a", 8, exact=True)
        rows, _, ticket = there.dispatch(x, weights, indices)
        return there.combine(jnp.where(rows > 0, rows, rows / 4), ticket)

    def layers(layer: Any, x: Any, weights: Any, indices: Any) -> Any:
        x = jax.checkpoint(layer)(x, weights, indices)
        return jax.lax.scan(lambda x, _: (layer(x, weights, indices), None), x, None, length=2)[0]

    given = arrays["x"], arrays["weights"]
    want, back = jax.vjp(lambda x, w: layers(plain, x, w, arrays["indices"]), *given)
    wanted = want, *back(arrays["target"])

    @jax.jit
    def step(x: Any, weights: Any, indices: Any, grad: Any) -> Any:
        mapped = jax.shard_map(partial(layers, parallel), mesh=where, in_specs=P("a"), out_specs=P("a"))
        out, back = jax.vjp(lambda x, weights: mapped(x, weights, indices), x, weights)
        return out, *back(grad)

    with jax.set_mesh(where):
        placed = {name: put(array, where, "a") for name, array in arrays.items()}
        got = step(*(placed[name] for name in ("x", "weights", "indices", "target")))
    for a, b in zip(got, wanted, strict=True):
        np.testing.assert_array_equal(a, b)


def two_hundred_steps() -> None:
    """Outputs of all steps of a training are those of one device, to the bit with exact, else within rounding."""
    problem, where = Problem(16, 6, 3), mesh((NUM_DEVICES,), AxisType.Auto)
    want = of_one_device(problem, steps=200)
    target = problem.arrays()["target"]
    losses = ((want["out"] - target) ** 2).sum((1, 2))
    assert losses[-1] < 0.2 * losses[0]
    if not ON_GPU:  # see `same`
        same(of_devices(problem, where, steps=200, exact=True), want, True, "float32", "exact")
    got = of_devices(problem, where, steps=200)["out"]
    np.testing.assert_allclose(((got - target) ** 2).mean((1, 2)), losses / target.size, rtol=0, atol=1e-5)


def training() -> None:
    """The example learns on meshes what it learns on one device."""
    steps = 12
    losses = {size: moe_jax_mesh.train(steps, num_devices=size) for size in (1, NUM_DEVICES)}
    losses["exact"] = moe_jax_mesh.train(steps, num_devices=NUM_DEVICES, exact=True)
    plain = moe_jax.train(steps)
    for name, found in losses.items():
        np.testing.assert_allclose(found, plain, rtol=0, atol=1e-5, err_msg=str(name))
    assert plain[-1] < 0.75 * plain[0]


if __name__ == "__main__":
    assert NUM_DEVICES == 4 or (ON_GPU and NUM_DEVICES > 1)
    globals()[sys.argv[1]]()
    sys.stdout.write("done\n")
