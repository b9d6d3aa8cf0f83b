# SPDX-License-Identifier: Apache-2.0
"""A router in plain JAX, whose gradients are JAX's own, and calls of ours that are compared with it."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager
from typing import Any

import numpy as np

from cupy_router import RoutingMethod
from tests import oracle
from tests.gradient_cases import SMOOTH, TOLERANCE, Inputs


def enable_x64(on: bool = True) -> AbstractContextManager[Any]:
    import jax

    context: AbstractContextManager[Any] = (
        jax.enable_x64(on) if hasattr(jax, "enable_x64") else jax.experimental.enable_x64(on)
    )
    return context


def twin(logits: Any, indices: Any, method: RoutingMethod, logit_bias: Any = None, expert_scale: Any = None) -> Any:
    """Return the weights of given experts, step by step, in the dtype of the logits."""
    import jax
    import jax.numpy as jnp

    experts = indices[:, : method.top_k]
    x = logits
    if logit_bias is not None:
        x = x + jnp.pad(logit_bias, (0, x.shape[1] - method.num_experts))
    x = oracle.scale_and_cap(x, method, jnp.tanh)
    routed = x[:, : method.num_experts]
    chosen = jnp.take_along_axis(routed, experts, axis=1)
    if method.shared_in_normalizer:
        weighed = jnp.concatenate([chosen, x[:, method.num_experts :]], axis=1)
        weights = jax.nn.softmax(jax.nn.log_sigmoid(weighed), axis=1)
    else:
        score = _scores()[method.score if isinstance(method.score, str) else method.score.name]
        after = method.score_after_topk
        weights = score(chosen) if after else jnp.take_along_axis(score(routed), experts, axis=1)
        if method.renormalize:
            total = weights.sum(axis=1, keepdims=True) + method.renormalize_eps
            least = method.renormalize_min
            weights = weights / (total if least is None else jnp.maximum(total, least))
    weights = weights * method.scale
    if expert_scale is not None:
        factors = jnp.pad(expert_scale[experts], ((0, 0), (0, weights.shape[1] - method.top_k)), constant_values=1.0)
        weights = weights * factors
    fixed = jnp.full((len(weights), method.num_columns - weights.shape[1]), method.shared_weight, weights.dtype)
    return jnp.concatenate([weights, fixed], axis=1)


def _scores() -> dict[str, Callable[[Any], Any]]:
    import jax
    import jax.numpy as jnp

    return {
        "identity": lambda x: x,
        "sigmoid": jax.nn.sigmoid,
        "sqrtsoftplus": lambda x: jnp.sqrt(jnp.log1p(jnp.exp(x))),
        "softmax": lambda x: jax.nn.softmax(x, axis=1),
        "softsign": lambda x: x / (1 + abs(x)),
        "square": lambda x: x * x,
    }


class Case(Inputs):
    """A call of a kind with a method: differentiable arrays in `smooth`, the others in `fixed`."""

    def __init__(self, kind: str, name: str, place: Callable[[np.ndarray], Any]) -> None:
        super().__init__(kind, name)
        arrays = {name: place(array) for name, array in self.hosts.items()}
        self.smooth = {name: array for name, array in arrays.items() if name in SMOOTH}
        self.fixed = {name: array for name, array in arrays.items() if name not in SMOOTH}
        self.upstream = place(self.upstream_host)
        self.wide = enable_x64(self.method.index_dtype == "int64")

    def loss(self, smooth: Mapping[str, Any], **more: Any) -> tuple[Any, Any]:
        weights, indices = self.route({**self.fixed, **smooth}, **more)
        return (weights.astype(np.float32) * self.upstream).sum(), indices

    def check(self, found: Mapping[str, Any], indices: Any) -> None:
        """Assert that gradients with respect to `smooth` are those of the twin in float64, within rounding."""
        want = self.wanted(np.asarray(indices))
        assert found.keys() == self.smooth.keys()
        for name, got in found.items():
            array = self.smooth[name]
            assert (got.dtype, got.shape, got.devices()) == (array.dtype, array.shape, array.devices())
            most = float(abs(want[name]).max())
            atol = 2e-6 * max(1.0, most)
            if self.method.weight_dtype != "float32":  # JAX rounds what comes in to the dtype of the weights
                atol += 2 * TOLERANCE[self.method.weight_dtype] * most
            wide, rtol = np.asarray(got).astype(np.float64), TOLERANCE[str(array.dtype)]
            np.testing.assert_allclose(wide, want[name], rtol=rtol, atol=atol, err_msg=name)

    def wanted(self, indices: np.ndarray) -> dict[str, np.ndarray]:
        """Return JAX's float64 gradients on the CPU, for the rows that were routed."""
        import jax
        import jax.numpy as jnp

        first = indices[:, 0].astype(np.int64)  # not an expert where a row has none
        rows = np.flatnonzero((first >= 0) & (first < self.method.num_experts))

        def loss(wide: Mapping[str, Any]) -> Any:
            logits = wide["logits"] if "logits" in wide else wide["x"] @ wide["weight"].T
            layer = {name: wide.get(name) for name in ("logit_bias", "expert_scale")}
            weights = twin(logits[rows], jnp.asarray(indices[rows]), self.method, **layer)
            return (weights * self.upstream_host[rows]).sum()

        with enable_x64(), jax.default_device(jax.devices("cpu")[0]):
            wide = {name: jnp.asarray(self.hosts[name].astype(np.float64)) for name in self.smooth}
            return {name: np.asarray(array) for name, array in jax.jit(jax.grad(loss))(wide).items()}
