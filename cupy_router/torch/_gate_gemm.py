# SPDX-License-Identifier: Apache-2.0
"""The gate GEMM in PyTorch: for models that return logits, and for gradients with respect to x and the gate."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from cupy_router.torch._state import in_torch_func

# First version of PyTorch with a CUDA GEMM of 16-bit inputs and float32 output.
_HAS_MIXED_GEMM = tuple(int(part) for part in torch.__version__.split(".")[:2]) >= (2, 8)


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
        grad_x = (grad_logits @ weight.float()).to(x.dtype) if needed[0] else None
        grad_weight = (grad_logits.t() @ x.float()).to(weight.dtype) if needed[1] else None
    return grad_x, grad_weight
