# SPDX-License-Identifier: Apache-2.0
"""The experts implementation "cupy_router" of transformers: expert_layout, permute, grouped GEMMs and unpermute.

transformers calls it in place of its own implementations for every experts module whose configuration names it.
Weights, biases, activation and norm are those of the module.
"""

from __future__ import annotations

import sys
from typing import Any

import torch
from torch.fx.experimental.symbolic_shapes import statically_known_true

from cupy_router.ops._rows import LayoutInts
from cupy_router.ops.expert_layout import OP as LAYOUT
from cupy_router.ops.expert_layout import LayoutOptions, expert_layout
from cupy_router.ops.permute import OP as PERMUTE
from cupy_router.ops.permute import permute
from cupy_router.ops.unpermute import OP as UNPERMUTE
from cupy_router.ops.unpermute import unpermute
from cupy_router.results import ExpertLayout
from cupy_router.torch import _state
from cupy_router.torch._experts_launch import layout_and_rows
from cupy_router.torch._library import prepare
from cupy_router.torch._router_spec import Unsupported

NAME = "cupy_router"

# Most bytes of weights that are copied for one token. A layer of Qwen3-30B-A3B copies 75 MB, and its experts take 65 us
# of an H200 (bench_transformers --profile). The host takes longer to launch them, yet not as long as grouped GEMMs.
GATHERED_BYTES = 2**28

Parts = tuple[Any, Any, tuple[Any, Any] | None, Any]

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
        raise Unsupported(f"experts=True needs transformers 5.3 or later{version and f', this is {version}'}")
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
    parts = first, second, biases, norm = _parts(self)
    is_eager = not (_state.is_special() or torch.is_grad_enabled())
    picks = _picks(self, hidden_states, top_k_index, second.shape[0])
    gathers = is_eager and _gathers(self, parts, hidden_states, top_k_index)
    if gathers or (picks and hidden_states.shape[0] == 1):
        return _of_one_token(self, parts, hidden_states, top_k_index, top_k_weights)
    want = _WANT_EXPERTS if picks else _wanted(biases, norm)
    given = hidden_states.contiguous(), top_k_index.contiguous(), second.shape[0], want
    nodes = _nodes.get((second.shape[0], want)) if torch.compiler.is_dynamo_compiling() else None
    if nodes is not None:
        rows, layout = nodes.layout_and_rows(*given[:2])
    else:
        rows, layout = (is_eager and layout_and_rows(*given)) or _layout_and_rows(*given)
    # Pairs of experts that are elsewhere have no row. Then the last rows have no pair, and hold garbage after a GEMM,
    # as their gradients do. Older releases of transformers do not say whether there are such pairs.
    some_are_elsewhere = not (biases is None and norm is None) and getattr(self, "_is_expert_parallel", True)
    y = _product(rows, first, self.is_transposed, layout, picks)
    if biases is not None:
        y.add_(_of_rows(biases[0], layout.row_experts, some_are_elsewhere))
    y = self._apply_gate(y) if getattr(self, "has_gate", True) else self.act_fn(y)
    y = _product(y, second, self.is_transposed, layout, picks)
    if biases is not None:
        y.add_(_of_rows(biases[1], layout.row_experts, some_are_elsewhere))
    if norm is not None:
        if some_are_elsewhere:
            y = y.masked_fill(layout.row_experts[:, None] < 0, 0.0)
        y = norm(y)
    if y.dtype != hidden_states.dtype:
        y = y.to(torch.promote_types(y.dtype, hidden_states.dtype))  # the sum is rounded once, to the dtype of y
    if nodes is not None:
        return nodes.unpermute(y, layout, top_k_weights.contiguous()).to(hidden_states.dtype)
    return unpermute(y, layout, top_k_weights.contiguous()).to(hidden_states.dtype)


def _parts(experts: Any) -> Parts:
    """Return the weights of both GEMMs, their biases and the norm behind them, None if there are none."""
    name = "gate_up_proj" if getattr(experts, "has_gate", True) else "up_proj"
    biases = (getattr(experts, f"{name}_bias"), experts.down_proj_bias) if experts.has_bias else None
    norm = experts.post_expert_norm if getattr(experts, "has_post_expert_norm", False) else None
    return getattr(experts, name), experts.down_proj, biases, norm


class _Nodes:
    """The three ops in graphs. Their functions add the same nodes, but more guards, which every call checks."""

    _permute, _unpermute = prepare(PERMUTE, LayoutInts()), prepare(UNPERMUTE, LayoutInts())

    def __init__(self, num_experts: int, want: tuple[str, ...]) -> None:
        self._layout = prepare(LAYOUT, LayoutOptions(num_experts, want=want))

    def layout_and_rows(self, x: Any, indices: Any) -> tuple[Any, ExpertLayout]:
        layout = ExpertLayout(*self._layout(None, None, indices, None, None, -1))
        return self._permute(x, layout.order, layout.positions, None), layout

    def unpermute(self, y: Any, layout: ExpertLayout, weights: Any) -> Any:
        return self._unpermute(y, layout.positions, layout.order, weights, None, None)


_nodes: dict[tuple[int, tuple[str, ...]], _Nodes] = {}


def prepare_nodes(experts: Any) -> None:
    """Prepare what torch.compile finds in a module. Without it, graphs are the same, but their guards take longer."""
    _, second, biases, norm = _parts(experts)
    # With expert parallelism, calls find the weights of this rank, and parameters have the shape of all.
    num_experts = experts.num_experts if getattr(experts, "_is_expert_parallel", False) else second.shape[0]
    for want in {_wanted(biases, norm), _WANT_EXPERTS}:
        key = num_experts, want
        _nodes.setdefault(key, _Nodes(*key))


def _wanted(biases: Any, norm: Any) -> tuple[str, ...]:
    return _WANT if biases is None and norm is None else _WANT_EXPERTS


# -- Rows in order of experts ------------------------------------------------------------------------------------------


def _layout_and_rows(x: Any, indices: Any, num_experts: int, want: tuple[str, ...]) -> tuple[Any, Any]:
    layout = expert_layout(indices, num_experts, want=want)
    return permute(x, layout), layout


def _product(rows: Any, weights: Any, is_transposed: bool, layout: ExpertLayout, picks: bool) -> Any:
    """Return each row times its expert's weights, in their dtype. weights: [num_experts, out, in], or transposed."""
    if picks:
        return _each_times(rows.to(weights.dtype), weights, layout.row_experts, is_transposed)
    return _grouped_mm(rows, weights if is_transposed else weights.transpose(-2, -1), layout.ends)


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


# -- Few pairs ---------------------------------------------------------------------------------------------------------


def _picks(experts: Any, x: Any, indices: Any, num_experts: int) -> bool:
    """Return whether a graph without gradients has so few pairs that reading the weights of each is the fastest.

    Inductor compiles such a product to one kernel that copies no weights. A grouped GEMM takes up to twice as long, as
    its tiles have many more rows than an expert has tokens. Other backends do copy the weights of each pair.
    """
    if torch.is_grad_enabled() or not torch.compiler.is_dynamo_compiling() or not _picks_on(x.device):
        return False
    if getattr(experts, "_is_expert_parallel", False):
        return False
    return statically_known_true(x.shape[0] * indices.shape[1] <= num_experts)  # type: ignore[no-any-return]


def _picks_on(device: Any) -> bool:
    return device.type == "cuda"  # type: ignore[no-any-return]


def _gathers(experts: Any, parts: Parts, x: Any, indices: Any) -> bool:
    """Return whether an eager call with one token is faster by products with copies of the weights.

    The host launches fewer kernels then. A captured graph needs no host, and its kernels take longer.
    """
    if x.shape[0] != 1 or not x.is_cuda or getattr(experts, "_is_expert_parallel", False):
        return False
    first, second, _, _ = parts
    num_bytes = (first.nbytes + second.nbytes) // second.shape[0] * indices.shape[1]
    return num_bytes <= GATHERED_BYTES and not torch.cuda.is_current_stream_capturing()


def _of_one_token(experts: Any, parts: Parts, x: Any, indices: Any, weights: Any) -> Any:
    """Return the same as :func:`experts_forward` for one token, without a layout."""
    first, second, biases, norm = parts
    chosen = indices[0]
    if not hasattr(experts, "_is_expert_parallel"):  # then it may be; weights of experts that are elsewhere are 0
        chosen = chosen.clamp(max=second.shape[0] - 1)
    y = _each_times(x.to(first.dtype).expand(len(chosen), -1), first, chosen, experts.is_transposed)
    if biases is not None:
        y.add_(biases[0][chosen])
    y = experts._apply_gate(y) if getattr(experts, "has_gate", True) else experts.act_fn(y)
    y = _each_times(y.to(second.dtype), second, chosen, experts.is_transposed)
    if biases is not None:
        y.add_(biases[1][chosen])
    if norm is not None:
        y = norm(y)
    if weights.dtype == y.dtype and not torch.compiler.is_dynamo_compiling():
        y = weights @ y
    else:
        y = (weights.T.float() * y).sum(dim=0, keepdim=True)
    return y.to(x.dtype)


def _each_times(rows: Any, weights: Any, chosen: Any, is_transposed: bool) -> Any:
    """Return each row times its expert's weights: [num_experts, out, in], or transposed. chosen: expert of each row."""
    if torch.compiler.is_dynamo_compiling():
        return _sum_of_products(rows, weights[chosen], is_transposed).to(weights.dtype)
    if is_transposed:
        return torch.bmm(rows.unsqueeze(1), weights[chosen]).squeeze(1)
    return torch.bmm(weights[chosen], rows.unsqueeze(2)).squeeze(2)


def _sum_of_products(rows: Any, weights: Any, is_transposed: bool) -> Any:
    """Return products in float32, in a form that Inductor makes one fast kernel of."""
    rows = rows.as_strided(rows.shape, rows.stride())  # Inductor computes the rows once, not within each product
    if is_transposed:
        return (weights.float() * rows.unsqueeze(2).float()).sum(1)
    products = weights.float() * rows.unsqueeze(1).float()
    return products.unflatten(2, (_num_parts(rows.shape[1]), -1)).sum(2).sum(2)


def _num_parts(length: int) -> int:
    """Return the number of parts of a sum, each nearly as long as a power of two, since Inductor's blocks are as long.

    Inductor fuses the sum of up to three parts; of more, it would write products to memory.
    """
    numbers = [number for number in (1, 2, 3) if length % number == 0]
    return max(numbers, key=lambda number: (length // number / 2 ** (length // number - 1).bit_length(), -number))
