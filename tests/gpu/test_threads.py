# SPDX-License-Identifier: Apache-2.0
"""Eight threads at once, each on its own stream: with compiled kernels, and with kernels that all compile at once."""

from __future__ import annotations

import threading
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import pytest

from cupy_router import RoutingMethod, activation_topk
from tests import compare, frameworks, inputs, oracle
from tests.gpu.support import NAMES, call, on_gpu, upload

THREADS = 8


def together(work: Any) -> None:
    """Run work(number) in all threads; the first error is raised here."""
    with ThreadPoolExecutor(THREADS) as threads:
        for done in [threads.submit(work, number) for number in range(THREADS)]:
            done.result(timeout=120)


@pytest.mark.parametrize("framework", tuple(frameworks.ON_GPU))
@pytest.mark.acceptance("8 threads at once")
def test_eight_threads(framework: str, cupy: Any) -> None:
    gpu = on_gpu(framework)
    cases = [call(name, seed) for name in NAMES for seed in range(3)]
    uploaded = [upload(gpu, case.arrays) for case in cases]
    cupy.cuda.Device().synchronize()
    start = threading.Barrier(THREADS, timeout=60)

    def work(number: int) -> None:
        stream = cupy.cuda.Stream(non_blocking=True)
        start.wait()
        for turn in range(60):
            at = (number + turn) % len(cases)
            given = {"stream": stream} if turn % 2 else {}
            result = cases[at](uploaded[at], **given)
            cupy.cuda.Device().synchronize()
            cases[at].check(*map(gpu.numpy, result))

    together(work)


@pytest.mark.acceptance("8 threads at once")
def test_eight_threads_compile_together(cupy: Any) -> None:
    """All threads need the same new kernels at the same moment."""
    experts = 99  # no other test has this number
    logits = inputs.normal((17, experts))
    on_device = cupy.asarray(logits)
    cupy.cuda.Device().synchronize()
    start = threading.Barrier(THREADS, timeout=60)

    def work(number: int) -> None:
        for k in (3, 5, 7):
            method = RoutingMethod(experts, k, "sigmoid")
            start.wait()
            result = activation_topk(on_device, method)
            cupy.cuda.get_current_stream().synchronize()
            got = oracle.Routing(cupy.asnumpy(result.weights), cupy.asnumpy(result.indices))
            compare.assert_routes(got, oracle.route(logits, method), logits, method)

    together(work)


def test_a_thread_that_never_used_cuda(cupy: Any) -> None:
    case = call("topk_select")
    arrays = upload(on_gpu("cupy"), case.arrays)
    cupy.cuda.Device().synchronize()
    found: list[Any] = []

    def work() -> None:
        result = case(arrays)
        cupy.cuda.get_current_stream().synchronize()
        found.append(tuple(map(cupy.asnumpy, result)))

    thread = threading.Thread(target=work)
    thread.start()
    thread.join(timeout=60)
    assert len(found) == 1
    case.check(*found[0])


def test_threads_keep_their_current_streams_apart(cupy: Any) -> None:
    """CuPy's current stream belongs to a thread: other threads do not see it."""
    case = call("activation_topk")
    arrays = upload(on_gpu("cupy"), case.arrays)
    cupy.cuda.Device().synchronize()

    def work(number: int) -> None:
        stream = cupy.cuda.Stream(non_blocking=True)
        with stream:
            for _ in range(20):
                result = case(arrays)
                stream.synchronize()
                indices = cupy.asnumpy(result.indices)
                assert (np.sort(indices, -1)[:, 1:] != np.sort(indices, -1)[:, :-1]).all()
                case.check(cupy.asnumpy(result.weights), indices)

    together(work)
