# SPDX-License-Identifier: Apache-2.0
"""The gradient with respect to logits, against central differences; its limits: far logits, NaN, sums of 0."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from cupy_router import RoutingMethod, ScoreFunction, activation_topk
from cupy_router.ops import _row_lanes
from cupy_router.ops.activation_topk_backward import LogitsGradient, activation_topk_backward
from tests import compare, gradients, inputs, methods, oracle
from tests.backends import Backend
from tests.compare import NO_ARRAYS
from tests.gradients import upstream_of
from tests.methods import METHODS, M, layer_of


def choose(logits: np.ndarray, method: RoutingMethod, layer: methods.Layer = NO_ARRAYS) -> np.ndarray:
    """Return the indices of the forward pass."""
    return oracle.route(logits, method, **vars(layer)).indices


def backward(
    backend: Backend,
    upstream: np.ndarray,
    indices: np.ndarray,
    logits: np.ndarray,
    method: RoutingMethod,
    layer: methods.Layer = NO_ARRAYS,
    pad: tuple[int, int] = (0, 0),
    **options: Any,
) -> np.ndarray:
    arrays = (backend.array(array, *pad) for array in (upstream, indices, logits))
    given = replace(layer, bias=None).arguments(backend.array)
    return backend.numpy(activation_topk_backward(*arrays, method, **given, **options).grad_logits)


@pytest.mark.parametrize("name", METHODS)
def test_every_step(backend: Backend, name: str) -> None:
    method = METHODS[name]
    kind = list(METHODS).index(name)
    dtype = inputs.FLOATS[kind % 3] if method.num_experts < 200 else "float32"
    logits = inputs.distinct(backend.rows(5, method.num_logits), method.num_logits, dtype)
    if name == "groups of negative scores":
        logits = logits - 5
    layer = layer_of(method, kind)
    indices, upstream = choose(logits, method, layer), upstream_of(len(logits), method)
    got = backward(backend, upstream, indices, logits, method, layer)
    assert got.dtype == logits.dtype
    gradients.assert_right(got, upstream, indices, logits, method, layer)


def test_forward_then_backward(backend: Backend) -> None:
    """Results of the forward pass are inputs of the backward pass, unchanged."""
    method = M(64, 6, scale=2.5, num_shared_experts=1)
    logits, upstream = inputs.distinct(7, 64), upstream_of(7, method)
    on_device = backend.array(logits)
    indices = activation_topk(on_device, method, num_valid=5).indices
    got = backend.numpy(activation_topk_backward(backend.array(upstream), indices, on_device, method).grad_logits)
    gradients.assert_right(got, upstream, backend.numpy(indices), logits, method)
    assert not got[5:].any()


SIZES = [
    (1, 1), (2, 1), (2, 2), (8, 2), (36, 6), (60, 4), (64, 8), (72, 8), (96, 12), (108, 6), (160, 6),
    (256, 6), (384, 6), (576, 8), (1000, 32), (1024, 1), (1025, 4), (300, 33), (2000, 300),
]  # fmt: skip


@pytest.mark.parametrize("score", ["sqrtsoftplus", "softmax"])
@pytest.mark.parametrize(("experts", "k"), SIZES)
@pytest.mark.many_kernels
def test_every_size(backend: Backend, experts: int, k: int, score: str) -> None:
    kind = experts + k
    method = M(experts, k, score, renormalize=bool(kind % 2), renormalize_eps=1e-3 * (kind % 3))
    logits = inputs.distinct(3, experts, "float32" if experts > 200 else inputs.FLOATS[kind % 3], seed=1)
    indices, upstream = choose(logits, method), upstream_of(3, method)
    gradients.assert_right(backward(backend, upstream, indices, logits, method), upstream, indices, logits, method)


@pytest.mark.parametrize("dtype", inputs.FLOATS)
@pytest.mark.parametrize("many", [False, True])
@pytest.mark.parametrize("experts", [256, 384])
@pytest.mark.many_kernels
def test_few_rows_and_many(
    backend: Backend, monkeypatch: pytest.MonkeyPatch, experts: int, many: bool, dtype: str
) -> None:
    """The size of DeepSeek-V4; with many rows several share a warp."""
    if backend.runs_kernels:
        monkeypatch.setattr(_row_lanes, "few", lambda *_: not many)
    method, n = M(experts, 6, renormalize_eps=1e-20, scale=1.5), 33 + 2 * many
    logits, upstream = inputs.normal((n, experts), dtype, seed=71), upstream_of(n, method)
    indices = oracle.route(logits, method).indices
    got = backward(backend, upstream, indices, logits, method)
    gradients.assert_right(got, upstream, indices, logits, method)


@pytest.mark.parametrize("score", ["sigmoid", "softmax"])
@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_a_float32_gradient_of_16_bit_logits(backend: Backend, score: str, dtype: str) -> None:
    method = M(64, 6, score, renormalize=False)
    logits, upstream = inputs.distinct(4, 64, dtype), upstream_of(4, method)
    indices = choose(logits, method)
    got = backward(backend, upstream, indices, logits, method, dtype="float32")
    assert got.dtype == np.float32
    gradients.assert_right(got, upstream, indices, logits, method)


@pytest.mark.parametrize("pad", [(0, 1), (1, 0), (8, 0), (24, 3)], ids=str)
@pytest.mark.parametrize("experts", [64, 1100])
@pytest.mark.parametrize("score", ["sigmoid", "softmax"])
def test_any_stride_and_alignment(backend: Backend, score: str, experts: int, pad: tuple[int, int]) -> None:
    """Inputs between poison; of `out` exactly its rows are written."""
    method = M(experts, 5, score, renormalize=False, index_dtype="int64")
    logits, upstream = inputs.distinct(6, experts), upstream_of(6, method)
    indices = choose(logits, method)
    indices[4] = -1
    row_pad, offset = pad
    flat = backend.upload(np.full(offset + 6 * (experts + row_pad) + 8, 77, np.float32))
    rows = flat[offset : offset + 6 * (experts + row_pad)].reshape(6, experts + row_pad)
    out = LogitsGradient(rows[:, :experts])
    arrays = (backend.array(array, *pad) for array in (upstream, indices, logits))
    assert activation_topk_backward(*arrays, method, out=out) is out
    gradients.assert_right(backend.numpy(out.grad_logits), upstream, indices, logits, method)
    around = backend.numpy(flat)
    assert (around[:offset] == 77).all()
    assert (around[offset + 6 * (experts + row_pad) :] == 77).all()
    assert (backend.numpy(rows)[:, experts:] == 77).all()


@pytest.mark.parametrize("experts", [64, 1100])
@pytest.mark.parametrize("score", ["sqrtsoftplus", "softmax"])
def test_rows_without_experts_get_zeros(backend: Backend, score: str, experts: int) -> None:
    """Padding and invalid indices, whatever the gradient there."""
    method = M(experts, 4, score, num_shared_experts=1)
    logits, upstream = inputs.distinct(5, experts), upstream_of(5, method)
    indices = choose(logits, method)
    indices[1], indices[3, 2], indices[4, 0] = -1, experts, 2**31 - 1
    upstream[1], logits[1] = np.nan, np.nan
    got = backward(backend, upstream, indices, logits, method)
    assert not got[[1, 3, 4]].any()
    gradients.assert_right(got[[0, 2]], upstream[[0, 2]], indices[[0, 2]], logits[[0, 2]], method)
    assert not backward(backend, upstream, np.full_like(indices, -1), logits, method).any()
    assert backward(backend, upstream[:0], indices[:0], logits[:0], method).shape == (0, experts)


def test_a_row_does_not_depend_on_others(backend: Backend) -> None:
    method = M(100, 6, "softmax", renormalize=False)
    logits, upstream = inputs.normal((9, 100), "bfloat16", seed=72), upstream_of(9, method)
    indices = oracle.route(logits, method).indices
    together = backward(backend, upstream, indices, logits, method)
    for r in (0, 4, 8):
        part = slice(r, r + 1)
        alone = backward(backend, upstream[part], indices[part], logits[part], method)
        compare.assert_same_bits(alone, together[part])
    compare.assert_same_bits(backward(backend, upstream, indices, logits, method), together)


# -- Where functions end -----------------------------------------------------------------------------------------------


def single(backend: Backend, x: np.ndarray, method: RoutingMethod) -> np.ndarray:
    """Return the gradient of each x as the only expert of a token."""
    logits = x.astype(np.float32)[:, None]
    return backward(backend, np.ones_like(logits), np.zeros(logits.shape, np.int32), logits, method)[:, 0]


FAR = np.concatenate([np.arange(-176, 100, 0.375), [-1e30, 1e30, np.inf, -np.inf, 0.0, -0.0, 3e38]])


def test_sqrtsoftplus_far_from_zero(backend: Backend) -> None:
    """sigmoid(x) / (2 y), also where both are 0 in float32, exp(x / 2) / 2, and where exp(x) overflows."""
    got = single(backend, FAR, M(1, 1, renormalize=False))
    x = FAR.astype(np.float32).astype(np.float64)
    with np.errstate(over="ignore"):
        y = np.sqrt(np.logaddexp(0, np.maximum(x, -700)))
        want = np.where(x < -40, np.exp(x / 2) / 2, 1 / ((1 + np.exp(-x)) * 2 * y))
    compare.assert_weights_close(got, want.astype(np.float32), 3e-6)
    assert (got[x < -175] == 0).all()
    assert (got[(x > -172) & (x < 3e37)] > 0).all()


def test_sigmoid_far_from_zero(backend: Backend) -> None:
    got = single(backend, FAR, M(1, 1, "sigmoid", renormalize=False))
    x = FAR.astype(np.float32).astype(np.float64)
    with np.errstate(over="ignore"):
        want = 1 / ((1 + np.exp(-x)) * (1 + np.exp(x)))
    compare.assert_weights_close(got, want.astype(np.float32), 3e-6)


def test_a_cap_far_from_zero(backend: Backend) -> None:
    got = single(backend, FAR, M(1, 1, "identity", renormalize=False, logit_softcap=4.0, logit_scale=0.5))
    x = FAR.astype(np.float32).astype(np.float64)
    with np.errstate(over="ignore"):
        want = 0.5 / np.cosh(x / 8) ** 2
    compare.assert_weights_close(got, want.astype(np.float32), 3e-6)


@pytest.mark.parametrize("score", ["sqrtsoftplus", "sigmoid", "softmax"])
def test_ratios_of_tiny_scores(backend: Backend, score: str) -> None:
    """Logits -80 and -81: renormalised, the gradient has ordinary size although the scores are tiny."""
    method = M(3, 2, score)
    logits, indices = np.array([[0.0, -80.0, -81.0]], np.float32), np.array([[1, 2]], np.int32)
    upstream = np.array([[1.0, 0.0]], np.float32)
    got = backward(backend, upstream, indices, logits, method)
    step = 0.5 if score == "sqrtsoftplus" else 1.0  # u = sigmoid(step * difference)
    u = 1 / (1 + np.exp(-step))
    np.testing.assert_allclose(got, [[0, step * u * (1 - u), -step * u * (1 - u)]], rtol=2e-5, atol=1e-12)


def test_the_smallest_normal_score(backend: Backend) -> None:
    """Its root is normal, half of it is not: the quotient by the sum comes first."""
    logits = np.array([[-174.0, -174.5]], np.float32)
    got = backward(backend, np.array([[1, 0]], np.float32), np.array([[0, 1]], np.int32), logits, M(2, 2))
    u = 1 / (1 + np.exp(-0.25))
    np.testing.assert_allclose(got, [[u * (1 - u) / 2, -u * (1 - u) / 2]], rtol=1e-4)


@pytest.mark.parametrize("columns", [8, 1200])
def test_a_sum_of_zero_has_no_gradient(backend: Backend, columns: int) -> None:
    logits = np.full((2, columns), -300.0, np.float32)
    indices = np.array([[0, 1], [2, 3]], np.int32)
    upstream = np.ones((2, 2), np.float32)
    assert not backward(backend, upstream, indices, logits, M(columns, 2)).any()
    assert not backward(backend, upstream, indices, logits, M(columns, 2, renormalize_eps=0.5)).any()
    logits[:, :4] = 1, -1, 2, -2  # they cancel
    assert not backward(backend, upstream, indices, logits, M(columns, 2, "identity")).any()


def test_the_clamp_of_the_sum(backend: Backend) -> None:
    """Below the minimum the divisor is a constant; above it is the sum."""
    logits = np.array([[1.0, 2.0], [1.0, 3.0], [1.0, 4.0]], np.float32)
    upstream, indices = np.array([[1.0, 0.0]] * 3, np.float32), np.array([[0, 1]] * 3, np.int32)
    got = backward(backend, upstream, indices, logits, M(2, 2, "identity", renormalize_min=4.0))
    np.testing.assert_allclose(got, [[1 / 4, 0], [3 / 16, -1 / 16], [4 / 25, -1 / 25]], rtol=1e-6)
    clamped = M(64, 6, "softmax", renormalize_min=2.0)  # never reached: a plain softmax, halved
    logits, upstream = inputs.distinct(3, 64), upstream_of(3, clamped)
    indices = choose(logits, clamped)
    gradients.assert_right(backward(backend, upstream, indices, logits, clamped), upstream, indices, logits, clamped)


@pytest.mark.parametrize(("experts", "after"), [(64, False), (64, True), (1100, False)])
def test_an_eps_beside_a_softmax(backend: Backend, experts: int, after: bool) -> None:
    """The divisor exceeds the sum, so every logit of the row affects the weights."""
    method = M(experts, 6, "softmax", renormalize_eps=0.25, score_after_topk=after)
    logits, upstream = inputs.distinct(3, experts), upstream_of(3, method)
    indices = choose(logits, method)
    got = backward(backend, upstream, indices, logits, method)
    gradients.assert_right(got, upstream, indices, logits, method)
    assert ((got != 0).sum(axis=1) == (6 if after else experts)).all()


def test_softmax_over_the_chosen_has_no_gradient_elsewhere(backend: Backend) -> None:
    """Exactly 0, though it is computed from the whole row."""
    method = M(128, 8, "softmax")
    logits, upstream = inputs.normal((5, 128), seed=73), upstream_of(5, method)
    got = backward(backend, upstream, oracle.route(logits, method).indices, logits, method)
    assert ((got != 0).sum(axis=1) == 8).all()


@pytest.mark.parametrize("columns", [8, 1200])
@pytest.mark.parametrize("score", ["sqrtsoftplus", "sigmoid", "softmax", "identity"])
def test_nan_does_not_spread(backend: Backend, score: str, columns: int) -> None:
    """A chosen NaN has gradient NaN, one that was not chosen 0; the others do not change."""
    logits = inputs.distinct(3, columns, seed=3) + np.float32(5)
    indices = np.array([[0, 1, 2]] * 3, np.int32)
    upstream = np.array([[1, -2, 4]] * 3, np.float32)
    logits[1:, [2, 5]] = logits[0, [2, 5]] = np.nan
    method = M(columns, 3, score, logit_softcap=30.0)
    got = backward(backend, upstream, indices, logits, method)
    assert np.isnan(got[:, 2]).all()
    assert np.isfinite(np.delete(got, 2, axis=1)).all()
    assert (got[:, 5] == 0).all()
    kept = np.delete(logits, [2, 5], axis=1)
    without = backward(
        backend, upstream[:, :2], indices[:, :2], kept, replace(method, num_experts=columns - 2, top_k=2)
    )
    np.testing.assert_allclose(got[:, :2], without[:, :2], rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("score", ["sqrtsoftplus", "identity"])
def test_an_infinite_score(backend: Backend, score: str) -> None:
    """It weighs NaN and the others 0, whatever their logits: their gradient is 0."""
    logits = np.array([[np.inf, 1.0, 2.0]], np.float32)
    got = backward(backend, np.ones((1, 2), np.float32), np.array([[0, 2]], np.int32), logits, M(3, 2, score))
    np.testing.assert_array_equal(got, [[np.nan, 0, 0]])
    alone = backward(
        backend, np.ones((1, 2), np.float32), np.array([[0, 2]], np.int32), logits, M(3, 2, score, renormalize=False)
    )
    assert alone[0, 0] == (1 if score == "identity" else 0)
    assert alone[0, 2] > 0


def test_equal_infinite_logits_share_a_softmax(backend: Backend) -> None:
    logits = np.array([[np.inf, 0.0, np.inf, -np.inf], [-np.inf] * 4], np.float32)
    method, indices = M(4, 2, "softmax", renormalize=False), np.array([[0, 2], [0, 1]], np.int32)
    got = backward(backend, np.array([[1, 0]] * 2, np.float32), indices, logits, method)
    np.testing.assert_allclose(got, [[0.25, 0, -0.25, 0], [3 / 16, -1 / 16, -1 / 16, -1 / 16]], rtol=1e-6)


def test_a_nan_gradient_is_passed_on(backend: Backend) -> None:
    method = M(16, 3)
    logits, upstream = inputs.distinct(2, 16), upstream_of(2, method)
    upstream[1, 0] = np.nan
    indices = choose(logits, method)
    got = backward(backend, upstream, indices, logits, method)
    assert np.isnan(got[1, indices[1]]).all()
    assert np.isfinite(got[0]).all()


@pytest.mark.parametrize(
    "name", ["sigmoid", "softmax", "softmax after top-k", "in bfloat16", "by a block", "softmax by a block"]
)
def test_experts_of_a_table_may_repeat(backend: Backend, name: str) -> None:
    """Every occurrence of an expert adds to its gradient."""
    experts, k = (1100, 5) if name.endswith("block") else (16, 5)
    score = "softmax" if name.startswith("softmax") else "sigmoid"
    method = M(experts, k, score, score_after_topk=name == "softmax after top-k", renormalize=score == "sigmoid")
    logits = inputs.distinct(4, experts, "bfloat16" if name == "in bfloat16" else "float32")
    indices = np.array([[3, 3, 7, 3, 1], [0, 1, 2, 3, 4], [5] * 5, [9, 15, 9, 15, 2]], np.int32)
    upstream = upstream_of(4, method)
    got = backward(backend, upstream, indices, logits, method, repeated=True)
    gradients.assert_right(got, upstream, indices, logits, method)


# -- Bad input ---------------------------------------------------------------------------------------------------------

F32, I32 = np.float32, np.int32
GOOD: dict[str, Any] = {
    "grad_weights": np.zeros((3, 2), F32), "indices": np.zeros((3, 2), I32), "logits": np.zeros((3, 8), F32),
}  # fmt: skip
BAD = [
    ({"grad_weights": np.zeros((3, 2), np.float16)}, TypeError, "grad_weights must be float32, as .* got float16"),
    ({"grad_weights": np.zeros((3, 3), F32)}, ValueError, r"grad_weights must have shape \[num_tokens, top_k \(\+"),
    ({"grad_weights": None}, TypeError, "grad_weights must be an array"),
    ({"indices": np.zeros((3, 2), np.int8)}, TypeError, "indices must be uint8 or .* or int64, got int8"),
    ({"indices": np.zeros((2, 2), I32)}, ValueError, r"indices must have shape .* = \[3, 2\], got int32 \[2, 2\]"),
    ({"indices": None}, TypeError, "indices must be an array, got None"),
    ({"logits": np.zeros((3, 9), F32)}, ValueError, r"logits must have shape \[num_tokens, .*\] = \[3, 8\]"),
    ({"logits": np.zeros(8, F32)}, ValueError, r"logits must have shape \[num_tokens, .*\], got"),
    ({"logits": np.zeros((3, 8), np.float64)}, TypeError, "logits must be float32 or float16 or bfloat16, got float64"),
    ({"logit_bias": np.zeros(7, F32)}, ValueError, "logit_bias must have shape"),
    ({"expert_scale": np.zeros(8, np.float16)}, TypeError, "expert_scale must be float32"),
    ({"dtype": "float64"}, ValueError, "dtype must be 'float32' or None, got 'float64'"),
    ({"out": (np.zeros((3, 8), F32), np.zeros((3, 2), I32))}, TypeError, "out must be LogitsGradient\\(grad_logits\\)"),
    ({"out": LogitsGradient(np.zeros((3, 7), F32))}, ValueError, r"out.grad_logits must have shape .* = \[3, 8\]"),
    (
        {"method": M(8, 2, ScoreFunction("cubic", cuda="x * x * x", numpy=lambda x: x**3))},
        ValueError,
        r"ScoreFunction\('cubic'\) has no gradient: give it a derivative, which is another ScoreFunction",
    ),
]  # fmt: skip


@pytest.mark.parametrize(("changes", "error", "message"), BAD, ids=lambda value: str(value)[:40])
def test_errors(backend: Backend, changes: dict[str, Any], error: type[Exception], message: str) -> None:
    arguments = {"method": M(8, 2)} | GOOD | changes
    given = {
        name: LogitsGradient(*map(backend.upload, value)) if isinstance(value, LogitsGradient)
        else tuple(map(backend.upload, value)) if isinstance(value, tuple)
        else backend.upload(value) if isinstance(value, np.ndarray) and value.dtype not in (np.int8, np.float64)
        else value
        for name, value in arguments.items()
    }  # fmt: skip
    if backend.name == "gpu" and any(isinstance(value, np.ndarray) for value in given.values()):
        pytest.skip("dtypes that the test does not upload")
    with pytest.raises(error, match=f"^activation_topk_backward: {message}"):
        activation_topk_backward(**given)


def test_a_derivative_is_a_score_function() -> None:
    with pytest.raises(TypeError, match=r"derivative is '2 \* x', but must be a ScoreFunction or None"):
        ScoreFunction("square", cuda="x * x", numpy=abs, derivative="2 * x")  # type: ignore[arg-type]
    derivative = ScoreFunction("derivative", cuda="1.0f", numpy=np.ones_like)
    with_derivative = ScoreFunction("line", cuda="x", numpy=abs, derivative=derivative)
    assert with_derivative != replace(with_derivative, derivative=None)
    assert M(8, 2, with_derivative) != M(8, 2, replace(with_derivative, derivative=None))
