# SPDX-License-Identifier: Apache-2.0
"""Interceptor of calls for PyTorch: it adds a call to a graph, applies torch.func, or makes it differentiable.

Other eager calls do not go through PyTorch's dispatcher; `wants` takes 0.5 us of them.
"""

from __future__ import annotations

from typing import Any

import torch

from cupy_router.ops import _run
from cupy_router.ops._op import Op
from cupy_router.torch import _autograd, _library, _state, _transforms
from cupy_router.torch._autograd import wants_gradient
from cupy_router.torch._state import REFUSED_IN_GRAPHS, is_special, refuse_out_and_stream

_is_grad_enabled = torch.is_grad_enabled


def wants(op: Op, inputs: tuple[Any, ...]) -> bool:
    """Return whether a call is traced, inside torch.func, in forward mode, or wants a gradient."""
    if is_special():
        return isinstance(inputs[0], torch.Tensor) or _state.in_dynamo()
    return _is_grad_enabled() and wants_gradient(op, inputs)


def run(op: Op, options: Any, inputs: tuple[Any, ...], out: Any, stream: Any, number: int) -> Any:
    """Return the results of a call that :func:`wants` accepts."""
    outs = _library.flat(op, options, out)
    if _state.is_tracing():
        if stream is None and _library.can_hold(op, inputs, outs):
            if outs or op.written:
                _autograd.refuse_writing(op, options, inputs, outs)
            op.check_traced(options, inputs, f"{op.label}: ")
            return _library.call(op, options, inputs, number, out, outs)
        if not _state.in_dynamo():
            raise ValueError(f"{op.label}: {REFUSED_IN_GRAPHS}")
    if _state.in_dynamo():
        return _state.outside_of_graphs(_run.run, op, options, inputs, out, stream, number)
    if _transforms.applies((*inputs, *outs)):
        refuse_out_and_stream(op.label, out, stream)
        return _transforms.run(op, options, inputs, number)
    if _is_grad_enabled() and wants_gradient(op, inputs):
        if outs:
            _autograd.refuse_writing(op, options, inputs, outs)
        return _autograd.run_with_gradient(op, options, inputs, out, stream, number)
    return _run.run(op, options, inputs, out, stream, number, eager=True)
