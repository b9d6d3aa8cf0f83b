# SPDX-License-Identifier: Apache-2.0
"""Calls with replicas of experts, for tests of every framework."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

from cupy_router import Router, RoutingMethod, activation_topk, dense_router
from tests import inputs
from tests.logit_calls import exact
from tests.methods import METHODS, layer_of

KINDS = ("activation_topk", "dense_router decode", "dense_router prefill", "Router")
HIDDEN, MOST = 40, 5
# A size for each kernel, shared experts and dtypes of indices.
NAMES = ("everything", "8 groups, best 4, top 2", "two shared experts", "float16 weights, int64 indices")
WIDE = ("4096 experts, 64 chosen", "33 columns of results")


@dataclass(frozen=True)
class Call:
    """A call of one of KINDS with a method of tests.methods. Some experts have no replica, and some maps are bad."""

    kind: str
    name: str = "everything"
    n: int = 23
    offset: int = 3
    dtype: str = "int32"  # of replicas and counts
    given: str = ""  # "route" or "empty": experts are given, and what becomes of rows of -1

    @property
    def method(self) -> RoutingMethod:
        return METHODS[self.name]

    @property
    def num_physical(self) -> int:
        return 2 * self.method.num_experts + 3

    def arrays(self) -> dict[str, np.ndarray]:
        """Return the arrays by name. Logits, or those that x and weight give, are exact."""
        method, made = self.method, {}
        if self.kind == "activation_topk":
            made["logits"] = np.ascontiguousarray(inputs.distinct(self.n, method.num_logits, "float32"))
        else:
            made["x"] = exact(self.n, HIDDEN, seed=742, dtype="float32")
            made["weight"] = exact(method.num_logits, HIDDEN, seed=743, dtype="float32")
        layer = layer_of(method, 7)  # all arrays
        made |= {"logit_bias": layer.logit_bias, "expert_scale": layer.expert_scale, "bias": layer.bias}
        if self.given:
            rows = [inputs.rng(744, row).permutation(method.num_experts)[: method.top_k] for row in range(self.n)]
            made["indices"] = np.stack(rows).astype(np.int32)
            made["indices"][1::4] = -1
            made["indices"][2::4, -1] = method.num_experts
        return {name: array for name, array in made.items() if array is not None} | self.maps()

    def maps(self) -> dict[str, np.ndarray]:
        """Return replicas and counts, each of which is bad for one expert in nine."""
        num_experts = self.method.num_experts
        replicas = inputs.rng(745, num_experts).integers(0, self.num_physical, (num_experts, MOST)).astype(np.int32)
        counts = (1 + np.arange(num_experts) % MOST).astype(np.int32)
        replicas[0::9] = np.resize([-2, self.num_physical, 2**31 - 1, -(2**31)], MOST)
        counts[4::9] = np.resize([0, -1, MOST + 1, 2**31 - 1, -(2**31)], len(counts[4::9]))
        made = {"replicas": replicas.astype(self.dtype), "replica_counts": counts.astype(self.dtype)}
        if self.dtype == "int64":  # which are in range if they are cut to 32 bits
            made["replicas"][0, :] += 2**32 - made["replicas"][0, :]
            made["replica_counts"][4] = 2**32 + 1
        return made

    def options(self) -> dict[str, Any]:
        return {"replica_offset": self.offset, "num_physical": self.num_physical}

    def __call__(self, arrays: dict[str, Any], **more: Any) -> Any:
        """Call the op with arrays of any framework, by name; without maps, with the ids of experts."""
        given, method = {**arrays, **more}, self.method
        if "replicas" in arrays:
            given |= self.options()
        if self.given:
            given["unset"] = self.given
        if self.kind == "activation_topk":
            return activation_topk(given.pop("logits"), method, **given)
        if self.kind.startswith("dense_router"):
            path = self.kind.partition(" ")[2]
            return dense_router(given.pop("x"), given.pop("weight"), method, path=path, **given)
        layer = {name: given.pop(name) for name in ("weight", "bias", "logit_bias", "expert_scale") if name in given}
        return Router(method, **layer)(given.pop("x"), **given)

    def logical(self, arrays: dict[str, Any], **more: Any) -> Any:
        """Call the op for the ids of experts."""
        return self({name: array for name, array in arrays.items() if name not in self.maps()}, **more)

    def physical(self, experts: np.ndarray) -> np.ndarray:
        """Return the physical experts of the experts of all tokens, one by one."""
        method, maps = self.method, self.maps()
        found = np.full_like(experts, -1)
        for token, slot in np.ndindex(experts.shape):
            expert = int(experts[token, slot])
            if expert >= method.num_experts and slot >= method.top_k:
                found[token, slot] = self.num_physical + expert - method.num_experts
            elif expert in range(method.num_experts) and int(maps["replica_counts"][expert]) in range(1, MOST + 1):
                turn = (token + self.offset) % int(maps["replica_counts"][expert])
                replica = int(maps["replicas"][expert, turn])
                found[token, slot] = replica if replica in range(self.num_physical) else -1
        return found
