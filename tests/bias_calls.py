# SPDX-License-Identifier: Apache-2.0
"""Calls with several biases, whose results are exact, for tests of every framework."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np

from cupy_router import Router, RoutingMethod, activation_topk, dense_router, hash_router
from tests import inputs, oracle
from tests.logit_calls import exact
from tests.methods import METHODS, layer_of

HASHED = ("hash_router of logits", "hash_router of x", "hash Router")
KINDS = ("activation_topk", "dense_router decode", "dense_router prefill", "Router", *HASHED)
HIDDEN, BIASES, VOCABULARY = 40, 3, 12
# Every step that may meet a bias, and a size for each kernel.
NAMES = (
    "bfloat16 weights", "sigmoid, bias on logits", "softmax after top-k, bias on logits", "everything",
    "8 groups, best 4, top 2", "3 groups of 8", "two shared experts", "shared in the normaliser, in groups",
    "softmax, bias on logits", "float16 weights, int64 indices",
)  # fmt: skip
WIDE = ("4096 experts, 64 chosen", "4096 experts in 16 groups", "33 columns of results")


@dataclass(frozen=True)
class Call:
    """A call of one of KINDS with a method of tests.methods; indices of biases that do not exist are among the rest."""

    kind: str
    name: str = "everything"
    n: int = 11
    num_biases: int = BIASES
    dtype: str = "float32"

    @property
    def method(self) -> RoutingMethod:
        return METHODS[self.name]

    def arrays(self) -> dict[str, np.ndarray]:
        """Return the arrays by name. Logits, or those that x and weight give, are exact."""
        method, made = self.method, {}
        if self.takes_logits:
            made["logits"] = np.ascontiguousarray(inputs.distinct(self.n, method.num_logits, self.dtype))
        else:
            made["x"] = exact(self.n, HIDDEN, seed=720, dtype=self.dtype)
            made["weight"] = exact(method.num_logits, HIDDEN, seed=721, dtype=self.dtype)
        layer = layer_of(method, 3)
        made |= {"logit_bias": layer.logit_bias, "expert_scale": layer.expert_scale}
        made["bias"] = 2 * exact(self.num_biases, method.num_experts, seed=722)
        made["bias_index"] = inputs.rng(723, self.n).integers(0, self.num_biases, self.n).astype(np.int32)
        bad = np.resize([-1, self.num_biases, 2**31 - 1, -(2**31)], self.n)
        made["bias_index"][2::6] = bad[2::6]
        if self.is_hash:
            ids = inputs.rng(724, self.n).integers(0, VOCABULARY, self.n)
            ids[1::4], ids[3::8] = 7, VOCABULARY + 5  # an expert of 7 does not exist, nor does the other
            rows = [inputs.rng(725, row).permutation(method.num_experts)[: method.top_k] for row in range(VOCABULARY)]
            rows[7][-1] = method.num_experts
            made |= {"token_ids": ids, "table": np.stack(rows).astype(np.int32)}
        return {name: array for name, array in made.items() if array is not None}

    @property
    def takes_logits(self) -> bool:
        return self.kind in ("activation_topk", "hash_router of logits")

    @property
    def is_hash(self) -> bool:
        return self.kind in HASHED

    def function(self) -> Callable[..., Any]:
        """Return a function of arrays by name and of options."""
        method, kind = self.method, self.kind

        def function(arrays: dict[str, Any], **more: Any) -> Any:
            given = dict(arrays)
            if kind.startswith("hash_router"):
                return hash_router(given.pop("token_ids"), given.pop("table"), method, **given, **more)
            if kind == "activation_topk":
                return activation_topk(given.pop("logits"), method, **given, **more)
            if kind.startswith("dense_router"):
                path = kind.partition(" ")[2]
                return dense_router(given.pop("x"), given.pop("weight"), method, path=path, **given, **more)
            x, bias_index = given.pop("x"), given.pop("bias_index")
            token_ids = given.pop("token_ids", None)
            return Router(method, **given)(x, token_ids, bias_index=bias_index, **more)

        return function

    def __call__(self, arrays: dict[str, Any], **more: Any) -> Any:
        return self.function()(arrays, **more)

    def logits(self) -> np.ndarray:
        """Return the logits before all steps."""
        arrays = self.arrays()
        return arrays["logits"] if self.takes_logits else oracle.gate_logits(arrays["x"], arrays["weight"])

    @property
    def exist(self) -> np.ndarray:
        """True for the tokens that have experts."""
        arrays = self.arrays()
        index = arrays["bias_index"]
        exist = (index >= 0) & (index < self.num_biases)
        return exist & ((index > 0) | self.in_table) if self.is_hash else exist

    @property
    def in_table(self) -> np.ndarray:
        """True for the tokens whose experts the table has."""
        ids = self.arrays()["token_ids"]
        return (ids < VOCABULARY) & (ids != 7)
