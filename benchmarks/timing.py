# SPDX-License-Identifier: Apache-2.0
"""The clockwork: samples of what calls take on the GPU and on the host. harness.py says what is made of them.

Imports nothing of this repository, so that turn.py can time any checkout by this very text.
"""

from __future__ import annotations

import gc
import time
from collections.abc import Callable, Hashable, Mapping
from typing import Any, TypeVar

import cupy

COLD_BYTES = 2 * (50 << 20) + (20 << 20)  # more than twice the L2 of an H100
REPLAY_MICROSECONDS = 1000  # a replay of about this length drowns what its ends cost
ROUNDS, REPLAYS = 3, 12
HOST_ROUNDS, HOST_BATCHES, HOST_CALLS = 5, 40, 20
GARBAGE_CALLS = 100
TURNS, STEPS = 12, 3

Call = Callable[[int], Any]  # call number i, on the i-th set of inputs
Action = Callable[[], Any]
Time = tuple[float, float]  # median and spread in microseconds
Name = TypeVar("Name", bound=Hashable)


# -- Time on the GPU ---------------------------------------------------------------------------------------------------


def graph_rounds(
    call: Call, calls: int = 1, *, torch: bool = False, rounds: int = ROUNDS, replays: int = REPLAYS
) -> list[list[float]]:
    """Return the microseconds of a call in each replay of each round, with at least `calls` calls in a graph.

    `torch`: PyTorch captures the graph, not CuPy.
    """
    capture = _capture_by_torch if torch else _capture
    cupy.cuda.Device().synchronize()  # inputs were made on another stream
    probe_calls = 8
    probe = capture(call, probe_calls)
    estimate = min(probe() for _ in range(3)) / probe_calls
    calls = max(calls, min(500, max(5, int(REPLAY_MICROSECONDS / estimate))))
    found = []
    for _ in range(rounds):
        replay = capture(call, calls)
        found.append([replay() / calls for _ in range(replays)])
    return found


def _capture(call: Call, calls: int) -> Callable[[], float]:
    stream = cupy.cuda.Stream(non_blocking=True)
    with stream:
        call(0)  # compiles
        stream.synchronize()
        stream.begin_capture()
        for i in range(calls):
            call(i)
        graph = stream.end_capture()
    begin, end = cupy.cuda.Event(), cupy.cuda.Event()

    def replay() -> float:
        graph.launch(stream)
        begin.record(stream)
        graph.launch(stream)
        end.record(stream)
        end.synchronize()
        return float(cupy.cuda.get_elapsed_time(begin, end)) * 1000

    replay()
    return replay


def _capture_by_torch(call: Call, calls: int) -> Callable[[], float]:
    import torch

    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        for _ in range(2):
            call(0)  # compiles and allocates
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, stream=stream):
        for i in range(calls):
            call(i)
    begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)

    def replay() -> float:
        with torch.cuda.stream(stream):
            graph.replay()
            begin.record(stream)
            graph.replay()
            end.record(stream)
        end.synchronize()
        return float(begin.elapsed_time(end)) * 1000

    replay()
    return replay


def cold_inputs(make: Callable[[], Any], num_bytes: int) -> list[Any]:
    """Return inputs of `num_bytes` bytes each, enough of them that a pass over all misses L2."""
    count = max(2, -(-COLD_BYTES // num_bytes))
    if count > 4096:
        raise ValueError(f"{num_bytes} bytes are too few to be read cold")
    return [make() for _ in range(count)]


def warm_up(seconds: float = 0.5) -> None:
    """Bring the clocks up."""
    array = cupy.zeros(1 << 24, cupy.float32)
    end = time.perf_counter() + seconds
    while time.perf_counter() < end:
        for _ in range(50):
            array += 1
        cupy.cuda.get_current_stream().synchronize()


# -- Time on the host --------------------------------------------------------------------------------------------------


def host_rounds(
    calls: Mapping[Name, Action], *, rounds: int = HOST_ROUNDS, batches: int = HOST_BATCHES
) -> dict[Name, list[list[float]]]:
    """Microseconds of a call in each batch of each round, in which the calls take turns.

    The cycle collector is off meanwhile, as `timeit` has it.
    """
    synchronize = cupy.cuda.Device().synchronize
    found: dict[Name, list[list[float]]] = {name: [] for name in calls}
    for function in calls.values():
        for _ in range(50):
            function()
    gc.collect()
    gc.disable()
    try:
        for _ in range(rounds):
            for name, function in calls.items():
                times = []
                for _ in range(batches):
                    synchronize()
                    begin = time.perf_counter_ns()
                    for _ in range(HOST_CALLS):
                        function()
                    times.append((time.perf_counter_ns() - begin) / HOST_CALLS / 1000)
                found[name].append(times)
    finally:
        gc.enable()
    return found


def step_turns(steps: Mapping[Name, Action], turns: int = TURNS, calls: int = STEPS) -> dict[Name, list[list[float]]]:
    """Microseconds of each step in each turn, until the GPU is idle. The first call of a turn is not counted."""
    synchronize = cupy.cuda.Device().synchronize
    found: dict[Name, list[list[float]]] = {name: [] for name in steps}
    gc.collect()
    gc.disable()
    try:
        for _ in range(turns):
            for name, step in steps.items():
                times = []
                for _ in range(1 + calls):
                    synchronize()
                    begin = time.perf_counter_ns()
                    step()
                    synchronize()
                    times.append((time.perf_counter_ns() - begin) / 1000)
                found[name].append(times[1:])
    finally:
        gc.enable()
    return found


def garbage(call: Action) -> int:
    """How many objects 100 calls leave to the cycle collector."""
    call()
    gc.collect()
    gc.disable()
    try:
        for _ in range(GARBAGE_CALLS):
            call()
        return gc.collect()
    finally:
        gc.enable()
