# SPDX-License-Identifier: Apache-2.0
"""A hash layer with given experts: first those of the table, for tokens whose row is -1, then those that are given."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from cupy_router.ops import _dense_launches as launches
from cupy_router.ops._cached import Reordered, Work, launch_of
from cupy_router.ops._declared import Arrays
from cupy_router.ops._given import EMPTY, ROUTE, given_kernel, selects, without_logits
from cupy_router.ops._replicas import NAMES as REPLICA_NAMES
from cupy_router.ops._routed import LOGITS, RoutedOp
from cupy_router.ops.dense_router import DenseOptions
from cupy_router.reference.given import given_ids, known_rows, unset_rows
from cupy_router.reference.hash_router import hash_router
from cupy_router.reference.scoring import empty_results
from cupy_router.tuning import Gpu


def reference(op: RoutedOp, options: Any, arrays: Arrays, num_valid: int) -> tuple[Any, ...]:
    """Return the results of a hash layer with given experts."""
    method, num_tokens = options.method, arrays.x.shape[0]
    ids = given_ids(arrays.given_experts, method)
    weights, indices = empty_results(num_tokens, method.num_columns, method)
    returned: tuple[Any, ...] = ()
    is_set = np.ones(num_tokens, bool)
    if arrays.token_ids is not None and options.unset == ROUTE:
        is_set = ~unset_rows(ids)
        plain = arrays.replaced(given_experts=None)
        weights, indices, *returned = op.route_reference(options, plain, num_valid)  # type: ignore[assignment]
    rows = np.arange(num_tokens)
    layer: dict[str, Any] = arrays.named("logit_bias", "expert_scale")
    if arrays.weight is not None:
        layer |= arrays.named("x", "weight") | {"batch_invariant": options.batch_invariant}
    found = hash_router(rows, np.where(known_rows(ids, method)[:, None], ids, -1), method, **layer, num_valid=num_valid)
    for array, given in zip((weights, indices), found, strict=True):
        array[is_set] = given[is_set]
    return weights, indices, *returned


class TableThenGiven:
    """The kernels of a hash layer, and then one for given experts, which leaves tokens whose row is -1 as they are."""

    def __init__(self, op: RoutedOp, options: Any, arrays: Arrays, gpu: Gpu) -> None:
        device = arrays.x.device
        looks_up = arrays.token_ids is not None and selects(options, arrays.given_experts)
        self._given: Work
        self._table: Any = op.route(options, arrays.replaced(given_experts=None), gpu) if looks_up else None
        if options.batch_invariant and arrays.weight is not None:
            self._given = _by_gate(op, options, arrays, gpu, looks_up)
            self.function = self._given.function
            return
        kernel = given_kernel(options, arrays if arrays.weight is not None else arrays.replaced(x=None), gpu)
        kernel = without_logits(kernel._replace(macros=kernel.macros | {"KEEPS_UNSET": int(looks_up)}))
        self._given = launch_of(op, options, kernel, device)
        self.function = self._given.function

    def __call__(self, stream: int, varying: Sequence[int | float]) -> None:
        if self._table is not None:
            self._table(stream, varying)
        self._given(stream, varying)


def _by_gate(op: RoutedOp, options: Any, arrays: Arrays, gpu: Gpu, keeps_unset: bool) -> Work:
    """Return the launch of the gate GEMM for the given experts."""
    unset = ROUTE if keeps_unset else EMPTY
    dense = DenseOptions(options.method, None, None, None, unset, options.batch_invariant)
    absent = ("token_ids", "bias", "bias_index", "logits_out", *REPLICA_NAMES)
    given = arrays.replaced(**dict.fromkeys(absent))
    more = {"KEEPS_UNSET": int(keeps_unset)}
    work = launches.fused_chunks(op, dense, given, gpu, _parameters, more)
    names = op.parameters(options)
    return Reordered(work, names, [name for name in names if name != LOGITS], True)


def _parameters(names: Sequence[str]) -> tuple[str, ...]:
    """Return the parameters of the kernel for these arrays of a call, of which it does not take all."""
    unused = ("token_ids", "table", "bias", "bias_index")
    return tuple(["" if name in unused else name for name in names])
