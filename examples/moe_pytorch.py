# SPDX-License-Identifier: Apache-2.0
"""Train a mixture-of-experts layer in PyTorch: `python -m examples.moe_pytorch`, on a GPU if there is one.

Tokens are brought into the order of their experts, two grouped GEMMs process them, and their sum, weighted by the
router, is added to the token. With a plain router, every expert processes every token instead.
"""

from __future__ import annotations

from typing import Any

import torch

from cupy_router import expert_layout, permute, unpermute, update_bias
from cupy_router.torch import Gate
from examples import tokens


def grouped_mm(rows: Any, matrices: Any, offs: Any) -> Any:
    """Multiply the rows of each expert, which end at offs, by its matrix.

    PyTorch has that from 2.10 on; in graphs, for bfloat16 only. Otherwise multiply every row by every matrix.
    """
    if hasattr(torch.nn.functional, "grouped_mm") and not torch.compiler.is_compiling():
        return torch.nn.functional.grouped_mm(rows, matrices, offs=offs)
    row, first = torch.arange(rows.shape[0], device=rows.device), torch.cat([offs.new_zeros(1), offs[:-1]])
    own = (row >= first[:, None]) & (row < offs[:, None])  # [num_experts, num_rows]
    return (own[:, :, None] * (rows @ matrices)).sum(dim=0)


def plain_router(x: Any, weight: Any) -> tuple[Any, Any]:
    """Compute the same as the Gate, in plain PyTorch."""
    scores = torch.nn.functional.softplus(x @ weight.T).sqrt()
    weights, indices = scores.topk(tokens.METHOD.top_k, dim=1)
    return weights / weights.sum(dim=1, keepdim=True), indices


class MoE(torch.nn.Module):  # type: ignore[misc]  # Any where torch is not installed
    def __init__(self, plain: bool = False) -> None:
        super().__init__()
        initial = {name: torch.from_numpy(value) for name, value in tokens.parameters().items()}
        self.gate = Gate(initial["gate"].shape[1], tokens.METHOD, bias=True)
        self.gate.load_state_dict({"weight": initial.pop("gate")}, strict=False)  # without a bias, which is 0
        self.register_buffer("load", torch.zeros(tokens.METHOD.num_experts, dtype=torch.int32))
        for name, value in initial.items():
            setattr(self, name, torch.nn.Parameter(value))
        self.plain = plain

    def forward(self, x: Any) -> Any:
        """Return the cluster logits of x [num_tokens, hidden]."""
        if self.plain:
            weights, indices = plain_router(x, self.gate.weight)
            mix = x.new_zeros(x.shape[0], tokens.METHOD.num_experts).scatter(1, indices, weights)
            inner = torch.relu(x @ self.up) * mix.T[:, :, None]  # [num_experts, num_tokens, width]
            return (x + (inner @ self.down).sum(dim=0)) @ self.head
        weights, indices = self.gate(x)
        layout = expert_layout(indices, tokens.METHOD.num_experts, load=self.load)
        inner = torch.relu(grouped_mm(permute(x, layout), self.up, layout.ends))  # [num_pairs, width]
        y = grouped_mm(inner, self.down, layout.ends)
        return unpermute(y, layout, weights, residual=x) @ self.head


def train(steps: int = 200, plain: bool = False, balance: float = 0.0) -> list[float]:
    """Return the loss of each step. `balance`: by how much a step moves the bias of an expert."""
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
        bias = model.gate.e_score_correction_bias
        update_bias(bias, model.load, rate=balance, out=bias)
        model.load.zero_()
        losses.append(loss.detach())
    return [float(loss) for loss in losses]


if __name__ == "__main__":
    for step, loss in enumerate(train()):
        if step % 20 == 19:
            print(f"step {step + 1:3}: loss {loss:.3f}")
