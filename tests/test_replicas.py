# SPDX-License-Identifier: Apache-2.0
"""Replicas of experts: weights of the experts, ids of the physical ones, and layouts that count these."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from cupy_router import (
    LayoutSpec,
    Router,
    Routing,
    RoutingMethod,
    activation_topk,
    dense_router,
    expert_layout,
)
from cupy_router.ops import _chunks
from tests import compare
from tests.backends import Backend
from tests.canvas import Canvas
from tests.oracle_layout import NAMES as LAYOUT_NAMES
from tests.replica_calls import KINDS, NAMES, WIDE, Call

EVERY = pytest.mark.parametrize("kind", KINDS)
GIVEN = pytest.mark.parametrize("given", ["", "route", "empty"])


def uploaded(backend: Backend, call: Call, row_pad: int = 0, offset: int = 0) -> dict[str, Any]:
    return {
        name: backend.array(array, row_pad, offset) if array.ndim == 2 else backend.array(array)
        for name, array in call.arrays().items()
    }


def check(backend: Backend, call: Call, arrays: dict[str, Any], **more: Any) -> Any:
    """Assert that weights are those of the experts, to the bit, and indices the replicas of these."""
    got, experts = call(arrays, **more), call.logical(arrays, **more)
    compare.assert_same_bits(backend.numpy(got.weights), backend.numpy(experts.weights))
    compare.assert_same_bits(backend.numpy(got.indices), call.physical(backend.numpy(experts.indices)))
    return got


@pytest.mark.many_kernels
@pytest.mark.parametrize("name", NAMES)
@GIVEN
@EVERY
def test_tokens_take_replicas_in_turn(kind: str, given: str, name: str, backend: Backend) -> None:
    call = Call(kind, name, given=given)
    found = check(backend, call, uploaded(backend, call))
    indices = backend.numpy(found.indices)[:, : call.method.top_k]
    assert (indices == -1).any()
    assert len(np.unique(indices)) > call.method.top_k


@pytest.mark.many_kernels
@pytest.mark.parametrize("name", WIDE)
@GIVEN
def test_rows_of_a_block(given: str, name: str, backend: Backend) -> None:
    call = Call("activation_topk", name, 7, given=given)
    check(backend, call, uploaded(backend, call))


@EVERY
def test_rows_that_lie_apart_and_numbers_of_tokens(kind: str, backend: Backend) -> None:
    for n, row_pad, offset in ((0, 0, 0), (1, 3, 1), (64, 8, 0)):
        call = Call(kind, n=n)
        check(backend, call, uploaded(backend, call, row_pad, offset))


@pytest.mark.parametrize(("offset", "dtype"), [(0, "int64"), (2**31 - 1, "int32")])
def test_the_offset_and_dtypes_of_maps(offset: int, dtype: str, backend: Backend) -> None:
    call = Call("activation_topk", offset=offset, dtype=dtype)
    check(backend, call, uploaded(backend, call))


@EVERY
def test_padding_and_results_in_place(kind: str, backend: Backend) -> None:
    call = Call(kind, "two shared experts", 6)
    arrays = uploaded(backend, call)
    count = backend.array(np.array([4], np.int32))
    indices = backend.numpy(check(backend, call, arrays, num_valid=count).indices)
    assert (indices[4:] == -1).all()
    assert (indices[:4, -1] == call.num_physical + 1).all()
    canvases = [Canvas((6, 8), 3, dtype, backend) for dtype in (np.float32, np.int32)]
    out = Routing(*(canvas.array for canvas in canvases))
    assert call(arrays, out=out, num_valid=4) is out
    compare.assert_same_bits(backend.numpy(out.indices), indices)
    assert all(canvas.is_clean() for canvas in canvases)


@pytest.mark.many_kernels
@pytest.mark.parametrize("n", [1, 16, 300])
@GIVEN
@EVERY
def test_layouts_count_physical_experts(kind: str, given: str, n: int, backend: Backend) -> None:
    call = Call(kind, "two shared experts", min(n, 64) if "decode" in kind else n, given=given)
    plan = check(backend, call, uploaded(backend, call), layout=LayoutSpec(4, want=LAYOUT_NAMES))
    want = expert_layout(backend.numpy(plan.indices), call.num_physical + 2, alignment=4, want=LAYOUT_NAMES)
    for name in LAYOUT_NAMES:
        compare.assert_same_bits(backend.numpy(getattr(plan.layout, name)), getattr(want, name))


@pytest.mark.backends("simt")
def test_tokens_of_all_chunks(backend: Backend, monkeypatch: pytest.MonkeyPatch) -> None:
    """A chunk does not know which tokens it has."""
    call = Call("dense_router prefill", "two shared experts", 50)
    arrays = uploaded(backend, call)
    check(backend, call, arrays)
    monkeypatch.setattr(_chunks, "budget", lambda gpu: 4 * 66 * 16)
    monkeypatch.setattr("cupy_router.ops.dense_router.budget", _chunks.budget)
    call = replace(call, n=49)
    check(backend, call, uploaded(backend, call))


def test_unsigned_ids_without_a_replica(backend: Backend) -> None:
    method = RoutingMethod(4, 2, index_dtype="uint8", num_shared_experts=1)
    logits = backend.array(np.array([[0, 3, 2, 1]], np.float32))
    maps = {"replicas": np.array([[0], [1], [253], [3]], np.int32), "replica_counts": np.array([1, 0, 1, 1], np.int32)}
    given: dict[str, Any] = {name: backend.array(array) for name, array in maps.items()}
    indices = activation_topk(logits, method, **given, num_physical=254).indices
    assert backend.numpy(indices).tolist() == [[255, 253, 254]]
    with pytest.raises(ValueError, match=r"num_physical must be at most 254 with index_dtype 'uint8', got 255"):
        activation_topk(logits, method, **given, num_physical=255)


LOGITS = np.zeros((2, 4), np.float32)
MAPS: dict[str, Any] = {"replicas": np.zeros((4, 2), np.int32), "replica_counts": np.ones(4, np.int32)}


@pytest.mark.backends("reference")
@pytest.mark.parametrize(
    ("given", "kind", "message"),
    [
        (MAPS, ValueError, "come together, got no num_physical"),
        ({"num_physical": 4}, ValueError, "come together, got no replicas and no replica_counts"),
        ({"replica_offset": 1}, ValueError, "replica_offset needs replicas, got 1 without any"),
        (MAPS | {"num_physical": 0}, ValueError, "num_physical must be in 1.."),
        (MAPS | {"num_physical": 4.0}, TypeError, "num_physical must be an int"),
        (MAPS | {"num_physical": 4, "replica_offset": -1}, ValueError, "replica_offset must be in 0..2147483647"),
        (MAPS | {"num_physical": 4, "replicas": np.zeros((4, 0), np.int32)}, ValueError, "at least one column"),
        (MAPS | {"num_physical": 4, "replicas": np.zeros((3, 2), np.int32)}, ValueError, r"= \[4, max_replicas\], got"),
        (MAPS | {"num_physical": 4, "replica_counts": np.zeros(5, np.int32)}, ValueError, "replica_counts must have"),
        (MAPS | {"num_physical": 4, "replicas": np.zeros((4, 2), np.int16)}, TypeError, "replicas must be int32"),
    ],
)
def test_what_is_refused(given: dict[str, Any], kind: type[Exception], message: str) -> None:
    method = RoutingMethod(4, 2)
    calls = [
        lambda: activation_topk(LOGITS, method, **given),
        lambda: dense_router(LOGITS, np.eye(4, dtype=np.float32), method, **given),
        lambda: Router(method, weight=np.eye(4, dtype=np.float32))(LOGITS, **given),
    ]
    for call in calls:
        with pytest.raises(kind, match=message):
            call()


@pytest.mark.backends("reference")
def test_a_router_with_a_table_has_no_replicas() -> None:
    router = Router(RoutingMethod(4, 2), weight=LOGITS.repeat(2, 0), table=np.zeros((3, 2), np.int32))
    with pytest.raises(ValueError, match="a router with a table takes no replicas and no replica_counts"):
        router(LOGITS, np.zeros(2, np.int32), **MAPS)
