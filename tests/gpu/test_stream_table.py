# SPDX-License-Identifier: Apache-2.0
"""Framework x producer's stream x consumer's stream, after a slow producer: a wrong order is a wrong result.

Inputs hold other values until the end of a busy stream. The caller orders arrays of PyTorch and CuPy across streams, as
for their own functions; what comes by DLPack is ordered by its protocol.
"""

from __future__ import annotations

from itertools import product
from typing import Any

import numpy as np
import pytest

from tests.gpu.support import Raw, call, on_gpu, spin, upload
from tests.gpu.test_frameworks import OnlyDLPack
from tests.gpu.test_streams import Streams, slow

SPIN = 100  # milliseconds
OPS = ("activation_topk", "dense_router", "topk_select")
PRODUCERS = ("default", "side")
# Where the call runs: on the current stream, which is the producer's or waits for it, or on one that `stream=` names.
CONSUMERS = ("the producer's", "another, current", "another, given", "another, as a handle", "the default, given")


def stream_of(streams: Streams, kind: str) -> Any:
    if kind == "side":
        return streams.new()
    return streams.module.default_stream() if streams.is_torch else streams.module.Stream.null


def wait(streams: Streams, waiting: Any, producer: Any) -> None:
    if streams.is_torch:
        waiting.wait_stream(producer)
    else:
        waiting.wait_event(producer.record())


def produced(streams: Streams, op: str, producer: Any) -> tuple[Any, dict[str, Any]]:
    """Return a call and its arrays, which become valid late on the producer's stream; everything is compiled."""
    right, wrong = call(op, seed=0), call(op, seed=1)
    source, target = upload(streams.gpu, right.arrays), upload(streams.gpu, wrong.arrays)
    # Also new kernels of this process: CUDA loads a kernel after all work in flight.
    for given in ({}, {"stream": streams.new()}):
        for array in right(target, **given):
            streams.clone(array)
    wait(streams, streams.new(), producer)
    with streams.use(producer):
        for key in target:
            streams.copy(target[key], upload(streams.gpu, wrong.arrays)[key])
    streams.synchronize()
    spin(0)
    with streams.use(producer):
        spin(SPIN, Raw(streams.handle(producer)))
        for key in target:
            streams.copy(target[key], source[key])
    return right, target


def consumed(streams: Streams, right: Any, target: Any, consumer: Any, how: str) -> list[Any]:
    """Return copies of the results, made on the stream of the call."""
    if how.endswith(("given", "handle")):
        result = right(target, stream=streams.handle(consumer) if how.endswith("handle") else consumer)
    else:
        with streams.use(consumer):
            result = right(target)
    with streams.use(consumer):
        return [streams.clone(a) for a in result]


@pytest.mark.parametrize(
    ("framework", "producer", "how", "op"), [*product(("cupy", "torch"), PRODUCERS, CONSUMERS, OPS)]
)
def test_the_table(framework: str, producer: str, how: str, op: str) -> None:
    streams = Streams(framework)
    first = stream_of(streams, producer)
    right, target = produced(streams, op, first)
    consumer = first
    if how != "the producer's":
        consumer = stream_of(streams, "default" if how.startswith("the default") else "side")
        wait(streams, consumer, first)
    copies = consumed(streams, right, target, consumer, how)
    assert streams.busy(first), "the host waited, so that order could not go wrong"
    streams.synchronize()
    right.check(*map(streams.gpu.numpy, copies))


@pytest.mark.parametrize("how", CONSUMERS[1:4])
@pytest.mark.parametrize("framework", ["cupy", "torch"])
def test_a_wrong_order_is_detected(framework: str, how: str) -> None:
    """The same without the wait reads the other values."""
    streams = Streams(framework)
    first = stream_of(streams, "side")
    right, target = produced(streams, "activation_topk", first)
    copies = consumed(streams, right, target, streams.new(), how)
    assert streams.busy(first)
    streams.synchronize()
    with pytest.raises(AssertionError):
        right.check(*map(streams.gpu.numpy, copies))


class Foreign(OnlyDLPack):
    """An array of a framework with a current stream of its own."""

    def __init__(self, array: Any, stream: Any) -> None:
        super().__init__(array)
        self.stream = stream

    def __dlpack__(self, **wanted: Any) -> object:
        with self.stream:  # from which CuPy makes the consumer's stream wait
            return super().__dlpack__(**wanted)


@pytest.mark.parametrize(("producer", "how", "op"), [*product(PRODUCERS, ("current", "given", "handle"), OPS)])
def test_dlpack_orders_other_frameworks(producer: str, how: str, op: str) -> None:
    """Exporting a foreign array makes our stream wait for its producer's, which is unknown here."""
    streams = Streams("cupy")
    first, consumer = stream_of(streams, producer), streams.new()
    right, target = produced(streams, op, first)
    foreign = {key: Foreign(array, first) for key, array in target.items()}
    if how == "current":
        with streams.use(consumer):
            result = right(foreign)
    else:
        result = right(foreign, stream=streams.handle(consumer) if how == "handle" else consumer)
    with streams.use(consumer):
        copies = [streams.clone(a) for a in result]
    assert streams.busy(first), "the host waited"
    streams.synchronize()
    right.check(*map(streams.gpu.numpy, copies))


@pytest.mark.parametrize(("how", "op"), [*product(("default", "side, current", "side, given"), OPS)])
def test_jax_orders_both_ways(how: str, op: str) -> None:
    """After XLA's slow producer, whatever stream the call runs on, and before XLA's use of the results."""
    gpu, streams, case = on_gpu("jax"), Streams("cupy"), call(op)
    source, produce = upload(gpu, case.arrays), slow(gpu.jax)
    consumer = stream_of(streams, "side" if how.startswith("side") else "default")

    def routed(arrays: dict[str, Any]) -> Any:
        if how.endswith("given"):
            return case(arrays, stream=consumer)
        with consumer:
            return case(arrays)

    gpu.jax.block_until_ready(routed(produce(source)))
    late = produce(source)
    result = routed(late)
    doubled = [a + a for a in result]
    del late
    case.check(*map(gpu.numpy, result))
    for a, b in zip(doubled, result, strict=True):
        np.testing.assert_array_equal(np.asarray(a), np.asarray(b) * 2)
