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
from cupy_router.torch._router_spec import Unsupported

NAME = "cupy_router"

_FLOATS = (torch.bfloat16, torch.float16, torch.float32)
_WANT = ("ends", "order", "positions")
_WANT_EXPERTS = (*_WANT, "row_experts")

_transformers: Any = None  # its module of experts implementations, once ours is registered


def register() -> Any:
    """Add the implementation to the registry of transformers and return that.

    Raises:
        Unsupported: There is none that we know.
    """
    global _transformers
    found = sys.modules.get("transformers.integrations.moe")
    known = ("ALL_EXPERTS_FUNCTIONS", "grouped_mm_experts_forward", "_grouped_mm")
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
    num_experts, norm = second.shape[0], _norm(self)
    want = _WANT if biases is None and norm is None else _WANT_EXPERTS
    layout = expert_layout(top_k_index.contiguous(), num_experts, want=want)
    # Pairs of experts that are elsewhere have no row. Then the last rows have no pair, and hold garbage after a GEMM,
    # as their gradients do.
    some_are_elsewhere = getattr(self, "_is_expert_parallel", True)
    y = _grouped(permute(hidden_states.contiguous(), layout), first, layout, self.is_transposed)
    if biases is not None:
        y.add_(_of_rows(biases[0], layout.row_experts, some_are_elsewhere))
    y = self._apply_gate(y) if self.has_gate else self.act_fn(y)
    y = _grouped(y, second, layout, self.is_transposed)
    if biases is not None:
        y.add_(_of_rows(biases[1], layout.row_experts, some_are_elsewhere))
    if norm is not None:
        if some_are_elsewhere:
            y = y.masked_fill(layout.row_experts[:, None] < 0, 0.0)
        y = norm(y)
    # The sum is rounded once, to the wider of both dtypes.
    y = y.to(torch.promote_types(y.dtype, hidden_states.dtype))
    return unpermute(y, layout, top_k_weights.contiguous()).to(hidden_states.dtype)


def _parameters(experts: Any) -> tuple[Any, Any, tuple[Any, Any] | None]:
    """Return the weights of both GEMMs, and their biases if there are any."""
    if experts.has_gate:
        first, bias = experts.gate_up_proj, experts.gate_up_proj_bias if experts.has_bias else None
    else:
        first, bias = experts.up_proj, experts.up_proj_bias if experts.has_bias else None
    return first, experts.down_proj, (bias, experts.down_proj_bias) if experts.has_bias else None


def _norm(experts: Any) -> Any:
    return experts.post_expert_norm if getattr(experts, "has_post_expert_norm", False) else None


def _grouped(rows: Any, weight: Any, layout: Any, is_transposed: bool) -> Any:
    """Return the rows of each expert times its weight, [num_experts, out, in] or transposed."""
    return _transformers._grouped_mm(rows, weight if is_transposed else weight.transpose(-2, -1), layout.ends)


def _of_rows(bias: Any, row_experts: Any, some_are_elsewhere: bool) -> Any:
    """Return the bias of each row's expert. Rows without a pair get the last one's, and give no gradient to any."""
    if some_are_elsewhere and torch.is_grad_enabled():
        bias = torch.cat((bias, bias.new_zeros(1, bias.shape[1])))  # -1 is the row of zeros
    return bias[row_experts]
