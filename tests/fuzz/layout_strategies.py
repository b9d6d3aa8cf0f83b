# SPDX-License-Identifier: Apache-2.0
"""Settings and cases of layouts and rows: sizes, dtypes and strides decide the kernels, so a setting fixes them."""

from __future__ import annotations

import random
from dataclasses import dataclass
from typing import Any

import numpy as np
from hypothesis import strategies as st

from cupy_router import RoutingMethod
from cupy_router.simt.device import SCHEDULES
from tests import oracle_layout
from tests.backends import DTYPES
from tests.fuzz.arrays import floats, integers, small_integers
from tests.fuzz.case import Case

FLOATS = ("float32", "float16", "bfloat16")
IDS = ("uint8", "int16", "uint16", "int32", "int64")
EXPERTS = (1, 2, 5, 8, 31, 60, 64, 128, 257, 1025)
TOP_K = (1, 2, 3, 6, 8, 22)
WANTS = (oracle_layout.DEFAULT_WANT, oracle_layout.NAMES, ("counts", "ends", "order"), ("positions",), ("row_experts",))


@dataclass(frozen=True)
class LayoutSetting:
    """Everything that decides which kernels a call compiles."""

    op: str  # of layout_case.OPS, or a router, which has a layout then
    rows: int
    k: int
    experts: int
    alignment: int = 1
    want: tuple[str, ...] = oracle_layout.DEFAULT_WANT
    ids: str = "int32"
    given: frozenset[str] = frozenset()  # optional arrays
    shard: tuple[int, int] | None = None
    hidden: int = 0
    dtype: str = "float32"
    weights: str = "float32"  # their dtype
    capacity: int | None = None
    aligned: bool = True
    dense: bool = True
    out_padding: int = -1

    def __str__(self) -> str:
        parts = [self.op, f"{self.rows}x{self.k}", f"E{self.experts}", f"a{self.alignment}"]
        if self.op == "expert_layout":
            parts += [self.ids, f"want{WANTS.index(self.want)}", *([f"shard{self.shard}"] if self.shard else [])]
        elif self.op in ("permute", "unpermute"):
            parts += [f"hidden{self.hidden}", self.dtype, f"weights:{self.weights}", f"c{self.capacity}"]
        parts += [
            *sorted(self.given),
            "aligned" if self.aligned else "misaligned",
            "dense" if self.dense else "strided",
        ]
        return "-".join([*parts, f"out{self.out_padding}"])


def layout_settings(seed: int = 0, count: int = 12) -> list[LayoutSetting]:
    """Return this many different settings, a third of them of expert_layout; they depend on the seed."""
    rng = random.Random(seed)
    makers = (_expert_layout, _permute, _unpermute, _expert_layout, _routed)
    found: dict[LayoutSetting, None] = {}
    while len(found) < count:
        found[makers[len(found) % len(makers)](rng)] = None
    return list(found)


def _memory(rng: random.Random) -> dict[str, Any]:
    dense = rng.random() < 0.5
    return {"aligned": rng.random() < 0.5, "dense": dense, "out_padding": rng.choice((-1, 0) if dense else (-1, 3))}


def _pairs(rng: random.Random) -> dict[str, Any]:
    return {"rows": rng.choice((1, 3, 17, 40, 130)), "k": rng.choice(TOP_K), "experts": rng.choice(EXPERTS)}


def _expert_layout(rng: random.Random) -> LayoutSetting:
    common = _pairs(rng)
    given = {name for name in ("load", "num_valid") if rng.random() < 0.4}
    shard = None
    if rng.random() < 0.3:
        given.add("expert_map")
    elif rng.random() < 0.4:
        first = rng.randrange(common["experts"] + 1)
        shard = first, rng.randrange(common["experts"] - first + 1)
    return LayoutSetting(
        "expert_layout", **common, alignment=rng.choice((1, 1, 7, 16, 128)), want=rng.choice(WANTS),
        ids=rng.choice(IDS), given=frozenset(given), shard=shard, dtype=rng.choice(("int32", "int64")), **_memory(rng),
    )  # fmt: skip


def _rows(rng: random.Random) -> dict[str, Any]:
    memory, pairs = _memory(rng), _pairs(rng)
    pairs["rows"] = min(pairs["rows"], 17)
    alignment = rng.choice((1, 4, 16))
    most = oracle_layout.formula(pairs["rows"] * pairs["k"], pairs["experts"], alignment)
    capacity = rng.choice((most, most, most // 2 // alignment * alignment, 0, most + 5 * alignment))
    hidden = rng.choice((8, 64, 520) if memory["aligned"] and memory["dense"] else (1, 7, 64, 300))
    sizes = {"alignment": alignment, "capacity": min(capacity, 2000 // alignment * alignment), "hidden": hidden}
    return {**memory, **pairs, **sizes, "dtype": rng.choice(FLOATS), "weights": rng.choice(FLOATS)}


def _permute(rng: random.Random) -> LayoutSetting:
    common = _rows(rng)
    given = {"weights"} if rng.random() < 0.6 else set()
    if not given:
        common["dtype"] = rng.choice((*FLOATS, "uint8", "int64", "uint16"))
    return LayoutSetting("permute", **common, given=frozenset(given))


def _unpermute(rng: random.Random) -> LayoutSetting:
    given = {name for name in ("weights", "residual", "residual_scale") if rng.random() < 0.6}
    if "residual" not in given:
        given.discard("residual_scale")
    return LayoutSetting("unpermute", **_rows(rng), given=frozenset(given))


def _routed(rng: random.Random) -> LayoutSetting:
    experts = rng.choice((8, 60, 128, 384))
    given = {"num_valid"} if rng.random() < 0.5 else set()
    op = rng.choice(("activation_topk", "activation_topk", "hash_router", "dense_router"))
    rows = rng.choice((1, 5, 40, 64) if op == "dense_router" else (1, 5, 40, 64, 130))
    return LayoutSetting(
        op, rows, rng.choice((1, 6, 8)), experts, rng.choice((1, 16)), rng.choice(WANTS), given=frozenset(given),
        dtype=rng.choice(FLOATS), out_padding=rng.choice((-1, 0)),
    )  # fmt: skip


# -- Cases -------------------------------------------------------------------------------------------------------------


def layout_cases(setting: LayoutSetting) -> st.SearchStrategy[Case]:
    """Draw calls that compile this setting's kernels and no others."""
    draw = {"expert_layout": _expert_layout_case, "permute": _rows_case, "unpermute": _rows_case}
    return draw.get(setting.op, _routed_case)(setting)


_schedules = st.sampled_from(SCHEDULES)


@st.composite
def _ids(draw: st.DrawFn, setting: LayoutSetting) -> np.ndarray:
    """Draw experts, few or many of them, sorted or not, with ids that are none."""
    limits = np.iinfo(setting.ids)
    highest = min(setting.experts - 1, limits.max)
    edges = {setting.experts, setting.experts + 7, limits.min, limits.max, -1, 2**32, 2**31}
    bad = st.sampled_from(sorted(edge for edge in edges if limits.min <= edge <= limits.max))
    ids = draw(integers(setting.rows * setting.k, setting.ids, st.integers(0, highest), bad))
    if draw(st.booleans()):
        ids = np.sort(ids)[:: draw(st.sampled_from([1, -1]))]
    return np.ascontiguousarray(ids).reshape(setting.rows, setting.k)


def _layout(setting: LayoutSetting, columns: int) -> tuple[int, int]:
    """Return the elements between rows, and before them."""
    return (0 if setting.dense else -columns % 16 + 16 if setting.aligned else 3), (0 if setting.aligned else 1)


@st.composite
def _expert_layout_case(draw: st.DrawFn, setting: LayoutSetting) -> Case:
    experts, alignment = setting.experts, setting.alignment
    arrays = {"indices": draw(_ids(setting))}
    options: dict[str, Any] = {"num_experts": experts, "alignment": alignment, "want": list(setting.want)}
    num_counted = experts
    if setting.shard is not None:
        options["experts"], num_counted = list(setting.shard), setting.shard[1]
    if "expert_map" in setting.given:  # num_local is part of the setting: it is compiled
        options["num_local"] = num_counted = -(-experts // 2)
        far = st.sampled_from([-1, num_counted, 2**31 - 1, -(2**31)])
        arrays["expert_map"] = draw(integers(experts, "int32", st.integers(0, num_counted - 1), far))
    if "load" in setting.given:
        arrays["load"] = draw(integers(experts, setting.dtype, st.integers(0, 2**30)))
    if "num_valid" in setting.given:
        number = draw(st.integers(0, setting.rows) | st.sampled_from([-1, setting.rows + 1, 2**31 - 1, -(2**31)]))
        arrays["num_valid"] = np.full(draw(st.sampled_from([(), (1,)])), number, np.int32)
    elif draw(st.booleans()):
        options["num_valid"] = draw(st.integers(0, setting.rows))
    most = oracle_layout.formula(setting.rows * setting.k, num_counted, alignment)
    if draw(st.booleans()):
        options["capacity"] = alignment * draw(st.integers(0, most // alignment + 2))
    num_pairs = setting.rows * setting.k
    options["pad"] = draw(st.sampled_from([-1, -1, num_pairs, 2**31 - 1, -(2**31)]))
    layouts = {"indices": _layout(setting, setting.k)}
    padding = setting.out_padding
    return Case("expert_layout", arrays, None, options, layouts, padding, schedule=draw(_schedules))


@st.composite
def _rows_case(draw: st.DrawFn, setting: LayoutSetting) -> Case:
    """Draw a layout of drawn ids, sometimes with numbers that point outside."""
    made = oracle_layout.expert_layout(
        draw(_ids(setting)), setting.experts, alignment=setting.alignment, capacity=setting.capacity
    )
    order, positions = made["order"], made["positions"]
    if draw(st.booleans()):
        far = draw(integers(order.size + positions.size, "int32", st.sampled_from([-2, 2**31 - 1, -(2**31), 10**6])))
        rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
        order = np.where(rng.random(order.shape) < 0.1, far[: order.size], order)
        positions = np.where(rng.random(positions.shape) < 0.1, far[order.size :].reshape(positions.shape), positions)
    tokens, rows = (setting.rows, setting.hidden), (order.size, setting.hidden)
    if setting.op == "permute":
        arrays = {"x": draw(_content(tokens, setting.dtype)), "order": order, "positions": positions}
    else:
        arrays = {"y": draw(_content(rows, setting.dtype)), "positions": positions}
    for name, shape in (("weights", positions.shape), ("residual", tokens), ("residual_scale", tokens[:1])):
        if name in setting.given:
            dtype = {"weights": setting.weights, "residual": setting.dtype}.get(name, "float32")
            arrays[name] = draw(floats(shape, dtype, _tame))
    layouts = {name: _layout(setting, array.shape[1]) for name, array in arrays.items() if array.ndim == 2}
    return Case(setting.op, arrays, None, {}, layouts, setting.out_padding, schedule=draw(_schedules))


_tame = st.sampled_from([0.0, 1.0, -1.0, 0.25, 3.0, -0.0, 1e-3, 100.0])


@st.composite
def _content(draw: st.DrawFn, shape: tuple[int, int], dtype: str) -> np.ndarray:
    if dtype in FLOATS:
        return draw(floats(shape, dtype, _tame | st.sampled_from([np.inf, -np.inf, np.nan])))
    seed = draw(st.integers(0, 2**32 - 1))
    return np.random.default_rng(seed).integers(0, np.iinfo(dtype).max, shape).astype(DTYPES[dtype])


@st.composite
def _routed_case(draw: st.DrawFn, setting: LayoutSetting) -> Case:
    method = RoutingMethod(setting.experts, setting.k, "softmax" if setting.op != "dense_router" else "identity")
    arrays: dict[str, np.ndarray] = {}
    if setting.op == "dense_router":
        for name, rows in (("x", setting.rows), ("weight", setting.experts)):
            arrays[name] = draw(small_integers((rows, 40), setting.dtype))
    else:
        arrays["logits"] = draw(floats((setting.rows, setting.experts), setting.dtype))
    if setting.op == "hash_router":
        arrays["token_ids"] = draw(
            integers(setting.rows, "int32", st.integers(0, 8), st.sampled_from([-1, 9, 2**31 - 1]))
        )
        experts = st.integers(0, setting.experts - 1), st.sampled_from([-1, setting.experts])
        arrays["table"] = draw(integers(9 * setting.k, "int32", *experts)).reshape(9, setting.k)
    layout: dict[str, Any] = {"alignment": setting.alignment, "want": list(setting.want)}
    if draw(st.booleans()):
        most = oracle_layout.formula(setting.rows * setting.k, setting.experts, setting.alignment)
        layout["capacity"] = setting.alignment * draw(st.integers(0, most // setting.alignment + 2))
    options: dict[str, Any] = {"layout": layout}
    if "num_valid" in setting.given:
        arrays["num_valid"] = np.full((1,), draw(st.integers(-1, setting.rows + 1)), np.int32)
    elif draw(st.booleans()):
        options["num_valid"] = draw(st.integers(0, setting.rows))
    padding = setting.out_padding
    return Case(setting.op, arrays, method, options, {}, padding, schedule=draw(_schedules))
