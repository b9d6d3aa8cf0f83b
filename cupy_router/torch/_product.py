# SPDX-License-Identifier: Apache-2.0
"""The gate product where PyTorch makes it: for models that return logits, and for gradients by x and the gate."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from cupy_router.torch._state import in_torch_func

# From this version on, CUDA multiplies 16-bit floats with a float32 result.
_HAS_MIXED_PRODUCT = tuple(int(part) for part in torch.__version__.split(".")[:2]) >= (2, 8)


def gate_product(x: Any, weight: Any) -> Any:
    """Logits [num_tokens, rows of the gate] in float32, never rounded to less, whatever the dtypes and autocast.

    x: [num_tokens, hidden], weight: [rows of the gate, hidden], floats on one device.
    """
    if torch.is_autocast_enabled(x.device.type):
        with torch.autocast(x.device.type, enabled=False):
            return gate_product(x, weight)
    if _HAS_MIXED_PRODUCT and x.is_cuda and x.dtype == weight.dtype != torch.float32 and not in_torch_func():
        return _MixedProduct.apply(x, weight)
    return torch.nn.functional.linear(x.float(), weight.float())


class _MixedProduct(torch.autograd.Function):  # type: ignore[misc]  # PyTorch is untyped to us
    """16-bit floats in, float32 out: for the way back PyTorch has no such product, nor a derivative of this one."""

    @staticmethod
    def forward(ctx: Any, x: Any, weight: Any) -> Any:
        ctx.save_for_backward(x, weight)
        return torch.mm(x, weight.t(), out_dtype=torch.float32)

    @staticmethod
    def backward(ctx: Any, grad: Any) -> tuple[Any, Any]:
        x, weight = ctx.saved_tensors
        return product_gradients(x, weight, grad, ctx.needs_input_grad)


def product_gradients(x: Any, weight: Any, grad_logits: Any, needed: Sequence[bool]) -> tuple[Any, Any]:
    """The gradients of the product by x and by the gate, if needed: products in float32, then rounded."""
    with torch.autocast(x.device.type, enabled=False):
        by_x = (grad_logits @ weight.float()).to(x.dtype) if needed[0] else None
        by_weight = (grad_logits.t() @ x.float()).to(weight.dtype) if needed[1] else None
    return by_x, by_weight
