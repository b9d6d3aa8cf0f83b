# SPDX-License-Identifier: Apache-2.0
"""Expert layouts and rows as functions of JAX arrays, for tests of jax.jit on the CPU and on a GPU."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np

from cupy_router import (
    ExpertLayout,
    LayoutSpec,
    activation_topk,
    dense_router,
    expert_layout,
    hash_router,
    permute,
    unpermute,
)
from tests import inputs
from tests.backends import DTYPES
from tests.jax_calls import METHOD

EXPERTS, TOP_K, HIDDEN = 9, 3, 8
ARRAYS = ExpertLayout._fields[:7]


@dataclass(frozen=True, eq=False)  # jax.jit hashes it
class Case:
    """Options of `expert_layout`, and its arrays as NumPy arrays."""

    options: dict[str, Any]
    arrays: dict[str, np.ndarray]

    def __call__(self, arrays: dict[str, Any]) -> Any:
        return expert_layout(num_experts=EXPERTS, **self.options, **arrays)


def ids(n: int, dtype: str = "int32", seed: int = 0) -> np.ndarray:
    """Return [n, TOP_K] ids, some of which are no experts, and some of which occur twice in a row."""
    drawn = inputs.rng(500 + seed, n).integers(-1, EXPERTS + 1, (n, TOP_K))
    return drawn.astype(dtype)


def cases(n: int, dtype: str = "int32") -> dict[str, Case]:
    def case(arrays: dict[str, Any] | None = None, **options: Any) -> Case:
        return Case(options, {"indices": ids(n, dtype)} | {k: np.asarray(a) for k, a in (arrays or {}).items()})

    numbers = np.array([1, -1, 0, 1, 7, 0, 2, -(2**31), 1], np.int32)
    return {
        "by default": case(),
        "all arrays": case(want=ARRAYS, alignment=4),
        "one array": case(want=("row_experts",)),
        "little room": case(want=ARRAYS, alignment=4, capacity=8),
        "no room": case(want=ARRAYS, capacity=0),
        "some experts": case(want=ARRAYS, experts=(2, 3)),
        "no experts": case(want=ARRAYS, experts=(2, 0), alignment=7),
        "a map": case({"expert_map": numbers}, want=ARRAYS, num_local=2, alignment=16),
        "padded by a number": case(num_valid=n // 2),
        "padded by an array": case({"num_valid": np.array(n // 2, np.int32)}, want=ARRAYS, alignment=2),
        "padded by an array of one": case({"num_valid": np.array([n // 3], np.int32)}),
        "another pad": case(pad=n * TOP_K),
    }


NAMES = tuple(cases(1))


def same_layout(got: Any, want: Any) -> None:
    assert (type(got), got[len(ARRAYS) :]) == (type(want), want[len(ARRAYS) :])
    assert {type(number) for number in got[len(ARRAYS) :]} == {int}
    for name in ARRAYS:
        a, b = getattr(got, name), getattr(want, name)
        assert (a is None) == (b is None), name
        if a is not None:
            assert (str(a.dtype), a.shape) == ("int32", b.shape), name
            np.testing.assert_array_equal(np.asarray(a), np.asarray(b), err_msg=name)


ROUTERS = {"activation_topk": activation_topk, "hash_router": hash_router, "dense_router": dense_router}


def planned(name: str, arrays: dict[str, Any], spec: LayoutSpec) -> Any:
    """Call a router with a layout, where `tests.jax_calls` calls it without."""
    return ROUTERS[name.split(",")[0].split()[0]](**arrays, method=METHOD, layout=spec)


# -- Rows --------------------------------------------------------------------------------------------------------------


def arrays_of_rows(n: int, dtype: str = "float32") -> dict[str, np.ndarray]:
    """Return arrays whose products and sums are exact in every dtype: small multiples of powers of two."""
    draw = inputs.rng(510, n)

    def made(*shape: int, of: str = dtype) -> np.ndarray:
        values: np.ndarray = (draw.integers(-8, 9, shape) / 4).astype(np.float32).astype(DTYPES[of])
        return values

    return {
        "x": made(n, HIDDEN),
        "y": made(n * TOP_K, HIDDEN),
        "weights": made(n, TOP_K, of="float32"),
        "residual": made(n, HIDDEN),
        "residual_scale": made(n, of="float32"),
    }


def _permute(layout: Any, x: Any, **weights: Any) -> Any:
    return permute(x, layout, **weights)


def _unpermute(layout: Any, y: Any, weights: Any = None, **residual: Any) -> Any:
    return unpermute(y, layout, weights, **residual)


ROWS: dict[str, tuple[Callable[..., Any], tuple[str, ...]]] = {
    "permute": (_permute, ("x",)),
    "permute, weighted": (_permute, ("x", "weights")),
    "unpermute": (_unpermute, ("y",)),
    "unpermute, weighted": (_unpermute, ("y", "weights")),
    "unpermute with a residual": (_unpermute, ("y", "residual")),
    "unpermute with all": (_unpermute, ("y", "weights", "residual", "residual_scale")),
}


def plain(name: str, layout: Any, arrays: dict[str, Any]) -> Any:
    """Return what `ROWS[name]` returns, by gathers of JAX in the dtype of the arrays."""
    import jax.numpy as jnp

    if name.startswith("permute"):
        used = layout.order >= 0
        rows = arrays["x"][layout.order // layout.top_k]
        if "weights" in arrays:
            rows = rows * arrays["weights"].reshape(-1)[layout.order][:, None]
        return jnp.where(used[:, None], rows, 0)
    rows = arrays["y"][layout.positions]
    if "weights" in arrays:
        rows = rows * arrays["weights"][..., None]
    total = jnp.where(layout.positions[..., None] >= 0, rows, 0).sum(1)
    if "residual" in arrays:
        scale = arrays.get("residual_scale")
        total = total + (arrays["residual"] if scale is None else arrays["residual"] * scale[:, None])
    return total
