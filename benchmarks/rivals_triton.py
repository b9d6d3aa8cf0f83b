# SPDX-License-Identifier: Apache-2.0
"""What one writes plainly in Triton: a program per row and k rounds of argmax, which takes the lower index of equals.

Softplus is log(1 + exp(x)), the short way, which loses digits for very negative logits.
"""
# mypy: disable-error-code="no-untyped-def, untyped-decorator"
# ruff: noqa: N803, since compile-time constants are written in capitals

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl


@triton.jit
def _softplus(x):
    return tl.where(x > 20.0, x, tl.log(1.0 + tl.exp(x)))


@triton.jit
def _select_kernel(
    rows, bias, firsts, indices, scale,
    NUM_COLUMNS: tl.constexpr, K: tl.constexpr, ROUTER: tl.constexpr, BLOCK: tl.constexpr, SLOTS: tl.constexpr,
):  # fmt: skip
    """ROUTER: scores of logits, selected by score plus bias, renormalised and scaled; otherwise the largest values."""
    row = tl.program_id(0).to(tl.int64)
    columns = tl.arange(0, BLOCK)
    inside = columns < NUM_COLUMNS
    scores = tl.load(rows + row * NUM_COLUMNS + columns, mask=inside, other=0.0).to(tl.float32)
    values = scores
    if ROUTER:
        scores = tl.sqrt(_softplus(scores))
        values = scores + tl.load(bias + columns, mask=inside, other=0.0)
    values = tl.where(inside, values, float("-inf"))
    slots = tl.arange(0, SLOTS)
    chosen = tl.zeros([SLOTS], tl.float32)
    chosen_columns = tl.zeros([SLOTS], tl.int32)
    for slot in tl.static_range(K):
        best = tl.argmax(values, axis=0)
        score = tl.sum(tl.where(columns == best, scores, 0.0), axis=0)
        chosen = tl.where(slots == slot, score, chosen)
        chosen_columns = tl.where(slots == slot, best, chosen_columns)
        values = tl.where(columns == best, float("-inf"), values)
    if ROUTER:
        chosen = chosen / tl.sum(chosen, axis=0) * scale
    tl.store(firsts + row * K + slots, chosen, mask=slots < K)
    tl.store(indices + row * K + slots, chosen_columns, mask=slots < K)


@triton.jit
def _hash_kernel(
    token_ids, table, logits, weights, indices, num_tokens, scale,
    NUM_EXPERTS: tl.constexpr, K: tl.constexpr, TOKENS: tl.constexpr, SLOTS: tl.constexpr,
):  # fmt: skip
    tokens = (tl.program_id(0) * TOKENS + tl.arange(0, TOKENS)).to(tl.int64)[:, None]
    slots = tl.arange(0, SLOTS)[None, :]
    inside = (tokens < num_tokens) & (slots < K)
    ids = tl.load(token_ids + tokens, mask=tokens < num_tokens, other=0).to(tl.int64)
    experts = tl.load(table + ids * K + slots, mask=inside, other=0)
    chosen = tl.load(logits + tokens * NUM_EXPERTS + experts, mask=inside, other=0.0).to(tl.float32)
    scores = tl.where(inside, tl.sqrt(_softplus(chosen)), 0.0)
    sums = tl.sum(scores, axis=1)[:, None]
    tl.store(weights + tokens * K + slots, scores / sums * scale, mask=inside)
    tl.store(indices + tokens * K + slots, experts, mask=inside)


@triton.jit
def _trivial_kernel(x, SIZE: tl.constexpr):
    tl.store(x + tl.arange(0, SIZE), tl.zeros([SIZE], tl.float32))


def _select(rows: Any, bias: Any, k: int, scale: float, out: tuple[Any, Any]) -> tuple[Any, Any]:
    num_rows, num_columns = rows.shape
    _select_kernel[(num_rows,)](
        rows,
        rows if bias is None else bias,
        *out,
        scale,
        NUM_COLUMNS=num_columns,
        K=k,
        ROUTER=bias is not None,
        BLOCK=triton.next_power_of_2(num_columns),
        SLOTS=triton.next_power_of_2(k),
        num_warps=1,
    )
    return out


def router(logits: Any, bias: Any, k: int, scale: float, out: tuple[Any, Any]) -> tuple[Any, Any]:
    """activation_topk with sqrtsoftplus and renormalisation, into `out`."""
    return _select(logits, bias, k, scale, out)


def topk(scores: Any, k: int, out: tuple[Any, Any]) -> tuple[Any, Any]:
    """topk_select, into `out`."""
    return _select(scores, None, k, 1.0, out)


def hash_layer(token_ids: Any, table: Any, logits: Any, scale: float, out: tuple[Any, Any]) -> tuple[Any, Any]:
    """hash_router with logits, into `out`."""
    num_tokens, k = token_ids.shape[0], table.shape[1]
    tokens = 16
    grid = (triton.cdiv(num_tokens, tokens),)
    sizes = {"NUM_EXPERTS": logits.shape[1], "K": k, "TOKENS": tokens, "SLOTS": triton.next_power_of_2(k)}
    _hash_kernel[grid](token_ids, table, logits, *out, num_tokens, scale, **sizes, num_warps=4)
    return out


def trivial(x: Any) -> None:
    """The cheapest launch that Triton offers: it writes 32 zeros to a tensor."""
    _trivial_kernel[(1,)](x, SIZE=32)


def outputs(num_rows: int, k: int, device: Any) -> tuple[Any, Any]:
    """Weights (or values) and indices."""
    return torch.empty((num_rows, k), device=device), torch.empty((num_rows, k), dtype=torch.int32, device=device)
