# SPDX-License-Identifier: Apache-2.0
"""permute moves bytes, or rounds one product: everything here is exact to the last bit."""

from __future__ import annotations

from typing import Any

import ml_dtypes
import numpy as np
import pytest

from cupy_router import ExpertLayout, permute
from tests import inputs
from tests.backends import DTYPES, Backend
from tests.inputs import FLOATS, rng
from tests.layout_calls import layout_of, same_bytes, to_rows, tokens
from tests.layout_inputs import DISTRIBUTIONS, HIDDEN, hidden_states, uniform, zipf

ITEM = pytest.mark.acceptance
BYTES = (
    "bool", "int8", "uint8", "int16", "uint16", "int32", "uint32", "int64", "uint64", "float16", "float32", "float64",
    "complex64", "complex128", "bfloat16", "float8_e4m3fn", "float8_e5m2", "float8_e8m0fnu",
)  # fmt: skip
SUB_BYTE = ("int4", "uint4", "float4_e2m1fn")


class Foreign:
    """An array that only speaks DLPack."""

    def __init__(self, array: Any) -> None:
        self.array = array

    def __dlpack__(self, **wanted: Any) -> object:
        capsule: object = self.array.__dlpack__(**wanted)
        return capsule

    def __dlpack_device__(self) -> tuple[int, int]:
        kind, index = self.array.__dlpack_device__()
        return int(kind), index


def numpy_dtype(name: str) -> np.dtype:
    return np.dtype(getattr(ml_dtypes, name, name))


def any_bytes(shape: tuple[int, int], name: str) -> np.ndarray:
    """Return arrays of all bit patterns, as far as the dtype has such."""
    dtype = numpy_dtype(name)
    high = 2 if name == "bool" else 256
    drawn = rng(420, *shape).integers(0, high, (shape[0], shape[1] * dtype.itemsize)).astype(np.uint8)
    return drawn.view(dtype)


# -- Sizes, dtypes, memory ---------------------------------------------------------------------------------------------


@pytest.mark.slow("seconds", every=3)
@pytest.mark.many_kernels
@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("hidden", [pytest.param(h, marks=ITEM(f"rows: hidden {h}")) for h in HIDDEN])
def test_every_hidden_size(backend: Backend, hidden: int, dtype: str, weighted: bool) -> None:
    n, k = (5 if backend.name == "simt" else 33), 6
    layout = layout_of(backend, DISTRIBUTIONS["-1 sprinkled"](n, k, 20), 20, alignment=4)
    weights = inputs.normal((n, k), FLOATS[hidden % 3], seed=1) if weighted else None
    to_rows(backend, inputs.normal((n, hidden), dtype), layout, weights)


@pytest.mark.slow("seconds", every=3)
@pytest.mark.many_kernels
@pytest.mark.parametrize("weights_dtype", FLOATS)
@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("k", [1, 6, 8, 22])
@ITEM("rows: float32, float16, bfloat16")
def test_every_dtype_of_weights(backend: Backend, dtype: str, weights_dtype: str, k: int) -> None:
    n = tokens(backend, 65, 8 * k)
    layout = layout_of(backend, zipf(n, k, 60), 60, alignment=16)
    to_rows(backend, inputs.normal((n, 40), dtype), layout, inputs.normal((n, k), weights_dtype, seed=2))


@pytest.mark.many_kernels
@pytest.mark.parametrize("name", [pytest.param(name, marks=ITEM(f"rows: bytes of {name}")) for name in BYTES])
@pytest.mark.parametrize("hidden", [1, 7, 64])
def test_any_dtype_is_moved_as_bytes(backend: Backend, name: str, hidden: int) -> None:
    layout = layout_of(backend, DISTRIBUTIONS["-1 sprinkled"](9, 3, 7), 7, alignment=2)
    x = any_bytes((9, hidden), name)
    try:
        backend.numpy(backend.array(x))
    except (TypeError, ValueError):
        pytest.skip(f"this CuPy has no {name}; tests/gpu has the arrays of PyTorch and JAX")
    to_rows(backend, x, layout)
    to_rows(backend, x, layout, row_pad=3, offset=1, place=2)


@pytest.mark.many_kernels
@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "uint8"])
@pytest.mark.parametrize("hidden", [1, 7, 64, 1000])
@pytest.mark.parametrize(("row_pad", "offset", "place"), [(0, 1, 0), (1, 0, 1), (3, 2, 5), (8, 8, 8), (0, 0, 16)])
@pytest.mark.parametrize("weighted", [False, True])
@ITEM("rows: strided and misaligned", "rows: poison behind the output")
def test_strided_and_misaligned_rows(
    backend: Backend, hidden: int, dtype: str, row_pad: int, offset: int, place: int, weighted: bool
) -> None:
    layout = layout_of(backend, uniform(9, 2, 7), 7, alignment=4)
    x = any_bytes((9, hidden), dtype) if dtype == "uint8" else inputs.normal((9, hidden), dtype)
    weights = inputs.normal((9, 2), seed=3) if weighted and dtype != "uint8" else None
    to_rows(backend, x, layout, weights, row_pad=row_pad, offset=offset, place=place)


@pytest.mark.parametrize("n", [0, 1, 3, 64, pytest.param(1025, marks=pytest.mark.slow("seconds"))])
@pytest.mark.parametrize("k", [1, 2, 6, 8, 22])
def test_every_number_of_tokens(backend: Backend, n: int, k: int) -> None:
    n = tokens(backend, n, 8 * k)
    layout = layout_of(backend, zipf(n, k, 60), 60, alignment=7)
    x = inputs.normal((n, 24), "bfloat16")
    to_rows(backend, x, layout)
    to_rows(backend, x, layout, inputs.normal((n, k), "bfloat16", seed=4))


@pytest.mark.parametrize("hidden", [0, 5])
def test_no_rows_or_no_columns(backend: Backend, hidden: int) -> None:
    none = layout_of(backend, uniform(4, 2, 5), 5, capacity=0)
    assert to_rows(backend, inputs.normal((4, hidden)), none, inputs.normal((4, 2))).shape == (0, hidden)
    all_padding = layout_of(backend, np.empty((0, 2), np.int32), 5, capacity=6)
    assert not to_rows(backend, inputs.normal((0, hidden)), all_padding).any()


# -- Which rows --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", DISTRIBUTIONS)
@pytest.mark.parametrize("alignment", [1, 16])
@ITEM("rows: tokens without a pair")
def test_every_distribution(backend: Backend, kind: str, alignment: int) -> None:
    layout = layout_of(backend, DISTRIBUTIONS[kind](20, 6, 12), 12, alignment=alignment)
    rows = to_rows(backend, inputs.normal((20, 33), "float16"), layout)
    assert not rows[backend.numpy(layout.order) < 0].any()


@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("poison", [np.nan, np.inf])
@ITEM("rows: NaN and inf in padding rows")
def test_padding_is_zero_whatever_was_there(backend: Backend, poison: float, weighted: bool) -> None:
    """Neither the memory of the result nor other tokens reach rows without a pair."""
    ids = DISTRIBUTIONS["-1 sprinkled"](20, 6, 12)
    layout = layout_of(backend, ids, 12, alignment=8, capacity=160)
    x = np.full((20, 40), poison, np.float32)
    weights = np.full((20, 6), poison, np.float32) if weighted else None
    out = backend.array(np.full((160, 40), poison, np.float32))
    given = None if weights is None else backend.array(weights)
    rows = backend.numpy(permute(backend.array(x), layout, weights=given, out=out))
    padding = backend.numpy(layout.order) < 0
    assert padding.any()
    assert (rows[padding] == 0).all()
    assert not np.isfinite(rows[~padding]).any()


@ITEM("rows: order outside of the pairs")
@pytest.mark.parametrize("weighted", [False, True])
def test_any_order_outside_of_the_pairs_is_padding(backend: Backend, weighted: bool) -> None:
    x, weights = hidden_states((6, 40), np.float32), np.ones((6, 2), np.float32)
    layout = layout_of(backend, uniform(6, 2, 4), 4)
    order = np.array([12, 0, 2**31 - 1, 11, -(2**31), 13, -2, 24, 5, 5, -1, 2**30], np.int32)
    odd = layout._replace(order=backend.array(order))
    rows = to_rows(backend, x, odd, weights if weighted else None)
    assert np.flatnonzero(rows.any(-1)).tolist() == [1, 3, 8, 9]


@ITEM("rows: NaN and inf in rows of weight 0")
def test_special_values_and_weights(backend: Backend) -> None:
    """A product is that of float32: NaN of 0 * inf, infinities of an overflow, 0 for subnormals."""
    special = [0.0, -0.0, 1.0, np.inf, -np.inf, np.nan, 3e38, 1e-30, 1e-40, -65504.0, 2.0**-24, 1 / 3]
    for dtype in FLOATS:
        x = inputs.cast(np.resize(np.array(special, np.float32), (len(special), 16)).T, dtype)
        weights = inputs.cast(np.resize(np.array(special[::-1], np.float32), (16, 2)), FLOATS[(len(dtype)) % 3])
        to_rows(backend, x, layout_of(backend, uniform(16, 2, 5), 5), weights)


def test_positions_are_needed_but_not_read(backend: Backend) -> None:
    layout = layout_of(backend, uniform(6, 2, 4), 4)
    x = inputs.normal((6, 8))
    wrong = layout._replace(positions=backend.array(np.full((6, 2), 2**31 - 1, np.int32)))
    same_bytes(to_rows(backend, x, wrong), to_rows(backend, x, layout))


@pytest.mark.parametrize("weighted", [False, True])
def test_every_run_gives_the_same(backend: Backend, weighted: bool) -> None:
    n, repeats = (300, 100) if backend.name == "gpu" else (20, 10)
    layout = layout_of(backend, zipf(n, 6, 30), 30, alignment=16)
    x = backend.array(inputs.normal((n, 264), "bfloat16"))
    weights = backend.array(inputs.normal((n, 6))) if weighted else None
    first = backend.numpy(permute(x, layout, weights=weights))
    for _ in range(repeats):
        assert backend.numpy(permute(x, layout, weights=weights)).tobytes() == first.tobytes()


# -- Frameworks --------------------------------------------------------------------------------------------------------


def as_tensor(torch: Any, x: np.ndarray, name: str) -> Any:
    if not hasattr(torch, name):
        pytest.skip(f"this PyTorch has no {name}")
    return torch.from_numpy(np.ascontiguousarray(x).view(np.uint8)).view(getattr(torch, name))


@pytest.mark.slow("seconds", every=6)
@pytest.mark.backends("reference")
@pytest.mark.parametrize("name", BYTES)
def test_torch_moves_any_dtype(name: str) -> None:
    torch = pytest.importorskip("torch")
    x = any_bytes((9, 5), name)
    tensor = as_tensor(torch, x, name)
    layout = layout_of(Backend(), uniform(9, 2, 7), 7, alignment=2)
    tensors = layout._replace(order=torch.from_numpy(layout.order), positions=torch.from_numpy(layout.positions))
    right = to_rows(Backend(), x, layout)
    for given in (layout, tensors):  # arrays of a layout may be of another framework
        rows = permute(tensor, given)
        assert (type(rows), rows.dtype) == (torch.Tensor, tensor.dtype)
        assert rows.view(torch.uint8).numpy().tobytes() == right.tobytes()
        out = torch.empty_like(rows)
        assert permute(tensor, given, out=out) is out
        assert out.view(torch.uint8).numpy().tobytes() == right.tobytes()


@pytest.mark.slow("seconds", every=6)
@pytest.mark.backends("reference")
@pytest.mark.parametrize("name", BYTES)
def test_jax_moves_any_dtype(name: str, jax_on_the_cpu: None) -> None:
    jax = pytest.importorskip("jax")
    with jax.enable_x64(name in ("int64", "uint64", "float64", "complex128")):
        x = any_bytes((9, 5), name)
        layout = layout_of(Backend(), uniform(9, 2, 7), 7, alignment=2)
        rows = permute(jax.numpy.asarray(x), layout)
        assert isinstance(rows, jax.Array)
        assert rows.dtype == x.dtype
        assert np.asarray(rows).tobytes() == permute(x, layout).tobytes()


@pytest.mark.backends("reference")
@pytest.mark.parametrize("name", ["int64", "uint64", "float64", "complex128"])
def test_jax_never_gives_fewer_bits(name: str, jax_on_the_cpu: None) -> None:
    jax = pytest.importorskip("jax")
    with jax.enable_x64(True):
        x = jax.numpy.ones((4, 3), name)
    layout = layout_of(Backend(), uniform(4, 2, 7), 7)
    with pytest.raises(ValueError, match=f"^permute: {name} results need JAX's option jax_enable_x64, which is off$"):
        permute(x, layout)


@pytest.mark.backends("reference")
@pytest.mark.parametrize("name", BYTES)
def test_any_other_framework_moves_any_dtype(name: str) -> None:
    """A producer that only speaks DLPack gets NumPy arrays."""
    torch = pytest.importorskip("torch")
    x = any_bytes((9, 5), name)
    tensor = as_tensor(torch, x, name)
    try:
        tensor.__dlpack__()
    except RuntimeError as error:  # before PyTorch 2.8
        pytest.skip(str(error))
    layout = layout_of(Backend(), uniform(9, 2, 7), 7)
    rows = permute(Foreign(tensor), layout)
    same_bytes(rows, permute(x, layout))


@pytest.mark.backends("reference")
@pytest.mark.parametrize("framework", ["numpy", "torch", "jax"])
@pytest.mark.parametrize("name", SUB_BYTE)
def test_dtypes_below_a_byte_are_refused(name: str, framework: str, jax_on_the_cpu: None) -> None:
    x: Any = np.zeros((4, 4), numpy_dtype(name))
    if framework == "torch":
        torch = pytest.importorskip("torch")
        dtype = getattr(torch, name, None) or getattr(torch, f"{name}_x2", None)
        if dtype is None:
            pytest.skip(f"this PyTorch has no {name}")
        x = torch.zeros(4, 4, dtype=torch.uint8).view(dtype)
    elif framework == "jax":
        jax = pytest.importorskip("jax")
        if not hasattr(jax.numpy, name):
            pytest.skip(f"this JAX has no {name}")
        x = jax.numpy.asarray(x)
    layout = layout_of(Backend(), uniform(4, 2, 7), 7)
    with pytest.raises(TypeError, match=rf"^permute: x must have a dtype of numbers of 8 bits or more, got {name}"):
        permute(x, layout)


@pytest.mark.backends("reference")
@pytest.mark.parametrize("dtype", ["O", "U3", "S2", "M8[s]", "m8[s]", [("a", "i4")]])
def test_what_are_no_numbers_is_refused(dtype: Any) -> None:
    layout = layout_of(Backend(), uniform(4, 2, 7), 7)
    with pytest.raises(TypeError, match=r"^permute: x must have a dtype of numbers of 8 bits or more, got \S"):
        permute(np.zeros((4, 4), dtype), layout)


@pytest.mark.parametrize("dtype", FLOATS)
def test_rows_of_zero_tokens_keep_their_dtype(backend: Backend, dtype: str) -> None:
    layout = layout_of(backend, np.empty((0, 2), np.int32), 4)
    assert backend.numpy(permute(backend.array(np.zeros((0, 3), DTYPES[dtype])), layout)).dtype == DTYPES[dtype]


def test_zeros_keep_their_signs(backend: Backend) -> None:
    """Also where a product is so small that it is flushed to 0."""
    zero, x = backend.array(np.zeros(1, np.int32)), np.array([[-1.0, 1.0, -0.0, -1e-30]], np.float32)
    layout = ExpertLayout(order=zero, positions=zero.reshape(1, 1), num_tokens=1, top_k=1, alignment=1, capacity=1)
    for weight in np.array([0.0, -0.0, 1e-20], np.float32):
        rows = backend.numpy(permute(backend.array(x), layout, weights=backend.array(np.full((1, 1), weight))))
        np.testing.assert_array_equal(np.signbit(rows), np.signbit(x) ^ np.signbit(weight))
