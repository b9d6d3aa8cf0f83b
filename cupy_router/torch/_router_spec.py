# SPDX-License-Identifier: Apache-2.0
"""Description of a router module of a Hugging Face model."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from cupy_router.arrays._torch import name_of
from cupy_router.method import RoutingMethod
from cupy_router.ops import dense_router, hash_router
from cupy_router.ops._given import ROUTE
from cupy_router.results import RoutingWithLogits
from cupy_router.torch._library import Prepared, prepare

INLINE = "route_tokens_to_experts"  # method of sparse blocks that route without a router module
SORTED = ("order", "rows", "gates", "sizes", "logits")  # results of routers that sort the pairs by expert
FLAT = ("flat logits",)  # result of gates that return [num_tokens, num_logits] for [batch, sequence, hidden], too


class Unsupported(Exception):
    """Reason why a router is not swapped."""


class ResultTypes(NamedTuple):
    """Results of a router for one dtype of the hidden states and one of the gate."""

    method: RoutingMethod  # with the module's dtypes of weights and indices
    dtypes: tuple[Any, ...]  # dtype of each result


class Plan(NamedTuple):
    """The call of a swapped router, for one dtype of the hidden states and one of the gate.

    method: With the module's dtypes of weights and indices.
    dtypes: Those of the module's results.
    options: Those of `dense_router`, or of `hash_router` if there is a table, as the tuple of their fields.
    places: Places of the module's results among those of the op; None if they are computed from these.
    node: The same call in graphs.
    """

    method: RoutingMethod
    dtypes: tuple[Any, ...]
    options: tuple[Any, ...]
    places: tuple[int, ...] | None
    node: Prepared


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
    batch_invariant: bool = False  # rows are the same to the bit in any batch
    plans: Mapping[tuple[Any, Any], Plan] = field(init=False, repr=False)  # by dtypes of x and gate
    layer: tuple[str | int | None, ...] = field(init=False, repr=False)  # sources of the arrays of a layer

    def __post_init__(self) -> None:
        layer = tuple(
            [self._source(role) for role in ("bias", "bias_index", "logit_bias", "expert_scale", "given_experts")]
        )
        object.__setattr__(self, "layer", layer)
        object.__setattr__(self, "plans", {dtypes: _plan(self, *found) for dtypes, found in self.results.items()})

    def _source(self, role: str) -> str | int | None:
        """Return the path of a tensor in the module, or its place among the arguments; None if there is none."""
        places = [place for place, (argument, _) in enumerate(self.arguments) if argument == role]
        return places[0] if places else self.tensors.get(role)


def _plan(spec: RouterSpec, method: RoutingMethod, dtypes: tuple[Any, ...]) -> Plan:
    """Let the kernel write the module's results, in their dtypes, where these are results of the op."""
    outputs, fields = spec.outputs, RoutingWithLogits._fields
    computed = method.logit_scale != 1.0 or method.logit_softcap is not None  # the module's logits from those of the op
    logits_dtype = None
    if "logits" in outputs and not computed:
        logits_dtype = name_of(dtypes[outputs.index("logits")])
    elif {"logits", "probabilities"} & set(outputs):
        logits_dtype = "float32"
    more = "total_scale" in spec.tensors or method.num_shared_experts or (computed and "logits" in outputs)
    places = None if more or not set(outputs) <= set(fields) else tuple([fields.index(name) for name in outputs])
    is_hash = "table" in spec.tensors
    options: tuple[Any, ...] = (method, None, logits_dtype) if is_hash else (method, None, None, logits_dtype)
    if spec.batch_invariant:
        options = (*options, ROUTE, True)
    return Plan(method, dtypes, options, places, prepare(hash_router.OP if is_hash else dense_router.OP, options))


def by_role(spec: RouterSpec, args: tuple[Any, ...], kwargs: dict[str, Any]) -> dict[str, Any]:
    """Return the arguments of a call by role, with None for those left out."""
    return {role: argument(spec, place, args, kwargs) for place, (role, _) in enumerate(spec.arguments)}


def argument(spec: RouterSpec, place: int, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """Return one argument of a call, None if it was left out."""
    return args[place] if place < len(args) else kwargs.get(spec.arguments[place][1])
