# SPDX-License-Identifier: Apache-2.0
"""Shared by ops with a routing method: options, arrays of a layer, macros and arguments of the kernels."""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import Any

from cupy_router.arrays import ITEM_SIZES, View
from cupy_router.method import RoutingMethod
from cupy_router.ops import _checks as check
from cupy_router.ops import _row_lanes as row_lanes
from cupy_router.ops._declared import INTS, Arrays, Input, row
from cupy_router.ops._declared import layer as layer_input
from cupy_router.ops._layout import LayoutSpec
from cupy_router.ops._options import Options

SCORE_CODES = {"identity": 0, "sigmoid": 1, "sqrtsoftplus": 2, "softmax": 3}
_OWN_SCORE = 4
_UNIFORM = RoutingMethod(1, 1)


@dataclass(frozen=True)
class MethodOptions(Options):
    """The options of a router that has only a method: that, its layout, what becomes of a given row of -1, and the
    number of physical experts and the offset of their replicas."""

    method: RoutingMethod
    layout: LayoutSpec | None = None
    unset: str = "route"
    num_physical: int | None = None
    replica_offset: int = 0


# -- The declaration of inputs and results -----------------------------------------------------------------------------

BIAS = layer_input("bias", "num_experts", ("float32",), leading="num_biases")
BIAS_INDEX = row("bias_index", "num_tokens", ("int32",))
LOGIT_BIAS = layer_input("logit_bias", "num_experts", ("float32",))
EXPERT_SCALE = layer_input("expert_scale", "num_experts", ("float32",))
TABLE = layer_input("table", "vocab_size, top_k", INTS, required=True)


def gate(*, required: bool) -> Input:
    """Declare the gate's weight."""
    return layer_input("weight", "num_experts (+ shared), hidden", required=required)


def method_sizes(method: RoutingMethod) -> dict[str, int]:
    """Return the sizes of axes that follow from a method."""
    of_given = {} if method.num_shared_experts else {"top_k or top_k + shared": method.top_k}
    return {
        "num_experts": method.num_experts,
        "num_experts (+ shared)": method.num_logits,
        "top_k (+ shared)": method.num_columns,
        **of_given,
    }


def check_layer(method: RoutingMethod, views: Mapping[str, View]) -> None:
    """Check the arrays of a layer by their declarations and the method."""
    known: dict[str, int] = {"top_k": method.top_k, **method_sizes(method)}
    for declared in (gate(required=False), BIAS, LOGIT_BIAS, EXPERT_SCALE, TABLE):
        view = views.get(declared.name)
        if view is not None:
            check.dtype(view, declared.dtypes)
            check.axes(view, declared.axes_of(len(view.shape)), known)
    check_bias(method, views.get("bias"))


def check_bias(method: RoutingMethod, bias: Any) -> None:
    """Refuse a bias if the method cannot use it."""
    if bias is not None and method.score_after_topk and method.bias_on == "score":
        raise ValueError("bias has no scores to go to where score_after_topk is set, unless bias_on is 'logits'")


def check_bias_index(bias: View | None, bias_index: View | None) -> None:
    """Refuse several biases without the bias of each token, and the reverse."""
    several = bias is not None and len(bias.shape) == 2
    if bias is not None and several and bias_index is None:
        remedy = ": call bias.reshape(-1)" if bias.shape[0] == 1 else ""
        raise ValueError(f"bias [num_biases, num_experts] needs a bias_index [num_tokens], got {bias}{remedy}")
    if bias_index is not None and not several:
        raise ValueError(f"bias_index needs a bias [num_biases, num_experts], got {bias or 'none'}")
    if bias is not None and bias.shape[0] < 1:
        raise ValueError(f"bias must have at least one row, got {bias}")


def needs_whole_rows(method: RoutingMethod) -> bool:
    """Return whether the score of an expert depends on the logits of experts that are not selected."""
    return method.score == "softmax" and not method.score_after_topk


# -- Macros and arguments of kernels -----------------------------------------------------------------------------------


def row_bytes(arrays: Arrays) -> list[int]:
    """Return the strides of the rows of weights and indices, in bytes."""
    return [view.row_stride * ITEM_SIZES[view.dtype] for view in (arrays.weights, arrays.indices)]


def method_macros(method: RoutingMethod, given: Collection[str] = ()) -> dict[str, int]:
    """Return the macros for the steps of a method and the given arrays of a layer. Its numbers are arguments."""
    macros = {
        "NUM_EXPERTS": method.num_experts,
        "TOP_K": method.top_k,
        "SCORE": SCORE_CODES[method.score] if isinstance(method.score, str) else _OWN_SCORE,
        "RENORMALIZE": int(method.renormalize),
        "HAS_BIAS": int("bias" in given),
    }
    grouped = method.top_groups < method.num_groups
    options = {
        "HAS_EPS": int(method.renormalize and method.renormalize_eps != 0.0),
        "HAS_MIN": int(method.renormalize and method.renormalize_min is not None),
        "HAS_LOGIT_BIAS": int("logit_bias" in given),
        "HAS_EXPERT_SCALE": int("expert_scale" in given),
        "LOGIT_SCALED": int(method.logit_scale != 1.0),
        "LOGIT_CAPPED": int(method.logit_softcap is not None),
        "SELECT_ON_LOGITS": int(method.selects_on_logits),
        "SCORE_AFTER_TOPK": int(method.score_after_topk),
        "NUM_GROUPS": method.num_groups if grouped else 0,
        "TOP_GROUPS": method.top_groups if grouped else 0,
        "GROUP_TOP2": int(grouped and method.group_score == "top2"),
        "NUM_SHARED": method.num_shared_experts,
        "SHARED_LOGITS": int(method.shared_in_normalizer),
        "RESULT_DTYPE": row_lanes.DTYPE_CODES[method.weight_dtype],
        **(id_macros("INDEX", method.index_dtype) if method.index_dtype != "int32" else {}),
    }
    return macros | {name: value for name, value in options.items() if value}  # the kernels default them to 0


def id_macros(name: str, dtype: str) -> dict[str, int]:
    """Return the macros for a dtype of expert ids."""
    return {f"{name}_BYTES": ITEM_SIZES[dtype], f"{name}_UNSIGNED": int(dtype.startswith("u"))}


def bias_macros(arrays: Arrays) -> dict[str, int]:
    """Return the macros for the biases of a call, if there are several."""
    if arrays.bias_index is None:
        return {}
    return {"NUM_BIASES": arrays.bias.shape[0], "BIAS_STRIDE": arrays.bias.row_stride}


def method_arguments(method: RoutingMethod | None) -> dict[str, float]:
    """Return the numbers of a method, in the order of the kernels' parameters. None: those of uniform weights."""
    if method is None:
        method = _UNIFORM
    return {
        "renormalize_eps": method.renormalize_eps,
        "renormalize_min": -math.inf if method.renormalize_min is None else method.renormalize_min,
        "scale": method.scale,
        "logit_scale": method.logit_scale,
        "logit_softcap": method.logit_softcap or 0.0,
        "shared_weight": method.shared_weight,
    }


def headers(method: RoutingMethod | None) -> dict[str, str]:
    """Return the kernel file that a custom score replaces, with its new text."""
    if method is None or isinstance(method.score, str):
        return {}
    return {"routing/score_function.cuh": method.score.header}
