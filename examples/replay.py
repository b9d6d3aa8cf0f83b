# SPDX-License-Identifier: Apache-2.0
"""Router replay in PyTorch: `python -m examples.replay`, on a GPU if there is one.

A rollout by a model in bfloat16 samples an action for each token and records the experts of every layer, [layers,
tokens, top_k] uint8. Training steps of the same model in float32 replay them, so that the loss is that of the experts
that acted. Without replay, rounding sends some tokens to other experts, and the probabilities of their actions differ
from those of the rollout: the mismatch that is printed beside.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any, NamedTuple

import torch

from cupy_router import Routing, dense_router
from examples import tokens

LAYERS, LEARNING_RATE = 3, 0.3
METHOD = replace(tokens.METHOD, index_dtype="uint8")


class Policy(torch.nn.Module):  # type: ignore[misc]  # Any where torch is not installed
    """Layers of experts, of which each token has METHOD.top_k in every layer."""

    def __init__(self) -> None:
        super().__init__()
        for name, value in tokens.parameters().items():
            shift = [torch.from_numpy(value).roll(layer, 0) for layer in range(LAYERS)]  # no two layers are the same
            setattr(self, name, torch.nn.Parameter(shift[0] if name == "head" else torch.stack(shift)))

    def forward(self, x: Any, *, record: Any = None, replay: Any = None) -> Any:
        """Return the logits of all actions. record, replay: [layers, num_tokens, top_k], to fill, or to follow."""
        for layer in range(LAYERS):
            gate = self.gate[layer]
            if replay is not None:
                weights, indices = dense_router(x, gate, METHOD, indices=replay[layer], unset="empty")
            elif record is not None:
                weights = x.new_empty(record[layer].shape, dtype=torch.float32)
                weights, indices = dense_router(x, gate, METHOD, out=Routing(weights, record[layer]))
            else:
                weights, indices = dense_router(x, gate, METHOD)
            mix = weights.new_zeros(len(x), METHOD.num_experts).scatter(1, indices.long(), weights)
            inner = torch.relu(x @ self.up[layer]) * mix.T[:, :, None].to(x.dtype)  # [num_experts, num_tokens, width]
            x = x + (inner @ self.down[layer]).sum(dim=0)
        return x @ self.head


class Rollout(NamedTuple):
    """What a rollout leaves: actions [num_tokens], their log probabilities, and experts [layers, num_tokens, top_k]."""

    actions: Any
    log_probabilities: Any
    experts: Any


@torch.no_grad()  # type: ignore[untyped-decorator]
def roll_out(policy: Policy, x: Any) -> Rollout:
    """Sample an action for each token by a copy of the policy in bfloat16."""
    actor = Policy().to(x.device, torch.bfloat16)
    actor.load_state_dict(policy.state_dict())
    experts = torch.empty(LAYERS, len(x), METHOD.top_k, dtype=torch.uint8, device=x.device)
    logits = actor(x.bfloat16(), record=experts).float()
    actions = torch.distributions.Categorical(logits=logits).sample()
    return Rollout(actions, log_probabilities_of(logits, actions), experts)


def log_probabilities_of(logits: Any, actions: Any) -> Any:
    """Return the log probability of each token's action."""
    return logits.log_softmax(dim=-1).gather(1, actions[:, None])[:, 0]


def loss_of(log_probabilities: Any, rollout: Rollout, rewards: Any) -> Any:
    """Return the clipped policy gradient loss."""
    ratio = (log_probabilities - rollout.log_probabilities).exp()
    advantages = rewards - rewards.mean()
    return -torch.minimum(ratio * advantages, ratio.clamp(0.8, 1.2) * advantages).mean()


class Step(NamedTuple):
    """What a step reports: its loss, mean reward and mismatch, and the mismatch that it would have without replay."""

    loss: float
    reward: float
    mismatch: float
    without_replay: float


def train(steps: int = 20) -> list[Step]:
    """Let the policy learn to name the cluster of the next token."""
    torch.manual_seed(0)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    hidden, clusters = (torch.from_numpy(array).to(device) for array in tokens.load())
    policy = Policy().to(device)
    optimizer = torch.optim.SGD(policy.parameters(), LEARNING_RATE, tokens.MOMENTUM)
    reports = []
    for batch in tokens.batches(steps):
        x, wanted = hidden[torch.from_numpy(batch)], clusters[torch.from_numpy(batch)]
        rollout = roll_out(policy, x)
        rewards = (rollout.actions == wanted).float()
        replayed = log_probabilities_of(policy(x, replay=rollout.experts), rollout.actions)
        loss = loss_of(replayed, rollout, rewards)
        with torch.no_grad():
            selected = log_probabilities_of(policy(x), rollout.actions)
        mismatches = [(p.detach() - rollout.log_probabilities).abs().max() for p in (replayed, selected)]
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        reports.append(Step(float(loss.detach()), float(rewards.mean()), *map(float, mismatches)))
    return reports


if __name__ == "__main__":
    print("largest difference of a log probability from that of the rollout")
    for number, step in enumerate(train()):
        print(
            f"step {number + 1:3}: loss {step.loss:7.4f}, reward {step.reward:.3f}, "
            f"mismatch {step.mismatch:.3f} with replay, {step.without_replay:.3f} without"
        )
