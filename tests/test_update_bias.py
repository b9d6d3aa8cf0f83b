# SPDX-License-Identifier: Apache-2.0
"""The bias that balances experts: the sign rule against a loop in Python's integers, centring, frameworks, errors."""

from __future__ import annotations

import importlib
from typing import Any

import numpy as np
import pytest

from cupy_router import update_bias
from cupy_router.reference import update_bias as reference
from tests import inputs
from tests.backends import Backend
from tests.compare import assert_same_bits

RATE = 0.001


def moved(bias: np.ndarray, counts: np.ndarray, rate: float = RATE) -> np.ndarray:
    """The rule, one expert at a time."""
    total, result = sum(map(int, counts)), bias.copy()
    for e, count in enumerate(map(int, counts)):
        if count * len(counts) < total:
            result[e] = bias[e] + np.float32(rate)
        elif count * len(counts) > total:
            result[e] = bias[e] - np.float32(rate)
    return result


def case(num_experts: int, dtype: str = "int32", seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """A bias, and counts of which some are the mean."""
    rng = np.random.default_rng(seed)
    counts = rng.integers(0, 40, num_experts)
    if num_experts > 3:
        counts[: num_experts // 4] = 20
        counts[-1] += 20 * num_experts - counts.sum()
    return inputs.normal((num_experts,), seed=seed), counts.astype(dtype)


SIZES = (1, 2, 31, 33, 60, 255, 256, 257, 384, 1000, 4096)


@pytest.mark.parametrize("dtype", ["int32", "int64"])
@pytest.mark.parametrize("num_experts", SIZES)
def test_every_expert_moves_towards_the_mean(backend: Backend, num_experts: int, dtype: str) -> None:
    bias, counts = case(num_experts, dtype)
    got = backend.numpy(update_bias(backend.array(bias), backend.array(counts), rate=RATE))
    assert_same_bits(got, moved(bias, counts))
    if num_experts > 3:
        assert (got[: num_experts // 4] == bias[: num_experts // 4]).all(), "the mean stays"


@pytest.mark.parametrize("num_experts", SIZES)
def test_centring_subtracts_the_mean_to_the_same_bits_everywhere(backend: Backend, num_experts: int) -> None:
    bias, counts = case(num_experts)
    got = backend.numpy(update_bias(backend.array(bias + 3), backend.array(counts), rate=RATE, center=True))
    exact = moved(bias + 3, counts).astype(np.float64)
    np.testing.assert_allclose(got, exact - exact.mean(), rtol=0, atol=4e-6)
    assert_same_bits(got, reference.update_bias(bias + 3, counts, RATE, True))


def test_the_sign_is_exact(backend: Backend) -> None:
    """Counts of which neither float32 nor float64 knows the mean, nor int32 the sum."""
    for counts in ([2**31 - 1, 2**31 - 2, 2**31 - 2], [2**60 + 1, 2**60, 2**60], [2**60, 2**60, 2**60], [0, 0, 1]):
        given = np.array(counts, np.int32 if max(counts) < 2**31 else np.int64)
        got = backend.numpy(update_bias(backend.array(np.zeros(3, np.float32)), backend.array(given), rate=1.0))
        assert got.tolist() == moved(np.zeros(3, np.float32), given, 1.0).tolist()
    assert moved(np.zeros(3, np.float32), np.array([2**60 + 1, 2**60, 2**60]), 1.0).tolist() == [-1, 1, 1]


@pytest.mark.parametrize("center", [False, True])
def test_special_values(backend: Backend, center: bool) -> None:
    """Subnormals are 0, a zero has no sign, and NaN stays where it is unless it is in the mean."""
    bias = np.array([-0.0, 1e-40, -1e-40, np.inf, np.nan, -3e-38, 1.2e-38, -1.0], np.float32)
    counts = np.array([4, 4, 4, 4, 4, 4, 4, 4], np.int32)
    got = backend.numpy(update_bias(backend.array(bias), backend.array(counts), rate=2e-38, center=center))
    if center:
        assert np.isnan(got).all()
    else:
        np.testing.assert_array_equal(got, np.where(abs(bias) < 1.1e-38, 0, bias))
        assert not np.signbit(got[:3]).any()
    counts[5], counts[6] = 3, 5  # -3e-38 + 2e-38 and 1.2e-38 - 2e-38 are negative subnormals
    bias[3:5] = 0
    got = backend.numpy(update_bias(backend.array(bias), backend.array(counts), rate=2e-38, center=center))
    assert_same_bits(got, reference.update_bias(bias, counts, 2e-38, center))
    if not center:
        assert_same_bits(got, np.array([0, 0, 0, 0, 0, 0, 0, -1], np.float32))


def test_no_experts(backend: Backend) -> None:
    empty = backend.array(np.empty(0, np.float32)), backend.array(np.empty(0, np.int32))
    for center in (False, True):
        assert backend.numpy(update_bias(*empty, center=center)).shape == (0,)


@pytest.mark.parametrize("center", [False, True])
def test_in_place(backend: Backend, center: bool) -> None:
    bias, counts = case(300)
    array = backend.array(bias, offset=1)
    assert update_bias(array, backend.array(counts, offset=1), rate=RATE, center=center, out=array) is array
    assert_same_bits(backend.numpy(array), reference.update_bias(bias, counts, RATE, center))


def test_updates_balance_the_load() -> None:
    """Tokens choose by score plus bias; after some steps every expert gets its share."""
    rng = np.random.default_rng(0)
    scores, bias = rng.random((512, 16)) + np.linspace(0, 1, 16), np.zeros(16, np.float32)
    loads = []
    for _ in range(60):
        chosen = np.argsort(-(scores + bias), axis=1)[:, :2]
        loads.append(np.bincount(chosen.reshape(-1), minlength=16).astype(np.int32))
        update_bias(bias, loads[-1], rate=0.02, center=True, out=bias)
    assert loads[0].max() > 3 * 64
    assert loads[-1].max() < 1.3 * 64
    assert abs(bias.mean()) < 1e-6


BIAS, COUNTS = np.zeros(4, np.float32), np.zeros(4, np.int32)


@pytest.mark.parametrize(
    ("given", "options", "error", "message"),
    [
        ((BIAS.astype(np.float16), COUNTS), {}, TypeError, r"bias must be float32, got .*float16.*: convert it"),
        ((BIAS, BIAS), {}, TypeError, r"counts must be int32 or int64, got .*float32"),
        ((BIAS, COUNTS[:3]), {}, ValueError, r"counts must have shape \[num_experts\] = \[4\], got "),
        ((BIAS[None], COUNTS), {}, ValueError, r"bias must have shape \[num_experts\], got "),
        ((np.zeros(8, np.float32)[::2], COUNTS), {}, ValueError, r"bias must be contiguous along its last axis"),
        ((BIAS, None), {}, TypeError, r"counts must be an array, got None"),
        ((BIAS, COUNTS), {"rate": -0.5}, ValueError, r"rate must be at least 0 and finite in float32, got -0.5$"),
        ((BIAS, COUNTS), {"rate": float("nan")}, ValueError, r"rate must be at least 0 and finite in float32, got nan"),
        ((BIAS, COUNTS), {"rate": 1e39}, ValueError, r"rate must be at least 0 and finite in float32, got 1e\+39"),
        ((BIAS, COUNTS), {"rate": 10**400}, ValueError, r"rate must be .* finite in float32, got an int of 1329 bits"),
        ((BIAS, COUNTS), {"rate": -(10**5000)}, ValueError, r"rate must be .*, got an int of 16610 bits"),
        ((BIAS, COUNTS), {"rate": np.float16("inf")}, ValueError, r"rate must be .* finite in float32, got inf"),
        ((BIAS, COUNTS), {"center": np.array([1, 0])}, TypeError, r"center must be a bool, got ndarray$"),
        ((BIAS, COUNTS), {"center": 1}, TypeError, r"center must be a bool, got int$"),
        ((BIAS, COUNTS), {"center": None}, TypeError, r"center must be a bool, got NoneType$"),
        ((BIAS, COUNTS), {"rate": True}, TypeError, r"rate must be a float, got bool"),
        ((BIAS, COUNTS), {"rate": BIAS}, TypeError, r"rate must be a float, got ndarray"),
        ((BIAS, COUNTS), {"out": COUNTS.copy()}, TypeError, r"out must be float32, got "),
        ((BIAS, COUNTS), {"out": np.zeros(5, np.float32)}, ValueError, r"out must have shape "),
    ],
)
def test_bad_input(given: Any, options: Any, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=f"^update_bias: {message}"):
        update_bias(*given, **options)
    assert not BIAS.any()


@pytest.mark.filterwarnings("error")
def test_a_rate_may_be_an_int_or_numpys() -> None:
    for rate in (1, np.float32(1), np.float16(1), np.int64(1)):
        assert update_bias(BIAS, np.array([1, 0, 0, 0], np.int32), rate=rate).tolist() == [-1, 1, 1, 1]


def test_centring_may_be_asked_for_by_a_bool_of_numpy() -> None:
    bias, counts = case(60)
    for center in (False, True):
        assert_same_bits(update_bias(bias, counts, center=np.bool_(center)), update_bias(bias, counts, center=center))


# -- PyTorch -----------------------------------------------------------------------------------------------------------


@pytest.fixture
def torch() -> Any:
    return pytest.importorskip("torch")


@pytest.mark.backends("reference", "gpu")
def test_pytorch_in_place_raises_the_version(torch: Any, backend: Backend) -> None:
    bias, counts = case(60)
    device = "cuda" if backend.name == "gpu" else "cpu"
    tensor, load = torch.from_numpy(bias.copy()).to(device), torch.from_numpy(counts).to(device)
    before, version = tensor.clone(), tensor._version
    assert update_bias(tensor, load, out=tensor) is tensor
    assert tensor._version > version
    torch.testing.assert_close(tensor, before + 1e-3 * torch.sign(load.double().mean() - load).float(), rtol=0, atol=0)


@pytest.mark.backends("gpu")
def test_a_cuda_graph_of_pytorch_moves_the_bias_again(torch: Any) -> None:
    bias, counts = case(60)
    tensor, load = torch.from_numpy(bias).cuda(), torch.from_numpy(counts).cuda()
    update_bias(tensor.clone(), load)  # compiles
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        update_bias(tensor, load, out=tensor)
    for _ in range(3):
        graph.replay()
        load.copy_(load.flip(0))
    want = bias
    for given in (counts, counts[::-1], counts):
        want = reference.update_bias(want, given)
    assert_same_bits(tensor.cpu().numpy(), want)


@pytest.mark.backends("reference")
def test_pytorch_gives_no_gradient_and_refuses_to_write_into_what_requires_grad(torch: Any) -> None:
    bias, load = torch.zeros(4, requires_grad=True), torch.tensor([1, 0, 0, 0])
    assert not update_bias(bias, load).requires_grad
    with pytest.raises(ValueError, match=r"^update_bias: out must not require grad unless under torch.no_grad"):
        update_bias(bias, load, out=bias)
    assert not bias.detach().any()
    with torch.no_grad():
        update_bias(bias, load, rate=1.0, out=bias)
    assert bias.tolist() == [-1, 1, 1, 1]


@pytest.mark.backends("reference")
@pytest.mark.slow("seconds", every=2)
@pytest.mark.parametrize("backend_of_compile", ["aot_eager", "eager"])
def test_pytorch_in_place_compiled(torch: Any, backend_of_compile: str) -> None:
    def step(bias: Any, load: Any) -> Any:
        update_bias(bias, load, rate=0.5, center=True, out=bias)
        load.zero_()
        return bias * 2

    torch.compiler.reset()
    compiled = torch.compile(step, backend=backend_of_compile, fullgraph=True)
    (bias, counts), results = case(60), []
    for function in (step, compiled):
        tensor, load = torch.from_numpy(bias.copy()), torch.from_numpy(counts.copy())
        for _ in range(2):
            doubled = function(tensor, load)
            load += torch.from_numpy(counts[::-1].copy())
        results.append((tensor, doubled, load))
    torch.testing.assert_close(results[1], results[0], rtol=0, atol=0)
    want = reference.update_bias(bias, counts, 0.5, True)
    assert_same_bits(results[0][0].numpy(), reference.update_bias(want, counts[::-1], 0.5, True))


# -- JAX ---------------------------------------------------------------------------------------------------------------


@pytest.mark.backends("reference", "gpu")
def test_jax_jitted_and_out_refused() -> None:
    jax = pytest.importorskip("jax")
    if importlib.import_module("cupy_router.jax._ffi_targets").why_not() is not None:
        pytest.skip("calls inside jax.jit need a newer JAX")
    bias, counts = case(60)
    given = jax.numpy.asarray(bias), jax.numpy.asarray(counts)
    want = reference.update_bias(bias, counts, 0.5, True)
    for call in (update_bias, jax.jit(update_bias, static_argnames=("rate", "center"))):
        got = call(*given, rate=0.5, center=True)
        assert isinstance(got, jax.Array)
        assert_same_bits(np.asarray(got), want)
    with pytest.raises(ValueError, match=r"^update_bias: out"):
        update_bias(*given, out=given[0])
    with pytest.raises(ValueError, match=r"^update_bias: out and stream cannot be given inside"):
        jax.jit(lambda b, c: update_bias(b, c, out=b))(*given)
    with pytest.raises(TypeError, match=r"^update_bias: rate must be a float, got "):
        jax.jit(update_bias)(*given, rate=0.5)
    with pytest.raises(ValueError, match=r"results have no gradient"):
        jax.grad(lambda b: update_bias(b, given[1]).sum())(given[0])
