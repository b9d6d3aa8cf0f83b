# SPDX-License-Identifier: Apache-2.0
"""Gates with random values, for the tests of cupy_router.torch.Gate, and what the functions give for their arrays."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from typing import Any

import pytest

from cupy_router import Routing, RoutingMethod, dense_router, hash_router

torch = pytest.importorskip("torch", reason="PyTorch is not installed")
from cupy_router.torch import Gate  # noqa: E402

EXPERTS, K, HIDDEN, VOCABULARY = 16, 4, 8, 30
METHOD = RoutingMethod(EXPERTS, K, "sigmoid", scale=1.5)
FLOAT32 = ("e_score_correction_bias", "logit_bias", "per_expert_scale")


@pytest.fixture(autouse=True)
def seeded() -> Iterator[None]:
    """Seed PyTorch before each test of a module that imports this."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(3)
        yield


def table(dtype: Any = torch.int64) -> Any:
    return torch.rand(VOCABULARY, EXPERTS).argsort(dim=1)[:, :K].to(dtype)


def randomized(gate: Any) -> Any:
    """Give a gate random values; those of float32 arrays are not representable in 16 bits."""
    with torch.no_grad():
        for tensor in gate.state_dict().values():
            if tensor.is_floating_point():
                tensor.normal_()
    return gate


def dense_gate(**options: Any) -> Any:
    return randomized(Gate(HIDDEN, METHOD, bias=True, logit_bias=True, expert_scale=True, **options))


def hash_gate(**options: Any) -> Any:
    return randomized(Gate(HIDDEN, METHOD, logit_bias=True, expert_scale=True, table=table(), **options))


def others(gate: Any) -> dict[str, Any]:
    """Return a state dict with other values."""
    found: dict[str, Any] = randomized(copy.deepcopy(gate)).state_dict()
    return found


def arguments(gate: Any, axes: tuple[int, ...] = (2, 3)) -> tuple[Any, ...]:
    x = torch.randn(*axes, HIDDEN)
    return (x,) if gate.tid2eid is None else (x, torch.randint(VOCABULARY, axes))


def expected(arrays: Any, x: Any, token_ids: Any = None) -> Routing:
    """Return what the functions give for the arrays of a state dict, with the axes of x."""
    rows, ids = x.reshape(-1, HIDDEN), None if token_ids is None else token_ids.reshape(-1)
    weight = arrays["weight"]
    layer = {"logit_bias": arrays.get("logit_bias"), "expert_scale": arrays.get("per_expert_scale")}
    if "tid2eid" in arrays:
        found = hash_router(ids, arrays["tid2eid"], METHOD, x=rows, weight=weight, **layer)
    else:
        found = dense_router(rows, weight, METHOD, bias=arrays.get("e_score_correction_bias"), **layer)
    return Routing(*(array.reshape(*x.shape[:-1], K) for array in found))


def assert_same(got: Routing, want: Routing) -> None:
    assert type(got) is Routing
    for a, b in zip(got, want, strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=0)
