# SPDX-License-Identifier: Apache-2.0
"""Train a mixture-of-experts layer in PyTorch: `python -m examples.moe_pytorch`, on a GPU if there is one.

Every expert processes every token. The output is the sum weighted by the router, with weight 0 for experts that are
not selected.
"""

from __future__ import annotations

from typing import Any

import torch

from cupy_router.torch import Gate
from examples import tokens


def plain_router(x: Any, weight: Any) -> tuple[Any, Any]:
    """Compute the same as the Gate, in plain PyTorch."""
    scores = torch.nn.functional.softplus(x @ weight.T).sqrt()
    weights, indices = scores.topk(tokens.METHOD.top_k, dim=1)
    return weights / weights.sum(dim=1, keepdim=True), indices


class MoE(torch.nn.Module):  # type: ignore[misc]  # Any where torch is not installed
    def __init__(self, plain: bool = False) -> None:
        super().__init__()
        initial = {name: torch.from_numpy(value) for name, value in tokens.parameters().items()}
        self.gate = Gate(initial["gate"].shape[1], tokens.METHOD)
        self.gate.load_state_dict({"weight": initial.pop("gate")})
        for name, value in initial.items():
            setattr(self, name, torch.nn.Parameter(value))
        self.plain = plain

    def forward(self, x: Any) -> Any:
        """Return the cluster logits of x [num_tokens, hidden]."""
        weights, indices = plain_router(x, self.gate.weight) if self.plain else self.gate(x)
        mix = x.new_zeros(x.shape[0], tokens.METHOD.num_experts).scatter(1, indices.long(), weights)
        inner = torch.relu(x @ self.up) * mix.T[:, :, None]  # [num_experts, num_tokens, width]
        return (x + (inner @ self.down).sum(dim=0)) @ self.head


def train(steps: int = 200, plain: bool = False) -> list[float]:
    """Return the loss of each step."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    hidden, clusters = (torch.from_numpy(array).to(device) for array in tokens.load())
    model = MoE(plain).to(device)
    optimizer = torch.optim.SGD(model.parameters(), tokens.LEARNING_RATE, tokens.MOMENTUM)
    losses = []
    for batch in tokens.batches(steps):
        rows = torch.from_numpy(batch).to(device)
        loss = torch.nn.functional.cross_entropy(model(hidden[rows]), clusters[rows])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.detach())
    return [float(loss) for loss in losses]


if __name__ == "__main__":
    for step, loss in enumerate(train()):
        if step % 20 == 19:
            print(f"step {step + 1:3}: loss {loss:.3f}")
