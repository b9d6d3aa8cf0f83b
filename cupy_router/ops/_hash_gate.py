# SPDX-License-Identifier: Apache-2.0
"""A hash layer by the product of all experts: their logits, then the experts of the table, weighed by them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from typing import Any

from cupy_router import gemm
from cupy_router.arrays import View
from cupy_router.ops import _dense_decode as decode
from cupy_router.ops import _hash_biased as biased
from cupy_router.ops import _row_lanes as row_lanes
from cupy_router.ops import dense_router
from cupy_router.ops._cached import Kernel, Reordered, Work, launch_of
from cupy_router.ops._chunks import GateChunks
from cupy_router.ops._declared import Arrays
from cupy_router.ops._invariant import check_gpu
from cupy_router.ops._routed import LOGITS, ROUTING, RoutedOp
from cupy_router.ops.dense_router import DenseOptions
from cupy_router.tuning import Gpu


def by_gate_gemm(op: RoutedOp, target: Any, options: Any, arrays: Arrays, gpu: Gpu) -> Work:
    """Return the kernels of a call of `op`; `target` is `hash_router`, which weighs by logits."""
    if options.batch_invariant:
        check_gpu(gpu)
        return biased.on_hidden_states(op, options, arrays, gpu)
    few = arrays.x.shape[0] <= min(gpu.table.decode.max_tokens, decode.MAX_TOKENS)
    fits = row_lanes.fits_method(options.method) and gpu.capability >= (8, 0)
    fused = (few and fits) or gemm.why_not(arrays.x.device) is not None
    if fused and arrays.bias is not None:
        return biased.on_hidden_states(op, options, arrays, gpu)
    if fused and options.logits_dtype is not None:
        return _LogitsThenTable(op, target, options, arrays, gpu)
    return GateChunks(op, arrays, gpu, target, partial(_on_logits, target, _plain(options), arrays, gpu))


def _on_logits(target: Any, options: Any, arrays: Arrays, gpu: Gpu, logits: View) -> Work:
    """Return what looks experts up and weighs them by the logits of a chunk, of which it also makes those to return."""
    hashed = _hashed(target, arrays, logits).replaced(token_ids=replace(arrays.token_ids, shape=logits.shape[:1]))
    if hashed.logits_out is not None:
        return target.with_logits(options, hashed, gpu)  # type: ignore[no-any-return]
    routed = target.on_arrays(options, hashed, gpu)
    return launch_of(target, options, routed, logits.device) if isinstance(routed, Kernel) else routed


def _plain(options: Any) -> Any:
    """Return the options of a call on logits, which returns weights and indices alone."""
    return replace(options, layout=None, logits_dtype=None)


def _hashed(target: Any, arrays: Arrays, logits: View) -> Arrays:
    """Return the arrays of a call as those of `hash_router` with logits."""
    found = {name: getattr(arrays, name, None) for name in (*target.names, *target.result_names)}
    found |= {"logits": logits, "x": None, "weight": None}
    return Arrays(tuple(found), tuple(found.values()))


class _LogitsThenTable:
    """`dense_router` for the logits, then `hash_router` on these, which overwrites the experts that the first selects.

    With few tokens, its one launch takes less time than cuBLAS alone. With many, it serves where there is no cuBLAS.
    """

    def __init__(self, op: RoutedOp, target: Any, options: Any, arrays: Arrays, gpu: Gpu) -> None:
        names, dense = op.parameters(options), dense_router.OP
        dense_options = DenseOptions(options.method, None, None, options.logits_dtype)
        given = {name: getattr(arrays, name, None) for name in (*dense.names, *dense.result_names)}
        given |= {"bias": None, "expert_scale": None}
        taken = ["" if name == "expert_scale" else name for name in dense.parameters(dense_options)]
        gate = dense.route(dense_options, Arrays(tuple(given), tuple(given.values())), gpu)
        self._gate = Reordered(gate, names, taken, True)
        # Returned logits have their bias.
        hashed = _hashed(target, arrays, arrays.logits_out).replaced(logit_bias=None, logits_out=None)
        plain = _plain(options)
        table = launch_of(target, plain, target.on_arrays(plain, hashed, gpu), arrays.x.device)
        sources = {"logits": LOGITS, "x": "", "weight": "", "logit_bias": ""}
        self._table = Reordered(table, names, [sources.get(name, name) for name in (*target.names, *ROUTING)], True)
        self.function = self._table.function

    def __call__(self, stream: int, varying: Sequence[int | float]) -> None:
        self._gate(stream, varying)
        self._table(stream, varying)
