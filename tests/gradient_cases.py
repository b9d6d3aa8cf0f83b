# SPDX-License-Identifier: Apache-2.0
"""Calls whose weights are differentiable, for tests of every framework with gradients."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import numpy as np

from cupy_router import Router, activation_topk, dense_router, hash_router
from tests import inputs
from tests.methods import METHODS, layer_of

KINDS = ("activation_topk", "hash_router of logits", "hash_router of x", "dense_router", "Router", "hash Router")
SMOOTH = ("logits", "x", "weight", "logit_bias", "expert_scale")
TOLERANCE = {"float32": 1e-5, "float16": 2.0**-10, "bfloat16": 2.0**-7}
SMALL = [name for name, method in METHODS.items() if method.num_experts < 1000]
TOKENS, HIDDEN = 6, 24


class Inputs:
    """A call of a kind with a method: NumPy arrays by name, and the gradient of a loss with respect to the weights."""

    def __init__(self, kind: str, name: str) -> None:
        self.kind, self.method = kind, METHODS[name]
        number = list(METHODS).index(name) + KINDS.index(kind)
        self.dtype = inputs.FLOATS[number % 3] if self.method.num_experts < 200 else "float32"
        self.is_hash = kind.startswith("hash")
        layer = layer_of(self.method, number)
        self.layer = replace(layer, bias=None) if self.is_hash else layer
        self.hosts = self._hosts() | {name: a for name, a in vars(self.layer).items() if a is not None}
        self.upstream_host = inputs.normal((TOKENS, self.method.num_columns), seed=93)

    def _hosts(self) -> dict[str, np.ndarray]:
        """Return separated logits, or x and weight that give them; a table that repeats an expert, an invalid id."""
        method = self.method
        hosts: dict[str, np.ndarray] = {}
        if self.kind == "activation_topk" or self.kind.endswith("logits"):
            hosts["logits"] = np.ascontiguousarray(inputs.distinct(TOKENS, method.num_logits, self.dtype))
            if method.num_groups > 1 and method.score == "identity":
                hosts["logits"] = (hosts["logits"].astype(np.float32) - 5).astype(hosts["logits"].dtype)
        else:
            hosts["x"] = inputs.normal((TOKENS, HIDDEN), self.dtype, seed=90)
            hosts["weight"] = inputs.normal((method.num_logits, HIDDEN), self.dtype, seed=91, scale=HIDDEN**-0.5)
        if self.is_hash:
            table = [inputs.rng(92, row).permutation(method.num_experts)[: method.top_k] for row in range(9)]
            table[2][-1] = table[2][0]
            hosts |= {"table": np.stack(table).astype(np.int32), "token_ids": np.array([2, 8, 0, 9, 2, 5], np.int32)}
        return hosts

    def route(self, arrays: Mapping[str, Any], **more: Any) -> Any:
        """Call the op with arrays of any framework, by the names of `hosts`."""
        given, method = dict(arrays), self.method
        if self.kind == "activation_topk":
            return activation_topk(given.pop("logits"), method, **given, **more)
        if self.kind == "dense_router":
            return dense_router(given.pop("x"), given.pop("weight"), method, **given, **more)
        if self.kind.startswith("hash_router"):
            return hash_router(given.pop("token_ids"), given.pop("table"), method, **given, **more)
        x, token_ids = given.pop("x"), given.pop("token_ids", None)
        return Router(method, **given)(x, token_ids, **more)
