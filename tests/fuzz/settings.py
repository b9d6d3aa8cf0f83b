# SPDX-License-Identifier: Apache-2.0
"""Settings to fuzz, one per compiled kernel."""

from __future__ import annotations

import random
from dataclasses import dataclass, replace
from typing import Any

from cupy_router import RoutingMethod
from cupy_router.method import SCORES
from cupy_router.method_fields import INDEX_DTYPES
from cupy_router.ops import _row_lanes
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
    batch_invariant: bool = False
    replicas: int = 0  # most replicas of an expert, if they are given; dtypes as `ids`

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
        parts += [f"replicas{self.replicas}"] if self.replicas else []
        if self.op == "hash_router" or self.replicas:
            parts += [f"ids:{'/'.join(self.ids)}"]
        parts += ["batch_invariant"] if self.batch_invariant else []
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
    return _perhaps_with_replicas(rng, _perhaps_dense(rng, setting))


def _perhaps_with_replicas(rng: random.Random, setting: Setting) -> Setting:
    """Draw whether experts have replicas, if the dtype of ids has enough values."""
    method, most = setting.method(), rng.choice((0, 0, 0, 0, 2, 3))
    fits = most * setting.columns + method.num_shared_experts <= INDEX_DTYPES[method.index_dtype]
    ids = rng.choice(INTS), rng.choice(INTS)
    return replace(setting, replicas=most, ids=ids) if most and fits else setting


def _perhaps_invariant(rng: random.Random, setting: Setting) -> Setting:
    """Draw whether the call is batch-invariant, if its kernel takes the method; it also has groups of many tokens."""
    if rng.random() < 0.6 or not _row_lanes.fits_method(setting.method()):
        return setting
    rows = rng.choice((*ROWS, 70))
    weight_dtype = rng.choice((setting.dtype, setting.weight_dtype))
    if setting.columns > 64:  # the CPU executor is slow: two groups for tensor cores, which take one dtype, else three
        rows = min(rows, 17 if weight_dtype == setting.dtype != "float32" else 9)
    return replace(
        setting, batch_invariant=True, rows=rows, dense=setting.dense or rows == 1, weight_dtype=weight_dtype
    )


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
    setting = Setting(
        "hash_router", **common, given=frozenset(given), ids=(rng.choice(INTS), rng.choice(INTS)), rows=rows,
        dense=rng.random() < 0.5 or rows == 1, **returned, **(_gate(rng, common["aligned"]) if gate else {}),
    )  # fmt: skip
    return _perhaps_invariant(rng, setting) if gate else setting


def _dense_router(rng: random.Random) -> Setting:
    common = _common(rng, rng.choice(COLUMNS))
    rows, logits_dtype = rng.choice(ROWS), rng.choice(("", "", *FLOATS))
    given = _bias(rng)
    if rng.random() < 0.4:
        given |= _steps(rng, common, "bias" in given)
    dense = rows == 1 or rng.random() < 0.5  # a single row is dense
    setting = Setting(
        "dense_router", **common, given=given, rows=rows, dense=dense, logits_dtype=logits_dtype, replay=_replay(rng),
        **_gate(rng, common["aligned"]),
    )  # fmt: skip
    return _perhaps_with_replicas(rng, _perhaps_invariant(rng, setting))


def _gate(rng: random.Random, aligned: bool) -> dict[str, Any]:
    hidden = rng.choice((8, 40, 264, 520) if aligned else (1, 7, 77, 300))
    return {"hidden": hidden, "weight_dtype": rng.choice(FLOATS)}
