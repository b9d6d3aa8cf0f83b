# SPDX-License-Identifier: Apache-2.0
"""Zero experts, which return the token: unpermute adds it, times their weights, by the formula and as LongCat-Flash."""

from __future__ import annotations

import importlib
from contextlib import nullcontext
from typing import Any

import numpy as np
import pytest

from cupy_router import RoutingMethod, dense_router, expert_layout, permute, unpermute
from tests import inputs
from tests.backends import Backend
from tests.frameworks import ON_CPU, ON_GPU, transformers_with_models

REAL, ZERO, TOKENS, K, HIDDEN = 5, 3, 12, 4, 16


def case() -> dict[str, np.ndarray]:
    """Tokens with no zero expert, with only zero experts, with one twice, without any expert, and mixed ones."""
    rng = np.random.default_rng(0)
    indices = rng.integers(0, REAL + ZERO, (TOKENS, K)).astype(np.int32)
    indices[:4] = [[0, 1, 2, 3], [5, 6, 7, 5], [6, 6, 2, 2], [-1, 8, -1, 99]]
    weights = rng.random((TOKENS, K), np.float32)
    w = inputs.normal((REAL, HIDDEN, HIDDEN), seed=1) / 4
    return {"x": inputs.normal((TOKENS, HIDDEN), seed=2), "weights": weights, "w": w, "indices": indices}


def formula(x: Any, weights: Any, w: Any, indices: np.ndarray) -> list[Any]:
    """The sum over the slots of each token, one at a time."""
    sums = []
    for token, experts in enumerate(indices.tolist()):
        total = 0 * x[token]
        for slot, expert in enumerate(experts):
            if 0 <= expert < REAL + ZERO:
                total = total + weights[token, slot] * (x[token] @ w[expert] if expert < REAL else x[token])
        sums.append(total)
    return sums


def dense(xp: Any, x: Any, weights: Any, w: Any, indices: np.ndarray) -> Any:
    """The formula in three operations, with an identity for each zero expert and 0 for those that do not exist."""
    one = xp.eye(HIDDEN, dtype=x.dtype)[None]
    matrices = xp.concatenate([w, *[one] * ZERO, 0 * one])
    known = np.where((indices >= 0) & (indices < REAL + ZERO), indices, REAL + ZERO)
    return (weights[:, :, None] * xp.einsum("th,tkho->tko", x, matrices[known])).sum(1)


def mixture(xp: Any, x: Any, weights: Any, w: Any, indices: Any) -> Any:
    """The same in order of experts. Rows after the last pair are NaN, as a grouped GEMM may leave them."""
    layout = expert_layout(indices, REAL)
    rows, first = permute(x, layout), [int(row) for row in layout.offsets]
    parts = [rows[first[e] : first[e + 1]] @ w[e] for e in range(REAL)]
    y = xp.concatenate([*parts, rows[first[-1] :] * float("nan")])
    is_zero = (indices >= REAL) & (indices < REAL + ZERO)
    scale = xp.where(is_zero, weights, xp.zeros_like(weights)).sum(-1)
    return unpermute(y, layout, weights, residual=x, residual_scale=scale)


FRAMEWORKS = [
    pytest.param("numpy", marks=pytest.mark.backends("reference")),
    pytest.param("cupy", marks=pytest.mark.backends("gpu")),
    *(pytest.param(name, marks=pytest.mark.backends("reference", "gpu")) for name in ("torch", "jax")),
]


@pytest.mark.parametrize("framework", FRAMEWORKS)
def test_the_formula(framework: str, backend: Backend) -> None:
    made, given = (ON_GPU if backend.name == "gpu" else ON_CPU)[framework](), case()
    xp = importlib.import_module("jax.numpy" if framework == "jax" else framework)
    is_jax = framework == "jax"  # whose products of float32 are rounded to tf32 on a GPU
    with importlib.import_module("jax").default_matmul_precision("highest") if is_jax else nullcontext():
        got = mixture(xp, **{name: made.array(array) for name, array in given.items()})
    assert isinstance(got, made.result_type)
    exact = {name: array.astype(np.float64) for name, array in given.items() if name != "indices"}
    want = np.array(formula(**exact, indices=given["indices"]))
    np.testing.assert_allclose(dense(np, **exact, indices=given["indices"]), want, atol=1e-12)
    np.testing.assert_allclose(made.numpy(got), want, rtol=1e-2 if backend.name == "gpu" else 1e-5, atol=1e-5)
    assert not made.numpy(got)[3].any()
    np.testing.assert_allclose(made.numpy(got)[1], given["weights"][1].sum() * given["x"][1], rtol=1e-6)


@pytest.mark.backends("reference")
def test_gradients_in_pytorch() -> None:
    torch = pytest.importorskip("torch")
    given, upstream = case(), inputs.normal((TOKENS, HIDDEN), seed=3)
    results = []
    for dtype in (torch.float32, torch.float64):
        smooth = [torch.from_numpy(given[name]).to(dtype).requires_grad_() for name in ("x", "weights", "w")]
        if dtype == torch.float32:
            sums = mixture(torch, *smooth, torch.from_numpy(given["indices"]))
        else:
            sums = dense(torch, *smooth, given["indices"])
        results.append(torch.autograd.grad(sums, smooth, torch.from_numpy(upstream).to(dtype)))
    for got, want in zip(*results, strict=True):
        torch.testing.assert_close(got.double(), want, rtol=1e-4, atol=1e-5)


@pytest.mark.backends("reference")
@pytest.mark.slow("seconds")
def test_gradients_in_jax() -> None:
    jax, given = pytest.importorskip("jax"), case()
    upstream, smooth = inputs.normal((TOKENS, HIDDEN), seed=3), [given[name] for name in ("x", "weights", "w")]

    def loss(*smooth: Any) -> Any:
        return (mixture(jax.numpy, *smooth, jax.numpy.asarray(given["indices"])) * upstream).sum()

    def plain(*smooth: Any) -> Any:
        return (dense(jax.numpy, *smooth, given["indices"]) * upstream).sum()

    with jax.default_matmul_precision("highest"):
        got, want = (jax.grad(function, (0, 1, 2))(*map(jax.numpy.asarray, smooth)) for function in (loss, plain))
    for a, b in zip(got, want, strict=True):
        np.testing.assert_allclose(np.asarray(a), np.asarray(b), rtol=1e-4, atol=1e-5)


@pytest.mark.backends("reference")
@pytest.mark.slow("seconds")
def test_longcat_flash_of_transformers() -> None:
    """Its layer with its own weights, against dense_router and these ops."""
    transformers, torch = transformers_with_models(), pytest.importorskip("torch")
    try:
        module = importlib.import_module("transformers.models.longcat_flash.modeling_longcat_flash")
    except ImportError:
        pytest.skip(f"transformers {transformers.__version__} has no LongCat-Flash")
    config = transformers.LongcatFlashConfig(
        hidden_size=32, expert_ffn_hidden_size=16, n_routed_experts=16, zero_expert_num=8, moe_topk=4
    )
    layer = module.LongcatFlashMoE(config).float()
    torch.manual_seed(0)
    for parameter in layer.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    layer.router.e_score_correction_bias.copy_(torch.linspace(0, 0.02, 24))
    x = torch.randn(40, 32)
    experts, method = layer.experts, RoutingMethod.from_config(config)
    with torch.no_grad():
        bias, gate = layer.router.e_score_correction_bias, layer.router.classifier.weight
        weights, indices = dense_router(x, gate.float(), method, bias=bias)
        assert (indices >= 16).any()
        assert (indices < 16).any()
        layout = expert_layout(indices, 16)
        y = permute(x, layout)
        for e, (first, end) in enumerate(zip(layout.offsets[:-1], layout.ends, strict=True)):
            gate_rows, up = (y[first:end] @ experts.gate_up_proj[e].T).chunk(2, dim=-1)
            y[first:end] = (experts.act_fn(gate_rows) * up) @ experts.down_proj[e].T
        scale = torch.where(indices >= 16, weights, 0).sum(1)
        got = unpermute(y, layout, weights, residual=x, residual_scale=scale)
        torch.testing.assert_close(got, layer(x), rtol=1e-4, atol=1e-5)
