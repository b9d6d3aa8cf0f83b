# SPDX-License-Identifier: Apache-2.0
"""Look experts up by token id, and weight them by a gate if there is one."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from ..method import RoutingMethod
from .activation_topk import activation_topk
from .order import row_slices
from .scoring import (
    append_shared,
    append_shared_indices,
    bias_logits,
    empty_results,
    gate_logits,
    gate_logits_by_parts,
    prepare_logits,
    route_weights,
)


@np.errstate(all="ignore")
def hash_router(
    token_ids: NDArray[Any],
    table: NDArray[Any],
    method: RoutingMethod | None = None,
    logits: NDArray[Any] | None = None,
    x: NDArray[Any] | None = None,
    weight: NDArray[Any] | None = None,
    *,
    bias: NDArray[np.float32] | None = None,
    bias_index: NDArray[np.int32] | None = None,
    logit_bias: NDArray[np.float32] | None = None,
    expert_scale: NDArray[np.float32] | None = None,
    logits_dtype: str | None = None,
    batch_invariant: bool = False,
    num_valid: int | None = None,
) -> tuple[NDArray[Any], ...]:
    """Look the experts of each token up in the table, in the table's order, and weight them by their score.

    Logits only determine the weights. Without logits the weights are uniform, 1 / top_k.

    Args:
        token_ids: [num_tokens] int32 or int64.
        table: [vocab_size, top_k] int32 or int64, the experts of each token id.
        method: How to score and weight. Its ``num_experts`` also bounds the entries of the table.
        logits: [num_tokens, num_experts] float32, float16 or bfloat16.
        x: [num_tokens, hidden] in one of these dtypes, together with ``weight`` instead of ``logits``.
        weight: The gate, [num_experts, hidden].
        bias: [num_biases, num_experts] float32, or None. Tokens with another one than the first have the best experts
            by their score plus bias, not those of the table.
        bias_index: [num_tokens] int32, the bias of each token.
        logit_bias: [num_experts] float32 to add to the logits, or None.
        expert_scale: [num_experts] float32 factor of each expert's weight, or None.
        logits_dtype: Dtype of the logits to return, those of x and ``weight``; None: they are not returned.
        batch_invariant: Sum hidden in parts, so that logits do not depend on the number of tokens.
        num_valid: Number of rows before the padding; None if there is no padding.

    Returns:
        weights and indices [num_tokens, top_k + shared experts], float32 and int32 or the method's dtypes. Padding has
        weights 0 and indices -1, and so has a token whose id, bias or one of whose experts does not exist. With
        ``logits_dtype`` also logits [num_tokens, num_experts] of all experts, as :func:`dense_router` returns them.

    >>> table = np.array([[3, 0], [1, 2]], np.int32)
    >>> hash_router(np.array([1, 0, 7]), table)[1]
    array([[ 1,  2],
           [ 3,  0],
           [-1, -1]], dtype=int32)
    """
    products = gate_logits_by_parts if batch_invariant else gate_logits
    num_tokens, (vocab_size, top_k) = len(token_ids), table.shape
    valid = num_tokens if num_valid is None else num_valid
    weights, indices = empty_results(num_tokens, top_k if method is None else method.num_columns, method)

    routable = (token_ids >= 0) & (token_ids < vocab_size)
    routable[valid:] = False
    if bias_index is not None:
        routable &= bias_index == 0
    tokens = np.nonzero(routable)[0]
    experts = table[token_ids[tokens]].astype(np.int64)
    num_experts = 2**31 if method is None else method.num_experts  # unknown: the range of int32
    exist = np.all((experts >= 0) & (experts < num_experts), axis=-1)
    tokens, experts = tokens[exist], experts[exist]
    indices[tokens] = experts if method is None else append_shared_indices(experts, method)

    returned: tuple[NDArray[Any], ...] = ()
    if logits_dtype is not None and x is not None and weight is not None:  # of tokens without experts, too
        logits = np.zeros((num_tokens, len(weight)), np.float32)
        logits[:valid] = products(x[:valid], weight)
        biased = np.zeros_like(logits)
        biased[:valid] = bias_logits(logits[:valid], logit_bias)
        returned = (biased.astype(logits_dtype),)

    if method is not None and bias_index is not None:
        others = np.nonzero(bias_index[:valid])[0]
        if logits is not None:
            their_logits = logits[others]
        elif x is not None and weight is not None:
            their_logits = products(x[others], weight)
        layer: Any = {"bias_index": bias_index[others], "logit_bias": logit_bias, "expert_scale": expert_scale}
        weights[others], indices[others] = activation_topk(their_logits, method, bias, **layer)

    # Only tokens with experts of the table remain from here on.
    if logits is not None:
        logits = logits[tokens]
    elif x is not None and weight is not None:
        logits = products(x[tokens], weight)
    if method is None or logits is None:
        uniform = np.full((len(tokens), top_k), 1.0 / top_k, np.float32)
        weights[tokens] = uniform if method is None else append_shared(uniform, method)
        return weights, indices
    for rows in row_slices(len(tokens), method.num_logits):
        prepared = prepare_logits(logits[rows], method, logit_bias)
        weights[tokens[rows]] = route_weights(prepared, experts[rows], method, expert_scale)
    return weights, indices, *returned
