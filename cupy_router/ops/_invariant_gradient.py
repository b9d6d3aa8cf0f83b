# SPDX-License-Identifier: Apache-2.0
"""The backward pass of batch-invariant calls as calls of other ops, in whatever framework.

Logits are computed again by `dense_router`. The gradient of a token with respect to x is the sum of the gate's rows of
its experts, weighted by the gradients of its logits: `unpermute` sums them in order.
"""

from __future__ import annotations

from cupy_router.method import RoutingMethod
from cupy_router.ops._method import needs_whole_rows
from cupy_router.ops.dense_router import DenseOptions


def logits_options(num_logits: int) -> DenseOptions:
    """Return the options of a `dense_router` that returns the logits."""
    method = RoutingMethod(num_logits, 1, "identity", renormalize=False)
    return DenseOptions(method, None, None, "float32", batch_invariant=True)


def is_of_chosen_experts(method: RoutingMethod) -> bool:
    """Return whether the weights depend on the logits of the chosen experts alone."""
    return not (needs_whole_rows(method) or method.shared_in_normalizer)
