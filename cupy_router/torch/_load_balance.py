# SPDX-License-Identifier: Apache-2.0
"""What losses that balance the load of experts are made of, in plain PyTorch operations."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch

from cupy_router.arrays import View
from cupy_router.arrays import _torch as tensors
from cupy_router.method import FLOAT32_TINY, RoutingMethod, resolve
from cupy_router.ops import _checks as check
from cupy_router.ops import activation_topk
from cupy_router.ops._method import MethodOptions
from cupy_router.ops._op import INTS


class LoadBalance(NamedTuple):
    """How a batch used the experts, and how it might have.

    counts: [num_experts] int64, how many tokens chose each expert.
    mean_scores: [num_experts] float32, the mean of each expert's score over the tokens; differentiable by the logits.
    """

    counts: Any
    mean_scores: Any


def load_balance(
    logits: Any, indices: Any, method: RoutingMethod | str, *, logit_bias: Any = None, normalize: bool = True
) -> LoadBalance:
    """How many tokens chose each expert, and the mean of each expert's score: the two factors of the usual loss.

    That loss, of Switch Transformers and, over normalised scores, of DeepSeek-V3, is num_experts times the sum over
    the experts of their share of the choices, a constant, and their mean score, which has a gradient. It is 1 where
    all are used alike.

    Args:
        logits: [num_tokens, num_experts] float32, float16 or bfloat16 tensor, as for
            :func:`cupy_router.activation_topk`; with `dense_router`, which keeps its logits to itself,
            `torch.nn.functional.linear(x.float(), weight.float())`. Columns of shared experts are left out.
        indices: [num_tokens, top_k + num_shared_experts] int32 or int64 tensor, those of the routing, also without the
            columns of shared experts, which are left out. A row with an index of the first top_k that is no expert (-1:
            padding) counts for nothing, whatever its logits are.
        method: as for the routing. Its softmax is over all experts here, also with `score_after_topk`.
        logit_bias: [num_experts] float32 tensor, or None.
        normalize: divide the scores of each token by their sum, so that all tokens weigh alike; a softmax is so anyway.
            A sum of 0 gives scores 0.

    Raises:
        TypeError: something is no tensor, or has a dtype that is not allowed.
        ValueError: ranks, shapes or devices are wrong, there is no such preset, or the score is a ScoreFunction, which
            PyTorch cannot compute.

    Nothing waits for the GPU, and CUDA graphs can capture it.

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
    try:  # not by check.named, which hides the sentence from torch.compile
        _check(method, logits, indices, logit_bias)
    except TypeError as error:
        raise TypeError(f"load_balance: {error}") from error
    except ValueError as error:
        raise ValueError(f"load_balance: {error}") from error
    num_experts = method.num_experts
    chosen = indices[:, : method.top_k].long()
    routed = ((chosen >= 0) & (chosen < num_experts)).all(dim=1, keepdim=True)
    places = torch.where(routed, chosen + 1, 0).flatten()  # 0 is for rows that count for nothing
    # Integers add up to the same in any order.
    counts = torch.zeros(num_experts + 1, dtype=torch.int64, device=chosen.device)
    counts = counts.scatter_add(0, places, torch.ones_like(places))[1:]

    x = torch.where(routed, logits[:, :num_experts].float(), 0.0)  # padding may hold anything
    if logit_bias is not None:
        x = x + logit_bias
    x = x * method.logit_scale
    if method.logit_softcap is not None:
        x = method.logit_softcap * torch.tanh(x / method.logit_softcap)
    scores = _scores(x, method.score)
    if normalize:
        scores = _normalized(scores)
    mean_scores = torch.where(routed, scores, 0.0).sum(dim=0) / routed.sum().clamp(min=1)
    return LoadBalance(counts, mean_scores)


def _check(method: RoutingMethod, logits: Any, indices: Any, logit_bias: Any) -> None:
    """What can be checked without a look at the values, which would wait for the GPU."""
    rows, experts = _view("logits", logits), _view("indices", indices)
    bias = None if logit_bias is None else _view("logit_bias", logit_bias)
    activation_topk.OP.check_inputs(MethodOptions(method), [rows, None, bias, None, None])
    check.dtype(experts, INTS)
    columns = "top_k" if experts.shape[1:] == (method.top_k,) else "top_k + num_shared_experts"
    sizes = {"top_k": method.top_k, "top_k + num_shared_experts": method.num_columns, "num_tokens": rows.shape[0]}
    check.axes(experts, ("num_tokens", columns), sizes)
    check.one_device([rows, experts] if bias is None else [rows, experts, bias])


def _view(name: str, tensor: Any) -> View:
    """A tensor without its memory, which it has none of while a graph is traced."""
    if not isinstance(tensor, torch.Tensor):
        raise TypeError(f"{name} must be a PyTorch tensor, got {type(tensor).__name__}")
    dtype = tensors.NAMES.get(tensor.dtype, str(tensor.dtype).removeprefix("torch."))
    device = tensor.device.type, tensor.device.index or 0
    return View(name, 0, tuple(tensor.shape), (), dtype, device, readonly=False, host=None)


def _scores(x: Any, score: str) -> Any:
    if score == "softmax":
        highest = x.amax(dim=1, keepdim=True)  # where it is infinite, its experts share, as in the op
        return torch.where(highest.isinf(), (x == highest).float().log(), x).softmax(dim=1)
    if score == "sigmoid":
        return x.sigmoid()
    if score == "identity":
        return x
    # Below -20 the root of log(1 + exp(x)) is exp(x / 2); a root of 0 would have no gradient. Each way gets what it can
    # bear, as the one that is not taken has gradients too: 0 times what must not be infinite.
    near = torch.nn.functional.softplus(x.clamp(min=-20.0)).sqrt()
    return torch.where(x < -20.0, (0.5 * x.clamp(max=-20.0)).exp(), near)


def _normalized(scores: Any) -> Any:
    """Scores over their sum; 0 where that is 0, or subnormal, which is 0 to the ops and has no finite inverse."""
    total = scores.sum(dim=1, keepdim=True)
    nothing = total.abs() < FLOAT32_TINY
    return torch.where(nothing, 0.0, scores / torch.where(nothing, 1.0, total))
