# SPDX-License-Identifier: Apache-2.0
"""The executor itself: schedules, launches, crashes, the twins of PTX; and its probes as real CUDA."""

from __future__ import annotations

import time
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest

from cupy_router.compiler import CompileError
from cupy_router.simt import device
from cupy_router.simt.device import SCHEDULES, KernelFault, SimtBackend
from tests import compare
from tests.mma_probes import recorded
from tests.simt.sources import KERNELS, PROBES, build_all, run

pytestmark = pytest.mark.skipif(device.why_not() is not None, reason=str(device.why_not()))

RNG = np.random.default_rng(2)


@pytest.fixture(scope="module", autouse=True)
def _built() -> None:
    build_all((path.stem, None) for path in PROBES.glob("*.cu"))


@pytest.fixture(params=SCHEDULES)
def cpu(request: pytest.FixtureRequest) -> SimtBackend:
    return SimtBackend(request.param, seed=5)


# -- Twins of PTX ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_mma(cpu: SimtBackend, dtype: str) -> None:
    """All bits are those of a GPU, also for subnormal numbers, infinities and NaN."""
    tiles, expected = recorded(dtype, 16)
    for a, b, c, rows in zip(*tiles, expected, strict=True):
        d, is_bfloat16 = np.zeros((16, 8), np.float32), np.int32(dtype == "bfloat16")
        twice = np.tile(a.view(np.uint16), (2, 1)), np.ascontiguousarray(b.view(np.uint16).T), np.tile(c, (2, 1))
        run(cpu, "mma", 1, 32, *twice, d, is_bfloat16)
        compare.assert_same_bits(d, np.tile(rows, (2, 1)))


def test_clusters(cpu: SimtBackend) -> None:
    values = RNG.integers(0, 1000, (3, 4 * 64)).astype(np.int32)
    histograms, marks, greetings = np.zeros((3, 8), np.int32), np.zeros(12, np.int32), np.zeros(12, np.int32)
    run(cpu, "cluster", 12, 64, values, histograms, marks, greetings)
    np.testing.assert_array_equal(histograms, [np.bincount(row % 8, minlength=8) for row in values])
    right = np.arange(12) // 4 * 4 + (np.arange(12) + 1) % 4
    np.testing.assert_array_equal(marks, 100 * right)
    np.testing.assert_array_equal(greetings, 100 * right + 1)
    with pytest.raises(KernelFault, match=r"bad launch.*clusters"):
        run(cpu, "cluster", 10, 64, values, histograms, marks, greetings)


@pytest.mark.parametrize("k", [1, 300, 1100])
@pytest.mark.parametrize("bits", [1, 8, 32])
def test_the_kth_best_key_of_a_cluster(cpu: SimtBackend, bits: int, k: int) -> None:
    """Also where most of the keys are in one block, and many tie."""
    keys = np.concatenate([RNG.integers(0, 2**bits, (3, 500)), RNG.integers(0, 2**31, (1, 500))]).astype(np.uint32)
    together, alone = np.zeros((4, 2, 2), np.uint32), np.zeros((4, 2), np.uint32)
    run(cpu, "kth_key", 4, 256, keys, together, alone, np.int32(500), np.int32(k))
    assert (together[:, :, 0] == np.sort(keys.ravel())[-k]).all()
    assert (together == together[0, 0]).all()
    np.testing.assert_array_equal(alone[:, 0], np.sort(keys, axis=1)[:, -min(k, 500)])


def test_asynchronous_copies(cpu: SimtBackend) -> None:
    x = RNG.integers(0, 100, (3, 1000)).astype(np.float32)
    sums = np.zeros(3, np.float32)
    run(cpu, "async_copy", 3, 32, x, sums, np.int32(8), np.int32(1000))
    np.testing.assert_array_equal(sums, x.sum(1))


# -- Schedules ---------------------------------------------------------------------------------------------------------


def order(schedule: str, seed: int = 0) -> np.ndarray:
    """The numbers of 2 x 64 threads in the order of their steps, three each."""
    log, length = np.full(3 * 128, -1, np.int32), np.zeros(1, np.uint32)
    run(SimtBackend(schedule, seed), "order", 2, 64, log, length)
    assert length[0] == len(log)
    np.testing.assert_array_equal(np.bincount(log, minlength=128), np.full(128, 3))
    return log


def test_round_robin_and_reversed() -> None:
    forward = np.concatenate([np.tile(np.arange(64), 3), np.tile(np.arange(64, 128), 3)])
    np.testing.assert_array_equal(order("round_robin"), forward)
    np.testing.assert_array_equal(order("reversed"), 127 - forward)


def test_shuffled() -> None:
    log = order("shuffled", 1)
    assert (np.diff(log[:64]) < 0).sum() > 10
    np.testing.assert_array_equal(log, order("shuffled", 1))
    assert (log != order("shuffled", 2)).any()
    assert {order("shuffled", seed)[0] // 64 for seed in range(8)} == {0, 1}, "blocks come in shuffled order"


def test_run_ahead() -> None:
    logs = [order("run_ahead", seed).reshape(4, 3, 32) for seed in range(8)]
    for log in logs:  # a warp does all of its steps before the next one starts
        assert (log // 32 == log[:, :1, :1] // 32).all()
    assert len({tuple(log[:, 0, 0] // 32) for log in logs}) > 2


# -- Launches ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("grid", "block"),
    [((0,), (32,)), ((1,), (0,)), ((1,), (65,)), ((1,), (2048,)), ((1, 70000), (32,)), ((1,), (1, 1, 65))],
)
def test_bad_launch(grid: tuple[int, ...], block: tuple[int, ...]) -> None:
    with pytest.raises(KernelFault, match="bad launch") as error:
        run(SimtBackend(), "order", grid, block, np.zeros(9, np.int32), np.zeros(1, np.uint32))
    assert error.value.name == "bad launch"


@pytest.mark.parametrize(
    ("kind", "name", "detail"),
    [
        (1, "memory fault", "thread 40 (warp 1, lane 8): bad or misaligned access near address (nil)"),
        (2, "integer division", "thread 40 (warp 1, lane 8): division by zero"),
        (3, "memory fault", "thread 40"),
        (4, "trap", "thread 40"),
        (5, "assertion", "zero == 1 at crash.cu:"),
        (6, "time limit", "thread 40"),
        (7, "time limit", ""),
    ],
)
def test_crashes_are_reported_and_survived(kind: int, name: str, detail: str) -> None:
    cpu = SimtBackend(time_limit=0.3)
    x, zero = np.arange(64, dtype=np.int32), np.int32(0)
    with pytest.raises(KernelFault) as error:
        run(cpu, "crash", 1, 64, np.int32(kind), x, zero)
    assert error.value.name == name
    assert detail in str(error.value)
    x = np.arange(64, dtype=np.int32)
    run(cpu, "crash", 1, 64, np.int32(0), x, zero)
    np.testing.assert_array_equal(x, np.arange(1, 65))
    assert np.float32(1e-40) * np.float32(1) != 0, "the float mode is restored"


def test_shared_memory_is_new_for_every_block(cpu: SimtBackend) -> None:
    found = np.zeros((3, 32, 5), np.int32)
    run(cpu, "shared", 3, 32, found)
    np.testing.assert_array_equal(found, np.full((3, 32, 5), -1))


def test_other_threads_may_launch() -> None:
    cpu, x = SimtBackend(), np.zeros((8, 64), np.int32)
    args = [(np.int32(0), row, np.int32(0)) for row in x]
    with ThreadPoolExecutor(len(x)) as pool:
        list(pool.map(lambda a: run(cpu, "crash", 1, 64, *a), args * 20))
    assert (x == 20).all()


def test_portable_switch(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(device, "_FLAGS", [*device._FLAGS, "-DSIMT_UCONTEXT"])
    test_clusters(SimtBackend("shuffled"))
    test_crashes_are_reported_and_survived(1, "memory fault", "thread 40")


def test_it_is_fast_enough() -> None:
    x, out = np.arange(32, dtype=np.int32), np.zeros((31, 32), np.int64)
    cpu = SimtBackend()
    run(cpu, "warp", 1, 32, x, out)
    start = time.perf_counter()
    run(cpu, "warp", 1025, 32, x, out)
    assert time.perf_counter() - start < 5, (
        "1025 warps of 40 collectives each take a tenth of a second on an idle machine"
    )


def test_a_syntax_error_names_its_line() -> None:
    text = '#line 7 "kernels/wrong.cu"\nextern "C" __global__ void wrong(int *x) {\n  x[0] = y;\n}\n'
    with pytest.raises(CompileError, match=r"kernels/wrong.cu:8:.*y. was not declared"):
        SimtBackend().build(text, "wrong")
    with pytest.raises(CompileError, match="no extern"):
        SimtBackend().build(text, "right")


# -- The probes are CUDA -----------------------------------------------------------------------------------------------

ARCHITECTURES = {name: ["sm_75"] for name in ("integers", "floats", "atomics")} | {
    name: ["sm_90", "sm_100"] for name in ("cluster", "kth_key")
}
ARCHITECTURES |= {"wgmma_chain": ["sm_90a"], "tiles": ["sm_90"]}


@pytest.mark.parametrize("name", sorted(path.stem for path in PROBES.glob("*.cu")))
def test_nvrtc_accepts_the_probe(name: str) -> None:
    nvrtc = pytest.importorskip("cupy", reason="CuPy is not installed").cuda.nvrtc
    headers = sorted(KERNELS.rglob("*.cuh"))
    for architecture in ARCHITECTURES.get(name, ["sm_80", "sm_90"]):
        text = (PROBES / f"{name}.cu").read_text()
        program = nvrtc.createProgram(
            text,
            f"{name}.cu",
            [path.read_bytes() for path in headers],
            [path.relative_to(KERNELS).as_posix().encode() for path in headers],
        )
        try:
            nvrtc.compileProgram(program, (f"-arch={architecture}", "-std=c++17", "-ftz=true"))
        except nvrtc.NVRTCError:
            pytest.fail(f"{architecture}:\n{nvrtc.getProgramLog(program)}")
        assert nvrtc.getCUBIN(program)
