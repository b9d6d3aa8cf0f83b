# SPDX-License-Identifier: Apache-2.0
"""Cases of layouts and rows: results as flat tuples of arrays, and what they have to be.

A router with a layout has it as the option "layout", a dictionary of the fields of a LayoutSpec.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import numpy as np

import cupy_router
from cupy_router import ExpertLayout, LayoutSpec, RoutingPlan
from cupy_router.ops import _permute_backward, _unpermute_backward
from cupy_router.ops._declared import Arrays
from cupy_router.ops._rows import GradientOptions
from cupy_router.ops._run import run
from cupy_router.reference import expert_layout as reference
from cupy_router.reference import permute as permute_reference
from tests import compare, oracle_layout
from tests.backends import DTYPES
from tests.layout_calls import assert_within_rounding

GRADIENTS = {op.name: op for op in (_permute_backward.OP, _unpermute_backward.OP)}
OPS = ("expert_layout", "permute", "unpermute", *GRADIENTS)
Results = list[tuple[tuple[int, ...], Any]]


def names_of(options: dict[str, Any]) -> list[str]:
    """Return the arrays that a layout with these options has."""
    wanted = oracle_layout.returned(options.get("want", oracle_layout.DEFAULT_WANT))
    return [name for name in oracle_layout.NAMES if name in wanted]


def sizes(n: int, k: int, experts: int, options: dict[str, Any]) -> dict[str, tuple[int, ...]]:
    """Return the shapes of all arrays of a layout."""
    alignment, capacity = options.get("alignment", 1), options.get("capacity")
    if capacity is None:
        capacity = oracle_layout.formula(n * k, experts, alignment)
    rows, blocks = (capacity,), (capacity // alignment,)
    return {
        "counts": (experts,), "offsets": (experts + 1,), "ends": (experts,), "order": rows, "positions": (n, k),
        "block_experts": blocks, "row_experts": rows,
    }  # fmt: skip


def results(op: str, arrays: dict[str, np.ndarray], options: dict[str, Any]) -> Results:
    """Return shape and dtype of each result of an op."""
    if op == "permute":
        return [((len(arrays["order"]), arrays["x"].shape[1]), arrays["x"].dtype)]
    if op == "unpermute":
        return [((len(arrays["positions"]), arrays["y"].shape[1]), arrays["y"].dtype)]
    if op in GRADIENTS:
        given = [arrays.get(name) for name in GRADIENTS[op].names]
        facts = [a if a is None else a.shape for a in given], [a if a is None else str(a.dtype) for a in given]
        return [(shape, DTYPES[dtype]) for shape, dtype in GRADIENTS[op].outputs(_wanted_gradients(options), *facts)]
    shapes = sizes(*arrays["indices"].shape, counted(options), options)
    made: Results = [(shapes[name], np.int32) for name in names_of(options)]
    return made + [(arrays[name].shape, arrays[name].dtype) for name in ("load",) if name in arrays]


def counted(options: dict[str, Any]) -> int:
    """Return the number of experts in question."""
    if options.get("num_local") is not None:
        return int(options["num_local"])
    return int(options["num_experts"] if options.get("experts") is None else options["experts"][1])


# -- Calls -------------------------------------------------------------------------------------------------------------


def function(op: str) -> Callable[..., Any]:
    """Return an op that gives, and takes as `out`, a flat tuple of arrays."""
    if op in GRADIENTS:
        return partial(_gradient, GRADIENTS[op])
    return {"expert_layout": _expert_layout, "permute": _permute, "unpermute": _unpermute}[op]


def _wanted_gradients(options: dict[str, Any]) -> GradientOptions:
    return GradientOptions(tuple(options["want"]))


def _gradient(op: Any, *, want: list[str], out: Any = None, stream: Any = None, **given: Any) -> Any:
    options = GradientOptions(tuple(want))
    into = None if out is None else op.pack(options, out)
    result = run(op, options, tuple(given.get(name) for name in op.names), into, stream)
    return out or op.flatten(options, result)


def _expert_layout(*, out: Any = None, load: Any = None, **given: Any) -> Any:
    """The load is copied, so that each call starts with the same one, and is the last result."""
    names = names_of(given)
    into = None if out is None else ExpertLayout(**dict(zip(names, out, strict=False)))
    if load is not None and out is not None:
        out[-1][...] = load
        load = out[-1]
    elif load is not None:
        load = load.copy()
    layout = cupy_router.expert_layout(**given, load=load, out=into)
    return out or (*(getattr(layout, name) for name in names), *([] if load is None else [load]))


def _permute(*, x: Any, order: Any, positions: Any, out: Any = None, **given: Any) -> Any:
    layout = ExpertLayout(order=order, positions=positions)
    rows = cupy_router.permute(x, layout, **given, out=None if out is None else out[0])
    return out or (rows,)


def _unpermute(*, y: Any, positions: Any, out: Any = None, **given: Any) -> Any:
    layout = ExpertLayout(positions=positions)
    sums = cupy_router.unpermute(y, layout, **given, out=None if out is None else out[0])
    return out or (sums,)


def routed(router: Callable[..., Any]) -> Callable[..., Any]:
    """Return a router with a layout that gives, and takes as `out`, a flat tuple of arrays."""

    def call(*, layout: dict[str, Any], out: Any = None, **given: Any) -> Any:
        names, into = names_of(layout), None
        if out is not None:
            into = RoutingPlan(out[0], out[1], ExpertLayout(**dict(zip(names, out[2:], strict=True))))
        plan = router(**given, layout=LayoutSpec(**layout), out=into)
        return out or (plan.weights, plan.indices, *(getattr(plan.layout, name) for name in names))

    return call


# -- Checks ------------------------------------------------------------------------------------------------------------


def wanted(op: str, arrays: dict[str, np.ndarray], options: dict[str, Any], num_valid: int) -> tuple[np.ndarray, ...]:
    """Return the results of the NumPy reference."""
    if op == "permute":
        top_k = arrays["positions"].shape[1]
        return (permute_reference.permute(arrays["x"], arrays["order"], top_k, arrays.get("weights")),)
    if op in GRADIENTS:
        given = Arrays(GRADIENTS[op].names, [arrays.get(name) for name in GRADIENTS[op].names])
        made: tuple[np.ndarray, ...] = GRADIENTS[op].reference(_wanted_gradients(options), given, num_valid)
        return made
    if op == "unpermute":
        return (_sums(arrays)[0].astype(np.float32).astype(arrays["y"].dtype),)
    plain = {name: option for name, option in options.items() if name not in ("want", "num_valid", "num_experts")}
    expert_map, ids, experts = arrays.get("expert_map"), arrays["indices"], options["num_experts"]
    made = reference.expert_layout(ids, experts, expert_map=expert_map, num_valid=num_valid, **plain)
    found = tuple(made[name] for name in names_of(options))
    if "load" not in arrays:
        return found
    question = options.get("experts"), expert_map, options.get("num_local")
    more = reference.demand(ids[:num_valid], experts, *question)
    return (*found, arrays["load"] + more.astype(arrays["load"].dtype))


def _sums(arrays: dict[str, np.ndarray]) -> tuple[np.ndarray, np.ndarray]:
    given = (arrays.get(name) for name in ("weights", "residual", "residual_scale"))
    return oracle_layout.unpermute(arrays["y"], arrays["positions"], *given)


def check(
    op: str, arrays: dict[str, np.ndarray], options: dict[str, Any], num_valid: int, got: tuple[np.ndarray, ...]
) -> None:
    """Assert that the results are those of the reference, sums within their roundings."""
    if op == "unpermute":
        sums, terms = _sums(arrays)
        with np.errstate(over="ignore"):
            right = sums.astype(np.float32).astype(got[0].dtype).astype(np.float64)
        assert_within_rounding(got[0], right, sums, terms, arrays["positions"].shape[1])
        return
    if op in GRADIENTS:
        for name, array, other in zip(options["want"], got, wanted(op, arrays, options, num_valid), strict=True):
            assert_gradient_close(name, array, other, arrays)
        return
    right = wanted(op, arrays, options, num_valid)
    assert len(got) == len(right)
    for array, other in zip(got, right, strict=True):
        if op == "permute" and "weights" in arrays:
            np.testing.assert_array_equal(array.astype(np.float32), other.astype(np.float32))  # NaN of any payload
        else:
            compare.assert_same_bits(array, other)


def assert_gradient_close(name: str, got: np.ndarray, want: np.ndarray, arrays: dict[str, np.ndarray]) -> None:
    """Assert that one product is rounded as in the reference, and sums differ by a rounding for each term."""
    if name in ("rows", "scaled"):
        np.testing.assert_array_equal(got.astype(np.float32), want.astype(np.float32))
        return
    if name == "sums":
        sums, terms = _sums({**arrays, "residual": None, "residual_scale": None})  # type: ignore[dict-item]
        assert_within_rounding(got, want.astype(np.float64), sums, terms, arrays["positions"].shape[1])
        return
    x, other = (arrays[key].astype(np.float64) for key in ("x", "residual" if name == "residual_dots" else "y"))
    largest = float(np.abs(x).sum(1).max(initial=0) * np.abs(other).max(initial=0))
    np.testing.assert_allclose(got, want, rtol=1e-5, atol=1e-6 * largest)


def check_layout(indices: np.ndarray, experts: int, options: dict[str, Any], got: tuple[np.ndarray, ...]) -> None:
    """Assert that the layout of a router is that of its indices."""
    given = {"indices": indices}
    check("expert_layout", given, {**options, "num_experts": experts}, len(indices), got)
