# SPDX-License-Identifier: Apache-2.0
"""Subclasses of arrays: plain ones count as their array, those with a mask or without own memory are refused."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from cupy_router import Router, Routing, RoutingMethod, activation_topk, arrays, dense_router, hash_router, topk_select
from tests import inputs

METHOD = RoutingMethod(8, 2)
LOGITS, BIAS, GATE = inputs.normal((5, 8)), inputs.normal((8,), seed=1), inputs.normal((8, 6), seed=2)
X, IDS, ONE = inputs.normal((5, 6), seed=3), np.array([0, 1, 2, 1, 0], np.int32), np.array(1, np.int32)
TABLE = np.array([[0, 1], [2, 3], [7, 6]], np.int32)
KEYS = {"weight": "layers.0.gate.weight", "bias": "layers.0.gate.e_score_correction_bias"}

# Calls by the argument that they get in another class.
CALLS: dict[str, tuple[Callable[[Any], Any], np.ndarray]] = {
    "topk_select: scores": (lambda a: topk_select(a, 2), LOGITS),
    "topk_select: lengths": (lambda a: topk_select(LOGITS, 2, lengths=a), IDS),
    "activation_topk: logits": (lambda a: activation_topk(a, METHOD), LOGITS),
    "activation_topk: bias": (lambda a: activation_topk(LOGITS, METHOD, bias=a), BIAS),
    "activation_topk: num_valid": (lambda a: activation_topk(LOGITS, METHOD, num_valid=a), ONE),
    "activation_topk: expert_scale": (lambda a: activation_topk(LOGITS, METHOD, expert_scale=a), BIAS),
    "dense_router: x": (lambda a: dense_router(a, GATE, METHOD), X),
    "dense_router: weight": (lambda a: dense_router(X, a, METHOD), GATE),
    "hash_router: token_ids": (lambda a: hash_router(a, TABLE), IDS),
    "hash_router: table": (lambda a: hash_router(IDS, a), TABLE),
    "hash_router: logits": (lambda a: hash_router(IDS, TABLE, METHOD, logits=a), LOGITS),
    "Router: weight": (lambda a: Router(METHOD, weight=a)(X), GATE),
    "Router: bias": (lambda a: Router(METHOD, weight=GATE, bias=a)(X), BIAS),
    "Router.from_state_dict: layers.0.gate.weight": (
        lambda a: Router.from_state_dict({KEYS["weight"]: a}, "layers.0", METHOD)(X),
        GATE,
    ),
    "Router.from_state_dict: layers.0.gate.e_score_correction_bias": (
        lambda a: Router.from_state_dict({KEYS["weight"]: GATE, KEYS["bias"]: a}, "layers.0", METHOD)(X),
        BIAS,
    ),
}


class Plain(np.ndarray):
    """A class of the user's own."""


class Contrary(np.ndarray):
    """A class whose own methods would spoil every computation."""

    def __getitem__(self, index: Any) -> Any:
        raise AssertionError("indexed")

    def __array_ufunc__(self, *args: Any, **kwargs: Any) -> Any:
        raise AssertionError("computed with")

    def astype(self, *args: Any, **kwargs: Any) -> Any:
        raise AssertionError("converted")


def memmap(array: np.ndarray, folder: Path) -> np.ndarray:
    path = folder / "array.npy"
    np.save(path, array)
    return np.load(path, mmap_mode="r")


CLASSES: dict[str, Callable[[np.ndarray, Path], np.ndarray]] = {
    "plain": lambda array, folder: array.view(Plain),
    "contrary": lambda array, folder: array.view(Contrary),
    "record array": lambda array, folder: array.view(np.recarray),
    "memory map": memmap,
    "dtype with metadata": lambda array, folder: array.view(np.dtype(array.dtype, metadata={"unit": "m"})),
}


def assert_same(found: Any, expected: Any) -> None:
    for one, other in zip(found, expected, strict=True):
        assert type(one) is np.ndarray
        np.testing.assert_array_equal(one, other)


@pytest.mark.parametrize("kind", CLASSES)
@pytest.mark.parametrize("name", CALLS)
def test_plain_subclasses_count_as_their_array(name: str, kind: str, tmp_path: Path) -> None:
    call, array = CALLS[name]
    assert_same(call(CLASSES[kind](array, tmp_path)), call(array))


@pytest.mark.filterwarnings("ignore:the matrix subclass:PendingDeprecationWarning")
@pytest.mark.parametrize("name", CALLS)
def test_a_matrix_counts_as_its_array(name: str) -> None:
    """It has two axes even where that is refused, and no other class is named then."""
    call, array = CALLS[name]
    if array.ndim == 2 or "state_dict" in name:
        assert_same(call(np.matrix(array)), call(array))
    else:
        argument = name.rpartition(" ")[2]
        with pytest.raises(ValueError, match=rf"{argument} (must|.* needs) .*, got \w+ \[1, {array.size}\] on cpu"):
            call(np.matrix(array))


@pytest.mark.parametrize("masked", [np.ma.MaskedArray, type("Mine", (np.ma.MaskedArray,), {})])
@pytest.mark.parametrize("name", CALLS)
def test_a_masked_array_is_refused_by_name(name: str, masked: type) -> None:
    call, array = CALLS[name]
    given = masked(array, mask=np.zeros(array.shape, bool))  # also where nothing is masked
    with pytest.raises(TypeError, match=rf"^{name}.* must be an array without a mask, got a {masked.__name__}: pass"):
        call(given)
    call(given.filled(0))
    call(given.data)


def test_the_constant_of_masked_entries_is_refused() -> None:
    with pytest.raises(TypeError, match="num_valid must be an array without a mask, got a MaskedConstant"):
        activation_topk(LOGITS, METHOD, num_valid=np.ma.masked)


def test_masked_out_is_refused_and_nothing_written() -> None:
    weights = np.ma.array(np.full((5, 2), 7, np.float32), mask=True)
    indices = np.full((5, 2), 7, np.int32)
    with pytest.raises(TypeError, match=r"out\.weights must be an array without a mask, got a MaskedArray"):
        activation_topk(LOGITS, METHOD, out=Routing(weights, indices))
    assert (indices == 7).all()
    assert (weights.data == 7).all()


@pytest.mark.filterwarnings("ignore:the matrix subclass:PendingDeprecationWarning")
@pytest.mark.parametrize("kind", [Plain, Contrary, np.matrix, np.recarray])
def test_out_of_a_subclass_is_filled_and_returned(kind: Any) -> None:
    weights, indices = np.zeros((5, 2), np.float32), np.zeros((5, 2), np.int32)
    out = Routing(weights.view(kind), indices.view(kind))
    assert activation_topk(LOGITS, METHOD, out=out) is out
    assert_same((weights, indices), activation_topk(LOGITS, METHOD))


# -- Dtypes that only look alike ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("array", "words"),
    [
        (LOGITS.astype(">f4"), r"logits must be float32 or .*, got >f4 \[5, 8\] on cpu"),
        (LOGITS.astype(object), r"logits must be float32 or .*, got object \[5, 8\] on cpu"),
        (np.zeros((5, 8), [("a", "f4")]), r"logits must be float32 or .*, got \[\('a', '<f4'\)\] \[5, 8\] on cpu"),
        (np.zeros((5, 8), "M8[s]"), r"logits must be float32 or .*, got datetime64\[s\] \[5, 8\] on cpu"),
        (np.zeros((5, 8), "U3"), r"logits must be float32 or .*, got <U3 \[5, 8\] on cpu"),
        (np.float32(3), "logits must be an array of .*, got float32"),
    ],
    ids=["big-endian", "object", "struct", "date", "text", "scalar"],
)
def test_other_dtypes_are_refused_by_name(array: Any, words: str) -> None:
    with pytest.raises(TypeError, match=f"^activation_topk: {words}"):
        activation_topk(array, METHOD)


def test_big_endian_integers_are_refused_by_name() -> None:
    with pytest.raises(TypeError, match=r"token_ids must be int32 or int64, got >i4 \[5\] on cpu"):
        hash_router(IDS.astype(">i4"), TABLE)
    with pytest.raises(TypeError, match=r"num_valid must be int32, got >i4 \[\] on cpu"):
        activation_topk(LOGITS, METHOD, num_valid=ONE.astype(">i4"))


def test_one_dtype_of_two_names_is_accepted() -> None:
    assert_same(hash_router(IDS.astype("q"), TABLE), hash_router(IDS.astype("l"), TABLE))


def test_a_field_of_a_packed_struct_is_refused_with_its_strides() -> None:
    with pytest.raises(ValueError, match=r"logits has strides of \(40, 5\) bytes, which are no multiples of its item"):
        activation_topk(np.zeros((5, 8), [("b", "i1"), ("a", "f4")])["a"], METHOD)


# -- Other frameworks --------------------------------------------------------------------------------------------------


def test_results_for_a_dlpack_producer_are_plain_arrays() -> None:
    class Producer:
        def __dlpack__(self, **wanted: Any) -> object:
            return LOGITS.__dlpack__(**wanted)

        def __dlpack_device__(self) -> tuple[int, int]:
            return LOGITS.__dlpack_device__()

    assert_same(topk_select(Producer(), 2), topk_select(LOGITS, 2))


@pytest.mark.parametrize("error", [BufferError, RuntimeError, TypeError, ValueError])
def test_a_producer_that_refuses_is_named(error: type[Exception]) -> None:
    """Those with missing entries do, with errors of many types."""

    class Producer:
        def __dlpack__(self, **wanted: Any) -> object:
            raise error("it has nulls")

        def __dlpack_device__(self) -> tuple[int, int]:
            return 1, 0

    with pytest.raises(ValueError, match=r"bias \(Producer\) cannot be exported by DLPack: it has nulls"):
        activation_topk(LOGITS, METHOD, bias=Producer())


@pytest.mark.parametrize("requires_grad", [False, True])
@pytest.mark.parametrize("kind", ["Parameter", "Buffer", "plain", "with __torch_function__"])
def test_tensor_subclasses_count_as_their_tensor(kind: str, requires_grad: bool) -> None:
    torch = pytest.importorskip("torch", reason="PyTorch is not installed")

    class PlainTensor(torch.Tensor):
        pass

    class WithFunction(torch.Tensor):
        @classmethod
        def __torch_function__(cls, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            return super().__torch_function__(function, types, args, kwargs or {})

    tensor = torch.from_numpy(LOGITS)
    if kind in ("Parameter", "Buffer"):
        if not hasattr(torch.nn, kind):
            pytest.skip(f"this PyTorch has no {kind}")
        given = getattr(torch.nn, kind)(tensor).requires_grad_(requires_grad)
    else:
        given = tensor.as_subclass(PlainTensor if kind == "plain" else WithFunction).requires_grad_(requires_grad)
    found, expected = activation_topk(given, METHOD), activation_topk(LOGITS, METHOD)
    assert [type(result) for result in found] == [torch.Tensor] * 2
    assert found.weights.requires_grad == requires_grad
    assert_same([result.detach().numpy() for result in found], expected)


@pytest.mark.parametrize("requires_grad", [False, True])
def test_a_masked_array_beside_tensors_is_refused(requires_grad: bool) -> None:
    torch = pytest.importorskip("torch", reason="PyTorch is not installed")
    logits = torch.from_numpy(LOGITS).requires_grad_(requires_grad)
    with pytest.raises(TypeError, match="bias must be an array without a mask, got a MaskedArray"):
        activation_topk(logits, METHOD, bias=np.ma.array(BIAS, mask=BIAS > 0))
    assert type(activation_topk(logits, METHOD, bias=BIAS.view(Contrary)).weights) is torch.Tensor


def test_a_masked_tensor_is_refused() -> None:
    masked = pytest.importorskip("torch.masked", reason="PyTorch is not installed")
    torch = pytest.importorskip("torch")
    tensor = torch.from_numpy(LOGITS)
    with pytest.warns(UserWarning, match="prototype"):
        given = masked.masked_tensor(tensor, tensor > 0)
    with pytest.raises(ValueError, match=r"logits must be .*, got a MaskedTensor"):
        activation_topk(given, METHOD)


def test_a_masked_array_in_traced_calls_of_jax_is_refused() -> None:
    jax = pytest.importorskip("jax", reason="JAX is not installed")
    masked = np.ma.array(BIAS, mask=BIAS > 0)
    for transform in (lambda call: call, jax.jit):
        with pytest.raises(TypeError, match="bias must be an array without a mask, got a MaskedArray"):
            transform(lambda logits: activation_topk(logits, METHOD, bias=masked))(jax.numpy.asarray(LOGITS))
    plain = jax.jit(lambda logits: activation_topk(logits, METHOD, bias=BIAS.view(Contrary)))
    np.testing.assert_array_equal(plain(LOGITS).indices, activation_topk(LOGITS, METHOD, bias=BIAS).indices)


def test_classes_of_cupy() -> None:
    """A distributed array has chunks on several devices, and is itself an array at address 0."""
    cupy = pytest.importorskip("cupy", reason="CuPy is not installed")
    distributed = pytest.importorskip("cupyx.distributed.array", reason="this CuPy has no distributed arrays")
    with pytest.raises(TypeError, match="scores must be an array on one device, got a DistributedArray"):
        arrays._find("scores", distributed.DistributedArray)
    assert arrays._find("scores", type("Plain", (cupy.ndarray,), {})).name == "cupy"
