# SPDX-License-Identifier: Apache-2.0
"""What DeepSeek and Hugging Face checkpoints call the arrays of a router: key names in, key names out, no arrays."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import NamedTuple

# From a prefix (a layer, its sparse block, or the router itself) to the module whose `weight` is the gate.
_BLOCKS = ("", "mlp.", "ffn.", "block_sparse_moe.", "feed_forward.", "moe.")
_GATES = ("gate.", "router.", "router.gate.", "router.layer.", "gate.wg.", "router.classifier.")

# From that module's folder, or one of those above it, to the bias that only selects.
_BIASES = ("e_score_correction_bias", "moe_statics.e_score_correction_bias", "expert_bias")


class Keys(NamedTuple):
    """The keys of a router's arrays; None for what it does not have."""

    weight: str
    bias: str | None
    table: str | None


def router_keys(keys: Iterable[str], prefix: str) -> Keys:
    """The keys of the router at `prefix`: a layer, its sparse block or the router itself, with or without a last dot.

    Raises:
        ValueError: there is no gate, or a bias whose meaning a router does not know.

    >>> router_keys(["layers.3.ffn.gate.weight", "layers.3.ffn.gate.bias"], "layers.3.ffn")
    Keys(weight='layers.3.ffn.gate.weight', bias='layers.3.ffn.gate.bias', table=None)
    >>> router_keys(["model.layers.0.mlp.gate.weight", "model.layers.0.mlp.gate.tid2eid"], "model.layers.0.")
    Keys(weight='model.layers.0.mlp.gate.weight', bias=None, table='model.layers.0.mlp.gate.tid2eid')
    """
    known = set(keys)
    start = prefix if not prefix or prefix.endswith(".") else f"{prefix}."
    # The router itself first: a prefix that ends in it has no other gate below.
    gates = [start, *(f"{start}{block}{gate}" for block in _BLOCKS for gate in _GATES)]
    found = next((gate for gate in gates if f"{gate}weight" in known), None)
    if found is None:
        below = sorted(key for key in known if key.startswith(start))
        raise ValueError(
            f"no gate at prefix {prefix!r}: looked for {start}weight, {start}gate.weight, {start}mlp.gate.weight and "
            f"the like, but the keys there are {', '.join(below[:8]) + (', ...' if len(below) > 8 else '') or 'none'}"
        )
    bias = next((folder + name for folder in _folders(found) for name in _BIASES if folder + name in known), None)
    linear = f"{found}bias"
    if bias is None and linear in known:
        if found.endswith("router."):
            raise ValueError(f"{linear} is a bias on the logits, which a Router does not take yet")
        bias = linear  # DeepSeek's own name of it
    table = f"{found}tid2eid"
    return Keys(f"{found}weight", bias, table if table in known else None)


def _folders(gate: str) -> Iterator[str]:
    """The folder of the gate and the two above it, as far as there are any."""
    parts = gate.split(".")[:-1]
    for length in range(len(parts), max(len(parts) - 3, -1), -1):
        yield "".join(f"{part}." for part in parts[:length])
