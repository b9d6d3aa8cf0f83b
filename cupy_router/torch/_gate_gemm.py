# SPDX-License-Identifier: Apache-2.0
"""The gate GEMM in PyTorch: for models that return logits, and for gradients with respect to x and the gate."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from cupy_router.torch._state import in_torch_func

# First version of PyTorch with a CUDA GEMM of 16-bit inputs and float32 output.
_HAS_MIXED_GEMM = tuple(int(part) for part in torch.__version__.split(".")[:2]) >= (2, 8)


# A float32 is the sum of this many bfloat16 numbers, but for those far below the largest.
_PARTS = 3
_MIN_TOKENS = 1024  # fewer take longer in parts


def gate_gemm(x: Any, weight: Any) -> Any:
    """Return logits [num_tokens, num_logits] in float32, never rounded to 16 bits, even under autocast.

    x: [num_tokens, hidden], weight: [num_logits, hidden], floats on one device.
    """
    if torch.is_autocast_enabled(x.device.type):
        with torch.autocast(x.device.type, enabled=False):
            return gate_gemm(x, weight)
    if _HAS_MIXED_GEMM and x.is_cuda and x.dtype == weight.dtype != torch.float32 and not in_torch_func():
        if torch.is_grad_enabled() and (x.requires_grad or weight.requires_grad):
            return _MixedGemm.apply(x, weight)
        return torch.mm(x, weight.t(), out_dtype=torch.float32)
    return torch.nn.functional.linear(x.float(), weight.float())


class _MixedGemm(torch.autograd.Function):  # type: ignore[misc]  # PyTorch is untyped to us
    """GEMM of 16-bit inputs with float32 output. PyTorch has no derivative of it."""

    @staticmethod
    def forward(ctx: Any, x: Any, weight: Any) -> Any:
        ctx.save_for_backward(x, weight)
        return torch.mm(x, weight.t(), out_dtype=torch.float32)

    @staticmethod
    def backward(ctx: Any, grad: Any) -> tuple[Any, Any]:
        x, weight = ctx.saved_tensors
        return gate_gemm_gradients(x, weight, grad, ctx.needs_input_grad)


def gate_gemm_gradients(x: Any, weight: Any, grad_logits: Any, needed: Sequence[bool]) -> tuple[Any, Any]:
    """Return the gradients with respect to x and to the gate, if needed, computed in float32 and then rounded."""
    with torch.autocast(x.device.type, enabled=False):
        if any(needed) and _is_faster_in_parts(x, weight):
            parts = in_bfloat16_parts(grad_logits)
            grad_x = parts @ weight.repeat(_PARTS, 1) if needed[0] else None
            if not needed[1]:
                return grad_x, None
            products = torch.mm(parts.t(), x, out_dtype=torch.float32)
            return grad_x, products.reshape(_PARTS, *weight.shape).sum(0).to(weight.dtype)
        grad_x = (grad_logits @ weight.float()).to(x.dtype) if needed[0] else None
        grad_weight = (grad_logits.t() @ x.float()).to(weight.dtype) if needed[1] else None
    return grad_x, grad_weight


def _is_faster_in_parts(x: Any, weight: Any) -> bool:
    """Return whether tensor cores can do the work of float32 GEMMs, and PyTorch may not use them for these by itself.

    Products of bfloat16 are exact in float32, and so are sums of as many of them as there are parts of a gradient.
    """
    return (
        _HAS_MIXED_GEMM
        and x.is_cuda
        and x.dtype == weight.dtype == torch.bfloat16
        and x.shape[0] >= _MIN_TOKENS
        and torch.get_float32_matmul_precision() == "highest"
        and not in_torch_func()
    )


def in_bfloat16_parts(values: Any) -> Any:
    """Return [n, 3 m] bfloat16 of values [n, m] float32: three numbers that add up to each value, side by side.

    Each rounds what the parts before it leave. An infinite value, or NaN, is its first part.
    """
    num_columns = values.shape[1]
    parts = values.new_empty((values.shape[0], _PARTS * num_columns), dtype=torch.bfloat16)
    rest = values
    for place in range(_PARTS):
        part = parts.narrow(1, place * num_columns, num_columns)
        part.copy_(rest)
        if place + 1 < _PARTS:
            rest = torch.where(part.isfinite(), rest - part, 0.0)
    return parts
