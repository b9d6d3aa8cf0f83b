# SPDX-License-Identifier: Apache-2.0
"""Calls that return logits, with products that are exact in any order, for tests of every framework."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np

from cupy_router import Router, RoutingMethod, dense_router, hash_router
from tests import inputs, oracle
from tests.backends import DTYPES
from tests.methods import METHODS

KINDS = ("dense_router", "dense_router decode", "dense_router prefill", "hash_router", "Router", "hash Router")
VOCABULARY, HIDDEN = 40, 48
LAYER = ("logit_bias", "expert_scale")


def exact(*shape: int, seed: int, dtype: str = "float32") -> np.ndarray:
    """Return multiples of 1/8 in [-1, 1], which every dtype holds, as do float32 sums of their products."""
    values: np.ndarray = (inputs.rng(seed, *shape).integers(-8, 9, shape) / 8).astype(DTYPES[dtype])
    return values


@dataclass(frozen=True)
class Call:
    """A call of one of KINDS: with a method of tests.methods, and some number of tokens."""

    kind: str
    name: str = "logit scale and soft cap"
    n: int = 9
    dtype: str = "float32"
    given: tuple[str, ...] = ()  # of a layer
    hidden: int = HIDDEN

    @property
    def method(self) -> RoutingMethod:
        return METHODS[self.name]

    @property
    def is_hash(self) -> bool:
        return self.kind.startswith("hash")

    def arrays(self) -> dict[str, np.ndarray]:
        """Return the arrays by name; of a table, some token ids do not exist, and an expert of one."""
        method = self.method
        made = {
            "x": exact(self.n, self.hidden, seed=700, dtype=self.dtype),
            "weight": exact(method.num_logits, self.hidden, seed=701, dtype=self.dtype),
        }
        layer = {name: exact(method.num_experts, seed=702 + place) for place, name in enumerate(LAYER)}
        made |= {name: layer[name] for name in self.given}
        if self.is_hash:
            token_ids = inputs.rng(704, self.n).integers(0, VOCABULARY, self.n)
            token_ids[1::5], token_ids[3::5] = -1, 7
            rows = [inputs.rng(705, row).permutation(method.num_experts)[: method.top_k] for row in range(VOCABULARY)]
            table = np.stack(rows)
            table[7, -1] = method.num_experts
            made |= {"token_ids": token_ids.astype(np.int32), "table": table.astype(np.int32)}
        return made

    def __call__(self, arrays: dict[str, Any], **more: Any) -> Any:
        """Call with arrays of any framework, by the names of :meth:`arrays`."""
        return self.function()(arrays, **more)

    def function(self) -> Callable[..., Any]:
        """Return a function of arrays and options."""
        method = self.method

        def function(arrays: dict[str, Any], **more: Any) -> Any:
            given = dict(arrays)
            if self.kind.startswith("dense_router"):
                path = self.kind.partition(" ")[2] or None
                return dense_router(given.pop("x"), given.pop("weight"), method, path=path, **given, **more)
            if self.kind == "hash_router":
                return hash_router(given.pop("token_ids"), given.pop("table"), method, **given, **more)
            x, token_ids = given.pop("x"), given.pop("token_ids", None)
            return Router(method, **given)(x, token_ids, **more)

        return function

    def logits(self, num_valid: int | None = None, dtype: str = "float32") -> np.ndarray:
        """Return the logits: the products and the bias of experts, without scale and cap; 0 in padding."""
        arrays = self.arrays()
        found = oracle.gate_logits(arrays["x"], arrays["weight"])
        if "logit_bias" in arrays:
            found[:, : self.method.num_experts] += arrays["logit_bias"]
        if num_valid is not None:
            found[num_valid:] = 0
        return found.astype(DTYPES[dtype])
