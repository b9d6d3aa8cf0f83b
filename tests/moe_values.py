# SPDX-License-Identifier: Apache-2.0
"""Random weights that make the routing of small models depend on every tensor of their routers; random inputs."""

from __future__ import annotations

import inspect
import zlib
from typing import Any

import torch

from tests.moe_configs import SIZES

TOKENS = 24  # in each of two rows

_SPREAD = {"softmax": 0.05, "sigmoid": 0.2, "sqrtsoftplus": 0.4, "identity": 1.0}  # of scores


def fill(model: Any, routers: list[Any]) -> None:
    """Fill a model with random values that make routing depend on every tensor of a router.

    Fresh routers have no biases, scales of 1 and nearly uniform scores.
    """
    random = torch.Generator().manual_seed(zlib.crc32(type(model).__name__.encode()))
    for parameter in model.parameters():
        if parameter.ndim >= 2:
            parameter.normal_(std=max(parameter.shape[-2:]) ** -0.5, generator=random)
    for router in routers:
        plan = router._cupy_router
        gate = tensor_at(router, plan.gate)
        gate.normal_(std=2 * gate.shape[-1] ** -0.5, generator=random)
        for role, tensor in tensors_of(model, router):
            if role == "table":
                shuffled = torch.rand(len(tensor), plan.method.num_experts, generator=random).argsort()
                tensor.copy_(shuffled[:, : plan.method.top_k])
            elif role in ("bias", "logit_bias"):
                on_scores = role == "bias" and not plan.method.selects_on_logits
                tensor.normal_(std=_SPREAD[plan.method.score] if on_scores else 1.0, generator=random)
            else:
                tensor.copy_(0.5 + torch.rand(tensor.shape, generator=random))


def tensor_at(module: Any, path: str) -> Any:
    for name in path.split("."):
        module = getattr(module, name)
    return module


def tensors_of(model: Any, router: Any) -> list[tuple[str, Any]]:
    """Return role and tensor of each tensor of a router besides the gate, including those that its block passes in."""
    plan = router._cupy_router
    found = [(role, tensor_at(router, path)) for role, path in plan.tensors.items()]
    for role, name in plan.arguments:
        if role == "bias":
            block = next(module for module in model.modules() if router in module.children())
            found.append((role, getattr(block, name, None)))
    return [(role, tensor) for role, tensor in found if tensor is not None]


def cast(model: Any, routers: list[Any], device: str, dtype: Any) -> None:
    """Cast a model as loading it in that dtype would: some tensors of routers stay in float32."""
    of_routers = {id(tensor) for router in routers for tensor in (*router.parameters(), *router.buffers())}
    of_routers |= {id(tensor) for router in routers for _, tensor in tensors_of(model, router)}
    kept = getattr(model, "_keep_in_fp32_modules_strict", None) or ()
    exact = {
        name: tensor.clone()
        for name, tensor in (*model.named_parameters(), *model.named_buffers())
        if id(tensor) in of_routers and any(f".{key}." in f".{name}." for key in kept)
    }
    model.to(device, dtype)
    for name, tensor in (*model.named_parameters(), *model.named_buffers()):
        if name in exact:
            tensor.data = exact[name].to(device)


def inputs_of(model: Any, device: str, dtype: Any) -> dict[str, Any]:
    """Random inputs of a model."""
    random = torch.Generator().manual_seed(7)
    taken = inspect.signature(type(model).forward).parameters
    tokens = torch.randint(5, SIZES["vocab_size"] - 1, (2, TOKENS), generator=random)
    given: dict[str, Any] = {"input_ids": tokens}
    if "grid_thw" in taken:  # patches of images
        width = model.config.num_channels * model.config.patch_size**2
        given = {"pixel_values": torch.randn(TOKENS, width, generator=random), "grid_thw": torch.tensor([[1, 4, 6]])}
    elif type(model).__name__ == "Qwen3OmniMoeTalkerModel":  # it speaks after hidden states of another model
        hidden = model.config.get_text_config().hidden_size
        given = {"inputs_embeds": torch.randn(*tokens.shape, hidden, generator=random)}
    if "decoder_input_ids" in taken:
        given["decoder_input_ids"] = tokens.flip(1)
    moved = {name: value.to(device, dtype if value.is_floating_point() else None) for name, value in given.items()}
    return moved if "grid_thw" in taken else {**moved, "use_cache": False}
