# SPDX-License-Identifier: Apache-2.0
"""The kernels of expert_layout against the reference, on every path: one block, one launch, three launches."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest

from cupy_router import ExpertLayout, expert_layout, layout_capacity
from cupy_router.ops import _cached
from cupy_router.ops import _expert_layout_launch as launch
from cupy_router.ops._expert_layout_launch import Plan
from cupy_router.reference import expert_layout as reference
from tests.backends import Backend

pytestmark = pytest.mark.needs_kernels

WANT = ("counts", "offsets", "ends", "order", "positions", "block_experts", "row_experts")
POISON = 0x5A5A5A5A
FEW = 5  # tokens, at most 32 pairs of them
PLANS = {  # shares so small that few tokens have several
    "few": Plan("few", 64, 32),
    "block": Plan("block", 64, 2048),
    "cluster": Plan("cluster", 64, 256),
    "grid": Plan("grid", 64, 64),
    "shares": Plan("shares", 64, 64, tile=64),
}


@pytest.fixture(autouse=True)
def unplanned() -> Iterator[None]:
    """Calls are planned anew, and what they leave is forgotten."""
    _cached.forget()
    yield
    _cached.forget()


@pytest.fixture(params=[None, *PLANS], ids=lambda name: name or "chosen")
def plan(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """Every call takes this path."""
    if request.param is not None:
        chosen = launch.choose

        def choose(gpu: Any, num_pairs: int, num_local: int, alignment: int) -> Plan:
            return PLANS[request.param] if num_local > 0 else chosen(gpu, num_pairs, num_local, alignment)

        monkeypatch.setattr(launch, "choose", choose)
    return request.param or ""


def ids_of(n: int, k: int, num_experts: int, dtype: str = "int32", seed: int = 0) -> np.ndarray:
    """Return random ids, a few of them just outside of the experts."""
    limits = np.iinfo(dtype)
    low, high = max(-1, limits.min), min(num_experts + 1, limits.max)
    return np.random.default_rng(seed).integers(low, high, (n, k), endpoint=True).astype(dtype)


def assert_right(
    backend: Backend, ids: np.ndarray, num_experts: int, *, num_valid: Any = None, want: tuple[str, ...] = WANT,
    load: str | None = None, pad: int = -1, gap: int = 0, offset: int = 0, **options: Any,
) -> dict[str, Any]:  # fmt: skip
    """Call the op into poisoned memory, compare with the reference, and look at the memory around the results.

    gap: elements between the rows of ids and positions. offset: elements before every array.
    """
    valid = len(ids) if num_valid is None else min(max(int(np.ravel(num_valid)[0]), 0), len(ids))
    expected = reference.expert_layout(ids, num_experts, num_valid=valid, pad=pad, **options)
    names = [name for name in WANT if name in want or (name == "ends" and "offsets" in want)]
    memory = {name: poisoned(backend, expected[name].shape, gap * (name == "positions"), offset) for name in names}
    given: dict[str, Any] = {}
    if "expert_map" in options:
        given["expert_map"] = backend.array(options["expert_map"])
    before = np.random.default_rng(9).integers(0, 99, num_experts).astype(load) if load else None
    if before is not None:
        given["load"] = backend.array(before)
    if isinstance(num_valid, np.ndarray):
        num_valid = backend.array(num_valid)
    out = ExpertLayout(**{name: inner for name, (_, inner) in memory.items()})
    layout = expert_layout(
        backend.array(ids, gap, offset), num_experts, num_valid=num_valid, want=want, pad=pad, out=out,
        **options | given,
    )  # fmt: skip
    for name, (whole, inner) in memory.items():
        assert getattr(layout, name) is inner
        np.testing.assert_array_equal(backend.numpy(inner), expected[name], err_msg=name)
        inner[...] = POISON
        assert (backend.numpy(whole) == POISON).all(), f"written outside of {name}"
    if before is not None:
        question = (options.get(name) for name in ("experts", "expert_map", "num_local"))
        added = reference.demand(ids[:valid], num_experts, *question)
        np.testing.assert_array_equal(backend.numpy(given["load"]), before + added)
    return expected


def poisoned(backend: Backend, shape: tuple[int, ...], gap: int, offset: int) -> tuple[Any, Any]:
    """Return poisoned memory, and an array in it."""
    rows = shape if len(shape) == 1 else (shape[0], shape[1] + gap)
    size = int(np.prod(rows))
    whole = backend.xp.full(offset + size + 9, POISON, np.int32)
    inner = whole[offset : offset + size].reshape(rows)
    return whole, inner if len(shape) == 1 else inner[:, : shape[1]]


# -- Every path --------------------------------------------------------------------------------------------------------


@pytest.mark.many_kernels
@pytest.mark.acceptance("layout")
@pytest.mark.parametrize(
    ("k", "num_experts", "alignment"), [(8, 40, 1), (6, 60, 7), (1, 57, 4), (2, 1, 16), (22, 8, 1)]
)
@pytest.mark.parametrize("n", [0, 1, 3, 17, 70])
def test_sizes_on_every_path(backend: Backend, plan: str, n: int, k: int, num_experts: int, alignment: int) -> None:
    if plan == "few":
        n = min(n, 32 // k)
    assert_right(backend, ids_of(n, k, num_experts), num_experts, alignment=alignment)


def distributions(n: int, k: int, num_experts: int) -> dict[str, np.ndarray]:
    pairs = np.arange(n * k)
    uniform = ids_of(n, k, num_experts).ravel()
    return {
        "one expert": np.full(n * k, num_experts // 2),
        "one empty": np.where(uniform == 3, 4, uniform),
        "none empty": pairs % num_experts,
        "ascending": pairs * num_experts // (n * k),
        "descending": (n * k - 1 - pairs) * num_experts // (n * k),
        "some -1": np.where(pairs % 3, uniform, -1),
        "all -1": np.full(n * k, -1),
        "beyond": num_experts + pairs % 2 * 1000,
        "repeated in a row": pairs // k % num_experts,
        "extremes": np.where(pairs % 2, 2**31 - 1, -(2**31)),
    }


@pytest.mark.many_kernels
@pytest.mark.acceptance("layout")
@pytest.mark.parametrize("name", distributions(2, 2, 8))
def test_distributions(backend: Backend, plan: str, name: str) -> None:
    n, k, num_experts = FEW if plan == "few" else 70, 6, 50
    ids = distributions(n, k, num_experts)[name].reshape(n, k).astype(np.int32)
    assert_right(backend, ids, num_experts, alignment=4, load="int32")


@pytest.mark.acceptance("layout")
@pytest.mark.parametrize("alignment", [1, 8])
def test_capacity(backend: Backend, plan: str, alignment: int) -> None:
    n, k, num_experts = FEW if plan == "few" else 60, 6, 30
    ids = ids_of(n, k, num_experts)
    full = assert_right(backend, ids, num_experts, alignment=alignment)
    for capacity in (int(full["offsets"][-1]), int(full["offsets"][-1]) - alignment, 2 * alignment, 0, 4096):
        assert_right(backend, ids, num_experts, alignment=alignment, capacity=capacity, load="int64")


@pytest.mark.acceptance("layout")
def test_padding(backend: Backend, plan: str) -> None:
    ids = ids_of(FEW if plan == "few" else 50, 6, 30)
    for valid in (0, 1, len(ids) - 1, len(ids)):
        assert_right(backend, ids, 30, num_valid=valid, load="int64")
        assert_right(backend, ids, 30, num_valid=np.array([valid], np.int32), pad=len(ids) * 6)
    for count in (-5, 1000):
        assert_right(backend, ids, 30, num_valid=np.array([count], np.int32))


@pytest.mark.acceptance("layout")
@pytest.mark.parametrize("shards", [1, 3, 8])
def test_shards(backend: Backend, plan: str, shards: int) -> None:
    ids = ids_of(FEW if plan == "few" else 50, 6, 61)
    for shard in range(shards):
        first = shard * 61 // shards
        experts = first, (shard + 1) * 61 // shards - first
        assert_right(backend, ids, 61, experts=experts, alignment=2, load="int32")
    assert_right(backend, ids, 61, experts=(61, 0), load="int32")


@pytest.mark.acceptance("layout")
@pytest.mark.parametrize("load", [None, "int64"])
def test_an_expert_map_with_holes_that_sends_several_experts_to_one(
    backend: Backend, plan: str, load: str | None
) -> None:
    rng = np.random.default_rng(3)
    expert_map = rng.integers(-4, 45, 61).astype(np.int32)
    expert_map[[0, 60]] = 2**31 - 1, -(2**31)
    ids = ids_of(FEW if plan == "few" else 50, 6, 61)
    assert_right(backend, ids, 61, expert_map=expert_map, num_local=40, alignment=4, load=load)
    assert_right(backend, ids, 61, expert_map=expert_map, num_local=0, load=load)


@pytest.mark.many_kernels
@pytest.mark.acceptance("layout")
@pytest.mark.parametrize("dtype", ["uint8", "int16", "uint16", "int32", "int64"])
def test_dtypes_strides_and_offsets(backend: Backend, plan: str, dtype: str) -> None:
    n = FEW if plan == "few" else 30
    ids = ids_of(n, 6, 250, dtype)
    if dtype == "int64":
        ids[0, :4] = 2**32, 2**32 + 5, -(2**40), 2**62
    assert_right(backend, ids, 250, gap=3, offset=1, load="int64")
    if dtype == "uint8":
        assert_right(backend, ids, 256, offset=3)


@pytest.mark.many_kernels
@pytest.mark.parametrize("want", [("counts", "order"), ("ends", "positions"), ("offsets", "block_experts"), WANT[6:]])
def test_only_what_is_wanted(backend: Backend, plan: str, want: tuple[str, ...]) -> None:
    assert_right(backend, ids_of(FEW if plan == "few" else 30, 6, 30), 30, want=want, alignment=4)


# -- Large sizes -------------------------------------------------------------------------------------------------------


@pytest.mark.many_kernels
@pytest.mark.acceptance("layout")
@pytest.mark.parametrize("num_experts", [1, 2, 8, 60, 128, 256, 257, 384, 1000, 1024, 4096, 40_000])
@pytest.mark.parametrize("n", [64, 8192])
def test_numbers_of_experts(backend: Backend, n: int, num_experts: int) -> None:
    ids = ids_of(backend.rows(n, 1000), 8, num_experts)
    assert_right(backend, ids, num_experts, alignment=16, load="int32")


@pytest.mark.many_kernels
@pytest.mark.acceptance("layout")
@pytest.mark.parametrize("alignment", [1, 7, 16, 64, 128, 160, 224, 1 << 20])
@pytest.mark.parametrize("n", [3, 65, 1025])
def test_alignments(backend: Backend, n: int, alignment: int) -> None:
    ids = ids_of(backend.rows(n, 1000), 8, 9 if alignment > 1000 else 256)
    assert_right(backend, ids, 9 if alignment > 1000 else 256, alignment=alignment)


@pytest.mark.many_kernels
@pytest.mark.acceptance("layout")
@pytest.mark.parametrize("k", [1, 2, 6, 8, 22])
@pytest.mark.parametrize("n", [1, 64, 65, 1025, 8192, 70_000])
def test_numbers_of_tokens(backend: Backend, n: int, k: int) -> None:
    ids = ids_of(backend.rows(n, 100 * k, exactly=n > 8192), k, 256)
    assert_right(backend, ids, 256)
    assert_right(backend, np.full_like(ids, 17), 256)


@pytest.mark.backends("gpu")
def test_millions_of_pairs(backend: Backend) -> None:
    assert_right(backend, ids_of(600_000, 8, 384), 384, alignment=128, load="int64")


def test_rows_beyond_32_bits_are_not_needed(backend: Backend, plan: str) -> None:
    """Demand in rows that no int32 holds, in a buffer that does."""
    ids = np.arange(24, dtype=np.int32).reshape(4, 6)
    alignment = 1 << 28
    capacity = 0 if backend.name == "simt" else alignment
    assert_right(backend, ids, 24, alignment=alignment, capacity=capacity, want=("counts", "offsets", "positions"))
    assert layout_capacity(4, 6, 24, alignment) > 2**31


# -- Repetition --------------------------------------------------------------------------------------------------------


@pytest.mark.backends("gpu")
@pytest.mark.parametrize("n", [1, 64, 1024, 8192, 65_536])
def test_a_thousand_repeats_under_load_are_the_same(backend: Backend, n: int) -> None:
    xp, ids = backend.xp, ids_of(n, 8, 256)
    device_ids = backend.array(ids)
    expected = reference.expert_layout(ids, 256)
    busy, own = xp.cuda.Stream(non_blocking=True), xp.cuda.Stream(non_blocking=True)
    noise = xp.zeros(1 << 26, np.float32)
    wrong = xp.zeros((), np.int64)
    with own:
        order, positions = (xp.asarray(expected[name]) for name in ("order", "positions"))
        for i in range(1000):
            if i % 4 == 0:
                with busy:
                    noise += 1
            layout = expert_layout(device_ids, 256)
            wrong += (layout.order != order).sum() + (layout.positions != positions).sum()
    assert int(wrong) == 0


@pytest.mark.backends("gpu")
@pytest.mark.parametrize("n", [16, 1024, 8192, 65_536])
def test_graphs_follow_their_inputs(backend: Backend, n: int) -> None:
    xp = backend.xp
    ids, count = backend.array(ids_of(n, 8, 256)), xp.full(1, n, np.int32)
    stream = xp.cuda.Stream(non_blocking=True)
    with stream:
        out = expert_layout(ids, 256, num_valid=count)
        stream.begin_capture()
        expert_layout(ids, 256, num_valid=count, out=out)
        graph = stream.end_capture()
        for seed in range(20):
            new = ids_of(n, 8, 256, seed=seed)
            ids.set(new, stream=stream)
            count.fill(n - seed * n // 30)
            graph.launch(stream)
            expected = reference.expert_layout(new, 256, num_valid=n - seed * n // 30)
            for name in ("counts", "offsets", "ends", "order", "positions"):
                np.testing.assert_array_equal(getattr(out, name).get(stream=stream), expected[name])
