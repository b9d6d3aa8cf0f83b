# SPDX-License-Identifier: Apache-2.0
"""A router in plain PyTorch, whose gradients are autograd's, and calls of ours that are compared with it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np

from cupy_router import Router, RoutingMethod, activation_topk, dense_router, hash_router
from tests import frameworks, inputs
from tests.steps import METHODS, layer_of

KINDS = ("activation_topk", "hash_router of logits", "hash_router of x", "dense_router", "Router", "hash Router")
TOLERANCE = {"float32": 1e-5, "float16": 2.0**-10, "bfloat16": 2.0**-7}
SMALL = [name for name, method in METHODS.items() if method.num_experts < 1000]
TOKENS, HIDDEN = 6, 24


def twin(logits: Any, indices: Any, method: RoutingMethod, logit_bias: Any = None, expert_scale: Any = None) -> Any:
    """The weights of given experts, step by step; of the dtype of the logits."""
    import torch

    experts = indices[:, : method.top_k].long()
    x = logits
    if logit_bias is not None:
        x = x + torch.nn.functional.pad(logit_bias, (0, x.shape[1] - method.num_experts))
    x = x * method.logit_scale
    if method.logit_softcap is not None:
        x = method.logit_softcap * torch.tanh(x / method.logit_softcap)
    routed = x[:, : method.num_experts]
    if method.shared_in_normalizer:
        chosen = torch.cat([routed.gather(1, experts), x[:, method.num_experts :]], dim=1)
        weights = torch.softmax(torch.nn.functional.logsigmoid(chosen), dim=1)
    else:
        score = SCORES[method.score if isinstance(method.score, str) else method.score.name]
        after = method.score_after_topk
        weights = score(routed.gather(1, experts)) if after else score(routed).gather(1, experts)
        if method.renormalize:
            total = weights.sum(dim=1, keepdim=True) + method.renormalize_eps
            weights = weights / (total if method.renormalize_min is None else total.clamp(min=method.renormalize_min))
    weights = weights * method.scale
    if expert_scale is not None:
        factors = torch.nn.functional.pad(expert_scale[experts], (0, weights.shape[1] - method.top_k), value=1.0)
        weights = weights * factors
    fixed = weights.new_full((len(weights), method.num_columns - weights.shape[1]), method.shared_weight)
    return torch.cat([weights, fixed], dim=1)


SCORES: dict[str, Callable[[Any], Any]] = {
    "identity": lambda x: x,
    "sigmoid": lambda x: x.sigmoid(),
    "sqrtsoftplus": lambda x: (1 + x.exp()).log().sqrt(),
    "softmax": lambda x: x.softmax(dim=1),
    "softsign": lambda x: x / (1 + x.abs()),
    "square": lambda x: x * x,
}


class Case:
    """A call of a kind with a method: `arrays` by name, those that have a gradient in `smooth`."""

    def __init__(self, kind: str, name: str, device: str = "cpu") -> None:
        import torch

        self.kind, self.method = kind, METHODS[name]
        number = list(METHODS).index(name) + KINDS.index(kind)
        self.dtype = inputs.FLOATS[number % 3] if self.method.num_experts < 200 else "float32"
        self.is_hash = kind.startswith("hash")
        layer = layer_of(self.method, number)
        self.layer = replace(layer, bias=None) if self.is_hash else layer
        place = frameworks.PyTorch(device).array
        hosts = self._hosts() | {name: a for name, a in vars(self.layer).items() if a is not None}
        self.arrays = {name: place(array) for name, array in hosts.items()}
        smooth = ("logits", "x", "weight", "logit_bias", "expert_scale")
        self.smooth = {name: a.requires_grad_() for name, a in self.arrays.items() if name in smooth}
        self.upstream = torch.randn(TOKENS, self.method.num_columns, generator=torch.Generator().manual_seed(7))
        self.upstream = self.upstream.to(device)

    def _hosts(self) -> dict[str, np.ndarray]:
        """Logits far apart, or factors that make such; a table that repeats an expert, and a token id outside it."""
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

    def call(self, **more: Any) -> Any:
        given, method = dict(self.arrays), self.method
        if self.kind == "activation_topk":
            return activation_topk(given.pop("logits"), method, **given, **more)
        if self.kind == "dense_router":
            return dense_router(given.pop("x"), given.pop("weight"), method, **given, **more)
        if self.kind.startswith("hash_router"):
            return hash_router(given.pop("token_ids"), given.pop("table"), method, **given, **more)
        x, token_ids = given.pop("x"), given.pop("token_ids", None)
        return Router(method, **given)(x, token_ids, **more)

    def check(self, routing: Any) -> None:
        """The gradients of what a call gave are those of the twin in float64, within rounding."""
        import torch

        weights, indices = routing
        assert weights.requires_grad
        assert not indices.requires_grad
        found = torch.autograd.grad(
            (weights.float() * self.upstream).sum(), list(self.smooth.values()), retain_graph=True
        )
        want = self.wanted(indices)
        for (name, array), got in zip(self.smooth.items(), found, strict=True):
            assert (got.dtype, got.shape, got.device) == (array.dtype, array.shape, array.device)
            rtol = TOLERANCE[str(array.dtype).removeprefix("torch.")]
            atol = 2e-6 * max(1.0, float(want[name].abs().max()))
            if self.method.weight_dtype != "float32":  # autograd rounds what comes in to the dtype of the weights
                atol += 2 * TOLERANCE[self.method.weight_dtype] * float(want[name].abs().max())
            torch.testing.assert_close(
                got.double(), want[name], rtol=rtol, atol=atol, msg=lambda m, n=name: f"{n}: {m}"
            )

    def wanted(self, indices: Any) -> dict[str, Any]:
        """By autograd, in float64, of the rows that were routed."""
        import torch

        wide = {name: array.detach().double().requires_grad_() for name, array in self.smooth.items()}
        logits = wide["logits"] if "logits" in wide else wide["x"] @ wide["weight"].t()
        rows = (indices[:, 0] >= 0).nonzero()[:, 0]
        layer = {name: wide.get(name) for name in ("logit_bias", "expert_scale")}
        weights = twin(logits[rows], indices[rows], self.method, **layer)
        loss = (weights * self.upstream[rows].double()).sum()
        return dict(zip(wide, torch.autograd.grad(loss, list(wide.values())), strict=True))
