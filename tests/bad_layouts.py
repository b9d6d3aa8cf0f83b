# SPDX-License-Identifier: Apache-2.0
"""Good calls of expert_layout, permute, unpermute and of routers with a layout, which tests of bad input change."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

from cupy_router import (
    ExpertLayout,
    LayoutSpec,
    RoutingMethod,
    RoutingPlan,
    activation_topk,
    dense_router,
    expert_layout,
    hash_router,
    permute,
    unpermute,
)
from tests.backends import Backend
from tests.layout_calls import layout_of
from tests.layout_inputs import uniform
from tests.test_bad_input import assert_one_sentence, on_gpu

N, K, E, H, ROWS, ALIGNMENT = 6, 2, 4, 8, 24, 4
HOST = Backend()
IDS = uniform(N, K, E).astype(np.int32)
LAYOUT = layout_of(HOST, IDS, E, alignment=ALIGNMENT)
METHOD = RoutingMethod(E, K, "softmax")
MAP = np.array([1, 0, -1, 1], np.int32)


def zeros(*shape: int, dtype: Any = np.float32) -> np.ndarray:
    return np.zeros(shape, dtype)


def ints(*shape: int, dtype: Any = np.int32) -> np.ndarray:
    return np.zeros(shape, dtype)


def poison(*shape: int, dtype: Any = np.int32) -> np.ndarray:
    return np.full(shape, 77, dtype)


def arrays_of_out(**changes: Any) -> ExpertLayout:
    """Return preallocated arrays for the good call."""
    made: dict[str, Any] = {"counts": poison(E), "offsets": poison(E + 1), "ends": poison(E)}
    made |= {"order": poison(ROWS), "positions": poison(N, K)}
    return ExpertLayout(**{**made, **changes})


def plan(layout: Any = None, **changes: Any) -> RoutingPlan:
    made = {"weights": poison(N, K, dtype=np.float32), "indices": poison(N, K), "layout": layout}
    return RoutingPlan(**{**made, **changes})


def router_out(**changes: Any) -> RoutingPlan:
    return plan(arrays_of_out(order=poison(N * K), **changes))


GOOD: dict[str, tuple[Callable[..., Any], Callable[[], dict[str, Any]]]] = {
    "expert_layout": (
        expert_layout,
        lambda: {"indices": IDS, "num_experts": E, "alignment": ALIGNMENT, "load": poison(E), "out": arrays_of_out()},
    ),
    "permute": (permute, lambda: {"x": zeros(N, H), "layout": LAYOUT, "out": poison(ROWS, H, dtype=np.float32)}),
    "unpermute": (unpermute, lambda: {"y": zeros(ROWS, H), "layout": LAYOUT, "out": poison(N, H, dtype=np.float32)}),
    "activation_topk": (
        activation_topk,
        lambda: {"logits": zeros(N, E), "method": METHOD, "layout": LayoutSpec(), "out": router_out()},
    ),
    "hash_router": (
        hash_router,
        lambda: {
            "token_ids": ints(N), "table": ints(9, K), "method": METHOD, "layout": LayoutSpec(), "out": router_out(),
        },
    ),
    "dense_router": (
        dense_router,
        lambda: {
            "x": zeros(N, H), "weight": zeros(E, H), "method": METHOD, "layout": LayoutSpec(), "out": router_out(),
        },
    ),
}  # fmt: skip

BIG = 2**31
ROUTERS = ("activation_topk", "hash_router", "dense_router")


def many_tokens() -> np.ndarray:
    """Return indices of 2**30 tokens in 8 bytes."""
    return np.lib.stride_tricks.as_strided(IDS[:1], (2**30, K), (0, 4))


Cases = list[tuple[str, dict[str, Any], Any, str, str]]


def assert_refused(op: str, changes: dict[str, Any], error: Any, name: str, said: str, backend: Backend = HOST) -> None:
    """Assert that the call raises this error and leaves outs and load as they were."""
    function, good = GOOD[op]
    arguments = {**good(), **changes}
    if backend.name == "gpu":
        arguments = {key: nested_on_gpu(backend, value) for key, value in arguments.items()}
    written = [a for key in ("out", "load") for a in leaves(arguments.get(key))]
    before = [a.copy() for a in written]
    with pytest.raises(error) as caught:
        function(**arguments)
    assert type(caught.value) in (TypeError, ValueError)
    message = str(caught.value)
    assert message.startswith(f"{op}: "), f"the op is not named: {message}"
    assert re.search(rf"(?<![\w.])({name})(?!\.?\w)", message), f"{name} is not named: {message}"
    assert re.search(said, message), f"{said} is not said: {message}"
    assert_one_sentence(message)
    for a, b in zip(written, before, strict=True):
        assert (a == b).all()


def nested_on_gpu(backend: Backend, value: Any) -> Any:
    if isinstance(value, tuple):
        moved = [nested_on_gpu(backend, part) for part in value]
        return type(value)(*moved) if hasattr(value, "_fields") else tuple(moved)
    try:
        return on_gpu(backend, value)
    except (TypeError, ValueError) as error:
        pytest.skip(f"CuPy has no such arrays: {error}")


def leaves(value: Any) -> list[Any]:
    """Return the writable arrays in a tuple of tuples."""
    if isinstance(value, tuple):
        return [array for part in value for array in leaves(part)]
    return [value] if hasattr(value, "copy") and hasattr(value, "dtype") else []


def name_of(case: Any) -> str:
    op, changes, _, name, said = case
    return f"{op}-{'+'.join(changes)}-{name}-{said}"
