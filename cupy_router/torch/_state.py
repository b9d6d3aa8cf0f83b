# SPDX-License-Identifier: Apache-2.0
"""Detect tracing and transforms of PyTorch. Every eager call does this, so it takes only 0.2 us."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch.autograd import forward_ad

in_torch_func = getattr(torch._C, "_are_functorch_transforms_active", lambda: False)


def _frame_callback_before_2_6() -> Any:
    exchange = torch._C._dynamo.eval_frame.set_eval_frame
    found = exchange(None)
    if found is not None:
        exchange(found)
    return found


_is_compiling, _is_jit_traced = torch.compiler.is_compiling, torch._C._is_tracing
_num_modes = getattr(torch._C, "_len_torch_dispatch_stack", lambda: 0)
# Frame evaluation callback of torch.compile; None or False if Dynamo is not active.
_frame_callback = getattr(torch._C._dynamo.eval_frame, "get_eval_frame_callback", _frame_callback_before_2_6)
_backward_pass = getattr(torch._C, "_current_graph_task_id", lambda: -1)  # private, may disappear
REFUSED_IN_GRAPHS = (
    "stream, and arrays that are no tensors, cannot be given inside torch.export, torch.jit.trace or a "
    "TorchDispatchMode"
)
_HAS_LEVELS = hasattr(forward_ad, "_current_level")


def is_tracing() -> bool:
    """Return True if PyTorch traces the call and needs an op in its graph.

    This is so in torch.compile, torch.export and torch.jit.trace, and within a TorchDispatchMode such as those of
    make_fx and of fake tensors.
    """
    return _is_compiling() or _num_modes() > 0 or _is_jit_traced()


def is_special() -> bool:
    """Return True if a call may be traced, inside torch.func, or in forward-mode differentiation."""
    if _is_compiling() or _num_modes() or _is_jit_traced() or in_torch_func() or _frame_callback():
        return True
    return _HAS_LEVELS and forward_ad._current_level >= 0


def in_backward() -> bool:
    """Return True if autograd runs a backward pass on this thread, which may recompute what was computed before."""
    return not torch.compiler.is_dynamo_compiling() and _backward_pass() >= 0


def has_tangent(array: Any) -> bool:
    """Return True if forward mode differentiates with respect to a tensor. Needs an active forward-mode level."""
    return isinstance(array, torch.Tensor) and forward_ad.unpack_dual(array).tangent is not None


def in_dynamo() -> bool:
    """Return True if torch.compile traces the call, or runs it untraced but would trace the functions that it calls."""
    return torch.compiler.is_dynamo_compiling() or bool(_frame_callback())


def is_transformed() -> bool:
    """Return True inside torch.func, also if torch.compile traces it."""
    if not torch.compiler.is_dynamo_compiling():
        return bool(in_torch_func())
    from cupy_router.torch import _outside

    return bool(_outside.transforms_are_traced())


def outside_of_graphs(function: Callable[..., Any], *arguments: Any) -> Any:
    """Return the result of a function that torch.compile must not trace."""
    if not in_dynamo():
        return function(*arguments)
    from cupy_router.torch import _outside

    return _outside.call(function, *arguments)


def refuse_out_and_stream(name: str, out: Any, stream: Any) -> None:
    """Refuse arguments that a call inside torch.func cannot have."""
    if out is not None or stream is not None:
        raise ValueError(f"{name}: out and stream cannot be given inside torch.func or forward-mode differentiation")
