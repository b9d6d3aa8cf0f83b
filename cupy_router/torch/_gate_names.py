# SPDX-License-Identifier: Apache-2.0
"""Names of a Gate's arrays in checkpoints. In memory they have those of Hugging Face."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import torch

from cupy_router.huggingface import LINEARS, TENSORS, plain_bias_is_of_logits, plain_bias_selects
from cupy_router.method import RoutingMethod

BIAS, LOGIT_BIAS, PLAIN, BUFFERS = (
    "e_score_correction_bias",
    "logit_bias",
    "bias",
    ("e_score_correction_bias", "tid2eid"),
)

# Arrays that are float32 whatever the dtype of the gate, with their initial value.
FLOAT32 = {BIAS: 0.0, PLAIN: 0.0, LOGIT_BIAS: 0.0, "per_expert_scale": 1.0}


def logit_bias_name(method: RoutingMethod) -> str:
    """Return the name of the bias of the logits: a plain `bias` only where it cannot be taken for one that selects."""
    return PLAIN if plain_bias_is_of_logits(method) else LOGIT_BIAS


def named_as_ours(
    state: Mapping[str, Any], prefix: str, names: Iterable[str], method: RoutingMethod, errors: list[str]
) -> dict[str, Any]:
    """Return a state dict with our names for the arrays below a prefix, those of `FLOAT32` in float32.

    names: those that the gate has.
    errors: gets what is wrong with the names.
    """
    found, names = dict(state), list(names)
    either = LOGIT_BIAS in names and (BIAS in names or plain_bias_selects(method))
    if either and prefix + LOGIT_BIAS not in found:
        for key in (f"{prefix}{PLAIN}", f"{prefix}gate.{PLAIN}"):
            if found.pop(key, None) is not None:
                errors.append(
                    f"{key} may be the {LOGIT_BIAS} or, as in DeepSeek's checkpoints, a bias that only selects: rename "
                    f"it to {prefix}{LOGIT_BIAS} or {prefix}{BIAS}."
                )
    for name in names:
        for key in (prefix + other for other in _other_names(name, either, method)):
            if key in found and prefix + name not in found:
                found[prefix + name] = found.pop(key)
        value = found.get(prefix + name)
        if isinstance(value, torch.Tensor):
            found[prefix + name] = _as_loaded(name, value, method.num_experts)
    return found


def _other_names(name: str, either: bool, method: RoutingMethod) -> Iterator[str]:
    """Yield the names that an array has in checkpoints; either: a plain bias would not be the one of the logits."""
    role = TENSORS.get(name)
    yield from (other for other in TENSORS if TENSORS[other] == role and other not in (name, PLAIN))
    if name == BIAS and plain_bias_selects(method):
        yield PLAIN
    if name == LOGIT_BIAS and not either:
        yield PLAIN
    if name == "weight" or role == "logit_bias":
        part = PLAIN if role else name
        yield from (f"{linear}{part}" for linear in LINEARS)  # of a linear layer in a router
        if not (role and either):
            yield f"gate.{part}"


def _as_loaded(name: str, value: Any, num_experts: int) -> Any:
    """Return the value of an array as it is to be loaded: assign=True would keep its dtype and its class."""
    if name in BUFFERS:
        value = value.detach()
    if name in FLOAT32 and value.shape == (1, num_experts):  # the shape that some checkpoints have
        value = value.detach().reshape(num_experts)
    if name in FLOAT32 and value.dtype != torch.float32:
        value = value.detach().float()
    return value


def as_deepseek(key: str, method: RoutingMethod) -> str:
    """Return DeepSeek's name for the key of a gate's bias.

    Raises:
        ValueError: It would not be taken for this bias.
    """
    plain = key.removesuffix(BIAS) + PLAIN
    if not plain_bias_selects(method):
        raise ValueError(
            f"deepseek_state_dict: {key} cannot be saved as {plain}, which only selects with methods that "
            f"select by sigmoid or sqrtsoftplus scores, unlike {method}: save model.state_dict()"
        )
    return plain


def as_float32(tensor: Any) -> Any:
    """Return the tensor itself if it is float32 or None."""
    return tensor if tensor is None or tensor.dtype == torch.float32 else tensor.float()
