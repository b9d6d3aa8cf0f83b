# SPDX-License-Identifier: Apache-2.0
"""Description of a router module of a Hugging Face model."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from cupy_router.method import RoutingMethod

INLINE = "route_tokens_to_experts"  # method of sparse blocks that route without a router module
SORTED = ("order", "rows", "gates", "sizes", "logits")  # results of routers that sort the pairs by expert
FLAT = ("flat logits",)  # result of gates that return [num_tokens, num_logits] for [batch, sequence, hidden], too


class Unsupported(Exception):
    """Reason why a router is not swapped."""


class ResultTypes(NamedTuple):
    """Results of a router for one dtype of the hidden states and one of the gate."""

    method: RoutingMethod  # with the module's dtypes of weights and indices
    dtypes: tuple[Any, ...]  # dtype of each result


@dataclass(frozen=True)
class RouterSpec:
    """Description of a router module, as plain data that copies and pickles of the module include."""

    method: RoutingMethod
    gate: str  # path of the gate's weight
    call: str  # name of the Python method that routes
    arguments: tuple[tuple[str, str], ...]  # role and name of each argument of that method, in order
    outputs: tuple[str, ...] = ()  # role of each result
    ranks: tuple[int, ...] = (2, 3)  # numbers of dimensions of x, or of logits, for which results are known to be equal
    in_training: bool = True  # they are in training, too
    results: Mapping[tuple[Any, Any], ResultTypes] = field(default_factory=dict, repr=False)  # by dtypes of x and gate
    tensors: Mapping[str, str] = field(default_factory=dict)  # role of a tensor -> its path
    noise: tuple[str, ...] = ()  # attributes with the amount of noise in training


def by_role(spec: RouterSpec, args: tuple[Any, ...], kwargs: dict[str, Any]) -> dict[str, Any]:
    """Return the arguments of a call by role, with None for those left out."""
    return {
        role: args[place] if place < len(args) else kwargs.get(name)
        for place, (role, name) in enumerate(spec.arguments)
    }
