# SPDX-License-Identifier: Apache-2.0
"""Compute logits from hidden states by the gate GEMM, then route them by ``activation_topk``."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from ..method import RoutingMethod
from .activation_topk import activation_topk
from .scoring import bias_logits, gate_logits, gate_logits_by_parts


@np.errstate(all="ignore")
def dense_router(
    x: NDArray[Any],
    weight: NDArray[Any],
    method: RoutingMethod,
    bias: NDArray[np.float32] | None = None,
    *,
    bias_index: NDArray[np.int32] | None = None,
    logit_bias: NDArray[np.float32] | None = None,
    expert_scale: NDArray[np.float32] | None = None,
    given_experts: NDArray[Any] | None = None,
    unset: str = "route",
    logits_dtype: str | None = None,
    batch_invariant: bool = False,
    num_valid: int | None = None,
) -> tuple[NDArray[Any], ...]:
    """Multiply the tokens with the gate in float64, round the logits once to float32 and route them.

    Args:
        x: [num_tokens, hidden] float32, float16 or bfloat16.
        weight: The gate, [num_experts, hidden] in one of these dtypes. Further rows belong to shared experts.
        method: How to score, select and weight.
        bias, bias_index, logit_bias, expert_scale, given_experts, unset: As for :func:`activation_topk`.
        logits_dtype: Dtype of the logits to return; None: they are not returned.
        batch_invariant: Sum hidden in parts, so that logits do not depend on the number of tokens.
        num_valid: Number of rows before the padding; None if there is no padding.

    Returns:
        weights and indices as for :func:`activation_topk`. With `logits_dtype` also logits [num_tokens, num_experts]:
        with the bias, without scale and cap, rounded again if the dtype is not float32; 0 in the padding.

    >>> x, gate = np.array([[1.0, 2.0]], np.float32), np.array([[3, 0], [0, 1], [0, 2]], np.float32)
    >>> dense_router(x, gate, RoutingMethod(3, 2, "identity", renormalize=False))
    (array([[4., 3.]], dtype=float32), array([[2, 0]], dtype=int32))
    """
    num_tokens = len(x)
    logits = np.zeros((num_tokens, len(weight)), np.float32)
    valid = num_tokens if num_valid is None else num_valid
    logits[:valid] = (gate_logits_by_parts if batch_invariant else gate_logits)(x[:valid], weight)
    layer: Any = {"bias_index": bias_index, "logit_bias": logit_bias, "expert_scale": expert_scale}
    given: Any = {"given_experts": given_experts, "unset": unset}
    routed = activation_topk(logits, method, bias, **layer, **given, num_valid=valid)
    if logits_dtype is None:
        return routed
    logits[:valid] = bias_logits(logits[:valid], logit_bias)
    return *routed, logits.astype(logits_dtype)
