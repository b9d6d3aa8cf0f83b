# SPDX-License-Identifier: Apache-2.0
"""The gate product where PyTorch makes it: for models that return logits, and for gradients by x and the gate."""

from __future__ import annotations

from typing import Any

import torch

# From this version on, CUDA multiplies 16-bit floats with a float32 result.
_HAS_MIXED_PRODUCT = tuple(int(part) for part in torch.__version__.split(".")[:2]) >= (2, 8)


def gate_product(x: Any, weight: Any) -> Any:
    """Logits [num_tokens, rows of the gate] in float32, never rounded to less, whatever the dtypes and autocast.

    x: [num_tokens, hidden], weight: [rows of the gate, hidden], floats on one device.
    """
    if torch.is_autocast_enabled(x.device.type):
        with torch.autocast(x.device.type, enabled=False):
            return gate_product(x, weight)
    if _HAS_MIXED_PRODUCT and x.is_cuda and x.dtype == weight.dtype != torch.float32:
        return torch.mm(x, weight.t(), out_dtype=torch.float32)
    return torch.nn.functional.linear(x.float(), weight.float())
