# SPDX-License-Identifier: Apache-2.0
"""Calls with given experts, whose results are exact, for tests of every framework."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import pytest

from cupy_router import Router, RoutingMethod, activation_topk, dense_router, tuning
from cupy_router.ops import _cached
from cupy_router.tuning import DEFAULT
from tests import inputs, oracle
from tests.backends import DTYPES
from tests.logit_calls import exact
from tests.methods import METHODS, layer_of

KINDS = ("activation_topk", "dense_router decode", "dense_router prefill", "dense_router", "Router", "hash Router")
HASHED = ("hash Router", "hash Router without token ids", "hash Router without gate")
UNSET = ("route", "empty")
IDS = ("uint8", "int16", "uint16", "int32", "int64")
HIDDEN = 40
# Every step, and a size for each kernel.
NAMES = (
    "soft cap", "sigmoid after top-k", "softmax after top-k", "softmax, bias on logits", "everything",
    "8 groups, best 4, top 2", "3 groups of 8", "two shared experts", "32 columns of results",
    "shared in the normaliser, in groups", "float16 weights, int64 indices", "uint8 indices",
)  # fmt: skip
WIDE = ("4096 experts, 64 chosen", "33 columns of results", "shared in the normaliser, by a block")


def read_gates(monkeypatch: pytest.MonkeyPatch, most: int) -> None:
    """Compute only the products that are needed, up to a large number, or, with 0, never."""
    table = DEFAULT.table
    limits: dict[str, Any] = dict.fromkeys(("max_gates_read", "max_elements_read", "max_gates_read_backward"), most)
    given = replace(table.given_experts, **limits)
    monkeypatch.setattr(tuning.gpu, "nearest", lambda capability: replace(table, given_experts=given))
    _cached.forget()


@dataclass(frozen=True)
class Call:
    """A call of one of KINDS with a method of tests.methods. Rows of ids are of every kind: see `ids`."""

    kind: str
    name: str = "everything"
    unset: str = "route"
    id_dtype: str = "int32"
    n: int = 23
    dtype: str = "float32"
    with_shared: bool = False  # ids have columns of shared experts

    @property
    def method(self) -> RoutingMethod:
        return METHODS[self.name]

    @property
    def takes_logits(self) -> bool:
        return self.kind == "activation_topk"

    @property
    def is_hash(self) -> bool:
        return self.kind.startswith("hash")

    def ids(self) -> np.ndarray:
        """Return experts in any order, whatever their logits are: what a rollout with other weights chose.

        Of six rows, one is -1, one has a -1 or an id that is no expert, and one has an expert twice.
        """
        method, dtype = self.method, DTYPES[self.id_dtype]
        most = min(method.num_experts, np.iinfo(dtype).max)
        rows = [inputs.rng(731, row).permutation(most)[: method.top_k] for row in range(self.n)]
        found = np.stack(rows).astype(np.int64)
        found[1::6] = -1
        bad = np.resize([-1, method.num_experts, np.iinfo(dtype).max, np.iinfo(dtype).min], self.n)
        if method.top_k > 1:
            found[3::6, 1] = bad[3::6]
            found[5::6, 1] = found[5::6, 0]
        if self.with_shared:  # which nobody reads
            found = np.concatenate([found, np.full((self.n, method.num_shared_experts), 99)], axis=1)
        return found.astype(dtype)

    def arrays(self) -> dict[str, np.ndarray]:
        """Return the arrays by name. Logits, or those that x and weight give, are exact."""
        method, made = self.method, {}
        if self.takes_logits:
            made["logits"] = np.ascontiguousarray(inputs.distinct(self.n, method.num_logits, self.dtype))
        else:
            made["x"] = exact(self.n, HIDDEN, seed=732, dtype=self.dtype)
            made["weight"] = exact(method.num_logits, HIDDEN, seed=733, dtype=self.dtype)
        layer = layer_of(method, 7)  # all arrays
        made |= {"logit_bias": layer.logit_bias, "expert_scale": layer.expert_scale}
        if not self.is_hash:
            made["bias"] = layer.bias
        else:
            table = [inputs.rng(734, row).permutation(method.num_experts)[: method.top_k] for row in range(9)]
            made["table"] = np.stack(table).astype(np.int32)
            made["token_ids"] = inputs.rng(735, self.n).integers(-1, 10, self.n).astype(np.int32)
        if "without gate" in self.kind:
            made |= dict.fromkeys(("weight", "logit_bias", "expert_scale"))
        if "without token ids" in self.kind:
            made["token_ids"] = None
        return {name: array for name, array in made.items() if array is not None} | {"indices": self.ids()}

    def __call__(self, arrays: dict[str, Any], **more: Any) -> Any:
        """Call the op with arrays of any framework, by name."""
        given, method = {**arrays, "unset": self.unset, **more}, self.method
        if self.takes_logits:
            return activation_topk(given.pop("logits"), method, **given)
        if self.kind.startswith("dense_router"):
            path = self.kind.partition(" ")[2] or None
            return dense_router(given.pop("x"), given.pop("weight"), method, path=path, **given)
        rows = ("x", "token_ids", "indices")
        x, layer = given.pop("x"), {name: given.pop(name) for name in arrays if name not in rows}
        return Router(method, **layer)(x, **given)

    def logits(self) -> np.ndarray:
        """Return the logits before all steps."""
        arrays = self.arrays()
        return arrays["logits"] if self.takes_logits else oracle.gate_logits(arrays["x"], arrays["weight"])

    def experts(self) -> tuple[np.ndarray, np.ndarray]:
        """Return the experts that each token should have, and whether it has any."""
        method, arrays = self.method, self.arrays()
        ids = arrays["indices"][:, : method.top_k].astype(np.int64)
        routed = (ids == -1).all(-1) & (self.unset == "route")
        exist = ((ids >= 0) & (ids < method.num_experts)).all(-1)
        if self.is_hash:
            token_ids = arrays.get("token_ids", np.full(self.n, -1))
            selected = arrays["table"][token_ids.clip(0, 8)]
            routed &= (token_ids >= 0) & (token_ids < 9)
        else:
            prepared = oracle.prepare(self.logits(), method, arrays.get("logit_bias"))
            selected = oracle.choose(prepared, method, arrays.get("bias"))
        return np.where(routed[:, None], selected, ids), exist | routed
