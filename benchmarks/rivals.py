# SPDX-License-Identifier: Apache-2.0
"""The ops written in plain PyTorch, eager or compiled, for comparison. Needs only PyTorch."""

from __future__ import annotations

from typing import Any

import torch
from torch.nn.functional import softplus


def router(logits: Any, bias: Any, k: int, scale: float) -> tuple[Any, Any]:
    """Compute activation_topk as models do: softplus, sqrt, add, topk, gather, sum, div, mul."""
    scores = softplus(logits).sqrt()
    indices = (scores + bias).topk(k, dim=-1).indices
    weights = scores.gather(1, indices)
    return weights / weights.sum(dim=-1, keepdim=True) * scale, indices


def gate_and_router(x: Any, weight: Any, bias: Any, k: int, scale: float) -> tuple[Any, Any]:
    """Compute dense_router, with a GEMM of 16-bit inputs and float32 output on CUDA."""
    return router(
        torch.mm(x, weight.T, out_dtype=torch.float32) if x.is_cuda else x.float() @ weight.float().T, bias, k, scale
    )


def router_gradient(logits: Any, bias: Any, k: int, scale: float, upstream: Any) -> Any:
    """Return a function that runs the backward pass of :func:`router` and returns the gradient of the logits.

    Autograd uses the stream of the forward pass, so there is one forward pass for each stream, also for a capture.
    """
    logits = logits.detach().requires_grad_()
    weights: dict[Any, Any] = {}

    def gradient() -> Any:
        stream = torch.cuda.current_stream() if logits.is_cuda else None
        if stream not in weights:
            weights[stream] = router(logits, bias, k, scale)[0]
        return torch.autograd.grad(weights[stream], logits, upstream, retain_graph=True)[0]

    return gradient


def hash_layer(token_ids: Any, table: Any, logits: Any, scale: float) -> tuple[Any, Any]:
    """Compute hash_router with logits. `table` is int64, as `gather` requires."""
    indices = table[token_ids]
    weights = softplus(logits.gather(1, indices)).sqrt()
    return weights / weights.sum(dim=-1, keepdim=True) * scale, indices


def hash_layer_products(token_ids: Any, table: Any, x: Any, weight: Any, scale: float) -> tuple[Any, Any]:
    """Compute hash_router with x and weight. cuBLAS computes all dot products, also those that are not needed."""
    return hash_layer(token_ids, table, torch.mm(x, weight.T).float(), scale)


def compiled(function: Any) -> Any:
    """Compile a function for each set of shapes."""
    return torch.compile(function, dynamic=False)


def tensor(array: Any) -> Any:
    """Return a CuPy array as a tensor on the same memory; bfloat16 is passed as its bits."""
    if str(array.dtype) == "bfloat16":
        return torch.from_dlpack(array.view("int16")).view(torch.bfloat16)
    return torch.from_dlpack(array)


def expert_layout(indices: Any, num_experts: int) -> tuple[Any, Any, Any, Any]:
    """Counts, offsets, order and positions by a stable sort; `bincount` would wait for the GPU."""
    ids = indices.flatten().long()
    order = ids.argsort(stable=True)
    counts = ids.new_zeros(num_experts).scatter_add_(0, ids, torch.ones_like(ids))
    offsets = torch.nn.functional.pad(counts.cumsum(0), (1, 0))
    positions = torch.empty_like(order).scatter_(0, order, torch.arange(len(order), device=order.device))
    return counts, offsets, order, positions.view(indices.shape)


def permute(x: Any, tokens: Any) -> Any:
    """Compute permute by the token of each row, which must all have one."""
    return x.index_select(0, tokens)


def unpermute(y: Any, positions: Any, weights: Any) -> Any:
    """Compute unpermute: gather, multiply, sum. `positions` is int64."""
    return (y[positions] * weights[:, :, None]).sum(dim=1).to(y.dtype)
