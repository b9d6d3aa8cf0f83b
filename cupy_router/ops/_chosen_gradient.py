# SPDX-License-Identifier: Apache-2.0
"""The backward pass of few tokens by the gate's rows of their experts alone, in whatever framework.

Dot products of x with these rows are the logits of the chosen experts. Of these logits alone the weights depend, so
that the gradient with respect to them, one for each chosen expert, is that of a method that chooses all of top_k
experts. The gradient with respect to x is the sum of the same rows, weighted by it.
"""

from __future__ import annotations

from dataclasses import replace
from functools import lru_cache

from cupy_router.method import RoutingMethod
from cupy_router.ops import _row_lanes as row_lanes
from cupy_router.ops._invariant_gradient import is_of_chosen_experts
from cupy_router.ops.activation_topk_backward import without_factors
from cupy_router.tuning import DEFAULT, gpu_of


def takes_chosen_only(method: RoutingMethod, num_tokens: int, device: tuple[str, int] | None) -> bool:
    """Return whether weights depend on the logits of chosen experts alone, and these are less work than all logits.

    device: None where it is not known yet.
    """
    if not is_of_chosen_experts(method) or method.top_k > row_lanes.MAX_LANES:
        return False
    gpu = DEFAULT if device is None else gpu_of(device)
    return num_tokens * method.top_k <= gpu.table.given_experts.max_gates_read_backward * method.num_experts


@lru_cache(maxsize=1024)
def method_of_chosen(method: RoutingMethod) -> RoutingMethod:
    """Return the method for the logits [num_tokens, top_k] of the chosen experts, of which all are chosen."""
    return replace(without_factors(method), num_experts=method.top_k, num_groups=1, top_groups=1)
