# SPDX-License-Identifier: Apache-2.0
"""What losses that balance the load of experts are made of, in plain PyTorch operations."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch

from cupy_router.method import RoutingMethod, resolve


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
        indices: [num_tokens, top_k or more] int32 or int64 tensor, those of the routing; columns of shared experts are
            left out. Rows of -1 (padding) count for nothing, whatever their logits are.
        method: as for the routing. Its softmax is over all experts here, also with `score_after_topk`.
        logit_bias: [num_experts] float32 tensor, or None.
        normalize: divide the scores of each token by their sum, so that all tokens weigh alike; a softmax is so anyway.

    Raises:
        ValueError: the score is a ScoreFunction, which PyTorch cannot compute; or there is no such preset.

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
    num_experts = method.num_experts
    chosen = indices[:, : method.top_k].long()
    routed = chosen[:, :1] >= 0
    ones = torch.ones_like(chosen).flatten()
    # One place more, in front, for what is -1. Integers add up to the same in any order.
    counts = torch.zeros(num_experts + 1, dtype=torch.int64, device=chosen.device)
    counts = counts.scatter_add(0, chosen.flatten() + 1, ones)[1:]

    x = torch.where(routed, logits[:, :num_experts].float(), 0.0)  # padding may hold anything
    if logit_bias is not None:
        x = x + logit_bias
    x = x * method.logit_scale
    if method.logit_softcap is not None:
        x = method.logit_softcap * torch.tanh(x / method.logit_softcap)
    scores = _scores(x, method.score)
    if normalize:
        scores = scores / scores.sum(dim=1, keepdim=True)
    mean_scores = torch.where(routed, scores, 0.0).sum(dim=0) / routed.sum().clamp(min=1)
    return LoadBalance(counts, mean_scores)


def _scores(x: Any, score: str) -> Any:
    if score == "softmax":
        return x.softmax(dim=1)
    if score == "sigmoid":
        return x.sigmoid()
    if score == "identity":
        return x
    # Below -20 the root of log(1 + exp(x)) is exp(x / 2); a root of 0 would have no gradient.
    near = torch.nn.functional.softplus(x.clamp(min=-20.0)).sqrt()
    return torch.where(x < -20.0, (0.5 * x).exp(), near)
