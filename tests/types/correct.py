# SPDX-License-Identifier: Apache-2.0
"""Correct uses, in which type checkers find nothing: see tests/test_types.py."""

from __future__ import annotations

from typing import Any, TypeAlias, assert_type

import numpy as np
from numpy.typing import NDArray

import cupy_router
from cupy_router import (
    ExpertLayout,
    LayoutSpec,
    Router,
    Routing,
    RoutingMethod,
    RoutingPlan,
    RoutingPlanWithLogits,
    RoutingWithLogits,
    TopK,
)
from cupy_router.typing import Preset

N: TypeAlias = NDArray[Any]


class Tensor:
    """An array of a framework."""

    def __dlpack__(self, *, stream: int | None = None) -> object:
        return self


def numpy_arrays(x: NDArray[np.float32], gate: NDArray[np.float16], ids: NDArray[np.int32], with_logits: bool) -> None:
    method = RoutingMethod(8, 2, "softmax", weight_dtype="bfloat16", num_groups=2, group_score="top2")
    routing = cupy_router.activation_topk(x, "deepseek-v4-flash", bias=gate, num_valid=3)
    assert_type(routing, Routing[N])
    np.bincount(routing.indices.ravel(), minlength=8)
    weights, indices = cupy_router.dense_router(x, gate, method, path="prefill", unset="empty", indices=ids)
    assert_type(weights, N)
    assert_type(cupy_router.dense_router(x, gate, method, return_logits=True), RoutingWithLogits[N])
    cupy_router.dense_router(x, gate, method, return_logits=with_logits)
    assert_type(cupy_router.topk_select(x, 3, order="any", lengths=ids), TopK[N])
    layout = cupy_router.expert_layout(indices, 8, want=("counts", "ends", "order", "positions"))
    assert_type(layout, ExpertLayout[N])
    assert_type(layout.num_tokens, int)
    rows = cupy_router.permute(x, layout)
    assert_type(cupy_router.unpermute(rows, layout, weights, residual=x), N)
    assert_type(cupy_router.update_bias(gate, layout.counts, rate=0.01), N)


def tensors(x: Tensor, gate: Tensor, ids: Tensor, name: Preset, with_layout: LayoutSpec | None) -> None:
    assert_type(cupy_router.activation_topk(x, cupy_router.presets()[name]), Routing[Tensor])
    plan = cupy_router.activation_topk(x, name, layout=LayoutSpec(alignment=128))
    assert_type(plan, RoutingPlan[Tensor])
    assert_type(plan.layout.order, Tensor)
    assert_type(cupy_router.activation_topk(x, name, layout=with_layout), Routing[Tensor] | RoutingPlan[Tensor])
    assert_type(cupy_router.hash_router(ids, ids, name, x=x, weight=gate), Routing[Tensor])
    both = cupy_router.dense_router(x, gate, name, return_logits=True, layout=LayoutSpec(), logits_dtype="float16")
    assert_type(both, RoutingPlanWithLogits[Tensor])
    assert_type(cupy_router.unpermute(cupy_router.permute(x, both.layout), both.layout, both.weights), Tensor)
    by_hand = ExpertLayout(counts=ids, offsets=ids, alignment=128)
    assert_type(by_hand.offsets, Tensor)


def routers(state: dict[str, Tensor], x: Tensor, ids: Tensor) -> None:
    router = Router.from_state_dict(state, "layers.3", "kimi-k2")
    assert_type(router, Router)
    assert_type(router(x, num_valid=ids), Routing[Tensor])
    assert_type(router(x, ids, return_logits=True).logits, Tensor)
    score = cupy_router.ScoreFunction("double", cuda="2.0f * x", numpy=lambda x: 2 * x)
    assert_type(Router(RoutingMethod(8, 2, score), weight=x)(x, layout=LayoutSpec()), RoutingPlan[Tensor])


def names(x: Tensor, at_run_time: str) -> None:
    assert_type(cupy_router.activation_topk(x, cupy_router.presets()[at_run_time]), Routing[Tensor])


def given(x: Tensor, out: Routing) -> None:
    cupy_router.activation_topk(x, "olmoe", out=out, stream=0)
