# SPDX-License-Identifier: Apache-2.0
"""Experts that the caller gives in place of a selection: `indices` of activation_topk, dense_router and Router."""

from __future__ import annotations

from typing import Any

from cupy_router.arrays import ITEM_SIZES
from cupy_router.ops._cached import Kernel
from cupy_router.ops._declared import IDS, Arrays, row
from cupy_router.ops._method import id_macros
from cupy_router.ops._replicas import NAMES as REPLICA_NAMES
from cupy_router.ops._replicas import replica_arguments, replica_macros
from cupy_router.ops._routed import LOGITS, ROUTING
from cupy_router.ops._table_kernel import table_kernel
from cupy_router.tuning import Gpu

GIVEN = row("given_experts", "num_tokens, top_k or top_k + shared", IDS, path="indices")
ROUTE, EMPTY = "route", "empty"
TOKEN_IDS = "token_ids"  # the parameter of kernels that select


def as_unset(label: str, unset: Any) -> str:
    """Return what becomes of a row of -1."""
    if not isinstance(unset, str) or unset not in (ROUTE, EMPTY):
        given = repr(unset) if isinstance(unset, str) else type(unset).__name__
        raise ValueError(f"{label}: unset must be {ROUTE!r} or {EMPTY!r}, got {given}")
    return str(unset)


def check_given(options: Any, arrays: Arrays) -> None:
    """Refuse a wrong number of columns where shared experts may have some. They may be left out, and are not read."""
    method, given = options.method, arrays.given_experts
    if given is not None and given.shape[1] not in (method.top_k, method.num_columns):
        both = f"{method.top_k} or, with those of shared experts, {method.num_columns}"
        raise ValueError(f"indices must have top_k = {both} columns, got {given}")


def selects(options: Any, given: Any) -> bool:
    """Return whether experts of some rows may have to be selected: of all, or of those that are -1."""
    return given is None or (options.unset == ROUTE and not given.dtype.startswith("u"))


def given_macros(options: Any, arrays: Arrays) -> dict[str, int]:
    """Return the macros of a kernel that selects experts where none are given.

    arrays: with `token_ids`, the given experts are a table of those of tokens with bias 0.
    """
    given, token_ids = arrays.given_experts, getattr(arrays, TOKEN_IDS, None)
    if given is None:
        return {}
    macros = id_macros("GIVEN", given.dtype)
    if token_ids is not None:
        return {**macros, "GIVEN_ID_BYTES": ITEM_SIZES[token_ids.dtype], "GIVEN_ROWS": given.shape[0]}
    return {**macros, "UNSET_EMPTY": int(not selects(options, given))}


def given_kernel(options: Any, arrays: Arrays, gpu: Gpu) -> Kernel:
    """Choose the kernel for experts that are all given, without parameters for logits_out.

    arrays: those of an op by name; logits, or x and weight.
    """
    names = ("logits", "x", "weight", "logit_bias", "expert_scale", "num_valid", *ROUTING)
    found = {name: getattr(arrays, name, None) for name in names}
    found |= {"token_ids": None, "table": arrays.given_experts}
    kernel = table_kernel(options.method, Arrays(tuple(found), tuple(found.values())), gpu)
    macros, fixed = kernel.macros | replica_macros(options, arrays), replica_arguments(options) | kernel.fixed
    takes = ("given_experts", *REPLICA_NAMES, *names)
    nulls = ("logits", "x", "weight", *REPLICA_NAMES)
    return kernel._replace(macros=macros, fixed=fixed, takes=takes, nulls=nulls)


def without_logits(kernel: Kernel) -> Kernel:
    """Return the launch of a kernel that can return logits, without any."""
    return kernel._replace(fixed={LOGITS: 0} | kernel.fixed | {f"{LOGITS}_stride": 0})
