# SPDX-License-Identifier: Apache-2.0
"""A hash layer as `activation_topk` or `dense_router` to which the table gives the experts of the tokens with bias 0.

With several biases, all others have the best experts by their bias.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from cupy_router.ops import _dense_launches as launches
from cupy_router.ops import activation_topk
from cupy_router.ops._cached import NUMBER, Work, launch_with
from cupy_router.ops._chunks import with_logits
from cupy_router.ops._declared import Arrays
from cupy_router.ops._given import GIVEN, TOKEN_IDS
from cupy_router.ops._method import MethodOptions
from cupy_router.ops._op import Op
from cupy_router.ops._replicas import NAMES as REPLICA_NAMES
from cupy_router.ops._routed import LOGITS, ROUTING
from cupy_router.ops.dense_router import DenseOptions
from cupy_router.tuning import Gpu


def on_logits(op: Op, options: Any, arrays: Arrays, gpu: Gpu) -> Work:
    """Return the launch on logits; if they are returned as well, the address of the result is last."""
    kernel = with_logits(activation_topk.OP.selecting(MethodOptions(options.method), _given(arrays), gpu), arrays)
    varying = (*activation_topk.OP.names, *ROUTING, NUMBER, LOGITS, TOKEN_IDS)
    returned = () if arrays.logits_out is None else (LOGITS,)
    passed = (*_parameters(op.names), *ROUTING, NUMBER, *returned)
    return launch_with(varying, launches.by_token_id(kernel), arrays.indices.device, passed)


def on_hidden_states(op: Op, options: Any, arrays: Arrays, gpu: Gpu) -> Work:
    """Return the fused launch of few tokens, or one for each chunk: for batch invariance, or without cuBLAS."""
    dense = DenseOptions(options.method, None, None, options.logits_dtype, batch_invariant=options.batch_invariant)
    return launches.fused_chunks(op, dense, _given(arrays), gpu, _parameters)


def _given(arrays: Arrays) -> Arrays:
    return arrays.replaced(**{GIVEN.name: arrays.table, **dict.fromkeys(REPLICA_NAMES)})


def _parameters(names: Sequence[str]) -> tuple[str, ...]:
    """Return the parameters of kernels for these arrays of a call."""
    renamed = {"table": GIVEN.name, GIVEN.name: ""}  # experts that the caller gives as well are none of these kernels'
    return tuple([renamed.get(name, name) for name in names])
