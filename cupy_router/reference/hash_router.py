# SPDX-License-Identifier: Apache-2.0
"""From token ids to experts by a table, with weights from a gate if there is one."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from ..method import RoutingMethod
from .order import row_slices
from .scoring import append_shared, append_shared_indices, gate_logits, no_results, prepare_logits, route_weights


def hash_router(
    token_ids: NDArray[Any],
    table: NDArray[Any],
    method: RoutingMethod | None = None,
    logits: NDArray[Any] | None = None,
    x: NDArray[Any] | None = None,
    weight: NDArray[Any] | None = None,
    *,
    logit_bias: NDArray[np.float32] | None = None,
    expert_scale: NDArray[np.float32] | None = None,
    num_valid: int | None = None,
) -> tuple[NDArray[Any], NDArray[Any]]:
    """Look the experts of each token up in the table, as they stand there; weigh them by their score.

    The table alone decides which experts; logits only weigh. Without them the weights are uniform, 1 / top_k.

    Args:
        token_ids: [num_tokens] int32 or int64.
        table: [vocab_size, top_k] int32 or int64, the experts of each token id.
        method: how to score and weigh; its ``num_experts`` also bounds the entries of the table.
        logits: [num_tokens, num_experts] float32, float16 or bfloat16.
        x: [num_tokens, hidden] of those dtypes; instead of logits, with
        weight: [num_experts, hidden], the gate whose products with x are the logits.
        logit_bias: as long as a row of logits, float32, or None: added to them.
        expert_scale: [num_experts] float32, or None: a factor of each expert's weight.
        num_valid: rows from this one on are padding; None means that there is none.

    Returns:
        weights and indices [num_tokens, top_k + shared experts], float32 and int32 or what the method says; 0 and -1
        in padding and where the token id is outside the table or one of its experts does not exist.

    >>> table = np.array([[3, 0], [1, 2]], np.int32)
    >>> hash_router(np.array([1, 0, 7]), table)[1]
    array([[ 1,  2],
           [ 3,  0],
           [-1, -1]], dtype=int32)
    """
    num_tokens, (vocab_size, top_k) = len(token_ids), table.shape
    weights, indices = no_results(num_tokens, top_k if method is None else method.num_columns, method)

    routable = (token_ids >= 0) & (token_ids < vocab_size)
    routable[num_tokens if num_valid is None else num_valid :] = False
    tokens = np.nonzero(routable)[0]
    experts = table[token_ids[tokens]].astype(np.int64)
    num_experts = 2**31 if method is None else method.num_experts  # unknown: what int32 can hold
    exist = np.all((experts >= 0) & (experts < num_experts), axis=-1)
    tokens, experts = tokens[exist], experts[exist]
    indices[tokens] = experts if method is None else append_shared_indices(experts, method)

    # From here on only the tokens that have experts take part.
    if logits is not None:
        logits = logits[tokens]
    elif x is not None and weight is not None:
        logits = gate_logits(x[tokens], weight)
    if method is None or logits is None:
        uniform = np.full((len(tokens), top_k), 1.0 / top_k, np.float32)
        weights[tokens] = uniform if method is None else append_shared(uniform, method)
        return weights, indices
    for rows in row_slices(len(tokens), method.num_logits):
        prepared = prepare_logits(logits[rows], method, logit_bias)
        weights[tokens[rows]] = route_weights(prepared, experts[rows], method, expert_scale)
    return weights, indices
