# SPDX-License-Identifier: Apache-2.0
"""Results of the ops: named tuples of arrays of the caller's framework."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, NamedTuple

if TYPE_CHECKING:
    from typing import Generic

    from typing_extensions import TypeVar

    A = TypeVar("A", default=Any)
else:

    class _NoBase:
        """`Generic[A]` at run time: no base class, since PyTorch takes tuples with two for no named tuples."""

        def __getitem__(self, item: Any) -> _NoBase:
            return self

        def __mro_entries__(self, bases: Any) -> tuple[()]:
            return ()

    A, Generic = Any, _NoBase()

_LEFT_OUT: Any = None


class Routing(NamedTuple, Generic[A]):
    """Experts of each token and their weights.

    Attributes:
        weights: [num_tokens, top_k (+ shared experts)] float32, or the method's weight_dtype.
        indices: Expert ids, of the same shape, int32 or the method's index_dtype. A row without a result (padding, bad
            token id) has -1 here, or the highest value of an unsigned dtype, and weights 0.
    """

    weights: A
    indices: A


class TopK(NamedTuple, Generic[A]):
    """The k largest scores of each row, best first.

    Attributes:
        values: [num_rows, k] in the dtype of the scores, bit copies of the inputs; -inf where a row has fewer than k.
            None with ``return_values=False``.
        indices: [num_rows, k] int32, columns counted from the row's start; -1 where a row has fewer than k.
    """

    values: A
    indices: A


class ExpertLayout(NamedTuple, Generic[A]):
    """Rows of pairs in order of experts, as grouped GEMMs take them; see :func:`cupy_router.expert_layout`.

    A pair is one token with one of its experts, token * top_k + slot. L is the number of experts in question. Arrays
    are int32, or None if they were not asked for. In JAX the ints are static parts of a pytree.

    Attributes:
        counts: [L] pairs that want the expert.
        offsets: [L + 1] first row of each expert, multiples of `alignment`; the last is the number of rows in use.
        ends: [L] the row after the last pair of each expert.
        order: [capacity] pair of each row; `pad`, which is no pair, where a row has none.
        positions: [num_tokens, top_k] row of each pair, -1 where it has none.
        block_experts: [capacity / alignment] expert of each block of rows, -1 behind the rows in use.
        row_experts: [capacity] expert of each row, -1 where a row has no pair.
        num_tokens, top_k, alignment, capacity: ints. As `out`, a layout may leave them out.
    """

    counts: A = _LEFT_OUT
    offsets: A = _LEFT_OUT
    ends: A = _LEFT_OUT
    order: A = _LEFT_OUT
    positions: A = _LEFT_OUT
    block_experts: A = _LEFT_OUT
    row_experts: A = _LEFT_OUT
    num_tokens: int = _LEFT_OUT
    top_k: int = _LEFT_OUT
    alignment: int = _LEFT_OUT
    capacity: int = _LEFT_OUT


class RoutingWithLogits(NamedTuple, Generic[A]):
    """Experts of each token, their weights, and the logits of all experts.

    Attributes:
        weights, indices: As in :class:`Routing`.
        logits: [num_tokens, num_experts] in the dtype that was asked for: products of the hidden states with the gate,
            plus the logit bias, without scale and soft cap. Rows of padding are 0. With the method's
            `shared_in_normalizer` there are num_shared_experts more columns.
    """

    weights: A
    indices: A
    logits: A


class RoutingPlan(NamedTuple, Generic[A]):
    """Experts of each token, their weights, and the layout of the experts' rows.

    Attributes:
        weights, indices: As in :class:`Routing`.
        layout: :class:`ExpertLayout` of the indices.
    """

    weights: A
    indices: A
    layout: ExpertLayout[A]


class RoutingPlanWithLogits(NamedTuple, Generic[A]):
    """Experts of each token, their weights, the logits of all experts, and the layout of the experts' rows.

    Attributes:
        weights, indices, logits: As in :class:`RoutingWithLogits`.
        layout: :class:`ExpertLayout` of the indices.
    """

    weights: A
    indices: A
    logits: A
    layout: ExpertLayout[A]
