# SPDX-License-Identifier: Apache-2.0
"""A router in plain PyTorch, whose gradients are autograd's, and calls of ours that are compared with it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from cupy_router import RoutingMethod
from tests import frameworks, oracle
from tests.gradient_cases import SMOOTH, TOLERANCE, Inputs


def twin(logits: Any, indices: Any, method: RoutingMethod, logit_bias: Any = None, expert_scale: Any = None) -> Any:
    """Return the weights of given experts, step by step, in the dtype of the logits."""
    import torch

    experts = indices[:, : method.top_k].long()
    x = logits
    if logit_bias is not None:
        x = x + torch.nn.functional.pad(logit_bias, (0, x.shape[1] - method.num_experts))
    x = oracle.scale_and_cap(x, method, torch.tanh)
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


class Case(Inputs):
    """A call of a kind with a method: `arrays` by name, the differentiable ones in `smooth`."""

    def __init__(self, kind: str, name: str, device: str = "cpu") -> None:
        import torch

        super().__init__(kind, name)
        place = frameworks.PyTorch(device).array
        self.arrays = {name: place(array) for name, array in self.hosts.items()}
        self.smooth = {name: a.requires_grad_() for name, a in self.arrays.items() if name in SMOOTH}
        self.upstream = torch.from_numpy(self.upstream_host).to(device)

    def call(self, **more: Any) -> Any:
        return self.route(self.arrays, **more)

    def check(self, routing: Any) -> None:
        """Assert that the gradients of a result are those of the twin in float64, within rounding."""
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
        """Return autograd's float64 gradients for the rows that were routed."""
        import torch

        wide = {name: array.detach().double().requires_grad_() for name, array in self.smooth.items()}
        logits = wide["logits"] if "logits" in wide else wide["x"] @ wide["weight"].t()
        first = indices[:, 0].long()  # not an expert where a row has none: -1, or the highest value of the dtype
        rows = ((first >= 0) & (first < self.method.num_experts)).nonzero()[:, 0]
        layer = {name: wide.get(name) for name in ("logit_bias", "expert_scale")}
        weights = twin(logits[rows], indices.long()[rows], self.method, **layer)
        loss = (weights * self.upstream[rows].double()).sum()
        return dict(zip(wide, torch.autograd.grad(loss, list(wide.values())), strict=True))
