# SPDX-License-Identifier: Apache-2.0
"""Routers with `layout=`: the layout of the indices that they return, which are the same to the bit as without one."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace
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
    hash_router,
    presets,
)
from tests import compare, inputs, oracle_layout
from tests.backends import DTYPES, Backend
from tests.canvas import Canvas
from tests.methods import METHODS

ITEM = pytest.mark.acceptance
SHARED = RoutingMethod(60, 6, "sigmoid", num_shared_experts=2, shared_weight=0.5)
ALL = oracle_layout.NAMES


def logits_of(n: int, method: RoutingMethod, dtype: str = "float32") -> np.ndarray:
    return inputs.distinct(n, method.num_logits, dtype, seed=440)


def plan_of(
    backend: Backend, router: Callable[..., Any], spec: LayoutSpec, method: RoutingMethod, /, **given: Any
) -> tuple[np.ndarray, np.ndarray, ExpertLayout]:
    """Return weights, indices and layout on the host, checked: against the call without, and by the oracle."""
    plain = router(**given)
    plan = router(**given, layout=spec)
    assert type(plan) is RoutingPlan
    assert type(plan.layout) is ExpertLayout
    weights, indices = backend.numpy(plan.weights), backend.numpy(plan.indices)
    compare.assert_same_bits(indices, backend.numpy(plain.indices))
    compare.assert_same_bits(weights, backend.numpy(plain.weights))
    return weights, indices, checked(backend, plan.layout, indices, spec, method)


def checked(
    backend: Backend, layout: ExpertLayout, indices: np.ndarray, spec: LayoutSpec, method: RoutingMethod
) -> ExpertLayout:
    experts = method.num_experts + method.num_shared_experts
    options = {"alignment": spec.alignment, "capacity": spec.capacity, "want": spec.want}
    right = oracle_layout.expert_layout(indices, experts, **options)
    capacity = spec.capacity
    if capacity is None:
        capacity = oracle_layout.formula(indices.size, experts, spec.alignment)
    assert layout[-4:] == (*indices.shape, spec.alignment, capacity)
    found = {name: getattr(layout, name) for name in ALL}
    assert {name for name, array in found.items() if array is not None} == right.keys()
    for name, array in right.items():
        got = backend.numpy(found[name])
        assert got.dtype == np.int32
        np.testing.assert_array_equal(got, array, err_msg=name)
    return layout


def sizes() -> Iterator[Any]:
    for i, n in enumerate((0, 1, 7, 16, 33, 64, 65, 128, 1025)):
        for j, name in enumerate(("deepseek-v4-flash", "deepseek-v4-pro")):
            yield pytest.param(n, name, LayoutSpec((1, 16, 128)[(i + j) % 3], None, ALL), id=f"{n}-{name}")


@pytest.mark.parametrize(("n", "name", "spec"), list(sizes()))
@ITEM("layout: of routers")
def test_sizes(backend: Backend, n: int, name: str, spec: LayoutSpec) -> None:
    method = presets()[name]
    n = backend.rows(n, 4096)
    given = {"logits": backend.array(logits_of(n, method)), "bias": backend.array(inputs.normal((method.num_experts,)))}
    plan_of(backend, activation_topk, spec, method, **given, method=name)


@pytest.mark.many_kernels
@pytest.mark.parametrize("kind", [kind for kind in METHODS if "groups" not in kind])
def test_every_kind_of_method(backend: Backend, kind: str) -> None:
    """Shared experts have rows of their own, after the others; ids of any dtype are laid out."""
    method = METHODS[kind]
    n = backend.rows(33, 4 * method.num_experts)
    logits = backend.array(logits_of(n, method))
    plan_of(backend, activation_topk, LayoutSpec(4, None, ALL), method, logits=logits, method=method)


def routers(backend: Backend, n: int, method: RoutingMethod) -> dict[str, tuple[Callable[..., Any], dict[str, Any]]]:
    """Return every router with its arrays; some token ids and table entries are bad."""
    x = (inputs.rng(441, n).integers(-4, 5, (n, 40)) / 4).astype(np.float32)
    gate = (inputs.rng(442).integers(-4, 5, (method.num_logits, 40)) / 16).astype(np.float32)
    ids = inputs.rng(443, n).integers(-1, 21, n).astype(np.int32)
    table = np.stack([inputs.rng(444, row).permutation(method.num_experts)[: method.top_k] for row in range(20)])
    table[3, 1] = method.num_experts
    arrays = {
        "logits": logits_of(n, method), "x": x, "weight": gate, "ids": ids, "table": table.astype(np.int32),
    }  # fmt: skip
    on = {name: backend.array(array) for name, array in arrays.items()}
    hashed = {"token_ids": on["ids"], "table": on["table"], "method": method}
    found = {
        "activation_topk": (activation_topk, {"logits": on["logits"], "method": method}),
        "hash_router": (hash_router, {**hashed, "logits": on["logits"]}),
        "hash_router of x": (hash_router, {**hashed, "x": on["x"], "weight": on["weight"]}),
        "hash_router alone": (hash_router, hashed),
        "dense_router": (dense_router, {"x": on["x"], "weight": on["weight"], "method": method}),
        "prefill": (dense_router, {"x": on["x"], "weight": on["weight"], "method": method, "path": "prefill"}),
        "Router": (Router(method, weight=on["weight"]), {"x": on["x"]}),
    }
    return {name: call for name, call in found.items() if method.num_shared_experts == 0 or "hash" not in name}


ROUTERS = (
    "activation_topk",
    "hash_router",
    "hash_router of x",
    "hash_router alone",
    "dense_router",
    "prefill",
    "Router",
)


@pytest.mark.parametrize("name", ROUTERS)
@pytest.mark.parametrize("n", [0, 1, 20, 64, 150])
def test_every_router(backend: Backend, name: str, n: int) -> None:
    if backend.name == "simt" and name in ("dense_router", "prefill", "Router") and n in (0, 150):
        pytest.skip("a gate product by cuBLAS")
    method = RoutingMethod(60, 6, "sigmoid")
    router, given = routers(backend, n, method)[name]
    for spec in (LayoutSpec(), LayoutSpec(8, None, ALL), LayoutSpec(8, 64, ALL)):
        plan_of(backend, router, spec, method, **given)


@pytest.mark.parametrize("name", ["activation_topk", "hash_router", "dense_router"])
@pytest.mark.parametrize("valid", [0, 11, 20])
def test_valid_rows(backend: Backend, name: str, valid: int) -> None:
    method = RoutingMethod(60, 6, "sigmoid")
    router, given = routers(backend, 20, method)[name]
    for number in (valid, backend.array(np.array([valid], np.int32))):
        _, indices, _ = plan_of(backend, router, LayoutSpec(4, None, ALL), method, **given, num_valid=number)
        assert (indices[valid:] == -1).all()


@pytest.mark.parametrize("want", [*((name,) for name in ALL), ("row_experts", "offsets")])
@pytest.mark.parametrize("n", [3, 100])
def test_only_what_is_wanted(backend: Backend, want: tuple[str, ...], n: int) -> None:
    method = RoutingMethod(60, 6, "softmax")
    logits = backend.array(logits_of(n, method))
    plan_of(backend, activation_topk, LayoutSpec(8, None, want), method, logits=logits, method=method)


@pytest.mark.parametrize("n", [1, 64, 150])
def test_shared_experts_are_experts_of_the_layout(backend: Backend, n: int) -> None:
    logits = backend.array(logits_of(n, SHARED))
    _, _, layout = plan_of(backend, activation_topk, LayoutSpec(), SHARED, logits=logits, method=SHARED)
    np.testing.assert_array_equal(backend.numpy(layout.counts)[60:], [n, n])


@pytest.mark.parametrize("n", [7, 150])
@pytest.mark.parametrize("index_dtype", ["int32", "int64"])
@pytest.mark.parametrize("place", [0, 3])
def test_results_of_the_caller_are_filled_and_nothing_beside_them(
    backend: Backend, n: int, index_dtype: str, place: int
) -> None:
    method = replace(RoutingMethod(60, 6, "softmax"), index_dtype=index_dtype)
    spec = LayoutSpec(8, 504 if n == 150 else None, ALL)
    logits = backend.array(logits_of(n, method, "bfloat16"))
    plan = activation_topk(logits, method, layout=spec)
    canvases = [
        Canvas(backend.numpy(array).shape, place, DTYPES[str(array.dtype)], backend)
        for array in (plan.weights, plan.indices, *(getattr(plan.layout, name) for name in ALL))
    ]
    weights, indices, *arrays = (canvas.array for canvas in canvases)
    for numbers in (plan.layout[-4:], ()):
        out = RoutingPlan(weights, indices, ExpertLayout(*arrays, *numbers))
        filled = activation_topk(logits, method, layout=spec, out=out)
        assert (filled is out) == bool(numbers)
        assert filled.weights is weights
        assert all(canvas.is_clean() for canvas in canvases)
        compare.assert_same_bits(backend.numpy(indices), backend.numpy(plan.indices))
        checked(backend, filled.layout, backend.numpy(indices), spec, method)


def test_every_run_gives_the_same(backend: Backend) -> None:
    method, repeats = presets()["deepseek-v4-flash"], 100 if backend.name == "gpu" else 5
    for n in (1, 64, 300) if backend.name != "simt" else (1, 20):
        logits = backend.array(inputs.normal((n, method.num_experts), "bfloat16"))
        spec = LayoutSpec(16, None, ALL)
        first = activation_topk(logits, method, layout=spec)
        for _ in range(repeats):
            again = activation_topk(logits, method, layout=spec)
            for one, other in zip(first.layout[:7], again.layout[:7], strict=True):
                assert backend.numpy(one).tobytes() == backend.numpy(other).tobytes()
