# SPDX-License-Identifier: Apache-2.0
"""The launcher alone, against recorded launches: what the driver would read, or the error before it."""

from __future__ import annotations

import ctypes
import struct
import threading
from collections.abc import Iterator
from typing import Any

import pytest

from cupy_router import declarations, launcher
from cupy_router.compiler import Function, Signature
from cupy_router.launcher import Launch
from tests.recorder import Recorder, declared, recording

# Parameters of every type in an order that leaves gaps between them, and values that fill all of their bytes.
SOURCE = """#line 1 "kernels/mixed.cu"
extern "C" __global__ void __launch_bounds__(128)
    mixed(const float *__restrict__ x, int small, long long large,  // a remark
          float ratio, int *y, int last) {}
"""
SIGNATURE = Signature("mixed", ("x", "small", "large", "ratio", "y", "last"), "PiqfPi")
VALUES = (0xFEDCBA9876543210, -0x12345678, -0x123456789ABCDEF0, 1.5, 0x7FFF0123456789AB, 2**31 - 1)


@pytest.fixture
def recorder() -> Iterator[Recorder]:
    with recording() as recorder:
        yield recorder


def function(recorder: Recorder, signature: Signature = SIGNATURE, source: str = SOURCE, device: int = 0) -> Function:
    return Function(recorder.build(source, signature.function, device), signature, recorder, device)


def launch(recorder: Recorder, num_varying: int = 3, **options: Any) -> Launch:
    """Launch `mixed` with these varying arguments, the others fixed."""
    names = SIGNATURE.names
    fixed = dict(zip(names[num_varying:], VALUES[num_varying:], strict=True))
    shape = {"grid": 7, "block": 96} | options
    return Launch(function(recorder), varying=names[:num_varying], fixed=fixed, **shape)


# -- What arrives ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("num_varying", range(7))
def test_every_value_arrives_in_its_type(recorder: Recorder, num_varying: int) -> None:
    assert declared(SOURCE, "mixed") == [
        ("x", "*"), ("small", "int"), ("large", "long long"), ("ratio", "float"), ("y", "*"), ("last", "int"),
    ]  # fmt: skip
    launch(recorder, num_varying)(4711, VALUES[:num_varying])
    (seen,) = recorder.launches
    assert seen.arguments == dict(zip(SIGNATURE.names, VALUES, strict=True))
    assert (seen.grid, seen.block, seen.shared_bytes, seen.stream) == ((7, 1, 1), (96, 1, 1), 0, 4711)


def test_arguments_are_aligned_and_do_not_overlap(recorder: Recorder) -> None:
    launch(recorder)(0, VALUES[:3])
    sizes = [struct.calcsize(code) for code in SIGNATURE.format]
    addresses = recorder.launches[0].addresses
    assert [address % size for address, size in zip(addresses, sizes, strict=True)] == [0] * 6
    ends = [address + size for address, size in zip(addresses, sizes, strict=True)]
    assert all(end <= start for end, start in zip(ends, addresses[1:], strict=False))


def test_a_struct_arrives_whole_at_one_address(recorder: Recorder) -> None:
    source = """#line 1 "kernels/mixed.cu"
struct Numbers {
    float scale;
    float bias;  // of each
};
extern "C" __global__ void mixed(int n, const Numbers numbers, long long last, Numbers more) {}
"""
    names = ("n", "scale", "bias", "last", "scale", "bias")
    signature = Signature("mixed", names, "iffqff", (1, 2, 1, 2))
    ours = Launch(function(recorder, signature, source), 1, 32, names, {})  # its buffer is read below
    ours(0, (7, 1.5, 2.5, -9, 3.5, 4.5))
    (seen,) = recorder.launches
    assert seen.arguments == {"n": 7, "last": -9, "scale": 3.5, "bias": 4.5}
    n, numbers, last, more = seen.addresses
    assert (numbers - n, last - numbers, more - last) == (4, 12, 8)
    assert [ctypes.c_float.from_address(numbers + 4 * i).value for i in range(2)] == [1.5, 2.5]


def test_the_grid_may_be_as_large_as_the_driver_takes(recorder: Recorder) -> None:
    launch(recorder, grid=2**31 - 1, block=1024)(0, VALUES[:3])
    assert (recorder.launches[0].grid[0], recorder.launches[0].block[0]) == (2**31 - 1, 1024)


@pytest.mark.parametrize(
    "passed",
    [SIGNATURE.names[:5], SIGNATURE.names[4::-1], ("other", "y", "large", "x"), ("y", "x"), ("small",), ("other",), ()],
    ids=" ".join,
)
def test_values_may_be_passed_in_another_order_and_left_out(recorder: Recorder, passed: tuple[str, ...]) -> None:
    given = dict(zip(SIGNATURE.names, VALUES, strict=True))
    ours = Launch(function(recorder), 1, 32, SIGNATURE.names[:5], {"last": VALUES[5]}, passed=passed)
    for _ in range(2):
        ours(0, [given.get(name, -1) for name in passed])
    expected = {name: value if name in (*passed, "last") else 0 for name, value in given.items()}
    assert [seen.arguments for seen in recorder.launches] == [expected] * 2


def test_ints_are_taken_as_floats_and_numpy_ints_as_ints(recorder: Recorder) -> None:
    np = pytest.importorskip("numpy")
    launch(recorder, 6)(0, (0, np.int64(5), np.int32(6), 3, 0, np.uint8(7)))
    assert recorder.launches[0].arguments == {"x": 0, "small": 5, "large": 6, "ratio": 3.0, "y": 0, "last": 7}


# -- What is refused ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "names",
    [
        SIGNATURE.names[:-1],
        (*SIGNATURE.names, "more"),
        ("small", "x", *SIGNATURE.names[2:]),
        ("z", *SIGNATURE.names[1:]),
        (),
    ],
    ids=["one too few", "one too many", "another order", "another name", "none"],
)
@pytest.mark.parametrize("num_varying", [0, 3])
def test_names_must_be_those_of_the_kernel_in_their_order(
    recorder: Recorder, names: tuple[str, ...], num_varying: int
) -> None:
    fixed = dict.fromkeys(names[num_varying:], 0)
    with pytest.raises(TypeError, match=r"^mixed takes \(x, small, large, ratio, y, last\), got \("):
        Launch(function(recorder), 1, 32, names[:num_varying], fixed)


@pytest.mark.parametrize(
    ("position", "value"),
    [
        (0, 1.0), (0, None), (0, "0"),
        (1, 1.0), (1, 2**31), (1, -(2**31) - 1), (1, None),
        (2, 1.0), (2, 2**63), (2, -(2**63) - 1),
        (3, None), (3, "1"), (3, 1j),
        (4, 1.5), (4, 2**64),
        (5, 1.0), (5, 2**31),
    ],
)  # fmt: skip
def test_values_must_fit_their_parameters(recorder: Recorder, position: int, value: Any) -> None:
    good = launch(recorder, 6)
    values = list(VALUES)
    values[position] = value
    with pytest.raises((TypeError, OverflowError)):
        good(0, values)
    assert recorder.launches == []
    good(0, VALUES)  # the buffer is as good as before
    assert recorder.launches[0].arguments == dict(zip(SIGNATURE.names, VALUES, strict=True))


def test_fixed_values_must_fit_their_parameters(recorder: Recorder) -> None:
    with pytest.raises(TypeError, match=r"^mixed\(x, small, large, ratio, y, last\): "):
        Launch(function(recorder), 1, 32, SIGNATURE.names[:5], {"last": 2**31})


@pytest.mark.parametrize("values", [(), VALUES[:2], VALUES[:4]], ids=["none", "one too few", "one too many"])
def test_the_number_of_values_must_be_right(recorder: Recorder, values: tuple[int, ...]) -> None:
    with pytest.raises(TypeError, match=r"^mixed\(x, small, large, ratio, y, last\): "):
        launch(recorder)(0, values)
    assert recorder.launches == []


@pytest.mark.parametrize(("grid", "block"), [(0, 32), (-1, 32), (2**31, 32), (1, 0), (1, 1025)])
def test_impossible_shapes_are_refused(recorder: Recorder, grid: int, block: int) -> None:
    with pytest.raises(ValueError, match=f"mixed: grid {grid} or block {block} is out of range"):
        launch(recorder, grid=grid, block=block)


# -- Shared memory -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("shared_bytes", [0, 1, 48 * 1024, 48 * 1024 + 1, 227 * 1024])
def test_more_than_48_kb_is_opted_in_to_once(recorder: Recorder, shared_bytes: int) -> None:
    ours = launch(recorder, shared_bytes=shared_bytes)
    for _ in range(3):
        ours(0, VALUES[:3])
    asked = [(ours.function.handle, 0, shared_bytes)] if shared_bytes > 48 * 1024 else []
    assert recorder.shared == asked
    assert {seen.shared_bytes for seen in recorder.launches} == {shared_bytes}


# -- Devices -----------------------------------------------------------------------------------------------------------


def on_device(recorder: Recorder, device: int) -> Launch:
    return Launch(function(recorder, device=device), 1, 32, SIGNATURE.names, {})


def test_the_device_is_switched_and_restored(recorder: Recorder) -> None:
    """The recorder refuses a launch on any device but the kernel's own."""
    assert recorder.current == 0
    on_device(recorder, 3)(0, VALUES)
    assert recorder.used == [3, 0]
    assert recorder.current == 0
    on_device(recorder, 0)(0, VALUES)
    assert recorder.used == [3, 0]
    assert [seen.device for seen in recorder.launches] == [3, 0]


def test_the_device_is_restored_if_the_launch_fails(recorder: Recorder) -> None:
    ours = on_device(recorder, 3)
    recorder.failure = RuntimeError("too many resources requested for launch")
    with pytest.raises(RuntimeError, match="too many resources"):
        ours(0, VALUES)
    assert recorder.current == 0
    recorder.failure = None
    ours(0, VALUES)
    assert [seen.device for seen in recorder.launches] == [3]


def test_no_device_is_switched_to_for_a_value_that_does_not_fit(recorder: Recorder) -> None:
    with pytest.raises(TypeError):
        on_device(recorder, 3)(0, (*VALUES[:-1], 1.5))
    assert recorder.used == []


# -- Threads -----------------------------------------------------------------------------------------------------------


def test_eight_threads_never_mix_their_arguments() -> None:
    """Each launch waits before it reads, so that all threads have packed their arguments."""
    threads, calls = 8, 25
    with recording(patience=1e-3) as recorder:
        ours = Launch(function(recorder), 1, 32, SIGNATURE.names, {})
        start = threading.Barrier(threads)

        def work(number: int) -> None:
            start.wait()
            for call in range(calls):
                mark = number * 1000 + call
                ours(mark, (mark, mark, -mark, float(mark), mark, mark))

        workers = [threading.Thread(target=work, args=(number,)) for number in range(threads)]
        for worker in workers:
            worker.start()
        for worker in workers:
            worker.join(timeout=60)
    assert sorted(seen.stream for seen in recorder.launches) == [t * 1000 + c for t in range(8) for c in range(calls)]
    for seen in recorder.launches:
        mark = seen.stream
        assert list(seen.arguments.values()) == [mark, mark, -mark, float(mark), mark, mark]
    assert len({seen.addresses for seen in recorder.launches}) == threads


def test_launches_with_the_same_types_do_not_share_their_values(recorder: Recorder) -> None:
    first, second = launch(recorder), launch(recorder, grid=9)
    first(1, (1, 2, 3))
    second(2, (4, 5, 6))
    first(3, (7, 8, 9))
    assert [list(seen.arguments.values())[:3] for seen in recorder.launches] == [[1, 2, 3], [4, 5, 6], [7, 8, 9]]
    assert [seen.grid[0] for seen in recorder.launches] == [7, 9, 7]


def test_the_only_device_is_made_current_once_in_each_thread(
    recorder: Recorder, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A new thread has no CUDA context before."""
    asked: list[int] = []
    recorder.switches = False
    monkeypatch.setattr(recorder, "use", lambda device: asked.append(threading.get_ident()))
    ours = launch(recorder)

    def work() -> None:
        for _ in range(3):
            ours(0, VALUES[:3])

    worker = threading.Thread(target=work)
    work()
    worker.start()
    worker.join()
    assert len(recorder.launches) == 6
    assert len(asked) == len(set(asked)) == 2


# -- What the launcher believes of the driver --------------------------------------------------------------------------


def test_sizes_are_those_of_the_device() -> None:
    """`struct` packs by the sizes of this machine's C, which have to be CUDA's: the kernel reads these bytes."""
    assert {code: struct.calcsize(f"@{code}") for code in "Piqf"} == {"P": 8, "i": 4, "q": 8, "f": 4}
    assert set(declarations._TYPES.values()) == {*"Piqf", declarations.TENSOR_MAP}
    assert launcher.MAX_GRID == 2**31 - 1
