# SPDX-License-Identifier: Apache-2.0
"""Losses of examples/moe_torchrun.py on several ranks, and of one process that computes the same.

`torchrun --nproc-per-node 2 -m tests.expert_parallel_training STEPS FILE` writes those of all options to the file.
"""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist

from cupy_router import expert_layout, permute, unpermute
from examples import moe_pytorch, moe_torchrun, tokens

OPTIONS: dict[str, dict[str, Any]] = {
    "gather": {},
    "gather, exact": {"exact": True, "max_tokens": tokens.BATCH},
    "exchange": {"method": "exchange"},
    "exchange, exact": {"method": "exchange", "exact": True},
}


def losses_of_one_process(steps: int, num_ranks: int) -> list[float]:
    """Return the losses of one process that has all experts, and routes and judges the tokens of each rank by itself.

    What ranks have in common is copied for each, and the gradients of the copies are added in order.
    """
    device = "cuda" if torch.cuda.is_available() else "cpu"
    hidden, clusters = (torch.from_numpy(array).to(device) for array in tokens.load())
    model = moe_pytorch.MoE().to(device)
    optimizer = torch.optim.SGD(model.parameters(), tokens.LEARNING_RATE, tokens.MOMENTUM)
    losses = []
    for batch in tokens.batches(steps):
        shards = [torch.from_numpy(rows).to(device) for rows in np.array_split(batch, num_ranks)]
        gates = [model.gate.weight.detach().clone().requires_grad_() for _ in shards]
        heads = [model.head.detach().clone().requires_grad_() for _ in shards]
        found = [
            torch.func.functional_call(model.gate, {"weight": gate}, (hidden[rows],))
            for gate, rows in zip(gates, shards, strict=True)
        ]
        weights, indices = (torch.cat(parts) for parts in zip(*found, strict=True))
        x = hidden[torch.cat(shards)]
        layout = expert_layout(indices, tokens.METHOD.num_experts)
        inner = torch.relu(moe_pytorch.grouped_mm(permute(x, layout), model.up, layout.ends))
        y = moe_pytorch.grouped_mm(inner, model.down, layout.ends)
        sums = (x + unpermute(y, layout, weights)).split([len(rows) for rows in shards])
        parts = [
            torch.nn.functional.cross_entropy(out @ head, clusters[rows], reduction="sum") / tokens.BATCH
            for out, head, rows in zip(sums, heads, shards, strict=True)
        ]
        optimizer.zero_grad()
        torch.autograd.backward(parts)
        for shared, copies in ((model.gate.weight, gates), (model.head, heads)):
            shared.grad = torch.stack([copy.grad for copy in copies]).sum(dim=0)
        optimizer.step()
        losses.append(torch.stack([part.detach() for part in parts]).sum(dim=0))
    return [float(loss) for loss in losses]


def main(steps: int, path: Path) -> None:
    if torch.cuda.is_available():
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
    dist.init_process_group("nccl" if torch.cuda.is_available() else "gloo")
    found = {name: moe_torchrun.train(steps, **options) for name, options in OPTIONS.items()}
    if dist.get_rank() == 0:
        path.write_text(json.dumps(found))
    dist.destroy_process_group()


if __name__ == "__main__":
    main(int(sys.argv[1]), Path(sys.argv[2]))
