# SPDX-License-Identifier: Apache-2.0
"""Train a mixture-of-experts layer in CuPy, or in NumPy without a GPU: `python -m examples.moe_cupy`.

Neither has automatic gradients, so the backward pass is written out. The router's part is `activation_topk_backward`,
that of the layout is `permute`, the rest is the chain rule.
"""

from __future__ import annotations

from itertools import pairwise, starmap
from typing import Any

import numpy as np

from cupy_router import LayoutSpec, activation_topk, compiler, permute, unpermute
from cupy_router.ops.activation_topk_backward import activation_topk_backward
from examples import tokens


def forward(xp: Any, p: dict[str, Any], x: Any) -> tuple[Any, Any]:
    """Return the cluster logits of x [num_tokens, hidden], and what the backward pass needs."""
    logits = x @ p["gate"].T
    plan = activation_topk(logits, tokens.METHOD, layout=LayoutSpec())
    rows = permute(x, plan.layout)  # [num_pairs, hidden], in order of experts
    parts = list(starmap(slice, pairwise(plan.layout.offsets.tolist())))  # the rows of each expert
    inner = xp.concatenate([xp.maximum(rows[part] @ up, 0) for part, up in zip(parts, p["up"], strict=True)])
    y = xp.concatenate([inner[part] @ down for part, down in zip(parts, p["down"], strict=True)])
    mixed = unpermute(y, plan.layout, plan.weights, residual=x)
    return mixed @ p["head"], (x, logits, plan, rows, parts, inner, y, mixed)


def backward(xp: Any, p: dict[str, Any], saved: Any, grad_scores: Any) -> dict[str, Any]:
    """Return the gradients with respect to all parameters."""
    x, logits, plan, rows, parts, inner, y, mixed = saved
    grad_mixed = grad_scores @ p["head"].T
    grad_y = permute(grad_mixed, plan.layout, weights=plan.weights)
    grad_inner = xp.concatenate([grad_y[part] @ down.T for part, down in zip(parts, p["down"], strict=True)])
    grad_inner *= inner > 0
    grad_weights = (y[plan.layout.positions] * grad_mixed[:, None]).sum(axis=2)
    grad_logits = activation_topk_backward(grad_weights, plan.indices, logits, tokens.METHOD).grad_logits
    return {
        "head": mixed.T @ grad_scores,
        "down": xp.stack([inner[part].T @ grad_y[part] for part in parts]),
        "up": xp.stack([rows[part].T @ grad_inner[part] for part in parts]),
        "gate": grad_logits.T @ x,
    }


def train(steps: int = 200) -> list[float]:
    """Return the loss of each step."""
    xp: Any = np if compiler.why_no_cuda() else compiler.require_cuda()
    hidden, clusters = map(xp.asarray, tokens.load())
    p = {name: xp.asarray(value) for name, value in tokens.parameters().items()}
    velocity = {name: xp.zeros_like(value) for name, value in p.items()}
    losses = []
    for batch in tokens.batches(steps):
        x, targets = hidden[batch], xp.eye(tokens.CLUSTERS, dtype=xp.float32)[clusters[batch]]
        scores, saved = forward(xp, p, x)
        scores -= scores.max(axis=1, keepdims=True)
        log_sum = xp.log(xp.exp(scores).sum(axis=1, keepdims=True))
        losses.append(((log_sum - scores) * targets).sum() / len(x))
        grads = backward(xp, p, saved, (xp.exp(scores - log_sum) - targets) / len(x))
        for name in p:
            velocity[name] = tokens.MOMENTUM * velocity[name] + grads[name]
            p[name] = p[name] - tokens.LEARNING_RATE * velocity[name]
    return [float(loss) for loss in losses]


if __name__ == "__main__":
    for step, loss in enumerate(train()):
        if step % 20 == 19:
            print(f"step {step + 1:3}: loss {loss:.3f}")
