# SPDX-License-Identifier: Apache-2.0
"""Gradients by central differences of the oracle's weights, without rounding."""

from __future__ import annotations

import numpy as np

from cupy_router import RoutingMethod
from tests import inputs, oracle
from tests.compare import HALF_ULP, NO_ARRAYS
from tests.methods import Layer

STEP = 1e-5
ALL_COLUMNS = 300  # of wider rows only the chosen ones and some others are tried


def weights(logits: np.ndarray, experts: list[int], method: RoutingMethod, layer: Layer) -> np.ndarray:
    """Return float64 weights [rows, num_columns] of the same experts for every row, not rounded."""
    x = oracle.prepare(logits, method, layer.logit_bias, oracle.unrounded)
    return oracle.weigh(x, np.tile(experts, (len(x), 1)), method, layer.expert_scale, oracle.unrounded)


def differences(
    row: np.ndarray, experts: list[int], upstream: np.ndarray, method: RoutingMethod, layer: Layer
) -> tuple[np.ndarray, np.ndarray]:
    """Return the tried columns of the logits and the derivative of sum(weights * upstream) with respect to each."""
    columns = np.arange(row.size)
    if row.size > ALL_COLUMNS:
        columns = np.unique([*experts, *columns[:: row.size // 20]])
    moved = np.repeat(row.astype(np.float64)[None], 2 * columns.size, axis=0)
    moved[np.arange(columns.size), columns] += STEP
    moved[columns.size + np.arange(columns.size), columns] -= STEP
    made = weights(moved, experts, method, layer)
    loss = made @ upstream.astype(np.float64)
    return columns, (loss[: columns.size] - loss[columns.size :]) / (2 * STEP)


def assert_right(
    got: np.ndarray,
    upstream: np.ndarray,
    indices: np.ndarray,
    logits: np.ndarray,
    method: RoutingMethod,
    layer: Layer = NO_ARRAYS,
    rtol: float = 1e-5,
) -> None:
    """Assert that `got` is the gradient within rounding, for logits of ordinary size; 0 where an index is no
    expert."""
    assert got.shape == logits.shape
    plain = 1.0 if layer.expert_scale is None else float(np.abs(layer.expert_scale).max())
    for r, row in enumerate(logits):
        have = got[r].astype(np.float64)
        experts = indices[r, : method.top_k].tolist()
        if not all(0 <= expert < method.num_experts for expert in experts):
            assert not have.any(), f"row {r} is padding"
            continue
        columns, want = differences(row, experts, upstream[r], method, layer)
        terms = float(np.abs(upstream[r].astype(np.float64)).max()) * abs(method.scale * method.logit_scale) * plain
        allowed = (rtol + HALF_ULP[str(got.dtype)]) * np.abs(want) + 1e-6 * terms
        bad = ~(np.abs(have[columns] - want) <= allowed)
        assert not bad.any(), f"row {r}, columns {columns[bad]}: {have[columns][bad]} != {want[bad]}"
        if method.score != "softmax" or method.score_after_topk:
            others = np.setdiff1d(np.arange(row.size), [*experts, *range(method.num_experts, row.size)])
            assert not have[others].any(), f"row {r} is not 0 where nothing was chosen"


def upstream_of(n: int, method: RoutingMethod, seed: int = 70) -> np.ndarray:
    """Return the gradient of a loss with respect to the weights."""
    return inputs.normal((n, method.num_columns), method.weight_dtype, seed=seed)
