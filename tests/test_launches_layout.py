# SPDX-License-Identifier: Apache-2.0
"""Recorded launches of layouts and rows: every argument by its name, whatever kernels a call takes."""

from __future__ import annotations

from itertools import product
from typing import Any

import pytest

from cupy_router import (
    ExpertLayout,
    LayoutSpec,
    RoutingMethod,
    activation_topk,
    expert_layout,
    permute,
    scratch,
    unpermute,
    update_bias,
)
from cupy_router.ops import _run
from cupy_router.ops._permute_backward import OP as PERMUTE_BACKWARD
from cupy_router.ops._rows import GradientOptions
from cupy_router.ops._unpermute_backward import OP as UNPERMUTE_BACKWARD
from tests.oracle_layout import NAMES
from tests.recorder import Launch, Recorder
from tests.test_launches import HEAP, Array, Fake, fake, only, recorder

__all__ = ["fake", "recorder"]  # fixtures

SCRATCH = 1 << 50
SIZES = (1, 5, 20, 64, 130, 500, 1024, 5000, 70_000)


@pytest.fixture
def scratched(monkeypatch: pytest.MonkeyPatch) -> list[tuple[Any, ...]]:
    """Return the arguments of all requests for scratch memory, each of which gets the same address."""
    requests: list[tuple[Any, ...]] = []

    def buffer(*request: Any) -> int:
        requests.append(request)
        return SCRATCH

    monkeypatch.setattr(scratch, "buffer", buffer)
    return requests


def pointers(layout: ExpertLayout) -> dict[str, int]:
    """Return the addresses of a layout's arrays by name, 0 for those that are not there."""
    return {name: 0 if getattr(layout, name) is None else getattr(layout, name).pointer for name in NAMES}


def assert_arguments(
    launches: list[Launch], right: dict[str, Any], requests: list[tuple[Any, ...]], must: set[str]
) -> None:
    """Assert each argument that is known, that the others lie in scratch memory, and that some are there at all."""
    seen = set()
    size = requests[-1][-1] if requests else 0
    for launch in launches:
        for name, value in launch.arguments.items():
            if name in right:
                assert value == right[name], f"{launch.function}: {name}"
                seen.add(name)
            elif value >= SCRATCH:
                assert value < SCRATCH + size, f"{launch.function}: {name} is not in scratch memory"
                assert value % 16 == 0
            else:
                assert abs(value) < HEAP, f"{launch.function}: {name} is an address of nothing"
        assert 0 < launch.grid[0] < 2**31
        assert launch.grid[1:] == (1, 1)
        assert 0 < launch.block[0] <= 1024
    assert must <= seen, f"no kernel has {must - seen}"


# -- Layouts -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("n", SIZES)
@pytest.mark.parametrize("question", ["all", "shard", "map"])
def test_expert_layout(recorder: Recorder, fake: Fake, scratched: list[tuple[Any, ...]], n: int, question: str) -> None:
    indices = Array(0x10000000000, (n, 6), "uint16", row_stride=2**33)
    given: dict[str, Any] = {"load": Array(0x3008, (384,), "int64"), "num_valid": Array(0x4004, (1,), "int32")}
    right = {"load": 0x3008, "num_valid": 0x4004, "expert_map": 0, "first_expert": 0}
    if question == "shard":
        given["experts"], right["first_expert"] = (300, 84), 300
    elif question == "map":
        given |= {"expert_map": Array(0x5000, (384,), "int32"), "num_local": 100}
        right["expert_map"] = 0x5000
    capacity = 128 * n
    layout = expert_layout(indices, 384, alignment=128, capacity=capacity, pad=6 * n, want=NAMES, **given)
    right |= pointers(layout) | {
        "indices": 0x10000000000, "indices_stride": 2**33 if n > 1 else 6, "positions_stride": 6, "num_valid_value": -1,
        "num_pairs": 6 * n, "num_tokens": n, "capacity": capacity, "pad": 6 * n,
    }  # fmt: skip
    assert_arguments(recorder.launches, right, scratched, right.keys() - {"num_tokens"})
    shapes = {name: getattr(layout, name).shape for name in NAMES}
    local = {"all": 384, "shard": 84, "map": 100}[question]
    assert shapes == {
        "counts": (local,), "offsets": (local + 1,), "ends": (local,), "order": (capacity,), "positions": (n, 6),
        "block_experts": (n,), "row_experts": (capacity,),
    }  # fmt: skip
    assert all(getattr(layout, name).dtype == "int32" for name in NAMES)
    macros = recorder.launches[-1].macros
    wanted = {"ID_BYTES": 2, "ID_UNSIGNED": 1, "NUM_EXPERTS": 384, "LOCAL_EXPERTS": local, "TOP_K": 6}
    wanted |= {"LAYOUT_ALIGNMENT": 128, "LAYOUT_LOAD_BYTES": 8, "HAS_MAP": int(question == "map"), "HAS_NUM_VALID": 1}
    assert macros | wanted == macros


@pytest.mark.slow("seconds", every=5)
@pytest.mark.parametrize("n", SIZES)
@pytest.mark.parametrize("want", [*((name,) for name in NAMES), ("counts", "offsets", "order", "positions")])
def test_what_is_not_wanted_is_null(
    recorder: Recorder, fake: Fake, scratched: list[tuple[Any, ...]], n: int, want: tuple[str, ...]
) -> None:
    layout = expert_layout(Array(0x1000, (n, 8), "int32"), 256, want=want, num_valid=n - 1)
    right = pointers(layout) | {"indices": 0x1000, "load": 0, "expert_map": 0, "num_valid": 0, "num_valid_value": n - 1}
    assert_arguments(recorder.launches, right, scratched, {"indices", *want})
    wanted = {name for name in NAMES if recorder.launches[-1].macros[f"LAYOUT_{name.upper()}"]}
    assert wanted == {name for name, pointer in pointers(layout).items() if pointer}


@pytest.mark.parametrize("n", SIZES)
def test_arrays_of_the_caller(recorder: Recorder, fake: Fake, scratched: list[tuple[Any, ...]], n: int) -> None:
    """Positions may have any stride."""
    indices = Array(0x1000, (n, 8), "int64")
    arrays = {
        "counts": Array(0xA004, (60,), "int32"), "offsets": Array(0xB004, (61,), "int32"),
        "ends": Array(0xC008, (60,), "int32"), "order": Array(0xD00C, (8 * n,), "int32"),
        "positions": Array(0x9004, (n, 8), "int32", row_stride=2**32 + 1),
    }  # fmt: skip
    out = ExpertLayout(**arrays)
    filled = expert_layout(indices, 60, out=out)
    assert filled[:7] == out[:7]
    right = pointers(out) | {"positions_stride": 2**32 + 1 if n > 1 else 8, "indices_stride": 8, "capacity": 8 * n}
    assert_arguments(recorder.launches, right, scratched, set(arrays))
    assert expert_layout(indices, 60, out=filled) is filled


def test_scratch_memory_is_that_of_the_stream(
    recorder: Recorder, fake: Fake, scratched: list[tuple[Any, ...]], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(_run, "keep_until_done", lambda *_: None)
    indices = Array(0x1000, (70_000, 8), "int32")
    for stream in (None, 5, 9):
        expert_layout(indices, 256, stream=stream)
    assert scratched
    assert {request[:2] for request in scratched} == {(("cuda", 0), stream) for stream in (77, 5, 9)}
    assert {launch.stream for launch in recorder.launches} == {77, 5, 9}


@pytest.mark.parametrize("n", [7, 70_000])
def test_a_second_call_has_its_own_addresses_and_compiles_nothing(
    recorder: Recorder, fake: Fake, scratched: list[tuple[Any, ...]], n: int
) -> None:
    compiled = 0
    for pointer in (0x1000, 0x2000, 0x3000):
        layout = expert_layout(Array(pointer, (n, 8), "int32"), 60)
        last = recorder.launches[-1].arguments
        assert (last["indices"], last["positions"]) == (pointer, layout.positions.pointer)
        compiled = compiled or len(recorder.sources)
    assert len(recorder.sources) == compiled


@pytest.mark.parametrize("n", [1, 16, 64, 65, 1000])
def test_routers_pass_their_indices_on(
    recorder: Recorder, fake: Fake, scratched: list[tuple[Any, ...]], n: int
) -> None:
    method = RoutingMethod(256, 6, "softmax")
    plan = activation_topk(Array(0x1000, (n, 256), "bfloat16"), method, layout=LayoutSpec(16, 64, NAMES))
    names = ("weights", "indices")
    right = pointers(plan.layout) | {name: getattr(plan, name).pointer for name in names}
    right |= {"logits": 0x1000, "capacity": 64}
    seen = {name for launch in recorder.launches for name in launch.arguments}
    known = {name: right[name] for name in right if name in seen}
    for launch in recorder.launches:
        for name, value in launch.arguments.items():
            assert value == known.get(name, value), f"{launch.function}: {name}"
    assert {*NAMES, *names, "logits"} <= seen


# -- Rows --------------------------------------------------------------------------------------------------------------

N, K, H, ROWS = 33, 6, 512, 256
ORDER, POSITIONS = Array(0x2000, (ROWS,), "int32"), Array(0x3000, (N, K), "int32", row_stride=9)
LAYOUT = ExpertLayout(order=ORDER, positions=POSITIONS, num_tokens=N, top_k=K, capacity=ROWS)
WEIGHTS = Array(0x4004, (N, K), "float16", row_stride=7)
NULLS = {"weights": 0, "y": 0, "residual": 0, "residual_scale": 0, "dots": 0, "scaled": 0, "residual_dots": 0}


def assert_rows(launch: Launch, right: dict[str, Any]) -> None:
    """Assert arguments; strides of null pointers may be anything."""
    arguments = {name: value for name, value in launch.arguments.items() if name in right}
    assert arguments == right
    assert launch.block[0] % 32 == 0


@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_permute(recorder: Recorder, fake: Fake, weighted: bool, dtype: str) -> None:
    x = Array(0x1000, (N, H), dtype, row_stride=2**33)
    out = Array(0x5000, (ROWS, H), dtype, row_stride=520)
    assert permute(x, LAYOUT, weights=WEIGHTS if weighted else None, out=out) is out
    right = NULLS | {
        "x": 0x1000, "order": 0x2000, "positions": 0x3000, "rows": 0x5000, "num_tokens": N, "capacity": ROWS,
        "x_bytes": 2**34, "rows_bytes": 1040, "positions_stride": 9,
    }  # fmt: skip
    launch = only(recorder)
    assert launch.function == "permute"
    assert_rows(launch, right | ({"weights": 0x4004, "weights_stride": 7} if weighted else {}))


@pytest.mark.parametrize("given", [(), ("weights",), ("weights", "residual"), ("residual", "residual_scale")])
def test_unpermute(recorder: Recorder, fake: Fake, given: tuple[str, ...]) -> None:
    y = Array(0x1000, (ROWS, H), "bfloat16", row_stride=600)
    arrays = {
        "weights": WEIGHTS, "residual": Array(0x6000, (N, H), "float32", row_stride=2**32),
        "residual_scale": Array(0x7004, (N,), "float32"),
    }  # fmt: skip
    chosen = {name: arrays[name] for name in given}
    sums = unpermute(y, LAYOUT, **chosen)
    assert (sums.shape, sums.dtype) == ((N, H), "bfloat16")
    right = {"y": 0x1000, "positions": 0x3000, "sums": sums.pointer, "x": 0, "dots": 0, "num_tokens": N}
    right |= {"capacity": ROWS, "y_bytes": 1200, "sums_bytes": 2 * H, "positions_stride": 9}
    right |= {name: chosen[name].pointer if name in chosen else 0 for name in arrays}
    if "residual" in chosen:
        right["residual_bytes"] = 2**34
    assert_rows(only(recorder), right)


def test_gradients(recorder: Recorder, fake: Fake) -> None:
    """Each is the other's kernel, with more results."""
    x, y = Array(0x1000, (N, H), "bfloat16"), Array(0x8000, (ROWS, H), "bfloat16", row_stride=520)
    given = (y, POSITIONS, WEIGHTS, x)
    sums, dots = _run.run(PERMUTE_BACKWARD, GradientOptions(("sums", "dots")), given, None, None)
    right = {"y": 0x8000, "x": 0x1000, "positions": 0x3000, "weights": 0x4004, "residual": 0, "residual_scale": 0}
    right |= {"sums": sums.pointer, "dots": dots.pointer, "dots_stride": K, "y_bytes": 1040, "x_bytes": 2 * H}
    assert_rows(recorder.launches[-1], right)
    assert (recorder.launches[-1].function, dots.dtype) == ("unpermute", "float32")
    residual, scale = Array(0x6000, (N, H), "bfloat16"), Array(0x7004, (N,), "float32")
    options = GradientOptions(("rows", "dots", "scaled", "residual_dots"))
    found = _run.run(UNPERMUTE_BACKWARD, options, (x, ORDER, POSITIONS, WEIGHTS, y, residual, scale), None, None)
    right = {"x": 0x1000, "order": 0x2000, "positions": 0x3000, "weights": 0x4004, "y": 0x8000, "residual": 0x6000}
    right |= {"residual_scale": 0x7004, "rows_bytes": 2 * H, "scaled_bytes": 2 * H, "residual_bytes": 2 * H}
    right |= {name: getattr(found, name).pointer for name in found._fields}
    assert_rows(recorder.launches[-1], right)
    assert recorder.launches[-1].function == "permute"


@pytest.mark.parametrize(
    ("n", "k", "hidden"),
    [*product((1, 33, 1024, 70_000), (1, 8), (1, 7, 1000, 4096, 7168, 100_000)), (2**31 - 1, 1, 1), (2**28 - 9, 8, 64)],
)
def test_grids_of_rows(recorder: Recorder, fake: Fake, n: int, k: int, hidden: int) -> None:
    """As far as memory reaches."""
    x, capacity = Array(0x1000, (n, hidden), "bfloat16"), min(k * n + 77, 2**31 - 1)
    positions = Array(0x3000, (n, k), "int32")
    layout = ExpertLayout(order=Array(0x2000, (capacity,), "int32"), positions=positions)
    permute(x, layout)
    unpermute(Array(0x5000, (capacity, hidden), "bfloat16"), layout)
    for launch in recorder.launches:
        assert 0 < launch.grid[0] < 2**31
        assert launch.grid[0] * launch.block[0] * max(1, hidden // 32) >= n
        assert launch.arguments["num_tokens"] == n


@pytest.mark.parametrize("center", [False, True])
@pytest.mark.parametrize(("dtype", "size"), [("int32", 4), ("int64", 8)])
def test_update_bias(recorder: Recorder, fake: Fake, dtype: str, size: int, center: bool) -> None:
    """One block for any number of experts, in place or not."""
    bias, counts = Array(0x1004, (384,)), Array(0x2008, (384,), dtype)
    result = update_bias(bias, counts, rate=0.25, center=center)
    assert update_bias(bias, counts, rate=0.5, center=center, out=bias) is bias
    for launch, updated, rate in zip(recorder.launches, (result.pointer, 0x1004), (0.25, 0.5), strict=True):
        assert (launch.function, launch.grid, launch.block) == ("update_bias", (1, 1, 1), (256, 1, 1))
        assert launch.macros == {"COUNT_BYTES": size, "CENTER": int(center)}
        right = {"bias": 0x1004, "counts": 0x2008, "updated": updated, "num_experts": 384, "rate": rate}
        assert launch.arguments == right
