# SPDX-License-Identifier: Apache-2.0
"""What PyTorch is doing around a call: what every eager call asks, in a fifth of a microsecond."""

from __future__ import annotations

from typing import Any

import torch
from torch.autograd import forward_ad

in_torch_func = getattr(torch._C, "_are_functorch_transforms_active", lambda: False)

_is_compiling, _is_jit_traced = torch.compiler.is_compiling, torch._C._is_tracing
_num_modes = getattr(torch._C, "_len_torch_dispatch_stack", lambda: 0)
_HAS_LEVELS = hasattr(forward_ad, "_current_level")


def is_tracing() -> bool:
    """Whether PyTorch is to see a call as an op: in torch.compile and torch.export, in torch.jit.trace, and within a
    TorchDispatchMode such as those of make_fx and of fake tensors."""
    return _is_compiling() or _num_modes() > 0 or _is_jit_traced()


def is_special() -> bool:
    """Whether a call may be more than a call: traced, inside torch.func, or with tangents."""
    if _is_compiling() or _num_modes() or _is_jit_traced() or in_torch_func():
        return True
    return _HAS_LEVELS and forward_ad._current_level >= 0


def has_tangent(array: Any) -> bool:
    """Whether forward mode differentiates by a tensor; where a level of it has been entered."""
    return isinstance(array, torch.Tensor) and forward_ad.unpack_dual(array).tangent is not None


def refuse_out_and_stream(name: str, out: Any, stream: Any) -> None:
    """Refuse arguments that a traced call cannot have."""
    if out is not None or stream is not None:
        places = "torch.compile, torch.export, torch.func, torch.jit.trace or a TorchDispatchMode"
        raise ValueError(f"{name}: out and stream cannot be given inside {places}")
