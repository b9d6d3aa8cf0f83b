# SPDX-License-Identifier: Apache-2.0
"""Names of a Gate's arrays in checkpoints. In memory they have those of Hugging Face."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import torch

from cupy_router.huggingface import LINEARS, TENSORS, plain_bias_selects
from cupy_router.method import RoutingMethod

BIAS, DEEPSEEK_BIAS, BUFFERS = "e_score_correction_bias", "bias", ("e_score_correction_bias", "tid2eid")

# Arrays that are float32 whatever the dtype of the gate, with their initial value.
FLOAT32 = {BIAS: 0.0, "bias": 0.0, "per_expert_scale": 1.0}


def named_as_ours(state: Mapping[str, Any], prefix: str, names: Iterable[str], method: RoutingMethod) -> dict[str, Any]:
    """Return a state dict with our names for the arrays below a prefix, those of `FLOAT32` in float32.

    names: those that the gate has.
    """
    found, names = dict(state), list(names)
    for name in names:
        others = [other for other, role in TENSORS.items() if role == TENSORS.get(name) and other != name]
        if name == "weight":
            others += [f"{linear}weight" for linear in (*LINEARS, "gate.")]  # of a linear layer in a router
        if name == BIAS and "bias" not in names and plain_bias_selects(method):
            others.append(DEEPSEEK_BIAS)
        for key in (prefix + other for other in others):
            if key in found and prefix + name not in found:
                found[prefix + name] = found.pop(key)
        value = found.get(prefix + name)
        if isinstance(value, torch.Tensor):
            found[prefix + name] = _as_loaded(name, value, method.num_experts)
    return found


def _as_loaded(name: str, value: Any, num_experts: int) -> Any:
    """Return the value of an array as it is to be loaded: assign=True would keep its dtype and its class."""
    if name in BUFFERS:
        value = value.detach()
    if name in FLOAT32 and value.shape == (1, num_experts):  # the shape that some checkpoints have
        value = value.detach().reshape(num_experts)
    if name in FLOAT32 and value.dtype != torch.float32:
        value = value.detach().float()
    return value


def name_as_deepseek(state: dict[str, Any], prefix: str, method: RoutingMethod) -> None:
    """Rename the bias of the gate at a prefix.

    Raises:
        ValueError: The gate has a bias that would be taken for another one.
    """
    ours, deepseek = prefix + BIAS, prefix + DEEPSEEK_BIAS
    selects = plain_bias_selects(method)
    if (ours in state and not selects) or (deepseek in state and selects):
        given = [argument for argument, key in (("bias", ours), ("logit_bias", deepseek)) if key in state]
        raise ValueError(
            f"deepseek_state_dict: {deepseek} is the bias of methods that select by sigmoid or sqrtsoftplus scores and "
            f"the logit_bias of others, but this gate has {' and '.join(given)} with {method}"
        )
    if ours in state:
        state[deepseek] = state.pop(ours)


def as_float32(tensor: Any) -> Any:
    """Return the tensor itself if it is float32 or None."""
    return tensor if tensor is None or tensor.dtype == torch.float32 else tensor.float()
