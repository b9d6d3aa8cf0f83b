# SPDX-License-Identifier: Apache-2.0
"""load_balance: the two factors of the usual load-balancing loss, in PyTorch operations."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch

from cupy_router.arrays import View
from cupy_router.arrays import _torch as tensors
from cupy_router.method import RoutingMethod, resolve
from cupy_router.method_fields import FLOAT32_TINY
from cupy_router.ops import _checks as check
from cupy_router.ops import activation_topk
from cupy_router.ops._declared import IDS
from cupy_router.ops._method import MethodOptions
from cupy_router.torch._logits import prepare_logits


class LoadBalance(NamedTuple):
    """Load of the experts in a batch, and their mean scores.

    Attributes:
        counts: [num_experts] int64, number of tokens that selected each expert.
        mean_scores: [num_experts] float32, mean score of each expert over the tokens; differentiable with respect to
            the logits.
    """

    counts: Any
    mean_scores: Any


def load_balance(
    logits: Any, indices: Any, method: RoutingMethod | str, *, logit_bias: Any = None, normalize: bool = True
) -> LoadBalance:
    """Return the two factors of the usual load-balancing loss: tokens per expert, and mean score of each expert.

    The loss of Switch Transformers and, over normalised scores, of DeepSeek-V3 is num_experts times the sum over the
    experts of (share of the selections) * (mean score). The share is a constant, the mean score has a gradient. The
    loss is 1 if all experts are used equally.

    Args:
        logits: [num_tokens, num_experts] float32, float16 or bfloat16 tensor, as for
            :func:`cupy_router.activation_topk`. With `dense_router`, which does not return its logits, compute
            `torch.nn.functional.linear(x.float(), weight.float())`. Columns of shared experts are ignored.
        indices: [num_tokens, top_k + num_shared_experts] integer tensor from the routing, with or without the
            columns of shared experts, which are ignored. A row in which one of the first top_k indices is not an expert
            (-1 in padding) is ignored, whatever its logits are.
        method: As for the routing. Its softmax is over all experts here, even with `score_after_topk`.
        logit_bias: [num_experts] float32 tensor, or None.
        normalize: Divide each token's scores by their sum, so that all tokens contribute equally. A sum of 0 gives
            scores 0.

    Raises:
        TypeError: An argument is not a tensor, or its dtype is not allowed.
        ValueError: A rank, shape or device is wrong, there is no such preset, or the score is a ScoreFunction, which
            PyTorch cannot compute.

    The host never waits for the GPU, and CUDA graphs can capture the call.

    >>> import torch
    >>> from cupy_router import RoutingMethod, activation_topk
    >>> from cupy_router.torch import load_balance
    >>> method = RoutingMethod(3, 1, "softmax")
    >>> logits = torch.tensor([[4.0, 0.0, 0.0], [3.0, 0.0, 1.0], [0.0, 2.0, 0.0]], requires_grad=True)
    >>> routing = activation_topk(logits, method)
    >>> counts, mean_scores = load_balance(logits, routing.indices, method)
    >>> counts
    tensor([2, 1, 0])
    >>> loss = 3 * (counts / counts.sum() * mean_scores).sum()
    >>> loss.backward()
    """
    method = resolve(method)
    if not isinstance(method.score, str):
        raise ValueError(f"load_balance: method has {method.score!r}, which PyTorch cannot compute")
    try:  # check.named would hide the message from torch.compile
        _check(method, logits, indices, logit_bias)
    except TypeError as error:
        raise TypeError(f"load_balance: {error}") from error
    except ValueError as error:
        raise ValueError(f"load_balance: {error}") from error
    num_experts = method.num_experts
    chosen = indices[:, : method.top_k].long()
    routed = ((chosen >= 0) & (chosen < num_experts)).all(dim=1, keepdim=True)
    bins = torch.where(routed, chosen + 1, 0).flatten()  # bin 0 takes the ignored rows
    # Integer sums do not depend on the order.
    counts = torch.zeros(num_experts + 1, dtype=torch.int64, device=chosen.device)
    counts = counts.scatter_add(0, bins, torch.ones_like(bins))[1:]

    x = torch.where(routed, logits[:, :num_experts].float(), 0.0)  # padding may hold any values
    if logit_bias is not None:
        x = x + logit_bias
    scores = _scores(prepare_logits(x, method), method.score)
    if normalize:
        scores = _normalized(scores)
    mean_scores = torch.where(routed, scores, 0.0).sum(dim=0) / routed.sum().clamp(min=1)
    return LoadBalance(counts, mean_scores)


def _check(method: RoutingMethod, logits: Any, indices: Any, logit_bias: Any) -> None:
    """Check everything but the values, which would wait for the GPU."""
    rows, experts = _view("logits", logits), _view("indices", indices)
    bias = None if logit_bias is None else _view("logit_bias", logit_bias)
    given = {"logits": rows, "logit_bias": bias}
    activation_topk.OP.check_inputs(MethodOptions(method), [given.get(name) for name in activation_topk.OP.names])
    check.dtype(experts, IDS)
    columns = "top_k" if experts.shape[1:] == (method.top_k,) else "top_k + num_shared_experts"
    sizes = {"top_k": method.top_k, "top_k + num_shared_experts": method.num_columns, "num_tokens": rows.shape[0]}
    check.axes(experts, ("num_tokens", columns), sizes)
    check.one_device([rows, experts] if bias is None else [rows, experts, bias])


def _view(name: str, tensor: Any) -> View:
    """Describe a tensor without its address, since a traced tensor has none."""
    if not isinstance(tensor, torch.Tensor):
        raise TypeError(f"{name} must be a PyTorch tensor, got {type(tensor).__name__}")
    dtype = tensors.NAMES.get(tensor.dtype, str(tensor.dtype).removeprefix("torch."))
    device = tensor.device.type, tensor.device.index or 0
    return View(name, 0, tuple(tensor.shape), (), dtype, device, readonly=False, host=None)


def _scores(x: Any, score: str) -> Any:
    if score == "softmax":
        highest = x.amax(dim=1, keepdim=True)  # experts with an infinite maximum get equal shares, as in the op
        return torch.where(highest.isinf(), (x == highest).float().log(), x).softmax(dim=1)
    if score == "sigmoid":
        return x.sigmoid()
    if score == "identity":
        return x
    # Below -20 sqrt(log(1 + exp(x))) is exp(x / 2) in float32, and a root of 0 would have no gradient. Both branches
    # get clamped inputs, because torch.where multiplies the gradient of the unused branch by 0, and 0 * inf is NaN.
    near = torch.nn.functional.softplus(x.clamp(min=-20.0)).sqrt()
    return torch.where(x < -20.0, (0.5 * x.clamp(max=-20.0)).exp(), near)


def _normalized(scores: Any) -> Any:
    """Divide the scores by their sum; 0 where the sum is 0 or subnormal, which the ops flush to 0."""
    total = scores.sum(dim=1, keepdim=True)
    is_zero = total.abs() < FLOAT32_TINY
    return torch.where(is_zero, 0.0, scores / torch.where(is_zero, 1.0, total))
