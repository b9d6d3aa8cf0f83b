# SPDX-License-Identifier: Apache-2.0
"""Kernels and whole ops in a sanitized child: clean where they are right, and one element too far is found."""

from __future__ import annotations

from pathlib import Path

import ml_dtypes
import numpy as np
import pytest

import cupy_router
from cupy_router.ops._topk_select_many import ManyShape
from cupy_router.ops.activation_topk_backward import activation_topk_backward
from cupy_router.simt import device
from cupy_router.simt.sanitized import Call, call_sanitized, why_not_sanitized
from cupy_router.simt.transport import pack, unpack
from tests import topk_calls
from tests.simt.sources import KERNELS, build_all, source

pytestmark = pytest.mark.skipif(device.why_not() is not None, reason=str(device.why_not()))

RNG = np.random.default_rng(4)
GRADIENT = "cupy_router.ops.activation_topk_backward:activation_topk_backward"
PROBED = ("shared", "warp", "atomics", "mma", "cluster", "async_copy")


@pytest.fixture(params=device.SANITIZERS)
def sanitizer(request: pytest.FixtureRequest) -> str:
    reason = why_not_sanitized(request.param)
    if reason is not None:
        pytest.skip(reason)
    return str(request.param)


@pytest.fixture(scope="module", autouse=True)
def _built() -> None:
    build_all((name, sanitizer) for name in PROBED for sanitizer in device.SANITIZERS)


def test_transport_keeps_shape_strides_and_misalignment() -> None:
    base = RNG.normal(size=1000).astype(np.float32)
    arrays: dict[str, np.ndarray] = {
        "rows": base[3:993].reshape(9, 110)[:, :100],
        "backwards": base[::-2],
        "empty": np.zeros((0, 7), np.int64),
        "bfloat16": base.astype(ml_dtypes.bfloat16)[5:9],
        "frozen": np.broadcast_to(base[:1], (4, 1)),
    }
    for name, copy in unpack(pack(arrays)).items():
        array = arrays[name]
        np.testing.assert_array_equal(copy, array)
        assert (copy.dtype, copy.strides, copy.flags.writeable) == (array.dtype, array.strides, array.flags.writeable)
        assert array.size == 0 or (copy.ctypes.data - array.ctypes.data) % 16 == 0


def test_probes_are_clean(sanitizer: str) -> None:
    def ints(*shape: int) -> np.ndarray:
        return np.zeros(shape, np.int32)

    half, single = np.zeros(256, np.uint16), np.zeros(1000, np.float32)
    atomics = [ints(9), np.zeros(9, np.uint32), np.zeros(2, np.int64), np.zeros(7, np.uint64), single[:1], np.zeros(1)]
    launches = [
        ((3,), (32,), (ints(3, 32, 5),)),
        ((1,), (32,), (ints(32), np.zeros((31, 32), np.int64))),
        ((2,), (64,), (ints(128), *atomics)),
        ((1,), (32,), (half, half[:128], single[:128], single[:128].copy(), np.int32(0))),
        ((8,), (64,), (ints(512), ints(16), ints(8), ints(8))),
        ((1,), (32,), (single, single[:1].copy(), np.int32(8), np.int32(1000))),
    ]
    calls = [
        Call("cupy_router.simt.sanitized:launch_here", (source(name), name, *shapes))
        for name, shapes in zip(PROBED, launches, strict=True)
    ]
    report = call_sanitized(calls, sanitizer=sanitizer, schedule="shuffled")
    assert (report.fault, len(report.results)) == (None, len(calls)), report.text
    assert report.results[4][1].tolist() == [256, 0, 0, 0, 0, 0, 0, 0] * 2, "the kernels did run"


def test_ops_are_clean(sanitizer: str) -> None:
    rows = RNG.normal(size=5 * 300 + 1).astype(np.float32)[1:].reshape(5, 300)[:, :256]
    halves = RNG.normal(size=(6, 60)).astype(ml_dtypes.bfloat16)
    lengths = np.array([0, 1, 59, 60, 100, 7], np.int32)
    method = cupy_router.RoutingMethod(256, 6, "sqrtsoftplus", scale=1.5)
    calls = [
        Call("cupy_router:topk_select", (rows, 8)),
        Call("cupy_router:topk_select", (halves, 60), {"lengths": lengths}),
        Call("cupy_router:activation_topk", (rows, method), {"bias": rows[0].copy(), "num_valid": 4}),
    ]
    report = call_sanitized(calls, sanitizer=sanitizer)
    assert (report.fault, len(report.results)) == (None, len(calls)), report.text
    for call, result in zip(calls, report.results, strict=True):
        expected = getattr(cupy_router, call.function.split(":")[1])(*call.args, **call.kwargs)  # here: the reference
        np.testing.assert_array_equal(result[1], expected[1])
        np.testing.assert_allclose(result[0].astype(np.float32), expected[0].astype(np.float32), rtol=1e-5)


def test_gradients_are_clean(sanitizer: str) -> None:
    """Rows of both kernels, with padding, at the end of memory; zeros that are written over are no race."""
    calls = []
    for score, columns, k in (("sqrtsoftplus", 60, 6), ("softmax", 60, 6), ("sigmoid", 1100, 5), ("softmax", 60, 34)):
        method = cupy_router.RoutingMethod(columns, k, score)
        logits = RNG.normal(size=(5, columns)).astype(ml_dtypes.bfloat16)
        indices = RNG.permuted(np.tile(np.arange(columns, dtype=np.int32), (5, 1)), axis=1)[:, :k].copy()
        indices[3], indices[1, 1] = -1, indices[1, 0]
        arrays = (RNG.normal(size=(5, k)).astype(np.float32), indices, logits)
        calls.append(Call(GRADIENT, (*arrays, method), {"repeated": True}))
    report = call_sanitized(calls, sanitizer=sanitizer, schedule="shuffled")
    assert (report.fault, len(report.results)) == (None, len(calls)), report.text
    for call, result in zip(calls, report.results, strict=True):
        expected = activation_topk_backward(*call.args, **call.kwargs)  # here: the reference
        got, want = result[0].astype(np.float32), expected.grad_logits.astype(np.float32)
        np.testing.assert_allclose(got, want, rtol=1e-2, atol=1e-6)


@pytest.mark.parametrize("order", ["any", "column", "value"])
def test_long_rows_are_clean(sanitizer: str, order: str) -> None:
    """Sampled rows, short rows, ties at the threshold, samples that mislead; a cluster, also with ties only."""
    base = RNG.normal(size=4 * 3001 + 1).astype(np.float32)[1:].reshape(4, 3001)[:, :3000]
    base[1] = np.round(base[1])
    lengths, some_empty = np.array([3000, 2999, 1025, 7], np.int32), np.array([3000, 0, 1025, 7], np.int32)
    equal = np.zeros(2 * 4501 + 1, np.float32)[1:].reshape(2, 4501)[:, :4500]
    plan = topk_calls.PLANS["many rows"]
    assert isinstance(plan, ManyShape)
    calls = [
        Call("tests.topk_calls:select_by_plan", (base, 300, "many rows"), {"order": order, "lengths": lengths}),
        Call("tests.topk_calls:select_by_plan", (base.astype(ml_dtypes.bfloat16), 200, "many rows"), {"order": order}),
    ]
    calls += [
        Call("tests.topk_calls:select_by_plan", (scores, 300, "held rows"), {"order": order, "lengths": some_empty})
        for scores in (base, base.astype(ml_dtypes.bfloat16))
    ]
    calls += [
        Call(
            "tests.topk_calls:select_by_plan", (topk_calls.misleading(plan, 1, 8000, "float32", best), 300, "many rows")
        )
        for best in (False, True)
    ]
    if order == "value":
        calls += [
            Call("tests.topk_calls:select_by_plan", (base, 300, "a cluster"), {"lengths": lengths}),
            Call("tests.topk_calls:select_by_plan", (equal, 600, "a cluster")),
        ]
    report = call_sanitized(calls, sanitizer=sanitizer, schedule="shuffled")
    assert (report.fault, len(report.results)) == (None, len(calls)), report.text
    for call, result in zip(calls, report.results, strict=True):
        expected = cupy_router.topk_select(*call.args[:2], **call.kwargs)  # here: the reference
        np.testing.assert_array_equal(np.sort(result.indices, axis=1), np.sort(expected.indices, axis=1))


def test_a_full_list_of_many_entries_a_thread() -> None:
    """The only rows that are looked at are as long as the list, of 20 entries for each thread."""
    reason = why_not_sanitized("address")
    if reason is not None:
        pytest.skip(reason)
    scores, lengths = np.arange(12_582_912, dtype=np.float32)[None], np.array([10_240], np.int32)
    report = call_sanitized([Call("cupy_router:topk_select", (scores, 1), {"lengths": lengths})], sanitizer="address")
    assert report.fault is None, report.text
    assert report.results[0].indices.tolist() == [[10_239]]


def test_a_fault_within_an_op_is_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The way of the data is that of a user's call: op, compiler, launcher; only the kernel file is a wrong one."""
    reason = why_not_sanitized("address")
    if reason is not None:
        pytest.skip(reason)
    text = (KERNELS / "topk_select.cu").read_text()
    body = text.index("{", text.index('extern "C" __global__'))
    wrong = "if (threadIdx.x == 0 && blockIdx.x == 0) indices[num_rows * indices_stride] = 1;\n"
    (tmp_path / "topk_select.cu").write_text(text[: body + 1] + wrong + text[body + 1 :])
    monkeypatch.setenv("CUPY_ROUTER_KERNELS", str(tmp_path))
    report = call_sanitized([Call("cupy_router:topk_select", (RNG.normal(size=(5, 64)).astype(np.float32), 4))])
    assert report.fault == "global memory out of bounds", report.text
    assert "topk_select.cu:" in report.text


def test_other_failures_are_errors(sanitizer: str) -> None:
    with pytest.raises(RuntimeError, match="k must be in"):
        call_sanitized([Call("cupy_router:topk_select", (np.zeros((5, 64), np.float32), 65))], sanitizer=sanitizer)


def test_a_sanitizer_wants_its_library() -> None:
    with pytest.raises(RuntimeError, match="LD_PRELOAD"):
        device.SimtBackend(sanitizer="thread")
