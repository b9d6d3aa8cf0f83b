# SPDX-License-Identifier: Apache-2.0
"""Bad input: the right kind of error, one sentence that names the argument, and nothing written."""

from __future__ import annotations

import ctypes
import re
from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np
import pytest

from cupy_router import Routing, RoutingMethod, TopK, activation_topk, hash_router, topk_select
from tests.backends import Backend

METHOD = RoutingMethod(16, 4)
CUDA = 2  # the number of that kind of device in DLPack
OPS: dict[str, tuple[Callable[..., Any], Callable[[], dict[str, Any]]]] = {
    "topk_select": (topk_select, lambda: {"scores": zeros(6, 16), "k": 4}),
    "activation_topk": (activation_topk, lambda: {"logits": zeros(6, 16), "method": METHOD}),
    "hash_router": (
        hash_router,
        lambda: {"token_ids": ints(6), "table": ints(10, 4), "method": METHOD, "logits": zeros(6, 16)},
    ),
}


def zeros(*shape: int, dtype: Any = np.float32) -> np.ndarray:
    return np.zeros(shape, dtype)


def ints(*shape: int) -> np.ndarray:
    return np.zeros(shape, np.int32)


def products(**changes: Any) -> dict[str, Any]:
    """hash_router by dot products, with some arguments changed."""
    return {"logits": None, "x": zeros(6, 8), "weight": zeros(16, 8), **changes}


class NotAnArray:
    pass


class Pair(NamedTuple):
    """The form of no result."""

    first: Any
    second: Any


def result_of(op: str) -> Any:
    return TopK if op == "topk_select" else Routing


FLOAT64, INT8, COMPLEX = (np.zeros((6, 16), t) for t in (np.float64, np.int8, np.complex64))

# op, the arguments that differ from a good call, the error, the argument it names, what else it says
CASES: list[tuple[str, dict[str, Any], Any, str, str]] = [
    # what is not an array
    ("topk_select", {"scores": [[1.0]]}, TypeError, "scores", "list"),
    ("topk_select", {"scores": NotAnArray()}, TypeError, "scores", "NotAnArray"),
    ("topk_select", {"scores": None}, TypeError, "scores", "NoneType|None"),
    ("topk_select", {"scores": 3.0}, TypeError, "scores", "float"),
    ("topk_select", {"scores": np.float32(3)}, (TypeError, ValueError), "scores", ""),
    ("topk_select", {"lengths": [1] * 6}, TypeError, "lengths", "list"),
    ("topk_select", {"starts": (1,) * 6}, TypeError, "starts", "tuple"),
    ("activation_topk", {"logits": "logits"}, TypeError, "logits", "str"),
    ("activation_topk", {"bias": 0.5}, TypeError, "bias", "float"),
    ("hash_router", {"token_ids": range(6)}, TypeError, "token_ids", "range"),
    ("hash_router", {"table": None}, TypeError, "table", "None"),
    ("hash_router", {"table": [[1, 2, 3, 4]]}, TypeError, "table", "list"),
    ("hash_router", products(x=[[1.0]]), TypeError, "x", "list"),
    ("hash_router", products(weight={}), TypeError, "weight", "dict"),
    # dtypes
    *[("topk_select", {"scores": a}, TypeError, "scores", str(a.dtype)) for a in (FLOAT64, INT8, COMPLEX)],
    *[("activation_topk", {"logits": a}, TypeError, "logits", str(a.dtype)) for a in (FLOAT64, INT8, COMPLEX)],
    ("topk_select", {"scores": zeros(6, 16, dtype=">f4")}, TypeError, "scores", ""),
    ("topk_select", {"scores": zeros(6, 16, dtype=bool)}, TypeError, "scores", "bool"),
    ("topk_select", {"lengths": zeros(6)}, TypeError, "lengths", "float32"),
    ("topk_select", {"lengths": zeros(6, dtype=np.int64)}, TypeError, "lengths", "int64.*: convert it to int32"),
    ("topk_select", {"scores": FLOAT64}, TypeError, "scores", "float64.*: convert it to float32"),
    ("topk_select", {"scores": zeros(6, 0)}, ValueError, "scores", r"at least one column .* got float32 \[6, 0\]"),
    ("topk_select", {"scores": zeros(2, 3, 16)}, ValueError, "scores", r": call scores.reshape\(-1, 16\)"),
    ("hash_router", {"token_ids": ints(2, 3)}, ValueError, "token_ids", r": call token_ids.reshape\(-1\)"),
    ("activation_topk", {"bias": zeros(3, 16)}, ValueError, "bias", r"\[3, 16\] on \S+$"),
    ("activation_topk", {"bias": zeros(1, 16)}, ValueError, "bias", r": call bias.reshape\(-1\)$"),
    ("hash_router", products(x=zeros(2, 3, 8)), ValueError, "x", r": call x.reshape\(-1, 8\)"),
    ("topk_select", {"starts": zeros(6, dtype=np.uint32)}, TypeError, "starts", "uint32"),
    ("activation_topk", {"bias": zeros(16, dtype=np.float64)}, TypeError, "bias", "float64"),
    ("activation_topk", {"bias": zeros(16, dtype=np.float16)}, TypeError, "bias", "float16"),
    ("hash_router", {"token_ids": zeros(6)}, TypeError, "token_ids", "float32"),
    ("hash_router", {"table": zeros(10, 4, dtype=np.int16)}, TypeError, "table", "int16"),
    ("hash_router", {"logits": FLOAT64}, TypeError, "logits", "float64"),
    ("hash_router", products(x=zeros(6, 8, dtype=np.float64)), TypeError, "x", "float64"),
    ("hash_router", products(weight=zeros(16, 8, dtype=np.float64)), TypeError, "weight", "float64"),
    # ranks and shapes
    ("topk_select", {"scores": zeros(16)}, ValueError, "scores", r"\[16\]"),
    ("topk_select", {"scores": zeros(2, 3, 16)}, ValueError, "scores", r"\[2, 3, 16\]"),
    ("topk_select", {"scores": zeros()}, ValueError, "scores", r"\[\]"),
    ("topk_select", {"lengths": ints(5)}, ValueError, "lengths", r"\[5\]"),
    ("topk_select", {"starts": ints(6, 1)}, ValueError, "starts", r"\[6, 1\]"),
    ("activation_topk", {"logits": zeros(16)}, ValueError, "logits", r"\[16\]"),
    ("activation_topk", {"logits": zeros(6, 17)}, ValueError, "logits", "16.*17"),
    ("activation_topk", {"bias": zeros(17)}, ValueError, "bias", r"\[17\]"),
    ("activation_topk", {"bias": zeros(1, 16)}, ValueError, "bias", r"\[1, 16\]"),
    ("hash_router", {"token_ids": ints(6, 1)}, ValueError, "token_ids", r"\[6, 1\]"),
    ("hash_router", {"table": ints(4)}, ValueError, "table", r"\[4\]"),
    ("hash_router", {"table": ints(10, 5)}, ValueError, "table", "4"),
    ("hash_router", {"table": ints(10, 0), "method": None, "logits": None}, ValueError, "table", r"\[10, 0\]"),
    ("hash_router", {"logits": zeros(5, 16)}, ValueError, "logits", r"\[5, 16\]"),
    ("hash_router", {"logits": zeros(6, 15)}, ValueError, "logits", r"\[6, 15\]"),
    ("hash_router", products(x=zeros(5, 8)), ValueError, "x", r"\[5, 8\]"),
    ("hash_router", products(x=zeros(8)), ValueError, "x", r"\[8\]"),
    ("hash_router", products(weight=zeros(16, 9)), ValueError, "weight", r"\[16, 9\]"),
    ("hash_router", products(weight=zeros(15, 8)), ValueError, "weight", r"\[15, 8\]"),
    # strides
    ("topk_select", {"scores": zeros(16, 6).T}, ValueError, "scores", r"strides \[1, 6\]"),
    ("activation_topk", {"logits": zeros(6, 32)[:, ::2]}, ValueError, "logits", r"strides \[32, 2\]"),
    ("hash_router", {"table": ints(10, 8)[:, ::2]}, ValueError, "table", r"strides \[8, 2\]"),
    ("hash_router", products(weight=zeros(8, 16).T), ValueError, "weight", r"strides \[1, 16\]"),
    # k, methods, combinations
    ("topk_select", {"k": 0}, ValueError, "k", "0"),
    ("topk_select", {"k": -1}, ValueError, "k", "-1"),
    ("topk_select", {"k": 17}, ValueError, "k", "17"),
    ("topk_select", {"k": 2**31, "lengths": ints(6)}, ValueError, "k", str(2**31)),
    ("topk_select", {"k": 2.0}, TypeError, "k", "float"),
    ("topk_select", {"k": True}, TypeError, "k", "bool"),
    ("topk_select", {"k": None}, TypeError, "k", "None"),
    ("activation_topk", {"method": "deepseek-v9"}, ValueError, "method", "deepseek-v4-pro"),
    ("activation_topk", {"method": None}, TypeError, "method", "None"),
    ("activation_topk", {"method": 6}, TypeError, "method", "int"),
    ("hash_router", {"method": "nonsense"}, ValueError, "method", "presets\\(\\) lists all"),
    ("hash_router", {"method": None}, ValueError, "logits", "method"),
    ("hash_router", products(method=None), ValueError, "x", "method"),
    ("hash_router", products(logits=zeros(6, 16)), ValueError, "logits and x|x and logits", ""),
    ("hash_router", products(weight=None), ValueError, "weight", "x"),
    ("hash_router", products(x=None), ValueError, "weight", "x"),
    # num_valid
    *[
        (op, {"num_valid": value}, error, "num_valid", said)
        for op in ("activation_topk", "hash_router")
        for value, error, said in (
            (-1, ValueError, "-1"),
            (7, ValueError, "7"),
            (np.int64(7), ValueError, "7"),
            (2**40, ValueError, str(2**40)),
            (True, TypeError, "bool"),
            (3.0, TypeError, r"an int or a one-element int32 array, got float 3.0: convert it by int\(\)"),
            ("3", TypeError, "an int or a one-element int32 array, got str 3$"),
            ([3], TypeError, r"an int or a one-element int32 array, got list \[3\]$"),
            (ints(2), ValueError, r"\[2\]"),
            (ints(0), ValueError, r"\[0\]"),
            (ints(1, 1), ValueError, r"\[1, 1\]"),
            (zeros(1, dtype=np.int64), TypeError, "int64"),
            (zeros(1), TypeError, "float32"),
        )
    ],
    # out
    *[
        (op, {"out": out if name == "out" else kind(*out)}, error, name, "")
        for op, fields, kind in (
            ("topk_select", "values", TopK),
            ("activation_topk", "weights", Routing),
            ("hash_router", "weights", Routing),
        )
        for out, error, name in (
            (zeros(6, 4), TypeError, "out"),
            ((zeros(6, 4), ints(6, 4)), TypeError, "out"),
            (Pair(zeros(6, 4), ints(6, 4)), TypeError, "out"),
            ((zeros(6, 4), None), TypeError, r"out\.indices"),
            (([[0.0]], ints(6, 4)), TypeError, rf"out\.{fields}"),
            ((zeros(6, 5), ints(6, 4)), ValueError, rf"out\.{fields}"),
            ((zeros(6, 4), ints(5, 4)), ValueError, r"out\.indices"),
            ((zeros(24), ints(6, 4)), ValueError, rf"out\.{fields}"),
            ((zeros(6, 4, dtype=np.float64), ints(6, 4)), TypeError, rf"out\.{fields}"),
            ((zeros(6, 4), zeros(6, 4, dtype=np.int64)), TypeError, r"out\.indices"),
            ((zeros(4, 6).T, ints(6, 4)), ValueError, rf"out\.{fields}"),
            ((zeros(6, 4), ints(6, 8)[:, ::2]), ValueError, r"out\.indices"),
        )
    ],
]


def assert_one_sentence(message: str) -> None:
    assert "\n" not in message
    assert len(message) < 300, message
    assert not re.search(r"[.!?]\s+[A-Z]", message), f"more than one sentence: {message}"


def assert_refused(
    op: str, changes: dict[str, Any], error: Any, name: str, said: str, backend: Backend | None = None
) -> None:
    """Assert that the call raises this error and leaves results unchanged; on CuPy arrays with a GPU backend."""
    function, good = OPS[op]
    out = result_of(op)(np.full((6, 4), 7, np.float32), np.full((6, 4), 7, np.int32))
    arguments = {**good(), "out": out, **changes}
    if backend is not None and backend.name == "gpu":
        arguments = {key: on_gpu(backend, value) for key, value in arguments.items()}
    given = [a for a in arguments["out"] if hasattr(a, "dtype")] if isinstance(arguments["out"], tuple) else []
    before = [a.copy() for a in given]
    with pytest.raises(error) as caught:
        function(**arguments)
    assert type(caught.value) in (TypeError, ValueError)
    message = str(caught.value)
    assert name == "method" or message.startswith(f"{op}: "), f"the op is not named: {message}"
    assert re.search(rf"(?<![\w.])({name})(?!\w)", message), f"{name} is not named: {message}"
    assert re.search(said, message), f"{said} is not said: {message}"
    assert_one_sentence(message)
    for a, b in zip(given, before, strict=True):
        assert (a == b).all()


def on_gpu(backend: Backend, value: Any) -> Any:
    """Return NumPy arrays, also those in a tuple, as CuPy arrays of the same strides."""
    if isinstance(value, tuple):
        moved = [on_gpu(backend, a) for a in value]
        return type(value)(*moved) if hasattr(value, "_fields") else tuple(moved)
    if not isinstance(value, np.ndarray):
        return value
    if not value.dtype.isnative:
        pytest.skip("CuPy has no other byte order")
    base = value if value.base is None else value.base
    start = backend.xp.asarray(base).data + (value.ctypes.data - base.ctypes.data)
    return backend.xp.ndarray(value.shape, value.dtype, start, strides=value.strides)


def name_of(case: Any) -> str:
    op, changes, _, name, said = case
    return f"{op}-{'+'.join(k for k, v in changes.items() if v is not None)}-{name}-{said}"


@pytest.mark.parametrize("case", CASES, ids=name_of)
def test_bad_arguments(case: Any, backend: Backend) -> None:
    op, changes, error, name, said = case
    assert_refused(op, changes, error, name, said, backend)


@pytest.mark.parametrize("position", [0, 1])
@pytest.mark.parametrize("op", sorted(OPS))
def test_read_only_out(op: str, position: int) -> None:
    out = [np.full((6, 4), 7, np.float32), np.full((6, 4), 7, np.int32)]
    out[position].flags.writeable = False
    field = "indices" if position else ("values" if op == "topk_select" else "weights")
    assert_refused(op, {"out": result_of(op)(*out)}, ValueError, rf"out\.{field}", "read-only")


@pytest.mark.parametrize("op", sorted(OPS))
def test_jax_out(op: str) -> None:
    jnp = pytest.importorskip("jax.numpy")
    field = "values" if op == "topk_select" else "weights"
    out = result_of(op)(jnp.zeros((6, 4), jnp.float32), jnp.zeros((6, 4), jnp.int32))
    assert_refused(op, {"out": out}, ValueError, rf"out\.{field}", "")


@pytest.mark.parametrize("op", sorted(OPS))
@pytest.mark.parametrize("stream", [object(), "0", 1.5, True, [0]], ids=lambda s: type(s).__name__)
def test_not_a_stream(op: str, stream: Any) -> None:
    assert_refused(op, {"stream": stream}, TypeError, "stream", type(stream).__name__)


@pytest.mark.parametrize("op", sorted(OPS))
def test_a_negative_stream_handle(op: str) -> None:
    assert_refused(op, {"stream": -1}, ValueError, "stream", "-1")


@pytest.mark.parametrize("op", sorted(OPS))
def test_no_rows_give_empty_arrays(op: str, backend: Backend) -> None:
    function, good = OPS[op]
    arguments = {name: a[:0] if name in ("scores", "logits", "token_ids") else a for name, a in good().items()}
    result = function(**{name: backend.array(a) if isinstance(a, np.ndarray) else a for name, a in arguments.items()})
    assert [a.shape for a in result] == [(0, 4), (0, 4)]
    assert str(result.indices.dtype) == "int32"


# -- Frameworks' own oddities ------------------------------------------------------------------------------------------


def test_tensors_without_memory() -> None:
    torch = pytest.importorskip("torch")
    for tensor in (torch.zeros(6, 16, device="meta"), torch.zeros(6, 16).to_sparse()):
        assert_refused("topk_select", {"scores": tensor}, ValueError, "scores", "")
        assert_refused("activation_topk", {"logits": tensor}, ValueError, "logits", "")
    assert_refused("activation_topk", {"bias": torch.zeros(16, device="meta")}, ValueError, "bias", "")
    assert_refused("topk_select", {"scores": torch.zeros(6, 16, dtype=torch.float64)}, TypeError, "scores", "float64")


def test_a_jax_tracer() -> None:
    jax = pytest.importorskip("jax")
    with pytest.raises(TypeError, match=r"activation_topk: logits must be float32.*got int32 \[6, 16\] on jax"):
        jax.jit(lambda logits: activation_topk(logits, METHOD).weights)(jax.numpy.zeros((6, 16), "int32"))


# -- CUDA arrays where there is no CUDA, and arrays of two devices -----------------------------------------------------


class Impostor:
    """A NumPy array whose DLPack device and capsule claim CUDA memory."""

    def __init__(self, host: np.ndarray) -> None:
        self.host = host

    def __dlpack_device__(self) -> tuple[int, int]:
        return CUDA, 0

    def __dlpack__(self, **wanted: Any) -> object:
        capsule: object = self.host.__dlpack__()
        tensor = ctypes.PYFUNCTYPE(ctypes.c_void_p, ctypes.py_object, ctypes.c_char_p)(
            ("PyCapsule_GetPointer", ctypes.pythonapi)
        )(capsule, b"dltensor")
        ctypes.c_int32.from_address(tensor + ctypes.sizeof(ctypes.c_void_p)).value = CUDA  # the device follows the data
        return capsule


def has_cuda() -> bool:
    try:
        import cupy
    except ImportError:
        return False
    return bool(cupy.cuda.is_available())


@pytest.mark.skipif(has_cuda(), reason="there is a usable CUDA device")
@pytest.mark.parametrize("op", sorted(OPS))
def test_a_cuda_array_without_cuda_is_an_error_with_advice(op: str) -> None:
    first = next(iter(OPS[op][1]()))
    changes = {first: Impostor(OPS[op][1]()[first])}
    function, good = OPS[op]
    with pytest.raises(RuntimeError, match=r"(?i)install|check"):
        function(**{**good(), **changes})


def test_arrays_on_two_devices() -> None:
    assert_refused("activation_topk", {"bias": Impostor(zeros(16))}, ValueError, "bias", "logits.*cpu.*cuda")
    assert_refused("hash_router", {"table": Impostor(ints(10, 4))}, ValueError, "table", "token_ids.*cpu.*cuda")
    lengths = Impostor(ints(6))
    assert_refused("topk_select", {"lengths": lengths}, ValueError, "lengths", "scores.*cpu.*cuda")
    out = TopK(zeros(6, 4), Impostor(ints(6, 4)))
    assert_refused("topk_select", {"out": out}, ValueError, r"out\.indices", "cuda")
