# SPDX-License-Identifier: Apache-2.0
"""Which kernels serve dense_router on an H100 or H200, by the number of tokens, the gate, dtypes and strides."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any
from unittest import mock

import ml_dtypes
import numpy as np
import pytest

from cupy_router import LayoutSpec, RoutingMethod, dense_router, gemm, tuning
from tests.recorder import Recorder, recording

DECODE, FUSED, GEMM = "dense_router_decode", "dense_router_prefill", "activation_topk"


@pytest.fixture
def recorder() -> Iterator[Recorder]:
    product = mock.patch.object(gemm, "product", return_value=mock.MagicMock(row_bytes=0))
    with recording() as recorder, product, tuning.assume(tuning.DEFAULT):
        yield recorder


def kernels(
    recorder: Recorder, n: int, experts: int = 256, hidden: int = 4096, dtype: Any = ml_dtypes.bfloat16,
    stride: int | None = None, **options: Any,
) -> list[str]:  # fmt: skip
    """Return the kernels of a call of n tokens; stride: elements from a row of x to the next."""
    size = np.dtype(dtype).itemsize
    x = np.zeros((n, max(hidden, stride or 0)), dtype)[:, :hidden]
    if stride is not None:
        x = np.lib.stride_tricks.as_strided(x, strides=(stride * size, size))
    dense_router(x, np.zeros((experts, hidden), dtype), RoutingMethod(experts, 8), **options)
    found = [launch.kernel for launch in recorder.launches]
    recorder.launches.clear()
    return found


@pytest.mark.parametrize(
    ("n", "kernel"), [(1, DECODE), (64, DECODE), (65, FUSED), (448, FUSED), (449, GEMM), (8192, GEMM)]
)
def test_by_the_number_of_tokens(n: int, kernel: str, recorder: Recorder) -> None:
    assert kernels(recorder, n) == [kernel]


@pytest.mark.parametrize(
    "other",
    [{"dtype": np.float32}, {"experts": 384, "hidden": 7168}, {"path": "prefill"}, {"stride": 0}, {"stride": 4100}],
    ids=str,
)
def test_cublas_where_it_is_faster_or_alone_can(other: dict[str, Any], recorder: Recorder) -> None:
    """In float32, for a gate of over 3 MB, if it is asked for, for rows that overlap or begin between 16-byte words."""
    assert kernels(recorder, 100, **other) == [GEMM]


@pytest.mark.parametrize(("n", "kernel"), [(16, DECODE), (17, FUSED), (64, FUSED), (65, FUSED), (8192, FUSED)])
def test_batch_invariant_calls_with_many_experts(n: int, kernel: str, recorder: Recorder) -> None:
    assert kernels(recorder, n, 384, 7168, batch_invariant=True) == [kernel]


@pytest.mark.parametrize("n", [17, 64])
def test_batch_invariant_calls_of_few_tokens(n: int, recorder: Recorder) -> None:
    """A gate that all multiprocessors read at once, rows that overlap, and a layout take the kernel for few."""
    assert kernels(recorder, n, batch_invariant=True) == [DECODE]
    assert kernels(recorder, n, 384, 7168, stride=0, batch_invariant=True) == [DECODE]
    assert FUSED not in kernels(recorder, n, 384, 7168, batch_invariant=True, layout=LayoutSpec())


def test_rows_that_overlap_have_no_map(recorder: Recorder) -> None:
    assert kernels(recorder, 100, stride=0, batch_invariant=True) == [DECODE]
