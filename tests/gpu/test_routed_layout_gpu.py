# SPDX-License-Identifier: Apache-2.0
"""Routers that lay out in their own launch: the same bits under load, and in graphs on several streams at once."""

from __future__ import annotations

from typing import Any

import pytest

from cupy_router import LayoutSpec
from tests import compare
from tests.backends import GpuBackend
from tests.gpu.test_layouts_gpu import assert_repeats
from tests.test_routed_layout import ACTIVATION, DENSE, HASH, Call, Case

NAMED = {"one block": ACTIVATION[10], "cluster": ACTIVATION[16], "last block": ACTIVATION[21], "padded": ACTIVATION[12]}
NAMED |= {"hash, one block": HASH[4], "hash, last block": HASH[6], "hash, products": HASH[9]}
NAMED |= {"dense, one block": DENSE[2], "dense, last block": DENSE[4], "dense, 64 tokens": DENSE[5]}


def arrays_of(plan: Any) -> list[Any]:
    return [array for array in (plan.weights, plan.indices, *plan.layout[:7]) if array is not None]


def spec_of(case: Case) -> LayoutSpec:
    return LayoutSpec(case.alignment, case.capacity, case.want)


@pytest.mark.parametrize("name", NAMED)
def test_the_same_bits_a_thousand_times_under_load(name: str, cupy: Any) -> None:
    call, spec = Call(GpuBackend(), NAMED[name]), spec_of(NAMED[name])
    assert_repeats(cupy, lambda: tuple(arrays_of(call(spec))))


@pytest.mark.parametrize("name", NAMED)
def test_graphs_on_two_streams_at_once(name: str, cupy: Any) -> None:
    case = NAMED[name]
    backend = GpuBackend()
    call = Call(backend, case)
    right = call(spec_of(case))
    cupy.cuda.Device().synchronize()
    graphs = []
    for _ in range(2):
        stream = cupy.cuda.Stream(non_blocking=True)
        with stream:
            out = call(spec_of(case))
            stream.begin_capture()
            for _ in range(20):
                call(spec_of(case), out)
            graphs.append((stream, stream.end_capture(), out))
    for _, _, out in graphs:
        for array in arrays_of(out):
            array.fill(77)
    cupy.cuda.Device().synchronize()
    for _ in range(20):
        for stream, graph, _ in graphs:
            graph.launch(stream)
    cupy.cuda.Device().synchronize()
    for _, _, out in graphs:
        for got, want in zip(arrays_of(out), arrays_of(right), strict=True):
            compare.assert_same_bits(backend.numpy(got), backend.numpy(want))
