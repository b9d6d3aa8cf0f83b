# SPDX-License-Identifier: Apache-2.0
"""The gate GEMM and its gradient with respect to x, in an order of sums that does not depend on the batch."""

from __future__ import annotations

from typing import Any

import torch

from cupy_router.ops import dense_router, unpermute
from cupy_router.ops._invariant_gradient import logits_options
from cupy_router.ops._rows import LayoutInts
from cupy_router.ops._run import run

_LEFT_OUT = (None,) * (len(dense_router.OP.names) - 2)  # all inputs but x and weight


def invariant_logits(x: Any, weight: Any, by_op: bool) -> Any:
    """Return float32 logits of x [num_tokens, hidden] and a gate [num_logits, hidden], of up to 1024 logits.

    by_op: call the op through PyTorch's dispatcher.
    """
    options, inputs = logits_options(weight.shape[0]), (x, weight, *_LEFT_OUT)
    if by_op:
        return torch.ops.cupy_router.dense_router_logits(options.text, *inputs, -1)[2]
    return run(dense_router.OP, options, inputs, None, None).logits


def batch_invariant_gate_gemm(x: Any, weight: Any) -> Any:
    """Return the same logits in any place: in graphs, and with a gradient."""
    inputs = _dense(x), _dense(weight), *_LEFT_OUT
    return run(dense_router.OP, logits_options(weight.shape[0]), inputs, None, None).logits


def _dense(tensor: Any) -> Any:
    return tensor if tensor.stride(-1) == 1 else tensor.contiguous()


def invariant_x_gradient(dtype: Any, weight: Any, grad_logits: Any, by_op: bool) -> Any:
    """Return the gradient with respect to x, in its dtype; each token's is the same to the bit in any batch."""
    num_tokens, num_logits = grad_logits.shape
    positions = torch.arange(num_logits, dtype=torch.int32, device=weight.device).repeat(num_tokens, 1)
    return sum_of_rows(dtype, weight, positions, grad_logits, by_op)


def sum_of_rows(dtype: Any, weight: Any, positions: Any, factors: Any, by_op: bool) -> Any:
    """Return, for each token, the sum of the gate's rows at these positions times their factors, in the order given.

    It is float32, and then rounded to dtype. A position that is no row is left out.
    """
    rows = weight if weight.dtype == dtype else weight.float()
    inputs = rows, positions, None, factors.contiguous(), None, None
    if by_op:
        summed = torch.ops.cupy_router.unpermute(LayoutInts().text, *inputs)
    else:
        summed = run(unpermute.OP, LayoutInts(), inputs, None, None)
    return summed.to(dtype)
