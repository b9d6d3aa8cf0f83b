# SPDX-License-Identifier: Apache-2.0
"""The steps from logits to scores in PyTorch, for functions that need more than the ops return."""

from __future__ import annotations

from typing import Any

import torch

from cupy_router.method import RoutingMethod


def prepare_logits(logits: Any, method: RoutingMethod) -> Any:
    """Return the logits, with their bias, after step 2 of docs/methods.md, in their own dtype."""
    if method.logit_scale != 1.0:
        logits = logits * method.logit_scale
    if method.logit_softcap is not None:
        logits = method.logit_softcap * torch.tanh(logits / method.logit_softcap)
    return logits
