# SPDX-License-Identifier: Apache-2.0
"""Scratch memory on the CPU: who shares it, how it grows, that it starts as zeros."""

from __future__ import annotations

import ctypes
import itertools
import threading

import numpy as np

from cupy_router import scratch

CPU = ("cpu", 0)


def memory(address: int, size: int) -> np.ndarray:
    return np.frombuffer((ctypes.c_ubyte * size).from_address(address), np.uint8)


def test_one_buffer_per_stream_and_use() -> None:
    calls = list(itertools.product((1001, 1002), ("first", "second")))
    found = {call: scratch.buffer(CPU, call[0], call[1], 1000) for call in calls}
    assert len(set(found.values())) == 4
    assert all(address % 256 == 0 for address in found.values())
    assert found == {call: scratch.buffer(CPU, call[0], call[1], 64 * 1024) for call in calls}


def test_buffers_start_as_zeros_and_keep_their_content() -> None:
    address = scratch.buffer(CPU, 1003, "kept", 100_000)
    assert not memory(address, 100_000).any()
    memory(address, 100_000)[:] = 7
    assert (memory(scratch.buffer(CPU, 1003, "kept", 10), 100_000) == 7).all()


def test_a_larger_request_gets_other_memory_and_keeps_the_smaller() -> None:
    small = scratch.buffer(CPU, 1004, "growing", 10)
    memory(small, 10)[:] = 5
    large = scratch.buffer(CPU, 1004, "growing", 1_000_000)
    assert large != small
    assert not memory(large, 1_000_000).any()
    assert (memory(small, 10) == 5).all()
    assert scratch.buffer(CPU, 1004, "growing", 10) == large


def test_threads_agree() -> None:
    found: list[int] = []
    start = threading.Barrier(8)

    def ask() -> None:
        start.wait()
        found.append(scratch.buffer(CPU, 1005, "shared", 1000))

    threads = [threading.Thread(target=ask) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(found) == 8
    assert len(set(found)) == 1
