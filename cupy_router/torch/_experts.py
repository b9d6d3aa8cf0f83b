# SPDX-License-Identifier: Apache-2.0
"""The experts implementation "cupy_router" of transformers: expert_layout, permute, grouped GEMMs and unpermute.

transformers calls it in place of its own implementations for every experts module whose configuration names it.
Weights, biases, activation and norm are those of the module.
"""

from __future__ import annotations

import sys
from typing import Any

import torch

from cupy_router.ops.expert_layout import expert_layout
from cupy_router.ops.permute import permute
from cupy_router.ops.unpermute import unpermute
from cupy_router.torch import _state
from cupy_router.torch._experts_launch import layout_and_rows as launch
from cupy_router.torch._router_spec import Unsupported

NAME = "cupy_router"

_FLOATS = (torch.bfloat16, torch.float16, torch.float32)
_WANT = ("ends", "order", "positions")
_WANT_EXPERTS = (*_WANT, "row_experts")

_native: dict[int, bool] = {}  # GPUs on which PyTorch has grouped_mm
_transformers: Any = None  # its module of experts implementations, once ours is registered


def register() -> Any:
    """Add the implementation to the registry of transformers and return that.

    Raises:
        Unsupported: There is none that we know.
    """
    global _transformers
    found = sys.modules.get("transformers.integrations.moe")
    known = ("ALL_EXPERTS_FUNCTIONS", "grouped_mm_experts_forward", "_grouped_mm", "_can_use_grouped_mm")
    if not all(hasattr(found, name) for name in known):
        version = getattr(sys.modules.get("transformers"), "__version__", "")
        raise Unsupported(f"experts=True needs a later release of transformers{version and f' than {version}'}")
    _transformers = found
    found.ALL_EXPERTS_FUNCTIONS.register(NAME, experts_forward)  # type: ignore[union-attr]
    return found.ALL_EXPERTS_FUNCTIONS  # type: ignore[union-attr]


def experts_forward(self: Any, hidden_states: Any, top_k_index: Any, top_k_weights: Any) -> Any:
    """Return the weighted sum of the outputs of each token's experts.

    Args:
        self: The experts module.
        hidden_states: [num_tokens, hidden]
        top_k_index: [num_tokens, top_k] experts of each token. With expert parallelism, ids that are not below the
            number of experts are pairs of other ranks, and add nothing.
        top_k_weights: [num_tokens, top_k]

    Returns:
        [num_tokens, hidden] in the dtype of hidden_states.
    """
    if hidden_states.dtype not in _FLOATS or not (hidden_states.is_cuda or hidden_states.is_cpu):
        return _transformers.grouped_mm_experts_forward(self, hidden_states, top_k_index, top_k_weights)
    first, second, biases = _parameters(self)
    norm = self.post_expert_norm if getattr(self, "has_post_expert_norm", False) else None
    want = _WANT if biases is None and norm is None else _WANT_EXPERTS
    rows, layout = _layout_and_rows(hidden_states.contiguous(), top_k_index.contiguous(), second.shape[0], want)
    # Pairs of experts that are elsewhere have no row. Then the last rows have no pair, and hold garbage after a GEMM,
    # as their gradients do. Older releases of transformers do not say whether there are such pairs.
    some_are_elsewhere = want is not _WANT and getattr(self, "_is_expert_parallel", True)
    y = _grouped_mm(rows, first if self.is_transposed else first.transpose(-2, -1), layout.ends)
    if biases is not None:
        y.add_(_of_rows(biases[0], layout.row_experts, some_are_elsewhere))
    y = self._apply_gate(y) if getattr(self, "has_gate", True) else self.act_fn(y)
    y = _grouped_mm(y, second if self.is_transposed else second.transpose(-2, -1), layout.ends)
    if biases is not None:
        y.add_(_of_rows(biases[1], layout.row_experts, some_are_elsewhere))
    if norm is not None:
        if some_are_elsewhere:
            y = y.masked_fill(layout.row_experts[:, None] < 0, 0.0)
        y = norm(y)
    if y.dtype != hidden_states.dtype:
        y = y.to(torch.promote_types(y.dtype, hidden_states.dtype))  # the sum is rounded once, to the dtype of y
    return unpermute(y, layout, top_k_weights.contiguous()).to(hidden_states.dtype)


def _layout_and_rows(x: Any, indices: Any, num_experts: int, want: tuple[str, ...]) -> tuple[Any, Any]:
    """Return the hidden states of all pairs in order of experts, and their layout."""
    if not _state.is_special() and not torch.is_grad_enabled():
        found = launch(x, indices, num_experts, want)
        if found is not None:
            return found
    layout = expert_layout(indices, num_experts, want=want)
    return permute(x, layout), layout


def _parameters(experts: Any) -> tuple[Any, Any, tuple[Any, Any] | None]:
    """Return the weights of both GEMMs, and their biases if there are any."""
    name = "gate_up_proj" if getattr(experts, "has_gate", True) else "up_proj"
    biases = (getattr(experts, f"{name}_bias"), experts.down_proj_bias) if experts.has_bias else None
    return getattr(experts, name), experts.down_proj, biases


def _grouped_mm(rows: Any, weight: Any, ends: Any) -> Any:
    """Return the rows of each expert times its weight [in, out], in the dtype of the weights."""
    if weight.is_cuda and not torch.compiler.is_compiling():
        device = weight.get_device()
        if device not in _native:
            _native[device] = _transformers._can_use_grouped_mm(rows, weight, ends)
        if _native[device]:  # asking once for each GPU saves 10 us for each product
            return torch._grouped_mm(rows.to(weight.dtype), weight, offs=ends)
    return _transformers._grouped_mm(rows, weight, ends)


def _of_rows(bias: Any, row_experts: Any, some_are_elsewhere: bool) -> Any:
    """Return the bias of each row's expert. Rows without a pair get the last one's, and give no gradient to any."""
    if some_are_elsewhere and torch.is_grad_enabled():
        bias = torch.cat((bias, bias.new_zeros(1, bias.shape[1])))  # -1 is the row of zeros
    return bias[row_experts]
