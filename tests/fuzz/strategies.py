# SPDX-License-Identifier: Apache-2.0
"""The cases that hypothesis draws for a setting, which compile its kernel and no other."""

from __future__ import annotations

from typing import Any

import numpy as np
from hypothesis import strategies as st

from cupy_router import RoutingMethod
from cupy_router.simt.device import SCHEDULES
from tests.fuzz.arrays import biases, bits, floats, integers, recorded, small_integers
from tests.fuzz.case import Case
from tests.fuzz.settings import Setting

Layouts = dict[str, tuple[int, int]]


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
    padding = _any_padding if _any_stride(setting) else _padding[setting.dense]
    return Case(
        "activation_topk", arrays, method, options, layouts, draw(padding), setting.as_of_rows,
        schedule=draw(_schedules),
    )  # fmt: skip


@st.composite
def _dense_router_case(draw: st.DrawFn, setting: Setting, max_rows: int) -> Case:
    arrays: dict[str, np.ndarray] = {}
    layouts: Layouts = {}
    draw(_factors(setting, setting.rows, arrays, layouts))
    options = draw(_layer_and_num_valid(setting, arrays, layouts))
    if setting.logits_dtype:
        options |= {"return_logits": True, "logits_dtype": setting.logits_dtype}
    if setting.batch_invariant:
        options["batch_invariant"] = True
    method = draw(_methods(setting))
    padding = draw(_padding[setting.dense])
    return Case("dense_router", arrays, method, options, layouts, padding, schedule=draw(_schedules))


@st.composite
def _hash_router_case(draw: st.DrawFn, setting: Setting, max_rows: int) -> Case:
    rows, layout = draw(_rows(setting, setting.columns, max_rows))
    rows = rows if setting.rows < 0 else setting.rows
    vocab_size = 13 if "bias" in setting.given or setting.batch_invariant else draw(st.integers(1, 50))
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
    if setting.batch_invariant:
        options["batch_invariant"] = True
    method = draw(_methods(setting)) if setting.given & {"logits", "x"} else None
    padding = draw(_padding[setting.dense])
    return Case("hash_router", arrays, method, options, layouts, padding, schedule=draw(_schedules))


_schedules = st.sampled_from(SCHEDULES)
_any_padding = st.sampled_from([-1, 0, 1, 7])
_padding = {True: st.sampled_from([-1, 0]), False: st.sampled_from([1, 7])}  # by whether a setting is dense


def _any_stride(setting: Setting) -> bool:
    """Return whether one kernel takes dense rows and others: those of wide rows do, but not those of given experts."""
    return setting.wide and not setting.replay[0]


@st.composite
def _rows(draw: st.DrawFn, setting: Setting, columns: int, max_rows: int) -> tuple[int, tuple[int, int]]:
    """Draw the number of rows and their layout. A single row is dense and aligned as its base."""
    layout = draw(_layout(setting, columns))
    alone = setting.dense or (
        _any_stride(setting) and setting.op != "hash_router" and (not setting.aligned or columns % 8 == 0)
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
    if setting.replicas:
        for name, dtype, values in (
            ("replicas", setting.ids[0], np.arange(setting.columns * setting.replicas)),
            (
                "replica_counts",
                setting.ids[1],
                draw(integers(setting.columns, "int32", st.integers(1, setting.replicas))),
            ),
        ):
            arrays[name] = values.astype(dtype)
        arrays["replicas"] = np.ascontiguousarray(arrays["replicas"].reshape(setting.replicas, -1).T)
        offset = draw(st.sampled_from([0, 1, 5, 2**31 - 1]))
        options |= {"num_physical": setting.columns * setting.replicas, "replica_offset": offset}
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
