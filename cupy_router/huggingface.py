# SPDX-License-Identifier: Apache-2.0
"""Names of a router's arrays in DeepSeek and Hugging Face checkpoints. Works on keys, not on arrays."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import NamedTuple

from cupy_router.method import RoutingMethod

# Path from a prefix (a layer, its sparse block, or the router itself) to the module whose `weight` is the gate: the
# router or a linear layer in it.
_BLOCKS = ("", "mlp.", "ffn.", "block_sparse_moe.", "feed_forward.", "moe.")
_ROUTERS = ("gate.", "router.")
_LINEARS = ("wg.", "classifier.", "layer.", "proj.")
_NESTED = ("router.gate.", *(router + linear for router in _ROUTERS for linear in _LINEARS))

# Role of each tensor of a router besides the gate, by its name in the checkpoint.
TENSORS = {
    "e_score_correction_bias": "bias",
    "moe_statics.e_score_correction_bias": "bias",
    "experts.e_score_correction_bias": "bias",
    "expert_bias": "bias",
    "router_bias": "bias",
    "bias": "logit_bias",  # in DeepSeek's own checkpoints it is the bias that only selects
    "per_expert_scale": "expert_scale",
    "global_scale": "total_scale",  # factor of all weights
    "scale": "input_scale",  # factor of the input, applied after a norm without weights
    "tid2eid": "table",
}


class Keys(NamedTuple):
    """Keys of a router's arrays; None for an array that it does not have."""

    weight: str
    bias: str | None = None
    logit_bias: str | None = None
    expert_scale: str | None = None
    table: str | None = None


def router_keys(keys: Iterable[str], prefix: str, method: RoutingMethod) -> Keys:
    """Return the keys of the router at `prefix`: a layer, its sparse block or the router, with or without a last dot.

    Raises:
        ValueError: There is no gate, a bias is ambiguous, or the router has a tensor that Router does not support.

    >>> keys = ["layers.3.ffn.gate.weight", "layers.3.ffn.gate.bias", "layers.4.ffn.gate.weight"]
    >>> router_keys(keys, "layers.3.ffn", RoutingMethod(8, 2))[:2]
    ('layers.3.ffn.gate.weight', 'layers.3.ffn.gate.bias')
    >>> router_keys(["mlp.router.weight", "mlp.router.bias"], "", RoutingMethod(8, 2, score_after_topk=True)).logit_bias
    'mlp.router.bias'
    """
    known = set(keys)
    gate = _gate(known, prefix)
    # The module of the router. The bias that only selects may also belong to a module above it.
    router = _folder_above(gate) if _is_nested(gate) else gate
    found = {"weight": f"{gate}weight"}
    for role, folders in {"bias": _folders(gate), "expert_scale": (gate, router), "table": (gate, router)}.items():
        names = [name for name in TENSORS if TENSORS[name] == role]
        key = next((folder + name for folder in folders for name in names if folder + name in known), None)
        if key is not None:
            found[role] = key
    linear = f"{gate}bias"
    if linear in known:
        found[_role_of_linear_bias(linear, gate, "bias" in found, method)] = linear
    others = sorted(key for key in known if key.startswith(router) and key not in found.values())
    if others:
        raise ValueError(f"{others[0]} is part of the router of {gate}weight, but nothing that a Router can take")
    return Keys(**found)


def _gate(known: set[str], prefix: str) -> str:
    """Return the path of the module that holds the gate, with a last dot."""
    start = prefix if not prefix or prefix.endswith(".") else f"{prefix}."
    below = [*_ROUTERS, *_NESTED]
    # The router first: if the prefix is the router, there is no other gate below it.
    gates = [start, *(f"{start}{block}{gate}" for block in _BLOCKS for gate in below)]
    if not start or f".{start}".endswith((".gate.", ".router.")):
        gates += [start + linear for linear in _LINEARS]
    found = next((gate for gate in gates if f"{gate}weight" in known), None)
    if found is None:
        there = sorted(key for key in known if key.startswith(start))
        raise ValueError(
            f"no gate at prefix {prefix!r}: looked for {start}weight, {start}gate.weight, {start}mlp.gate.weight and "
            f"the like, but the keys there are {', '.join(there[:8]) + (', ...' if len(there) > 8 else '') or 'none'}"
        )
    return found


def _is_nested(gate: str) -> bool:
    """Return True if the gate is a linear layer in the router, False if it is the router's own weight."""
    return gate in _LINEARS or f".{gate}".endswith(tuple(f".{nested}" for nested in _NESTED))


def _role_of_linear_bias(key: str, gate: str, has_bias: bool, method: RoutingMethod) -> str:
    """Return the role of the `bias` beside the gate: part of a linear layer, or DeepSeek's bias that only selects."""
    if method.score_after_topk and method.bias_on == "score":
        return "logit_bias"  # the method allows no other
    deepseek = not has_bias and not _is_nested(gate) and not f".{gate}".endswith(".router.")
    if deepseek and plain_bias_selects(method):
        return "bias"
    raise ValueError(
        f"{key} may be a bias that only selects (bias) or one that is part of the logits (logit_bias), and neither its "
        "name nor the method says which: give the arrays to Router by these names"
    )


def plain_bias_selects(method: RoutingMethod) -> bool:
    """Return True if a `bias` beside a gate of DeepSeek's only selects: the method selects by such scores."""
    return not method.selects_on_logits and method.score in ("sigmoid", "sqrtsoftplus")


def _folder_above(folder: str) -> str:
    return folder[: folder.rfind(".", 0, -1) + 1]


def _folders(gate: str) -> Iterator[str]:
    """Yield the path of the gate's module and of up to two modules above it."""
    parts = gate.split(".")[:-1]
    for length in range(len(parts), max(len(parts) - 3, -1), -1):
        yield "".join(f"{part}." for part in parts[:length])
