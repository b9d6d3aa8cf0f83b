# SPDX-License-Identifier: Apache-2.0
"""Routing methods that use every step there is, and arrays of layers for them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

from cupy_router import RoutingMethod, ScoreFunction
from tests import inputs

M = RoutingMethod
SOFTSIGN = ScoreFunction(
    "softsign", cuda="x / (1.0f + fabsf(x))  // return in a comment makes no body", numpy=lambda x: x / (1 + np.abs(x)),
    derivative=ScoreFunction(
        "softsign-derivative", cuda="float y = 1.0f + fabsf(x);\nreturn 1.0f / (y * y);",
        numpy=lambda x: (1 + np.abs(x)) ** -2.0,
    ),
)  # fmt: skip
SQUARE = ScoreFunction(
    "square", cuda="float y = x;\nreturn y * y;", numpy=lambda x: x * x,
    derivative=ScoreFunction("twice", cuda="2 * x", numpy=lambda x: 2 * x),
)  # fmt: skip

METHODS: dict[str, RoutingMethod] = {
    "logit scale": M(64, 6, "sigmoid", logit_scale=0.25),
    "negative logit scale": M(64, 6, logit_scale=-2.0),
    "soft cap": M(64, 6, "softmax", logit_softcap=3.0),
    "logit scale and soft cap": M(96, 4, "sqrtsoftplus", logit_scale=0.5, logit_softcap=30.0),
    **{f"{score} after top-k": M(64, 4, score, score_after_topk=True) for score in inputs.SCORES},
    "softmax after top-k, one expert": M(16, 1, "softmax", score_after_topk=True, renormalize=False),
    "softmax after top-k, not renormalised": M(32, 8, "softmax", score_after_topk=True, renormalize=False, scale=2.0),
    **{f"{score}, bias on logits": M(64, 6, score, bias_on="logits") for score in inputs.SCORES},
    "softmax after top-k, bias on logits": M(128, 4, "softmax", score_after_topk=True, bias_on="logits"),
    "8 groups, best 3, max": M(160, 6, "softmax", num_groups=8, top_groups=3, renormalize=False, scale=16.0),
    "8 groups, best 4, top 2": M(256, 8, "sigmoid", num_groups=8, top_groups=4, group_score="top2", scale=2.5),
    "5 groups of 12": M(60, 4, "sqrtsoftplus", num_groups=5, top_groups=2, group_score="top2"),
    "3 groups of 8": M(24, 8, "softmax", num_groups=3, top_groups=1),
    "32 groups of 4": M(128, 6, "sigmoid", num_groups=32, top_groups=5, group_score="top2"),
    "groups of 2": M(64, 6, "sigmoid", num_groups=32, top_groups=7, group_score="top2"),
    "groups of 1": M(16, 3, "sigmoid", num_groups=16, top_groups=3, group_score="top2"),
    "groups of negative scores": M(64, 8, "identity", num_groups=4, top_groups=1, renormalize=False),
    "groups by logits": M(64, 4, "softmax", num_groups=8, top_groups=2, score_after_topk=True),
    "groups of all experts": M(64, 4, num_groups=8, top_groups=8),
    "4096 experts, 64 chosen": M(4096, 64, "softmax"),
    "4096 experts in 16 groups": M(4096, 40, "sigmoid", num_groups=16, top_groups=4, group_score="top2"),
    "two shared experts": M(64, 6, num_shared_experts=2, shared_weight=0.5),
    "32 columns of results": M(40, 31, "sigmoid", num_shared_experts=1),
    "33 columns of results": M(40, 32, "softmax", num_shared_experts=1, renormalize=False),
    "shared in the normaliser": M(64, 6, "sigmoid", num_shared_experts=2, shared_in_normalizer=True, scale=2.0),
    "shared in the normaliser, by a block": M(48, 33, "sigmoid", num_shared_experts=3, shared_in_normalizer=True),
    "shared in the normaliser, in groups": M(
        64, 6, "sigmoid", num_shared_experts=1, shared_in_normalizer=True, num_groups=4, top_groups=2
    ),
    "bfloat16 weights": M(64, 6, weight_dtype="bfloat16", scale=2.5),
    "float16 weights, int64 indices": M(64, 6, "sigmoid", weight_dtype="float16", index_dtype="int64"),
    "bfloat16 weights by a block": M(64, 40, "softmax", weight_dtype="bfloat16", index_dtype="int64"),
    "own score": M(64, 6, SOFTSIGN, renormalize=False),
    "own score, a body": M(64, 6, SQUARE, scale=1.5),
    "own score after top-k": M(64, 6, SQUARE, score_after_topk=True),
    "everything": M(
        96, 6, "sigmoid", logit_scale=0.5, logit_softcap=8.0, bias_on="logits", num_groups=8, top_groups=3,
        group_score="top2", renormalize_eps=1e-6, scale=2.0, num_shared_experts=1, shared_weight=0.25,
        weight_dtype="bfloat16", index_dtype="int64",
    ),
    "uint8 indices": M(64, 6, index_dtype="uint8", num_shared_experts=2),
    "int16 indices": M(300, 8, "sigmoid", index_dtype="int16"),
    "uint16 indices, in groups": M(512, 8, "softmax", num_groups=8, top_groups=4, index_dtype="uint16"),
    "uint8 indices by a block": M(64, 40, "sigmoid", index_dtype="uint8"),
}  # fmt: skip


@dataclass(frozen=True)
class Layer:
    """Arrays of a layer besides its gate, each [num_experts] float32 or None."""

    bias: np.ndarray | None = None
    logit_bias: np.ndarray | None = None
    expert_scale: np.ndarray | None = None

    def arguments(self, upload: Any) -> dict[str, Any]:
        return {name: upload(array) for name, array in vars(self).items() if array is not None}


def layer_of(method: RoutingMethod, kind: int) -> Layer:
    """Return arrays of multiples of 1/8, whose sums with such logits are exact; `kind` decides which are there."""

    def draw(low: int, high: int, seed: int) -> np.ndarray:
        return (inputs.rng(seed, method.num_experts).integers(low, high, method.num_experts) / 8).astype(np.float32)

    may_bias = not method.score_after_topk or method.bias_on == "logits"
    return Layer(
        bias=draw(-8, 8, 60) if kind % 2 and may_bias else None,
        logit_bias=draw(-16, 16, 61) if kind % 3 else None,
        expert_scale=draw(1, 16, 62) if kind % 4 > 1 else None,
    )
