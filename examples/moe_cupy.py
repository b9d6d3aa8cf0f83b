# SPDX-License-Identifier: Apache-2.0
"""A mixture-of-experts layer in CuPy, or in NumPy without a GPU: `python -m examples.moe_cupy`.

Neither has gradients, so the way back is written out: `activation_topk_backward` is the part of it that belongs to the
router, the rest is the chain rule.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from cupy_router import activation_topk, compiler
from cupy_router.ops.activation_topk_backward import activation_topk_backward
from examples import tokens


def forward(xp: Any, p: dict[str, Any], x: Any) -> tuple[Any, dict[str, Any]]:
    """[num_tokens, hidden] -> scores of clusters, and what the way back needs."""
    logits = x @ p["gate"].T
    weights, indices = activation_topk(logits, tokens.METHOD)
    mix = xp.zeros((len(x), tokens.METHOD.num_experts), xp.float32)
    mix[xp.arange(len(x))[:, None], indices] = weights
    inner = xp.maximum(xp.einsum("nh,ehw->enw", x, p["up"], optimize=True), 0)  # every expert sees every token
    said = inner @ p["down"]  # [num_experts, num_tokens, hidden]
    mixed = x + xp.einsum("ne,enh->nh", mix, said)
    kept = {"x": x, "logits": logits, "indices": indices, "mix": mix, "inner": inner, "said": said, "mixed": mixed}
    return mixed @ p["head"], kept


def backward(xp: Any, p: dict[str, Any], kept: dict[str, Any], by_scores: Any) -> dict[str, Any]:
    """The gradients by all parameters."""
    x, mix, inner = kept["x"], kept["mix"], kept["inner"]
    by_mixed = by_scores @ p["head"].T
    by_said = mix.T[:, :, None] * by_mixed
    by_inner = (by_said @ p["down"].swapaxes(1, 2)) * (inner > 0)
    by_mix = xp.einsum("enh,nh->ne", kept["said"], by_mixed)
    by_weights = xp.take_along_axis(by_mix, kept["indices"], axis=1)
    by_logits = activation_topk_backward(by_weights, kept["indices"], kept["logits"], tokens.METHOD).grad_logits
    return {
        "head": kept["mixed"].T @ by_scores,
        "down": inner.swapaxes(1, 2) @ by_said,
        "up": x.T @ by_inner,
        "gate": by_logits.T @ x,
    }


def train(steps: int = 200) -> list[float]:
    """The loss of each step."""
    xp: Any = np if compiler.why_no_cuda() else compiler.require_cuda()
    hidden, clusters = map(xp.asarray, tokens.load())
    p = {name: xp.asarray(value) for name, value in tokens.parameters().items()}
    velocity = {name: xp.zeros_like(value) for name, value in p.items()}
    losses = []
    for batch in tokens.batches(steps):
        x, wanted = hidden[batch], xp.eye(tokens.CLUSTERS, dtype=xp.float32)[clusters[batch]]
        scores, kept = forward(xp, p, x)
        scores -= scores.max(axis=1, keepdims=True)
        log_sum = xp.log(xp.exp(scores).sum(axis=1, keepdims=True))
        losses.append(((log_sum - scores) * wanted).sum() / len(x))
        found = backward(xp, p, kept, (xp.exp(scores - log_sum) - wanted) / len(x))
        for name in p:
            velocity[name] = tokens.MOMENTUM * velocity[name] + found[name]
            p[name] = p[name] - tokens.LEARNING_RATE * velocity[name]
    return [float(loss) for loss in losses]


if __name__ == "__main__":
    for step, loss in enumerate(train()):
        if step % 20 == 19:
            print(f"step {step + 1:3}: loss {loss:.3f}")
