# SPDX-License-Identifier: Apache-2.0
"""Calls outside of the graphs of torch.compile, which break where such a call stands.

Imported where torch.compile is at work only, because `torch.compiler.disable` imports torch._dynamo for seconds.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from cupy_router.torch import _state

_REASON = (
    "cupy_router: a graph holds no stream= and no arrays but PyTorch's: leave out stream=, pass tensors, or call it "
    "outside of the graph"
)


def _call_with_a_stream_or_arrays_that_no_graph_can_hold(function: Callable[..., Any], *arguments: Any) -> Any:
    """Return the result of a function. PyTorch before 2.7 shows this name where it cannot break a graph."""
    return function(*arguments)


try:
    call = torch.compiler.disable(_call_with_a_stream_or_arrays_that_no_graph_can_hold, reason=_REASON)
except TypeError:  # an old PyTorch, without reasons
    call = torch.compiler.disable(_call_with_a_stream_or_arrays_that_no_graph_can_hold)


@torch.compiler.assume_constant_result  # type: ignore[untyped-decorator]  # graphs are guarded by the transforms around
def transforms_are_traced() -> bool:
    """Return whether transforms of torch.func are traced, in a way that torch.compile of PyTorch 2.4 can trace too."""
    return _state.in_torch_func()
