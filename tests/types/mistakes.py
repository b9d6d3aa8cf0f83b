# SPDX-License-Identifier: Apache-2.0
"""Ten mistakes, one in each function. Type checkers have to find at least eight: see tests/test_types.py."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

import cupy_router
from cupy_router import LayoutSpec, Router, RoutingMethod, dense_router, expert_layout, topk_select

LOGITS, GATE = np.zeros((2, 8), np.float32), np.zeros((8, 4), np.float32)


def misspelt_preset() -> None:
    cupy_router.activation_topk(LOGITS, "deepseek-v4-flsh")


def unknown_score() -> RoutingMethod:
    return RoutingMethod(8, 2, "relu")


def unknown_dtype() -> RoutingMethod:
    return RoutingMethod(8, 2, weight_dtype="float64")


def list_for_an_array() -> None:
    cupy_router.activation_topk([[0.0, 1.0]], RoutingMethod(2, 1))


def misspelt_argument() -> None:
    dense_router(LOGITS, GATE, "mixtral", biass=np.zeros(8))


def two_names_for_three_results() -> NDArray[Any]:
    weights, indices = dense_router(LOGITS, GATE, RoutingMethod(8, 2), return_logits=True)
    return weights[indices]


def logits_that_were_not_asked_for() -> NDArray[Any]:
    return dense_router(LOGITS, GATE, RoutingMethod(8, 2)).logits


def layout_by_its_name() -> None:
    Router(RoutingMethod(8, 2), weight=GATE)(LOGITS, layout="counts")


def order_by_another_word() -> None:
    topk_select(LOGITS, 2, order="ascending")


def missing_number_of_experts() -> None:
    expert_layout(np.zeros((2, 2), np.int32), LayoutSpec())
