# SPDX-License-Identifier: Apache-2.0
"""The boundary on CPU memory: any framework's array in, the caller's framework out, inputs never written."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from cupy_router import Routing, RoutingMethod, TopK, activation_topk, hash_router, topk_select
from tests import compare, frameworks, inputs, oracle
from tests.backends import DTYPES

pytestmark = pytest.mark.usefixtures("backend")

METHOD = RoutingMethod(16, 3)
LOGITS = inputs.normal((5, 16))
TABLE = np.array([inputs.rng(60, r).permutation(16)[:3] for r in range(10)], np.int32)
IDS = np.array([0, 9, 3, -1, 5], np.int32)


@pytest.fixture(params=sorted(frameworks.ON_CPU))
def framework(request: pytest.FixtureRequest) -> Any:
    return frameworks.ON_CPU[request.param]()


def dtypes_of(framework: Any) -> list[str]:
    return ["float32"] if isinstance(framework, frameworks.Strict) else list(inputs.FLOATS)


# -- Frameworks --------------------------------------------------------------------------------------------------------


def test_topk_select_with_every_framework(framework: Any) -> None:
    for dtype in dtypes_of(framework):
        scores = inputs.normal((5, 40), dtype)
        lengths = np.array([40, 3, 0, 17, 5], np.int32)
        result = topk_select(framework.array(scores), 4, lengths=framework.array(lengths))
        assert all(isinstance(a, framework.result_type) for a in result)
        want = oracle.topk(scores, 4, lengths)
        compare.assert_same_bits(framework.numpy(result.values), want[0])
        compare.assert_same_bits(framework.numpy(result.indices), want[1])


def test_activation_topk_with_every_framework(framework: Any) -> None:
    bias = inputs.normal((16,), seed=61)
    for dtype in dtypes_of(framework):
        logits = LOGITS.astype(DTYPES[dtype])
        result = activation_topk(framework.array(logits), METHOD, bias=framework.array(bias))
        assert all(isinstance(a, framework.result_type) for a in result)
        got = oracle.Routing(framework.numpy(result.weights), framework.numpy(result.indices))
        compare.assert_routes(got, oracle.route(logits, METHOD, bias), logits, METHOD, bias)


def test_hash_router_with_every_framework(framework: Any) -> None:
    result = hash_router(framework.array(IDS), framework.array(TABLE), METHOD, logits=framework.array(LOGITS))
    assert all(isinstance(a, framework.result_type) for a in result)
    want = oracle.hash_route(IDS, TABLE, METHOD, LOGITS)
    np.testing.assert_array_equal(framework.numpy(result.indices), want.indices)
    compare.assert_weights_close(framework.numpy(result.weights), want.weights, 2e-6)


def test_results_belong_to_the_framework_of_the_first_array() -> None:
    torch, jax = frameworks.PyTorch(), frameworks.JAX()
    bias = inputs.normal((16,))
    assert isinstance(activation_topk(torch.array(LOGITS), METHOD, bias=bias).weights, torch.result_type)
    assert isinstance(activation_topk(LOGITS, METHOD, bias=torch.array(bias)).weights, np.ndarray)
    assert isinstance(hash_router(jax.array(IDS), TABLE).indices, jax.result_type)


def test_a_tensor_that_requires_grad_is_accepted() -> None:
    torch = frameworks.PyTorch()
    logits = torch.array(LOGITS).requires_grad_()
    result = activation_topk(logits, METHOD)
    compare.assert_same_bits(torch.numpy(result.indices), oracle.route(LOGITS, METHOD).indices)
    parameter = torch.torch.nn.Parameter(torch.array(LOGITS))
    assert type(topk_select(parameter, 2).values) is torch.torch.Tensor


def test_an_ndarray_subclass_and_a_dlpack_only_array() -> None:
    class OnlyDLPack:
        def __init__(self, host: np.ndarray) -> None:
            self.host = host

        def __dlpack__(self, **wanted: Any) -> object:
            return self.host.__dlpack__(**wanted)

        def __dlpack_device__(self) -> tuple[int, int]:
            return self.host.__dlpack_device__()

    class OldDLPack(OnlyDLPack):
        """A producer from before DLPack 1.0, without max_version."""

        def __dlpack__(self, stream: Any = None) -> object:  # type: ignore[override]
            return self.host.__dlpack__()

    class RefusingDLPack(OnlyDLPack):
        """A producer that knows max_version and takes none, such as array-api-strict on NumPy 2.0."""

        def __dlpack__(self, **wanted: Any) -> object:
            if wanted:
                raise NotImplementedError("max_version is not implemented")
            return self.host.__dlpack__()

    class Sub(np.ndarray):
        pass

    want = oracle.topk(LOGITS, 3)
    producers = OnlyDLPack(LOGITS), OldDLPack(LOGITS), RefusingDLPack(LOGITS), OnlyDLPack(LOGITS[::-1][::-1])
    for array in (*producers, LOGITS.view(Sub)):
        result = topk_select(array, 3)
        compare.assert_same_bits(np.asarray(result.values), want[0])
        compare.assert_same_bits(np.asarray(result.indices), want[1])
    reversed_rows = topk_select(OnlyDLPack(LOGITS[::-1]), 3)
    np.testing.assert_array_equal(reversed_rows.indices, want[1][::-1])


def test_the_c_exchange_api_agrees_with_the_attributes() -> None:
    """PyTorch tensors are read by attributes; the exchange API, used for other types, must agree."""
    torch = pytest.importorskip("torch")
    if not hasattr(torch.Tensor, "__dlpack_c_exchange_api__"):
        pytest.skip("this PyTorch has no DLPack C exchange API")
    from cupy_router.arrays import _exchange, _torch

    exchange, tensor = _exchange.Exchange(torch.Tensor), torch.randn(6, 40)
    for layout in (tensor, tensor[::2], tensor[:, 5:], tensor[:1].expand(3, 40), tensor[0], torch.zeros(0, 4)):
        for dtype in (torch.float32, torch.bfloat16, torch.float16, torch.int32, torch.int64, torch.float64):
            given = layout.to(dtype)
            one, other = (reader.view("x", given, None) for reader in (exchange, _torch.FRAMEWORK))
            for field in ("pointer", "shape", "strides", "dtype", "device"):
                assert getattr(one, field) == getattr(other, field)
            assert exchange.current_stream(given) is None


def test_results_outlive_the_inputs_and_share_no_memory() -> None:
    scores = inputs.normal((4, 8))
    result = topk_select(scores, 8)
    before = [a.copy() for a in result]
    scores[:] = 0
    for a, b in zip(result, before, strict=True):
        np.testing.assert_array_equal(a, b)


# -- Layout ------------------------------------------------------------------------------------------------------------


def misaligned(host: np.ndarray) -> np.ndarray:
    """Return the same array at an address that is aligned only to its item size."""
    memory = np.zeros(host.nbytes + 64, np.uint8)
    shift = (-memory.ctypes.data) % 16 + host.itemsize
    array = memory[shift : shift + host.nbytes].view(host.dtype).reshape(host.shape)
    array[...] = host
    return array


@pytest.mark.parametrize("dtype", inputs.FLOATS)
def test_any_row_stride_and_alignment(dtype: str) -> None:
    scores = inputs.normal((6, 40), dtype)
    views = [scores[::2], scores[::-1], scores[:, 3:9], scores[1:2], np.broadcast_to(scores[0], (4, 40)), scores[:, :1]]
    for view in (*views, misaligned(scores), misaligned(scores)[:, 1:]):
        result = topk_select(view, 1)
        want = oracle.topk(np.ascontiguousarray(view), 1)
        compare.assert_same_bits(result.values, want[0])
        np.testing.assert_array_equal(result.indices, want[1])


def test_torch_layouts() -> None:
    torch = frameworks.PyTorch()
    scores = inputs.normal((6, 40), "bfloat16")
    tensor = torch.array(scores)
    for view in (tensor[::2], tensor[:, 5:], tensor[:1].expand(3, 40)):
        result = topk_select(view, 4)
        compare.assert_same_bits(torch.numpy(result.indices), oracle.topk(torch.numpy(view.clone()), 4)[1])


@pytest.mark.parametrize(
    "view",
    [
        pytest.param(lambda a: a.T, id="transposed"),
        pytest.param(lambda a: a[:, ::2], id="every-other-column"),
        pytest.param(lambda a: a[:, ::-1], id="columns-in-reverse"),
        pytest.param(lambda a: np.broadcast_to(a[:, :1], a.shape), id="one-column-repeated"),
    ],
)
def test_another_layout_is_refused_with_its_strides(view: Any) -> None:
    array = view(np.zeros((16, 32), np.float32))
    strides = ", ".join(str(step // 4) for step in array.strides)
    method = RoutingMethod(array.shape[1], 3)
    with pytest.raises(ValueError, match=rf"scores.*strides \[{strides}\]"):
        topk_select(array, 2)
    with pytest.raises(ValueError, match=rf"logits.*strides \[{strides}\]"):
        activation_topk(array, method)


def test_a_strided_vector_is_refused() -> None:
    with pytest.raises(ValueError, match=r"bias.*strides \[2\]"):
        activation_topk(LOGITS, METHOD, bias=np.zeros(32, np.float32)[::2])
    with pytest.raises(ValueError, match=r"token_ids.*strides \[2\]"):
        hash_router(np.zeros(10, np.int32)[::2], TABLE)


# -- Out ---------------------------------------------------------------------------------------------------------------


def outs(n: int, k: int, dtype: Any = np.float32) -> tuple[np.ndarray, np.ndarray]:
    return np.full((n, k), 7, dtype), np.full((n, k), 7, np.int32)


def test_out_with_every_framework_that_can_be_written() -> None:
    for framework in (frameworks.NumPy(), frameworks.PyTorch()):
        out = Routing(*map(framework.array, outs(5, 3)))
        assert activation_topk(framework.array(LOGITS), METHOD, out=out) is out
        want = oracle.route(LOGITS, METHOD)
        compare.assert_weights_close(framework.numpy(out.weights), want.weights, 2e-6)
        np.testing.assert_array_equal(framework.numpy(out.indices), want.indices)


@pytest.mark.parametrize("dtype", inputs.FLOATS)
def test_out_may_be_strided_and_misaligned(dtype: str) -> None:
    scores = inputs.normal((5, 30), dtype)
    values, indices = np.zeros((5, 9), DTYPES[dtype]), np.full((5, 9), 7, np.int32)
    base = misaligned(indices)
    out = TopK(misaligned(values)[:, 2:6], base[:, 3:7])
    topk_select(scores, 4, out=out)
    want = oracle.topk(scores, 4)
    compare.assert_same_bits(np.ascontiguousarray(out.values), want[0])
    np.testing.assert_array_equal(out.indices, want[1])
    assert (base[:, :3] == 7).all()
    assert (base[:, 7:] == 7).all()


def test_a_plain_tuple_as_out_is_refused() -> None:
    out = outs(5, 2)
    with pytest.raises(TypeError, match=r"out must be TopK\(values, indices\), got tuple"):
        topk_select(LOGITS, 2, out=out)
    assert (out[1] == 7).all()


@pytest.mark.parametrize("position", [0, 1])
def test_read_only_out_is_refused_and_nothing_written(position: int) -> None:
    out = outs(5, 3)
    out[position].flags.writeable = False
    name = ("out.weights", "out.indices")[position]
    with pytest.raises(ValueError, match=name):
        activation_topk(LOGITS, METHOD, out=Routing(*out))
    assert (out[0] == 7).all()
    assert (out[1] == 7).all()


def test_jax_out_is_refused() -> None:
    jax = frameworks.JAX()
    out = Routing(*map(jax.array, outs(5, 3)))
    with pytest.raises(ValueError, match=r"out\.weights"):
        activation_topk(jax.array(LOGITS), METHOD, out=out)
    assert (jax.numpy(out.weights) == 7).all()


def test_out_with_overlapping_rows_is_refused() -> None:
    weights, indices = outs(5, 3)
    with pytest.raises(ValueError, match=r"out\.weights.*strides"):
        activation_topk(LOGITS, METHOD, out=Routing(np.lib.stride_tricks.as_strided(weights, (5, 3), (0, 4)), indices))


# -- Inputs ------------------------------------------------------------------------------------------------------------


def test_inputs_are_never_written() -> None:
    """All inputs are read-only memory here, so that a write would be an error or a crash."""
    arrays: dict[str, np.ndarray] = {
        "ids": IDS, "table": TABLE, "logits": LOGITS, "x": inputs.normal((5, 8)), "weight": inputs.normal((16, 8)),
        "bias": inputs.normal((16,)), "lengths": np.arange(5, dtype=np.int32), "count": np.array(3, np.int32),
    }  # fmt: skip
    given = {name: a.copy() for name, a in arrays.items()}
    for a in given.values():
        a.flags.writeable = False
    topk_select(given["logits"], 3, lengths=given["lengths"], starts=given["lengths"])
    activation_topk(given["logits"], METHOD, bias=given["bias"], num_valid=given["count"])
    hash_router(given["ids"], given["table"], METHOD, logits=given["logits"], num_valid=given["count"])
    hash_router(given["ids"], given["table"], METHOD, x=given["x"], weight=given["weight"])
    for name, a in arrays.items():
        compare.assert_same_bits(given[name], a)


@pytest.mark.slow("process")
def test_importing_the_package_imports_no_framework() -> None:
    import subprocess
    import sys

    code = (
        "import sys, cupy_router; cupy_router.topk_select, cupy_router.presets();"
        "found = {'torch', 'jax', 'cupy'} & set(sys.modules); assert not found, found"
    )
    subprocess.run([sys.executable, "-c", code], check=True, timeout=60)


@pytest.mark.slow("process")
def test_a_call_imports_no_other_framework() -> None:
    import subprocess
    import sys

    code = (
        "import sys, numpy, cupy_router; cupy_router.topk_select(numpy.zeros((2, 3), 'f'), 1);"
        "found = {'torch', 'jax', 'cupy'} & set(sys.modules); assert not found, found"
    )
    subprocess.run([sys.executable, "-c", code], check=True, timeout=60)
