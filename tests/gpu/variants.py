# SPDX-License-Identifier: Apache-2.0
"""One small call of every variant of every kernel, with ties and NaN: what the sanitizers and the soak run."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from itertools import product
from typing import Any

import numpy as np

from cupy_router import RoutingMethod
from cupy_router.method import SCORES
from cupy_router.ops._topk_select_cluster import ClusterShape
from cupy_router.ops._topk_select_long import LaunchShape
from cupy_router.ops._topk_select_many import ManyShape
from tests import inputs, methods, oracle
from tests.backends import DTYPES
from tests.fuzz.case import BACKWARD, Case
from tests.gpu.layout_variants import layout_cases
from tests.topk_calls import PLANS, misleading

FLOATS = ("float32", "float16", "bfloat16")
IDS = ("uint8", "int16", "uint16", "int32", "int64")
ROWS, FEW_ROWS = 33, 5
MANY_ROWS = 140  # more than the multiprocessors that long rows are planned for
DENSE, STRIDED, MISALIGNED = (0, 0), (8, 0), (1, 1)  # elements between rows, elements in front


def cases() -> list[Case]:
    return [
        *_topk_select(),
        *_long_rows(),
        *_activation_topk(),
        *_steps(),
        *_hash_router(),
        *_dense_router(),
        *_given_experts(),
        *_replicas_and_batch_invariant(),
        *_backward(),
        *layout_cases(),
    ]


def _scores(rows: int, columns: int, dtype: str) -> np.ndarray:
    """Return rows: a third normal, a third of few values, a third with NaN."""
    scores = inputs.normal((rows, columns), dtype, seed=rows)
    scores[1::3] = np.round(scores[1::3].astype(np.float32))
    scores[2::3, ::7] = np.nan
    return scores


def _limits(rows: int, columns: int) -> dict[str, np.ndarray]:
    numbers = np.arange(rows, dtype=np.int32) * 37
    return {"lengths": numbers % (columns + 2) - 1, "starts": (numbers * 5) % (columns + 2) - 1}


def _topk_select() -> Iterator[Case]:
    def case(rows: int, columns: int, k: int, dtype: str, layout: tuple[int, int], **limits: np.ndarray) -> Case:
        arrays = {"scores": _scores(rows, columns, dtype), **limits}
        return Case("topk_select", arrays, None, {"k": k}, {"scores": layout}, layout[0] - 1)

    for dtype in FLOATS:
        for layout in (DENSE, STRIDED, MISALIGNED):
            yield case(ROWS, 256, 8, dtype, layout)
            for rows, columns, k in ((1000, 384, 6), (5000, 384, 6), (5000, 160, 10), (5000, 1000, 12)):
                yield replace(case(ROWS, columns, k, dtype, layout), as_of_rows=rows)
            yield case(FEW_ROWS, 3000, 600, dtype, layout)
        for columns, k, rows in ((36, 6, ROWS), (1000, 32, ROWS), (3000, 40, FEW_ROWS)):
            both = _limits(rows, columns)
            yield case(rows, columns, k, dtype, DENSE, lengths=both["lengths"])
            yield case(rows, columns, k, dtype, DENSE, **both)
        for as_of_rows in (1000, 5000):
            yield replace(case(ROWS, 200, 7, dtype, DENSE, **_limits(ROWS, 200)), as_of_rows=as_of_rows)
    for columns, k in ((1, 1), (8, 2), (16, 3), (32, 6), (64, 9), (384, 6), (1024, 1)):
        yield case(ROWS, columns, k, "float32", DENSE)


def _long_rows() -> Iterator[Case]:
    """Sampled or not, in pieces or not, read once or twice, ties at the threshold, all options."""

    def case(rows: int, columns: int, k: int, dtype: str, layout: tuple[int, int], **more: Any) -> Case:
        arrays = {"scores": _scores(rows, columns, dtype)}
        arrays |= {name: array for name, array in more.items() if isinstance(array, np.ndarray)}
        options = {"k": k} | {name: option for name, option in more.items() if name not in arrays}
        return Case("topk_select", arrays, None, options, {"scores": layout}, layout[0] - 1)

    def limits(rows: int, columns: int) -> dict[str, np.ndarray]:
        lengths, starts = [columns + 1, columns - 1000, 601, 0], [37, 0, 3, columns - 1]
        return {
            "lengths": np.resize(lengths, rows).astype(np.int32),
            "starts": np.resize(starts, rows).astype(np.int32),
        }

    def pages(rows: int, columns: int, page_size: int) -> dict[str, Any]:
        count = -(-columns // page_size) + 1
        table = inputs.rng(rows, columns).permutation(rows * count).reshape(rows, count)
        return {"index_map": table.astype(np.int32), "page_size": page_size}

    for i, dtype in enumerate(FLOATS):
        for columns, rows in ((9000, FEW_ROWS), (70_000, 3)):
            both = limits(rows, columns)
            yield case(rows, columns, 600, dtype, MISALIGNED, lengths=both["lengths"])
            yield case(rows, columns, 500, dtype, MISALIGNED, **both, **pages(1, columns, 64))
            yield case(rows, columns, 200, dtype, STRIDED)
        yield case(MANY_ROWS, 2100, 100, dtype, STRIDED)
        yield case(MANY_ROWS, 2100, 100, dtype, DENSE, order="any", **limits(MANY_ROWS, 2100))
        yield case(MANY_ROWS, 2100, 100, dtype, MISALIGNED, **limits(MANY_ROWS, 2100), order="column")
        for j, (name, plan) in enumerate(PLANS.items()):
            layout = (DENSE, STRIDED, MISALIGNED)[(i + j) % 3]
            yield replace(case(3, 5000, 300, dtype, layout, order="column", **pages(3, 5000, 16)), plan=name)
            yield replace(case(3, 5000, 300, dtype, layout, return_values=False, **limits(3, 5000)), plan=name)
            yield replace(case(3, 5000, 300, dtype, layout, order="any"), plan=name)
            if isinstance(plan, LaunchShape | ManyShape):  # a sample that misleads, so that rows are read again
                hidden = {"scores": misleading(plan, 2, 12_000, dtype, shows_best=False)}
                options = {"k": 300, "order": ("column", "value")[j % 2 == 0]}
                yield Case("topk_select", hidden, None, options, plan=name)
            if isinstance(plan, ClusterShape):  # more than its list holds: ties and scores above them are counted
                row = inputs.distinct(1, 12_000, dtype)[0]
                tied = np.stack([np.full_like(row, 1), np.repeat(row[:6000], 2), np.maximum(row, np.sort(row)[-100])])
                for order in ("any", "value"):
                    yield Case("topk_select", {"scores": tied}, None, {"k": 300, "order": order}, plan=name)
    yield case(1, 70_000, 8000, "float32", DENSE)
    yield case(1, 600_000, 2048, "float32", DENSE)
    yield case(2, 9000, 5000, "float32", DENSE)
    yield case(2, 20_000, 20_000, "float16", DENSE)


def _bias(experts: int) -> np.ndarray:
    return np.where(np.arange(experts) % 5 == 0, np.float32(8.08), inputs.normal((experts,), seed=1))


def _activation_topk() -> Iterator[Case]:
    def case(rows: int, method: RoutingMethod, dtype: str, layout: tuple[int, int], bias: bool, **more: Any) -> Case:
        arrays = {"logits": _scores(rows, method.num_experts, dtype)}
        if bias:
            arrays["bias"] = _bias(method.num_experts)
        layouts = {"logits": layout, "bias": (0, layout[1])}
        numbers = {name: array for name, array in more.items() if isinstance(array, np.ndarray)}
        options = {name: number for name, number in more.items() if isinstance(number, int)}
        return Case("activation_topk", arrays | numbers, method, options, layouts, layout[0] - 1)

    for score in SCORES:
        narrow = RoutingMethod(256, 6, score, renormalize_eps=1e-20, scale=2.5)
        for dtype in FLOATS:
            yield case(ROWS, narrow, dtype, DENSE, bias=True)
            for rows in (1000, 5000):
                yield replace(case(ROWS, narrow, dtype, STRIDED, bias=True), as_of_rows=rows)
                odd = replace(narrow, num_experts=200, top_k=8)
                yield replace(case(ROWS, odd, dtype, MISALIGNED, bias=False), as_of_rows=rows)
            yield case(ROWS, replace(narrow, num_experts=384, top_k=8), dtype, MISALIGNED, bias=False)
            yield case(FEW_ROWS, replace(narrow, num_experts=1500, top_k=40), dtype, DENSE, bias=True)
        for experts, k in ((1, 1), (8, 2), (36, 6), (160, 8), (1000, 32)):
            yield case(
                ROWS, replace(narrow, num_experts=experts, top_k=k, renormalize=k != 8), "float32", STRIDED, True
            )
    grouped = RoutingMethod(256, 8, "sigmoid", num_groups=8, top_groups=4, group_score="top2", scale=2.5)
    for dtype, layout in zip(FLOATS, (DENSE, STRIDED, MISALIGNED), strict=True):
        yield replace(case(ROWS, grouped, dtype, layout, bias=True), as_of_rows=5000)
    method = RoutingMethod(256, 6)
    for more in ({"num_valid": 20}, {"num_valid": 0}, {"num_valid": np.full((), 20, np.int32)}):
        yield case(ROWS, method, "float32", DENSE, True, **more)
    yield case(FEW_ROWS, replace(method, num_experts=1500), "float32", DENSE, False, num_valid=3)


def _steps() -> Iterator[Case]:
    """Cases of every step of a method; logits are so far apart that rounding decides nothing."""
    for i, method in enumerate(methods.METHODS.values()):
        rows = FEW_ROWS if method.num_experts > 1000 else ROWS
        arrays = {"logits": inputs.distinct(rows, method.num_logits)} | methods.layer_of(method, i).arguments(np.copy)
        yield Case("activation_topk", arrays, method, {}, {"logits": (DENSE, STRIDED, MISALIGNED)[i % 3]}, i % 3 - 1)
    for i, name in enumerate(("8 groups, best 4, top 2", "softmax after top-k", "shared in the normaliser")):
        method = methods.METHODS[name]
        x, weight = _products((9, 40), "bfloat16"), _products((method.num_logits, 40), "bfloat16")
        weight = (weight / 32).astype(weight.dtype)  # the scores of large logits all round to 1
        arrays = {"x": x, "weight": weight} | methods.layer_of(method, 2 + i).arguments(np.copy)
        yield Case("dense_router", arrays, method)


def _hash_router() -> Iterator[Case]:
    def case(rows: int, k: int, ids: str, table: str, method: RoutingMethod | None, **gate: np.ndarray) -> Case:
        experts = 300 if method is None else method.num_experts
        numbers = np.arange(rows) * 7 % 50
        numbers[3::8] = (-1, 50, 2**31 - 1, -(2**31))[k % 4]
        entries = inputs.rng(2, k).integers(0, experts, (50, k))
        entries[5::9, k - 1] = experts if method is not None else -1
        arrays = {"token_ids": numbers.astype(DTYPES[ids]), "table": entries.astype(DTYPES[table]), **gate}
        return Case("hash_router", arrays, method, {}, {"table": (k % 3, 0)}, k % 3 - 1)

    for ids in ("int32", "int64"):
        for table in ("int32", "int64"):
            for k in (1, 6, 8, 40):
                yield case(ROWS, k, ids, table, None)
    counted = {"logits": _scores(ROWS, 256, "float32"), "num_valid": np.full((), 20, np.int32)}
    yield case(ROWS, 6, "int32", "int32", RoutingMethod(256, 6), **counted)
    for score in SCORES:
        for k in (6, 32, 40):
            for dtype in FLOATS:
                method = RoutingMethod(256, k, score)
                yield case(ROWS, k, "int32", "int32", method, logits=_scores(ROWS, 256, dtype))
        dtypes = (("float32", "float32"), ("bfloat16", "bfloat16"), ("float16", "float32"), ("bfloat16", "float16"))
        for (dtype, weight_dtype), hidden in zip(dtypes, (512, 512, 264, 77), strict=True):
            x, weight = _products((FEW_ROWS, hidden), dtype), _products((64, hidden), weight_dtype)
            yield case(FEW_ROWS, 6, "int64", "int32", RoutingMethod(64, 6, score), x=x, weight=weight)
            odd = case(FEW_ROWS, 12, "int32", "int64", RoutingMethod(64, 12, score), x=x, weight=weight)
            yield replace(odd, layouts={"x": MISALIGNED, "weight": MISALIGNED})
    # Logits of all experts, which the product writes, or the kernel with their bias, and zeros in padding.
    x, weight = _products((FEW_ROWS, 264), "bfloat16"), _products((64, 264), "bfloat16")
    for k, layer in ((6, {}), (40, {}), (6, {"logit_bias": _bias(64)})):
        returning = case(FEW_ROWS, k, "int32", "int32", RoutingMethod(64, k), x=x, weight=weight, **layer)
        for options in ({}, {"num_valid": 2}):
            yield replace(returning, options={"return_logits": True, **options})


def _dense_router() -> Iterator[Case]:
    """One launch for few tokens, cuBLAS and a second one for 100."""
    dtypes = (("float32", "float32"), ("bfloat16", "bfloat16"), ("float16", "float32"), ("float16", "float16"))
    for i, score in enumerate(SCORES):
        method = RoutingMethod(72, 6, score, renormalize_eps=1e-20)
        layout = (DENSE, MISALIGNED)[i % 2]
        for j, (rows, hidden) in enumerate(((1, 264), (5, 512), (40, 264), (64, 77), (100, 77))):
            dtype, weight_dtype = dtypes[(i + j) % len(dtypes)]
            x, weight = _products((rows, hidden), dtype), _products((72, hidden), weight_dtype)
            arrays = {"x": x, "weight": weight, "bias": _bias(72)}
            yield Case("dense_router", arrays, method, {}, {"x": layout, "weight": layout}, rows % 2 - 1)
    x, weight = _products((9, 512), "bfloat16"), _products((256, 512), "bfloat16")
    yield Case("dense_router", {"x": x, "weight": weight}, RoutingMethod(256, 8), {"num_valid": 5})
    counted = {"x": x, "weight": weight, "num_valid": np.full((1,), 7, np.int32)}
    yield Case("dense_router", counted, RoutingMethod(256, 8))
    # Logits, as the kernel or the product writes them, and as the pass that routes finishes them.
    method, padded = RoutingMethod(72, 6, "softmax", score_after_topk=True), ({}, {"num_valid": 3})
    for i, (rows, dtype) in enumerate(((1, "float32"), (5, "bfloat16"), (40, "float16"), (64, "float32"))):
        for n in (rows, 100 + rows):
            arrays = {"x": _products((n, 264), "bfloat16"), "weight": _products((72, 264), "bfloat16")}
            arrays |= {"logit_bias": _bias(72)} if i % 2 else {}
            options = {"return_logits": True, "logits_dtype": dtype} | padded[n > 3 and i > 1]
            yield Case("dense_router", arrays, method, options, {}, n % 3 - 1)


def _given_experts() -> Iterator[Case]:
    """Some rows are -1, some have an id that is no expert."""
    method = RoutingMethod(72, 6, "sigmoid", renormalize_eps=1e-20)
    for i, (dtype, unset, rows) in enumerate(product(IDS, ("route", "empty"), (FEW_ROWS, 100))):
        ids = inputs.rng(4, rows).permuted(np.tile(np.arange(72), (rows, 1)), axis=1)[:, :6]
        ids[1::4], ids[2::4, i % 6] = -1, 72
        x, weight = _products((rows, 264), "bfloat16"), _products((72, 264), "bfloat16")
        given = {"indices": ids.astype(DTYPES[dtype])}
        layout = {"indices": (DENSE, STRIDED)[i % 2]}
        arrays = {"logits": _scores(rows, 72, FLOATS[i % 3]), "bias": _bias(72)}
        yield Case("activation_topk", arrays | given, method, {"unset": unset}, layout, i % 3 - 1)
        yield Case("dense_router", {"x": x, "weight": weight} | given, method, {"unset": unset}, layout, i % 3 - 1)


def _replicas_and_batch_invariant() -> Iterator[Case]:
    """Of 72 experts, an expert e has e % 3 + 1 replicas."""
    method = RoutingMethod(72, 6, "sigmoid", renormalize_eps=1e-20)
    replicas, counts = np.arange(216).reshape(3, 72).T, np.arange(72) % 3 + 1
    for i, (rows, dtype) in enumerate(product((FEW_ROWS, 100), ("int32", "int64"))):
        maps = {"replicas": np.ascontiguousarray(replicas, dtype), "replica_counts": counts.astype(dtype)}
        options = {"num_physical": 216, "replica_offset": 7}
        arrays = {"logits": _scores(rows, 72, FLOATS[i % 3]), "bias": _bias(72)}
        yield Case("activation_topk", arrays | maps, method, options, {"replicas": (DENSE, STRIDED)[i % 2]}, i % 3 - 1)
        x, weight = _products((rows, 264), "bfloat16"), _products((72, 264), ("bfloat16", "float32")[i % 2])
        for more in ({}, {"batch_invariant": True}):
            yield Case("dense_router", {"x": x, "weight": weight}, method, more)
            yield Case("dense_router", {"x": x, "weight": weight} | maps, method, options | more, {}, i % 3 - 1)
    x, weight = _products((500, 40), "bfloat16"), _products((1024, 40), "bfloat16")
    for rows in (70, 300, 500):  # clusters whose blocks have an eighth of hidden, a quarter or all
        arrays = {"x": x[:rows], "weight": weight}
        yield Case("dense_router", arrays, RoutingMethod(1024, 6, "sigmoid"), {"batch_invariant": True})
    for rows in (100, 300):  # whole stages, in a ring that is filled again
        arrays = {"x": _products((rows, 2048), "bfloat16"), "weight": _products((72, 2048), "bfloat16")}
        yield Case(
            "dense_router", arrays | {"bias": _bias(72)}, method, {"batch_invariant": True, "num_valid": rows - 3}
        )


def _backward() -> Iterator[Case]:
    """The gradient of the logits: every step of a method, rows of each dtype, and padding."""
    for i, method in enumerate(methods.METHODS.values()):
        logits = inputs.distinct(FEW_ROWS, method.num_logits, FLOATS[i % 3] if method.num_experts < 200 else "float32")
        layer = methods.layer_of(method, i)
        chosen = oracle.route(logits, method, **vars(layer)).indices
        chosen[3] = np.array(-1).astype(chosen.dtype)
        upstream = inputs.normal(chosen.shape, method.weight_dtype, seed=4)
        arrays = {"grad_weights": upstream, "indices": chosen, "logits": logits}
        arrays |= replace(layer, bias=None).arguments(np.copy)
        yield Case(BACKWARD, arrays, method, {}, {"logits": (DENSE, STRIDED, MISALIGNED)[i % 3]}, i % 3 - 1)


def _products(shape: tuple[int, int], dtype: str) -> np.ndarray:
    """Small integers, whose dot products are exact."""
    return inputs.rng(3, *shape).integers(-4, 5, shape).astype(DTYPES[dtype])
