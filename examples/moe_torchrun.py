# SPDX-License-Identifier: Apache-2.0
"""The layer of moe_pytorch.py on several ranks: `torchrun --nproc-per-node 2 -m examples.moe_torchrun`.

Each rank has some of the experts, all of the other parameters, and some of the tokens of each batch. Without torchrun
there is one rank.
"""

from __future__ import annotations

import os
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
import torch.distributed.nn  # before a group exists: its default arguments would hold the group until Python ends

from cupy_router.torch import ExpertParallel
from examples import moe_pytorch, tokens


class MoE(moe_pytorch.MoE):
    def __init__(self, parallel: ExpertParallel) -> None:
        super().__init__()
        self.parallel, (first, count) = parallel, parallel.experts
        self.up = torch.nn.Parameter(self.up.detach()[first : first + count].clone())
        self.down = torch.nn.Parameter(self.down.detach()[first : first + count].clone())

    def forward(self, x: Any) -> Any:
        """Return the cluster logits of the tokens of this rank."""
        rows, layout, ticket = self.parallel.dispatch(x, *self.gate(x))
        inner = torch.relu(moe_pytorch.grouped_mm(rows, self.up, layout.ends))
        y = moe_pytorch.grouped_mm(inner, self.down, layout.ends)
        return (x + self.parallel.combine(y, ticket)) @ self.head


def sum_over_ranks(tensor: Any) -> Any:
    """Return the sum in the order of ranks, the same bits on all of them."""
    parts = [torch.empty_like(tensor) for _ in range(dist.get_world_size())]
    dist.all_gather(parts, tensor.contiguous())
    return torch.stack(parts).sum(dim=0)


def train(steps: int = 200, **options: Any) -> list[float]:
    """Return the loss of each step. options: of ExpertParallel."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    hidden, clusters = (torch.from_numpy(array).to(device) for array in tokens.load())
    model = MoE(ExpertParallel(None, tokens.METHOD.num_experts, **options)).to(device)
    optimizer = torch.optim.SGD(model.parameters(), tokens.LEARNING_RATE, tokens.MOMENTUM)
    losses = []
    for batch in tokens.batches(steps):
        rows = torch.from_numpy(np.array_split(batch, dist.get_world_size())[dist.get_rank()]).to(device)
        loss = torch.nn.functional.cross_entropy(model(hidden[rows]), clusters[rows], reduction="sum") / tokens.BATCH
        optimizer.zero_grad()
        loss.backward()
        for shared in (model.gate.weight, model.head):
            shared.grad = sum_over_ranks(shared.grad)
        optimizer.step()
        losses.append(sum_over_ranks(loss.detach()))
    return [float(loss) for loss in losses]


def main() -> None:
    backend = "nccl" if torch.cuda.is_available() else "gloo"
    if "LOCAL_RANK" in os.environ:  # of torchrun
        if torch.cuda.is_available():
            torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
        dist.init_process_group(backend)
    else:
        dist.init_process_group(backend, store=dist.HashStore(), rank=0, world_size=1)
    for step, loss in enumerate(train()):
        if step % 20 == 19 and dist.get_rank() == 0:
            print(f"step {step + 1:3}: loss {loss:.3f}")
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
