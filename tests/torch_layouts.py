# SPDX-License-Identifier: Apache-2.0
"""permute and unpermute in plain PyTorch, calls of ours that are compared with them, and a layer that uses both."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch

from cupy_router import RoutingMethod, dense_router, expert_layout, permute, unpermute
from tests import frameworks, inputs
from tests.gradient_cases import TOLERANCE

EXPERTS = 6
IDS = torch.tensor(
    [[0, 2, 5], [2, 2, 1], [-1, 5, 0], [3, 6, 2], [-1, -1, -1], [0, 1, 2], [5, 5, 5], [2, 0, 3]], dtype=torch.int32
)
ALL = ("counts", "offsets", "order", "positions", "row_experts")

# Options of a layout of IDS.
LAYOUTS: dict[str, dict[str, Any]] = {
    "dense": {},
    "aligned": {"alignment": 4},
    "aligned by 2": {"alignment": 2},
    "short": {"alignment": 2, "capacity": 12},
    "of some experts": {"experts": (2, 3), "pad": 99},
    "padded": {"num_valid": 4},
}


def plain_permute(x: Any, layout: Any, *, weights: Any = None) -> Any:
    """Return the rows by a gather."""
    num_pairs = layout.num_tokens * layout.top_k
    used = (layout.order >= 0) & (layout.order < num_pairs)
    pairs = layout.order[used].long()
    rows = x[pairs // layout.top_k]
    if weights is not None:
        rows = rows * weights.reshape(-1)[pairs, None].to(rows.dtype)
    return x.new_zeros(layout.capacity, x.shape[1]).index_put((used.nonzero()[:, 0],), rows)


def plain_unpermute(
    y: Any, layout: Any, weights: Any = None, *, residual: Any = None, residual_scale: Any = None
) -> Any:
    """Return the sums of gathered rows."""
    used = layout.positions >= 0
    rows = y[layout.positions[used].long()]
    if weights is not None:
        rows = rows * weights[used][:, None].to(rows.dtype)
    total = y.new_zeros(layout.num_tokens, y.shape[1]).index_add(0, used.nonzero()[:, 0], rows)
    if residual is not None:
        total = total + (residual if residual_scale is None else residual * residual_scale[:, None]).to(y.dtype)
    return total


class Case:
    """A call of permute or unpermute: `arrays` by name, which all require grad, and a gradient of its result."""

    def __init__(
        self,
        op: str,
        name: str,
        dtype: str,
        names: tuple[str, ...],
        weights: str | None = None,
        residual: str | None = None,
        device: str = "cpu",
    ) -> None:
        self.op, self.layout = op, expert_layout(IDS.to(device), EXPERTS, want=ALL, **LAYOUTS[name])
        place, num_tokens = frameworks.PyTorch(device).array, len(IDS)
        shapes = {"x": (num_tokens, 10), "y": (self.layout.capacity, 10), "weights": tuple(IDS.shape)}
        shapes |= {"residual": (num_tokens, 10), "residual_scale": (num_tokens,)}
        dtypes = {"weights": weights or dtype, "residual": residual or dtype, "residual_scale": "float32"}
        hosts = {n: inputs.normal(shapes[n], dtypes.get(n, dtype), seed=520 + i) for i, n in enumerate(names)}
        self.arrays = {name: place(host).requires_grad_() for name, host in hosts.items()}
        rows = self.layout.capacity if op == "permute" else num_tokens
        self.upstream = place(inputs.normal((rows, 10), dtype, seed=530))

    @classmethod
    def all(cls, name: str, dtype: str, op: str | None = None, **more: Any) -> Iterator[Case]:
        """Make a call of each set of arguments that changes what is computed; the first has all of them."""
        for each, sets in {
            "permute": (("x", "weights"), ("x",)),
            "unpermute": (("y", "weights", "residual", "residual_scale"), ("y",), ("y", "weights", "residual")),
        }.items():
            if op in (None, each):
                for names in sets:
                    yield cls(each, name, dtype, names, **more)

    def ours(self, arrays: Any, layout: Any = None, **more: Any) -> Any:
        first, *others = arrays
        function = permute if self.op == "permute" else unpermute
        return function(arrays[first], layout or self.layout, **{name: arrays[name] for name in others}, **more)

    def plain(self, arrays: Any) -> Any:
        first, *others = arrays
        function = plain_permute if self.op == "permute" else plain_unpermute
        return function(arrays[first], self.layout, **{name: arrays[name] for name in others})

    def check(self, result: Any = None) -> None:
        """Assert that the result and its gradients are those of autograd in float64, within rounding."""
        result = self.ours(self.arrays) if result is None else result
        assert result.requires_grad
        found = torch.autograd.grad(result, list(self.arrays.values()), self.upstream, retain_graph=True)
        wide = {name: array.detach().double().requires_grad_() for name, array in self.arrays.items()}
        want = self.plain(wide)
        wanted = torch.autograd.grad(want, list(wide.values()), self.upstream.double())
        close(f"{self.op}", result, want)
        for (name, array), got, right in zip(self.arrays.items(), found, wanted, strict=True):
            assert (got.dtype, got.shape, got.device) == (array.dtype, array.shape, array.device)
            close(f"{self.op}: {name}", got, right)


def close(name: str, got: Any, want: Any) -> None:
    rtol = TOLERANCE[str(got.dtype).removeprefix("torch.")]
    torch.testing.assert_close(got.double(), want, rtol=rtol, atol=1e-6, msg=lambda message: f"{name}: {message}")


def leaves(found: Any) -> list[Any]:
    return list(torch.utils._pytree.tree_leaves(found))


def same(got: Any, want: Any) -> None:
    pairs = list(zip(leaves(got), leaves(want), strict=True))
    assert pairs
    for a, b in pairs:
        if isinstance(b, torch.Tensor):
            torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-6)
        else:
            assert a == b


class Moe(torch.nn.Module):  # type: ignore[misc]
    """A layer of experts that counts what each of them gets, in place."""

    def __init__(self, device: str = "cpu") -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(1)
        self.method = RoutingMethod(EXPERTS, 3, "softmax")
        self.gate = torch.nn.Parameter(torch.randn(EXPERTS, 6, generator=generator).to(device))
        self.scales = torch.nn.Parameter(torch.randn(EXPERTS, 6, generator=generator).to(device))
        self.register_buffer("load", torch.zeros(EXPERTS, dtype=torch.int64, device=device))

    def forward(self, x: Any) -> Any:
        weights, ids = dense_router(x, self.gate, self.method)
        layout = expert_layout(ids, EXPERTS, alignment=2, load=self.load, want=ALL)
        rows = permute(x, layout) * self.scales[layout.row_experts.clamp(min=0)]
        return unpermute(rows.relu() * 2, layout, weights, residual=x)
