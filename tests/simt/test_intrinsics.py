# SPDX-License-Identifier: Apache-2.0
"""Every intrinsic of the executor against plain NumPy."""

from __future__ import annotations

from typing import Any

import ml_dtypes
import numpy as np
import pytest

from cupy_router import tensor_map
from cupy_router.simt import device
from cupy_router.simt.device import SCHEDULES, SimtBackend
from tests.simt.sources import PROBES, build_all, run

pytestmark = pytest.mark.skipif(device.why_not() is not None, reason=str(device.why_not()))

RNG = np.random.default_rng(2)
LANES = np.arange(32)


@pytest.fixture(scope="module", autouse=True)
def _built() -> None:
    build_all((path.stem, None) for path in PROBES.glob("*.cu"))


@pytest.fixture(params=SCHEDULES)
def cpu(request: pytest.FixtureRequest) -> SimtBackend:
    return SimtBackend(request.param, seed=5)


# -- Warp intrinsics ---------------------------------------------------------------------------------------------------


def test_warp_intrinsics(cpu: SimtBackend) -> None:
    x = RNG.integers(-(2**31), 2**31, 32).astype(np.int32)
    u = x.astype(np.uint32)
    segment = LANES // 8 * 8
    expected = [
        x[(LANES * 7 + 3) % 32],
        x[segment + 5],
        x[LANES ^ 9],
        x[np.where((LANES ^ 6) > (LANES | 3), LANES, LANES ^ 6)],
        x[np.where(LANES < 3, LANES, LANES - 3)],
        x[np.where(LANES % 8 < 3, LANES, LANES - 3)],
        x[np.where(LANES + 5 > 31, LANES, LANES + 5)],
        x[np.where(LANES % 16 + 5 > 15, LANES, LANES + 5)],
        x[31 - LANES].astype(np.int64) << 30,
        x[31 - LANES],
        (x[31 - LANES].astype(np.float32) * np.float32(0.25) * 4).astype(np.int64),
        sum(1 << lane for lane in range(32) if x[lane] & 2),
        1, 0, 1, 0,
        [sum(1 << other for other in range(32) if np.fmod(x[other], 4) == np.fmod(x[lane], 4)) for lane in range(32)],
        0, 0, 2**32 - 1, 1,
        x.sum(dtype=np.int32), x.min(), x.max(), u.sum(dtype=np.uint32), u.min(), u.max(),
        np.bitwise_and.reduce(u | 0xF0F0), np.bitwise_or.reduce(u & 0xF0F0), np.bitwise_xor.reduce(u),
    ]  # fmt: skip
    third, other = LANES % 3 == 0, x.copy()
    for _ in range(3):
        other = other[LANES % 3]
    expected.append(np.where(third, x[third].sum(dtype=np.int32), other)[LANES ^ 1])
    out = np.full((len(expected), 32), 99, np.int64)
    run(cpu, "warp", 1, 32, x, out)
    for row, want in enumerate(expected):
        np.testing.assert_array_equal(out[row], np.broadcast_to(np.asarray(want, np.int64), 32), err_msg=f"row {row}")


# -- Integers and floats -----------------------------------------------------------------------------------------------


def test_integer_intrinsics() -> None:
    special = [0, 1, 2, 0x7FFFFFFF, 0x80000000, 0x80000001, 0xFFFFFFFF, 0xFFFF, 0x10000]
    x = np.concatenate([np.repeat(special, len(special)), RNG.integers(0, 2**32, 500)]).astype(np.uint32)
    y = np.concatenate([np.tile(special, len(special)), RNG.integers(0, 2**32, 500)]).astype(np.uint32)

    def signed(value: int, bits: int = 32) -> int:
        return value - (1 << bits) if value >> (bits - 1) else value

    def expected(a: int, b: int) -> list[int]:
        wide, both, shift = a << 32 | b, b << 32 | a, b & 31
        pool = [(both >> 8 * i) & 0xFF for i in range(8)]
        s, t = signed(a), signed(b)
        return [
            a.bit_count(), wide.bit_count(), 32 - a.bit_length(), 64 - wide.bit_length(),
            (a & -a).bit_length(), (wide & -wide).bit_length(),
            int(f"{a:032b}"[::-1], 2), int(f"{wide:064b}"[::-1], 2),
            sum(pool[selector] << 8 * i for i, selector in enumerate([2, 7, 1, 6])),
            both << shift >> 32 & 0xFFFFFFFF, both >> shift & 0xFFFFFFFF,
            (s * t >> 32) & 0xFFFFFFFF, a * b >> 32, wide * wide >> 64,
            min(s, t) & 0xFFFFFFFF, max(s, t) & 0xFFFFFFFF, min(a, b), max(a, b), min(a, b), max(a, b),
            min(signed(wide, 64), 5) & (2**64 - 1), max(wide, 5),
            a & 0x7FFFFF | 0x3F800000, a & 0x7FFFFF | 0x3F800000, wide >> 12 & (2**52 - 1),
        ]  # fmt: skip

    table = np.array([expected(int(a), int(b)) for a, b in zip(x, y, strict=True)], np.uint64).T
    out = np.full(table.shape, 99, np.uint64)
    run(SimtBackend(), "integers", (len(x) + 63) // 64, 64, x, y, out, np.int32(len(x)))
    for row in range(len(table)):
        np.testing.assert_array_equal(out[row], table[row], err_msg=f"row {row}")


def test_float_intrinsics() -> None:
    tiny = np.float32(1e-40)  # subnormal: zero to the kernel, as an operand and as a result
    special = [
        0,
        -0.0,
        1,
        -1,
        0.5,
        2.5,
        1e30,
        -1e30,
        3e38,
        2**31,
        2**32,
        2**63,
        2**64,
        np.inf,
        -np.inf,
        np.nan,
        tiny,
        2e-38,
    ]
    x = np.concatenate([np.repeat(np.array(special), len(special)), RNG.normal(0, 20, 700)]).astype(np.float32)
    y = np.concatenate([np.tile(np.array(special), len(special)), RNG.normal(0, 2, 700)]).astype(np.float32)

    def flush(values: Any) -> np.ndarray:
        with np.errstate(over="ignore"):
            single = np.asarray(values, np.float64).astype(np.float32)
        return np.where(np.abs(single) < np.float32(2**-126), np.copysign(np.float32(0), single), single)

    def integer(values: Any, kind: Any, shift: int = 0) -> np.ndarray:
        low, high = np.iinfo(kind).min, np.iinfo(kind).max
        cut = [0 if np.isnan(v) else low if v <= low else high if v >= high else int(v) for v in np.asarray(values)]
        return np.array([v >> shift & 0xFFFFFFFF for v in cut], np.uint32)

    with np.errstate(all="ignore"):
        a, b = flush(x).astype(np.float64), flush(y).astype(np.float64)
        bits, words = x.view(np.int32).astype(np.int64), x.view(np.uint32).astype(np.uint64)
        exact = [
            a + b, a - b, a * b, a / b, 1 / a, np.sqrt(a), 1 / np.sqrt(a), a * b + a,
            np.where(np.isnan(a), 0, np.clip(a, 0, 1)),
            np.fmin(a, b), np.fmax(a, b), np.fmin(a, b), np.fmax(a, b), 1 / np.sqrt(a),
        ]  # fmt: skip
        fast = [
            np.exp(a), 10**a, np.log(a), np.log2(a), np.log10(a), np.where(a < 0, np.nan, np.exp2(b * np.log2(a))),
            np.sin(a), np.cos(a), np.tan(a),
            np.where((abs(b) > 2.0**126) & (abs(b) < np.inf), a * 0, a / b),
        ]  # fmt: skip
        as_integers = [
            integer(np.rint(a), np.int32), integer(np.trunc(a), np.int32), integer(np.floor(a), np.int32),
            integer(np.ceil(a), np.int32), integer(np.rint(a), np.uint32), integer(np.trunc(a), np.uint32),
            integer(np.rint(a), np.int64, 32), integer(np.trunc(a), np.uint64, 32),
        ]  # fmt: skip
        to_floats = [
            bits.astype(np.float32), words.astype(np.float32),
            (bits << 20).astype(np.float32), (words << np.uint64(20)).astype(np.float32),
        ]  # fmt: skip
    out = np.full((len(exact) + len(fast) + len(as_integers) + len(to_floats), len(x)), 99, np.float32)
    run(SimtBackend(), "floats", (len(x) + 63) // 64, 64, x, y, out, np.int32(len(x)))
    rows = iter(enumerate(out))
    for want, (row, got) in zip(exact, rows, strict=False):
        decided = (row != 7) | ~(np.abs(b) > 1e20)  # a * b + a, where float64 has lost the + a
        np.testing.assert_array_equal(got[decided], flush(want)[decided], err_msg=f"row {row}")
        if row in (9, 10, 11, 12):
            zeros = (a == 0) & (b == 0)
            negative = (np.signbit(a) | np.signbit(b)) if row % 2 else (np.signbit(a) & np.signbit(b))
            np.testing.assert_array_equal(np.signbit(got)[zeros], negative[zeros], err_msg=f"row {row}: signs of zeros")
    for want, (row, got) in zip(fast, rows, strict=False):
        mild = np.abs(a) < 1e30  # beyond, the argument's own rounding decides
        np.testing.assert_allclose(got[mild], flush(want)[mild], rtol=3e-5, atol=1e-6, err_msg=f"row {row}")
    for want, (row, got) in zip(as_integers, rows, strict=False):
        np.testing.assert_array_equal(got.view(np.uint32), want, err_msg=f"row {row}")
    for want, (row, got) in zip(to_floats, rows, strict=False):
        np.testing.assert_array_equal(got, flush(want), err_msg=f"row {row}")
    assert np.float32(1e-40) * np.float32(1) != 0, "the float mode is restored"


@pytest.mark.parametrize("sixteen", ["half", "bfloat16"])
def test_conversions_are_exact(sixteen: str) -> None:
    dtype = np.dtype(np.float16 if sixteen == "half" else ml_dtypes.bfloat16)
    words = np.arange(65536, dtype=np.uint16).view(dtype).astype(np.float32)
    ordered = np.sort(words[~np.isnan(words)]).astype(np.float64)
    ties = ((ordered[1:] + ordered[:-1]) / 2).astype(
        np.float32
    )  # halfway between neighbours, up to bfloat16's infinity
    neighbours = [np.nextafter(ties, np.float32(way), dtype=np.float32) for way in (np.inf, -np.inf)]
    limits = np.array(
        [65504, 65519.996, 65520, 65536, 3.3895e38, 3.3961e38, 3.4028e38, 2**-25, 2.9802326e-8, 1e-40, 1e-45]
    )
    random = RNG.integers(0, 2**32, 100_000).astype(np.uint32).view(np.float32)
    with np.errstate(invalid="ignore"):
        values = np.concatenate([words, ties, *neighbours, limits, -limits, random]).astype(np.float32)
    to_float = [np.full(65536, 99, np.uint32) for _ in range(2)]
    from_float = [np.full(len(values), 99, np.uint16) for _ in range(2)]
    run(SimtBackend(), "conversions", 4, 256, *to_float, values, *from_float, np.int32(len(values)))

    which = 0 if sixteen == "half" else 1
    got = to_float[which].view(np.float32)
    np.testing.assert_array_equal(np.isnan(got), np.isnan(words))
    np.testing.assert_array_equal(got.view(np.uint32)[~np.isnan(words)], words.view(np.uint32)[~np.isnan(words)])
    with np.errstate(over="ignore"):
        want = np.where(np.isnan(values), 0x7FFF, values.astype(dtype).view(np.uint16))
    np.testing.assert_array_equal(from_float[which], want)


# -- Memory ------------------------------------------------------------------------------------------------------------


def test_atomics(cpu: SimtBackend) -> None:
    x = RNG.integers(-(2**31), 2**31, (4, 64)).astype(np.int32)
    u = x.astype(np.uint32)
    wide = u.astype(np.uint64) * np.uint64(0x100000001)
    ints = np.array([0, 0, 2**31 - 1, -(2**31), 0, 0, 0, 0, 0], np.int32)
    unsigned = np.array([0, 2**32 - 1, 0, 2**32 - 1, 0, 0, 0, 0, 0], np.uint32)
    longs = np.array([2**63 - 1, -(2**63)], np.int64)
    wides = np.array([0, 2**64 - 1, 0, 2**64 - 1, 0, 0, 0], np.uint64)
    floats, doubles = np.zeros(1, np.float32), np.zeros(1)
    run(cpu, "atomics", 4, 64, x, ints, unsigned, longs, wides, floats, doubles)

    total = x.sum(dtype=np.int32)
    exchanged = ints[4:6].sum(dtype=np.int32)  # each value was put there once and taken out again, but for the last
    odd, negative = (x & 1).sum(), (x < 0).any(1).sum()
    np.testing.assert_array_equal(ints[:4], [total, -total, x.min(), x.max()])
    assert exchanged == total
    np.testing.assert_array_equal(ints[6:], [odd, negative, (x > -2000000000).all(1).sum()])
    reduced = [np.bitwise_and.reduce(u | 1, None), np.bitwise_or.reduce(u & 255, None), np.bitwise_xor.reduce(u, None)]
    np.testing.assert_array_equal(unsigned[:6], [u.sum(dtype=np.uint32), u.min(), u.max(), *reduced])
    np.testing.assert_array_equal(unsigned[6:], [256 % 10, (10 - 256 % 10) % 10, (u % 1000).max()])
    np.testing.assert_array_equal(longs, [int(x.min()) << 20, int(x.max()) << 20])
    reduced = [
        np.bitwise_and.reduce(wide | np.uint64(1), None),
        np.bitwise_or.reduce(wide & np.uint64(0xFFFFFFFFFF), None),
    ]
    want = [wide.sum(dtype=np.uint64), wide.min(), wide.max(), *reduced, np.bitwise_xor.reduce(wide, None), 13]
    np.testing.assert_array_equal(wides, np.array(want, np.uint64))
    assert floats[0] == doubles[0] == np.fmod(x, 16).sum()


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_tiles_of_a_matrix(schedule: str) -> None:
    """Also those that reach beyond its last row and column: they have zeros there."""
    words = RNG.integers(1, 2**16, (20, 160)).astype(np.uint16)
    matrix = tensor_map.Matrix(rows=19, columns=152, row_bytes=320, tile_rows=16)
    padded = np.zeros((40, 64 * 5), np.uint16)
    padded[:19, :152] = words[:19, :152]
    for column, row in ((0, 0), (32, 8), (64, 16)):
        encoded = np.frombuffer(tensor_map.for_cpu(words.ctypes.data, matrix), np.uint64).copy()
        out = np.zeros((3, 16, 64), np.uint16)
        run(SimtBackend(schedule, seed=2), "tiles", 1, 64, encoded, out, np.int32(column), np.int32(row), np.int32(3))
        want = padded[row : row + 16, column : column + 192].reshape(16, 3, 64).transpose(1, 0, 2)
        np.testing.assert_array_equal(out, want)


def test_geometry_and_parameters(cpu: SimtBackend) -> None:
    grid, block = (3, 2, 2), (5, 3, 7)  # 105 threads: the last warp has 9
    data = RNG.integers(0, 100, (4, 4)).astype(np.int32)
    indices, sums = np.zeros((12, 105, 2), np.uint32), np.zeros((12, 105), np.float32)
    args = (data, np.int32(-3), np.int64(2**33), np.float32(0.5), np.float64(2.0**33), indices, sums)
    run(cpu, "geometry", grid, block, *args)
    np.testing.assert_array_equal(indices[..., 0], np.broadcast_to(np.arange(12)[:, None], (12, 105)))
    np.testing.assert_array_equal(indices[..., 1], np.broadcast_to(np.arange(105), (12, 105)))
    lanes = np.where(np.arange(105) < 96, 32, 9)
    mixed = data[np.arange(105) % 4, 0] + data[1, 1] + data[2, 2] + data[3, 3]
    np.testing.assert_allclose(sums, np.broadcast_to(2.0**34 - 3 + lanes + 0.5 + mixed, (12, 105)), rtol=1e-6)
