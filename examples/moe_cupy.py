# SPDX-License-Identifier: Apache-2.0
"""Train a mixture-of-experts layer in CuPy, or in NumPy without a GPU: `python -m examples.moe_cupy`.

Neither has automatic gradients, so the backward pass is written out. The router's part is `activation_topk_backward`,
the rest is the chain rule.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from cupy_router import activation_topk, compiler
from cupy_router.ops.activation_topk_backward import activation_topk_backward
from examples import tokens


def forward(xp: Any, p: dict[str, Any], x: Any) -> tuple[Any, dict[str, Any]]:
    """Return the cluster logits of x [num_tokens, hidden], and the arrays that the backward pass needs."""
    logits = x @ p["gate"].T
    weights, indices = activation_topk(logits, tokens.METHOD)
    mix = xp.zeros((len(x), tokens.METHOD.num_experts), xp.float32)
    mix[xp.arange(len(x))[:, None], indices] = weights
    inner = xp.maximum(x @ p["up"], 0)  # [num_experts, num_tokens, width]: every expert processes every token
    outputs = inner @ p["down"]  # [num_experts, num_tokens, hidden]
    mixed = x + xp.einsum("ne,enh->nh", mix, outputs)
    saved = {
        "x": x,
        "logits": logits,
        "indices": indices,
        "mix": mix,
        "inner": inner,
        "outputs": outputs,
        "mixed": mixed,
    }
    return mixed @ p["head"], saved


def backward(xp: Any, p: dict[str, Any], saved: dict[str, Any], grad_scores: Any) -> dict[str, Any]:
    """Return the gradients with respect to all parameters."""
    x, mix, inner = saved["x"], saved["mix"], saved["inner"]
    grad_mixed = grad_scores @ p["head"].T
    grad_outputs = mix.T[:, :, None] * grad_mixed
    grad_inner = (grad_outputs @ p["down"].swapaxes(1, 2)) * (inner > 0)
    grad_mix = xp.einsum("enh,nh->ne", saved["outputs"], grad_mixed)
    grad_weights = xp.take_along_axis(grad_mix, saved["indices"], axis=1)
    grad_logits = activation_topk_backward(grad_weights, saved["indices"], saved["logits"], tokens.METHOD).grad_logits
    return {
        "head": saved["mixed"].T @ grad_scores,
        "down": inner.swapaxes(1, 2) @ grad_outputs,
        "up": x.T @ grad_inner,
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
