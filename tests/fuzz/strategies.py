# SPDX-License-Identifier: Apache-2.0
"""Settings to fuzz, one per compiled kernel, and the cases that hypothesis draws for each."""

from __future__ import annotations

import random
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from hypothesis import strategies as st

from cupy_router import RoutingMethod
from cupy_router.method import SCORES
from cupy_router.method_fields import INDEX_DTYPES
from cupy_router.simt.device import SCHEDULES
from tests.fuzz.arrays import biases, bits, floats, integers, recorded, small_integers
from tests.fuzz.case import Case
from tests.topk_calls import PLANS

FLOATS = ("float32", "float16", "bfloat16")
INTS = ("int32", "int64")
IDS = ("uint8", "int16", "uint16", "int32", "int64")
COLUMNS = (1, 2, 3, 5, 8, 12, 31, 36, 60, 64, 96, 127, 128, 160, 255, 256, 257, 384, 512, 576, 896, 1000, 1023, 1024)
WIDE_COLUMNS = (1025, 1500, 2000)
AS_OF_ROWS = (0, 1000, 5000)  # few rows, some and many
TOP_K = (1, 2, 3, 6, 8, 10, 16, 31, 32)
ROWS = (1, 3, 8, 17, 40, 64)  # of calls whose kernel depends on their number

Layouts = dict[str, tuple[int, int]]


@dataclass(frozen=True)
class Setting:
    """Everything that decides which kernel an op compiles."""

    op: str
    columns: int
    k: int
    dtype: str = "float32"
    aligned: bool = True
    score: str = "sqrtsoftplus"
    renormalize: bool = True
    given: frozenset[str] = frozenset()  # optional arrays
    as_of_rows: int = 0  # number of rows by which the kernel is chosen; 0: those of the call
    ids: tuple[str, str] = ("int32", "int32")  # dtypes of token ids and table
    weight_dtype: str = "float32"
    hidden: int = 0
    rows: int = -1  # so many where that matters
    dense: bool = False  # rows follow each other, in all arrays; else not in the results
    divisor: str = ""  # what else the sum of scores goes through: "eps", "min" or nothing
    steps: tuple[tuple[str, Any], ...] = ()  # further fields of the method
    plan: str = ""  # of topk_select for long rows, with options of any kind
    logits_dtype: str = ""  # of logits that are returned
    replay: tuple[str, str] = ("", "route")  # dtype of given experts, and what becomes of rows of -1

    def method(self, **changes: Any) -> RoutingMethod:
        return RoutingMethod(
            self.columns, self.k, self.score, renormalize=self.renormalize, **{**dict(self.steps), **changes}
        )

    @property
    def num_logits(self) -> int:
        return self.method().num_logits

    @property
    def wide(self) -> bool:
        """True if the row or k is too large for kernels that keep a row in registers."""
        return self.columns > 1024 or self.k > 32

    def __str__(self) -> str:
        parts = [self.op, self.dtype, f"{self.columns}", f"k{self.k}"]
        if self.op != "topk_select":
            parts += [self.score, *(["renormalized"] if self.renormalize else [])]
        if self.op == "hash_router":
            parts += [f"ids:{'/'.join(self.ids)}"]
        if self.hidden:
            parts += [f"hidden{self.hidden}", f"weight:{self.weight_dtype}"]
        parts += [f"{self.rows}rows"] if self.rows >= 0 else []
        parts += [f"{name}:{value}" for name, value in self.steps]
        parts += [*([self.divisor] if self.divisor else []), *(["dense"] if self.dense else [])]
        parts += [self.plan.replace(" ", "_")] if self.plan else []
        parts += [f"logits:{self.logits_dtype}"] if self.logits_dtype else []
        parts += [f"replay:{'/'.join(self.replay)}"] if self.replay[0] else []
        return "-".join(
            [
                *parts,
                *sorted(self.given),
                *([f"as{self.as_of_rows}"] if self.as_of_rows else []),
                "aligned" if self.aligned else "misaligned",
            ]
        )


def settings(seed: int = 0, count: int = 72) -> list[Setting]:
    """Return this many different settings, most of them of activation_topk; they depend on the seed."""
    rng = random.Random(seed)
    makers = [_activation_topk, _topk_select, _hash_router, _activation_topk, _dense_router]
    found: dict[Setting, None] = {
        Setting("topk_select", 3000, 600, dtype, aligned=False, given=frozenset({"lengths"})): None for dtype in FLOATS
    }
    while len(found) < count:
        found[makers[len(found) % len(makers)](rng)] = None
    return list(found)


def _common(rng: random.Random, columns: int) -> dict[str, Any]:
    """Return the fields of all ops, and the method of those that have one."""
    return {
        "columns": columns,
        "k": min(rng.choice(TOP_K), columns),
        "dtype": rng.choice(FLOATS),
        "aligned": rng.random() < 0.5,
        "score": rng.choice(SCORES),
        "renormalize": rng.random() < 0.7,
        "divisor": rng.choice(("", "eps", "min")),
    }


def _topk_select(rng: random.Random) -> Setting:
    common = _common(rng, rng.choice(COLUMNS)) | {"score": SCORES[0], "renormalize": True, "divisor": ""}
    given = frozenset(name for name in ("lengths", "starts") if rng.random() < 0.4)
    if rng.random() < 0.4:
        given |= {"index_map"} if rng.random() < 0.5 else set()
        common |= {"columns": 3000, "k": 600, "aligned": False}
        return Setting("topk_select", **common, given=given, plan=rng.choice(list(PLANS)))
    return _perhaps_dense(rng, Setting("topk_select", **common, given=given, as_of_rows=rng.choice(AS_OF_ROWS)))


def _perhaps_dense(rng: random.Random, setting: Setting) -> Setting:
    """Draw whether rows are dense, where that selects the kernel; dense rows are aligned only if of whole words."""
    possible = not setting.wide and (not setting.aligned or setting.num_logits % 8 == 0)
    return replace(setting, dense=possible and rng.random() < 0.5)


def _activation_topk(rng: random.Random) -> Setting:
    wide = rng.random() < 0.15
    common = _common(rng, rng.choice(WIDE_COLUMNS if wide else COLUMNS))
    if wide:
        common["k"] = rng.choice((1, 6, 40))
    given = _bias(rng)
    if rng.random() < 0.5:
        given |= _steps(rng, common, "bias" in given)
    as_of_rows = 0 if wide else rng.choice(AS_OF_ROWS)
    setting = Setting("activation_topk", **common, given=given, as_of_rows=as_of_rows, replay=_replay(rng))
    return _perhaps_dense(rng, setting)


def _steps(rng: random.Random, common: dict[str, Any], biased: bool) -> frozenset[str]:
    """Further steps of a method, put into `common`, and the arrays that go with them. Experts are chosen by logits or
    by scores that are logits, so that no rounding decides between them."""
    steps: dict[str, Any] = {}
    by = rng.choice(("identity", "logits", "after"))
    if by == "identity":
        common["score"] = "identity"
    if by == "logits" or (by == "after" and biased):
        steps["bias_on"] = "logits"
    if by == "after":
        steps["score_after_topk"] = True
    divisors = [g for g in range(2, min(common["columns"], 40)) if common["columns"] % g == 0]
    if divisors and rng.random() < 0.6:
        groups = rng.choice(divisors)
        fewest = -(-common["k"] * groups // common["columns"])
        if fewest < groups:
            steps["num_groups"], steps["top_groups"] = groups, rng.randrange(fewest, groups)
            steps["group_score"] = rng.choice(("max", "top2"))
    if rng.random() < 0.3:
        steps["num_shared_experts"] = rng.choice((1, 3))
        if common["score"] == "sigmoid":
            steps["shared_in_normalizer"] = common["renormalize"] = True
            common["divisor"] = ""
    if rng.random() < 0.5:
        steps["weight_dtype"], steps["index_dtype"] = (
            rng.choice(FLOATS),
            rng.choice(_index_dtypes(common["columns"] + 3)),
        )
    if rng.random() < 0.3:
        steps["logit_scale"] = rng.choice((0.5, -2.0))
    common["steps"] = tuple(sorted(steps.items()))
    return frozenset(name for name in ("logit_bias", "expert_scale") if rng.random() < 0.4)


def _index_dtypes(num_ids: int) -> list[str]:
    return [dtype for dtype, most in INDEX_DTYPES.items() if num_ids <= most]


def _bias(rng: random.Random) -> frozenset[str]:
    return frozenset(rng.choice(((), (), ("bias",), ("bias",), ("bias", "bias_index")))) | _counted(rng)


def _replay(rng: random.Random) -> tuple[str, str]:
    return rng.choice(("", "", *IDS)), rng.choice(("route", "empty"))


def _counted(rng: random.Random) -> frozenset[str]:
    return frozenset({"num_valid"} if rng.random() < 0.4 else ())


def _hash_router(rng: random.Random) -> Setting:
    common = _common(rng, rng.choice(COLUMNS))
    common["k"] = rng.choice((common["k"], min(40, common["columns"])))
    source = rng.choice(((), ("logits",), ("x", "weight"), ("x", "weight")))
    gate, biased = "x" in source, bool(source) and common["k"] <= 32 and rng.random() < 0.4
    returned = {"logits_dtype": "float32"} if gate and rng.random() < 0.5 else {}
    rows = rng.choice(ROWS) if gate and (biased or returned) else -1
    given = {*source, *_counted(rng), *(("bias", "bias_index") if biased else ())}
    return Setting(
        "hash_router", **common, given=frozenset(given), ids=(rng.choice(INTS), rng.choice(INTS)), rows=rows,
        dense=rng.random() < 0.5 or rows == 1, **returned, **(_gate(rng, common["aligned"]) if gate else {}),
    )  # fmt: skip


def _dense_router(rng: random.Random) -> Setting:
    common = _common(rng, rng.choice(COLUMNS))
    rows, logits_dtype = rng.choice(ROWS), rng.choice(("", "", *FLOATS))
    given = _bias(rng)
    if rng.random() < 0.4:
        given |= _steps(rng, common, "bias" in given)
    dense = rows == 1 or rng.random() < 0.5  # a single row is dense
    return Setting(
        "dense_router", **common, given=given, rows=rows, dense=dense, logits_dtype=logits_dtype, replay=_replay(rng),
        **_gate(rng, common["aligned"]),
    )  # fmt: skip


def _gate(rng: random.Random, aligned: bool) -> dict[str, Any]:
    hidden = rng.choice((8, 40, 264, 520) if aligned else (1, 7, 77, 300))
    return {"hidden": hidden, "weight_dtype": rng.choice(FLOATS)}


# -- Cases -------------------------------------------------------------------------------------------------------------


def cases(setting: Setting, max_rows: int = 40) -> st.SearchStrategy[Case]:
    """Draw calls that compile this setting's kernel and no other."""
    draw = {
        "topk_select": _topk_select_case,
        "activation_topk": _activation_topk_case,
        "hash_router": _hash_router_case,
        "dense_router": _dense_router_case,
    }
    return draw[setting.op](setting, min(max_rows, max(4, 4000 // setting.columns)))


@st.composite
def _topk_select_case(draw: st.DrawFn, setting: Setting, max_rows: int) -> Case:
    columns, k = setting.columns, setting.k
    if setting.wide:  # one kernel for all sizes
        long = st.integers(1025, 5000 if setting.plan else 3000)
        columns = draw(long | st.integers(1, 40) if setting.given & {"lengths", "starts"} else long)
        k = draw(st.integers(33, 500 if setting.plan else 700))
    rows, layout = draw(_rows(setting, columns, max_rows))
    arrays = {"scores": draw(bits((rows, columns), setting.dtype))}
    edges = st.sampled_from([0, 1, k - 1, k, k + 1, columns - 1, columns, columns + 1, -1, 2**31 - 1, -(2**31)])
    for name in sorted(setting.given - {"index_map"}):
        arrays[name] = draw(integers(rows, "int32", edges | st.integers(0, columns)))
    layouts, options = {"scores": layout}, {"k": k}
    if setting.plan:
        options |= {"order": draw(st.sampled_from(("value", "column", "any"))), "return_values": draw(st.booleans())}
    if "index_map" in setting.given:
        page_size = options["page_size"] = draw(st.sampled_from([1, 2, 7, 64, 5000]))
        shape = draw(st.sampled_from([1, rows])), -(-columns // page_size) + draw(st.integers(0, 2))
        table = draw(integers(shape[0] * shape[1], "int32", st.integers(0, 2**31 // page_size - 1)))
        arrays["index_map"], layouts["index_map"] = table.reshape(shape), (draw(st.integers(0, 3)), 0)
    return Case(
        "topk_select", arrays, None, options, layouts, draw(_any_padding if setting.wide else _padding[setting.dense]),
        setting.as_of_rows, setting.plan, draw(_schedules),
    )  # fmt: skip


@st.composite
def _activation_topk_case(draw: st.DrawFn, setting: Setting, max_rows: int) -> Case:
    rows, layout = draw(_rows(setting, setting.num_logits, max_rows))
    arrays = {"logits": draw(floats((rows, setting.num_logits), setting.dtype))}
    layouts = {"logits": layout}
    options = draw(_layer_and_num_valid(setting, arrays, layouts))
    method = draw(_methods(setting))
    return Case(
        "activation_topk", arrays, method, options, layouts,
        draw(_any_padding if setting.wide else _padding[setting.dense]), setting.as_of_rows, schedule=draw(_schedules),
    )  # fmt: skip


@st.composite
def _dense_router_case(draw: st.DrawFn, setting: Setting, max_rows: int) -> Case:
    arrays: dict[str, np.ndarray] = {}
    layouts: Layouts = {}
    draw(_factors(setting, setting.rows, arrays, layouts))
    options = draw(_layer_and_num_valid(setting, arrays, layouts))
    if setting.logits_dtype:
        options |= {"return_logits": True, "logits_dtype": setting.logits_dtype}
    method = draw(_methods(setting))
    padding = draw(_padding[setting.dense])
    return Case("dense_router", arrays, method, options, layouts, padding, schedule=draw(_schedules))


@st.composite
def _hash_router_case(draw: st.DrawFn, setting: Setting, max_rows: int) -> Case:
    rows, layout = draw(_rows(setting, setting.columns, max_rows))
    rows = rows if setting.rows < 0 else setting.rows
    vocab_size = 13 if "bias" in setting.given else draw(st.integers(1, 50))
    limits = {"int32": [-(2**31), 2**31 - 1], "int64": [-(2**63), 2**63 - 1, 2**32, -(2**32)]}
    bad_ids = st.sampled_from([-1, vocab_size, *limits[setting.ids[0]]])
    bad_experts = st.sampled_from([-1, setting.columns, *limits[setting.ids[1]]])
    arrays = {
        "token_ids": draw(integers(rows, setting.ids[0], st.integers(0, vocab_size - 1), bad_ids)),
        "table": draw(
            integers(vocab_size * setting.k, setting.ids[1], st.integers(0, setting.columns - 1), bad_experts)
        ).reshape(vocab_size, setting.k),
    }
    layouts: Layouts = {"table": (0 if setting.dense else draw(st.integers(0, 3)), draw(st.integers(0, 1)))}
    if "logits" in setting.given:
        arrays["logits"], layouts["logits"] = draw(floats((rows, setting.columns), setting.dtype)), layout
    elif "x" in setting.given:
        draw(_factors(setting, rows, arrays, layouts))
    options = draw(_layer_and_num_valid(setting, arrays, layouts))
    if setting.logits_dtype:
        options["return_logits"] = True
    method = draw(_methods(setting)) if setting.given & {"logits", "x"} else None
    padding = draw(_padding[setting.dense])
    return Case("hash_router", arrays, method, options, layouts, padding, schedule=draw(_schedules))


_schedules = st.sampled_from(SCHEDULES)
_any_padding = st.sampled_from([-1, 0, 1, 7])
_padding = {True: st.sampled_from([-1, 0]), False: st.sampled_from([1, 7])}  # by whether a setting is dense


@st.composite
def _rows(draw: st.DrawFn, setting: Setting, columns: int, max_rows: int) -> tuple[int, tuple[int, int]]:
    """Draw the number of rows and their layout. A single row is dense and aligned as its base."""
    layout = draw(_layout(setting, columns))
    alone = setting.dense or (
        setting.wide and setting.op != "hash_router" and (not setting.aligned or columns % 8 == 0)
    )
    return draw(st.integers(0, max_rows).filter(lambda rows: rows != 1 or alone)), layout


@st.composite
def _layout(draw: st.DrawFn, setting: Setting, columns: int) -> tuple[int, int]:
    """Draw the elements between rows and before them; aligned: every row starts at a multiple of 16 bytes."""
    if setting.dense:
        return 0, (0 if setting.aligned else 1)
    if setting.aligned:
        return -columns % 8 + 8 * draw(st.integers(0, 1)), 8 * draw(st.integers(0, 1))
    return draw(st.integers(0, 5)), draw(st.sampled_from([1, 3]))


@st.composite
def _factors(draw: st.DrawFn, setting: Setting, rows: int, arrays: dict[str, np.ndarray], layouts: Layouts) -> None:
    """Add x and weight to the arrays."""
    for name, count, dtype in (("x", rows, setting.dtype), ("weight", setting.num_logits, setting.weight_dtype)):
        arrays[name] = draw(small_integers((count, setting.hidden), dtype))
        layouts[name] = draw(_layout(setting, setting.hidden))


@st.composite
def _layer_and_num_valid(
    draw: st.DrawFn, setting: Setting, arrays: dict[str, np.ndarray], layouts: Layouts
) -> dict[str, Any]:
    rows = len(next(iter(arrays.values())))
    for name in ("bias", "logit_bias"):
        if name in setting.given:
            arrays[name] = draw(floats((setting.columns,), "float32", biases))
            layouts[name] = (0, 0 if setting.aligned else 1)
    if "bias_index" in setting.given:
        arrays["bias"] = draw(floats((3, setting.columns), "float32", biases))
        layouts["bias"] = (-setting.columns % 8, 0) if setting.aligned else (1, 1)
        bad = st.sampled_from([-1, 3, 2**31 - 1, -(2**31)])
        arrays["bias_index"] = draw(integers(rows, "int32", st.integers(0, 2), bad))
    if "expert_scale" in setting.given:  # infinite ones would tell 0 from the smallest weights
        few = st.sampled_from([0.0, 1.0, -1.5, 0.25, 8.0, 1e4])
        arrays["expert_scale"] = np.resize(
            np.array(draw(st.lists(few, min_size=1, max_size=9)), np.float32), setting.columns
        )
    options: dict[str, Any] = {}
    dtype, unset = setting.replay
    if dtype:
        arrays["indices"] = draw(recorded((rows, setting.k), dtype, setting.columns))
        layouts["indices"] = (0, 0) if setting.dense else (draw(st.integers(0, 3)), draw(st.integers(0, 1)))
        options["unset"] = unset
    return options | draw(_num_valid(setting, arrays, rows))


@st.composite
def _num_valid(draw: st.DrawFn, setting: Setting, arrays: dict[str, np.ndarray], rows: int) -> dict[str, int]:
    """Draw num_valid as an array, as an option, or not at all."""
    if "num_valid" in setting.given:
        number = draw(st.integers(0, rows) | st.sampled_from([-(2**31), -1, rows + 1, 2**31 - 1]))
        arrays["num_valid"] = np.full(draw(st.sampled_from([(), (1,)])), number, np.int32)
        return {}
    return {"num_valid": draw(st.integers(0, rows))} if draw(st.booleans()) else {}


@st.composite
def _methods(draw: st.DrawFn, setting: Setting) -> RoutingMethod:
    eps = draw(st.sampled_from([1e-20, 0.25])) if setting.divisor == "eps" else 0.0
    minimum = draw(st.sampled_from([0.0, 1e-12, 0.5])) if setting.divisor == "min" else None
    scale = draw(st.sampled_from([1.0, 1.5, 2.5, 0.0, -2.0, 1e30]))
    return setting.method(renormalize_eps=eps, renormalize_min=minimum, scale=scale)
