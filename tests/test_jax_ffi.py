# SPDX-License-Identifier: Apache-2.0
"""Handlers between XLA and the kernels: on made-up call frames, and in XLA with a recorder in place of a GPU."""

from __future__ import annotations

import ctypes
import re
import shutil
import subprocess
from contextlib import nullcontext
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from cupy_router import RoutingMethod, activation_topk, compiler, dense_router, hash_router, scratch, topk_select
from tests import fake_xla, inputs
from tests.fake_xla import XLA
from tests.recorder import recording

jax = pytest.importorskip("jax", reason="JAX is not installed")
if jax.__version_info__ < (0, 8):
    pytest.skip("calls inside jax.jit need JAX 0.8 or later", allow_module_level=True)

from cupy_router.jax import _call_text, _ffi, _ffi_targets  # noqa: E402
from cupy_router.ops._method import MethodOptions  # noqa: E402
from cupy_router.ops.hash_router import HashOptions  # noqa: E402  # JAX may be missing
from cupy_router.ops.registry import OPS  # noqa: E402
from cupy_router.ops.topk_select import TopKOptions  # noqa: E402

METHOD = RoutingMethod(16, 4)
LOGITS, BIAS = inputs.normal((6, 16)), inputs.normal((16,))


def handler(op: str, on_cuda: bool = True) -> Any:
    return _ffi.handler(op, partial(_ffi_targets.execute, OPS[op]), on_cuda, True)


def call(options: Any, *given: int, number: int = -1) -> dict[str, str]:
    """Return the attribute of a call with these options, this method of `activation_topk`, or this k."""
    if isinstance(options, (int, RoutingMethod)):
        options = TopKOptions(options) if isinstance(options, int) else MethodOptions(options)
    return {_ffi.ATTRIBUTE: _call_text.encode(options, given, number)}


def results(n: int, k: int, dtype: Any = np.float32) -> list[np.ndarray]:
    return [np.zeros((n, k), dtype), np.zeros((n, k), np.int32)]


# -- CUDA --------------------------------------------------------------------------------------------------------------


@pytest.fixture
def recorder(monkeypatch: pytest.MonkeyPatch) -> Any:
    from cupy_router.ops import _cached

    monkeypatch.setattr(scratch, "relaxed", nullcontext)
    monkeypatch.setattr(_cached, "calls", {})
    with recording("cuda") as recorder:
        yield recorder


def addresses(*arrays: np.ndarray) -> list[int]:
    return [array.ctypes.data for array in arrays]


def test_a_launch_on_xlas_stream_and_device_with_xlas_buffers(recorder: Any) -> None:
    xla, out = XLA(stream=0x1234, device=3), results(6, 4)
    frame = xla.frame([LOGITS, BIAS], out, call(METHOD, 0, 1, number=5))
    assert handler("activation_topk")(frame) is None
    (launch,) = recorder.launches
    assert (launch.function, launch.stream, launch.device) == ("activation_topk", 0x1234, 3)
    said = launch.arguments
    assert [said[name] for name in ("logits", "bias", "weights", "indices")] == addresses(LOGITS, BIAS, *out)
    assert [said[name] for name in ("logit_bias", "expert_scale", "num_valid")] == [0, 0, 0]
    assert (said["num_valid_value"], said["num_tokens"], said["logits_stride"]) == (5, 6, 16)
    assert not xla.errors


def test_each_input_goes_to_its_parameter(recorder: Any) -> None:
    scale, count, out = np.ones(16, np.float32), np.array(3, np.int32), results(6, 4)
    handler("activation_topk")(XLA().frame([LOGITS, scale, count], out, call(METHOD, 0, 4, 8)))
    said = recorder.launches[0].arguments
    assert [said[name] for name in ("expert_scale", "num_valid")] == addresses(scale, count)
    assert [said[name] for name in ("bias", "logit_bias", "num_valid_value")] == [0, 0, -1]

    ids, table = np.zeros(6, np.int32), np.zeros((9, 4), np.int64)
    handler("hash_router")(XLA().frame([ids, table, LOGITS], out, call(HashOptions(METHOD), 0, 1, 2)))
    said = recorder.launches[1].arguments
    assert [said[name] for name in ("token_ids", "table", "logits")] == addresses(ids, table, LOGITS)
    assert (recorder.launches[1].macros["TABLE_BYTES"], said["vocab_size"]) == (8, 9)

    scores = inputs.normal((3, 2000), "bfloat16")
    lengths, out = np.zeros(3, np.int32), results(3, 50, scores.dtype)
    handler("topk_select")(XLA().frame([scores, lengths], out, call(50, 0, 1)))
    said = recorder.launches[2].arguments
    assert [said[n] for n in ("scores", "lengths", "values", "indices")] == addresses(scores, lengths, *out)
    assert (said["starts"], said["k"], said["num_columns"]) == (0, 50, 2000)


def test_plans_are_cached_by_what_they_depend_on(recorder: Any) -> None:
    """By device and alignment, but not by streams and other addresses."""
    run, out = handler("activation_topk"), results(6, 4)
    memory = np.zeros(300, np.float32)
    first = -memory.ctypes.data // 4 % 4  # the first element at a multiple of 16 bytes
    aligned, another, shifted = (memory[at : at + 96].reshape(6, 16) for at in (first, first + 100, first + 201))
    for logits in (aligned, another, shifted):
        for device in (0, 1):
            for stream in (7, 8):
                run(XLA(stream, device).frame([logits], out, call(METHOD, 0)))
    assert [launch.stream for launch in recorder.launches] == [7, 8] * 6
    assert [launch.device for launch in recorder.launches] == [0, 0, 1, 1] * 3
    assert [launch.macros["ALIGNED"] for launch in recorder.launches] == [1] * 8 + [0] * 4
    assert [launch.arguments["logits"] for launch in recorder.launches[::4]] == addresses(aligned, another, shifted)
    assert len(recorder.sources) == 4


def test_no_rows_launch_nothing(recorder: Any) -> None:
    xla = XLA()
    assert handler("activation_topk")(xla.frame([LOGITS[:0]], results(0, 4), call(METHOD, 0))) is None
    assert not recorder.launches
    assert not xla.errors


def test_only_the_execute_stage_launches(recorder: Any) -> None:
    for stage in (0, 1, 2, 4):
        assert handler("activation_topk")(XLA().frame([LOGITS], results(6, 4), call(METHOD, 0), stage=stage)) is None
    assert not recorder.launches


# -- What is wrong -----------------------------------------------------------------------------------------------------

GOOD = ([LOGITS], results(6, 4), call(METHOD, 0))

WRONG: dict[str, tuple[XLA, tuple[Any, ...], dict[str, Any], str]] = {
    "a short frame": (XLA(), GOOD, {"size": 160}, "XLA's call frame has 160 bytes"),
    "another major version": (XLA(version=(1, 0)), GOOD, {}, "XLA's FFI has version 1.0"),
    "a short table": (XLA(size=176), GOOD, {}, "a table of 176 bytes.*install another release"),
    "no buffer": (XLA(), GOOD, {"kind": 2}, "one that is no buffer"),
    "17 buffers": (XLA(), ([LOGITS] * 17, *GOOD[1:]), {}, "more than 16 arguments"),
    "no attribute": (XLA(), (*GOOD[:2], {}), {}, "needs the attribute 'call'"),
    "another attribute": (XLA(), GOOD, {"attribute_type": 3}, "needs the attribute 'call'"),
    "no text": (XLA(), (*GOOD[:2], {"call": "?"}), {}, "Expecting value"),
    "missing buffers": (XLA(), (*GOOD[:2], call(METHOD, 0, 1)), {}, "activation_topk got 3 buffers from XLA, not"),
    "another dtype": (XLA(), ([LOGITS.astype(np.float64)], *GOOD[1:]), {}, "logits must be float32.*got float64"),
    "another shape": (XLA(), ([LOGITS[:, 1:].copy()], *GOOD[1:]), {}, r"logits must have .* = \[num_tokens, 16\]"),
    "results of another shape": (
        XLA(),
        (GOOD[0], results(5, 4), GOOD[2]),
        {},
        r"out.weights must have shape .*\[6, 4\]",
    ),
    "results of another dtype": (
        XLA(),
        (GOOD[0], results(6, 4, np.float16), GOOD[2]),
        {},
        r"out.weights must be float32",
    ),
}


@pytest.mark.parametrize("name", WRONG)
def test_errors_become_xla_errors(name: str, recorder: Any) -> None:
    xla, arguments, more, message = WRONG[name]
    xla.errors.clear()
    made = handler("activation_topk")(xla.frame(*arguments, **more))
    assert made == 0xE1
    ((said, code),) = xla.errors
    assert re.search(f"^activation_topk: .*{message}", said)
    assert code in (3, 13)
    assert not recorder.launches


def test_xla_errors_are_passed_on_and_freed(recorder: Any) -> None:
    xla = XLA()
    xla.refusal = b"no stream here"
    assert handler("activation_topk")(xla.frame(*GOOD)) == 0xE1
    assert xla.errors == [("activation_topk: RuntimeError: XLA: no stream here", 13)]
    assert xla.destroyed == [0xBAD]


def test_a_launch_that_fails(recorder: Any) -> None:
    xla = XLA()
    recorder.failure = OSError("the driver is gone \udc80")
    assert handler("activation_topk")(xla.frame(*GOOD)) == 0xE1
    assert xla.errors == [("activation_topk: OSError: the driver is gone ?", 13)]


def test_cuda_without_cupy_is_an_error_with_advice(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(compiler, "BACKENDS", {})
    monkeypatch.setattr(compiler, "why_no_cuda", lambda: "CuPy is not usable: install cupy-router[cuda12].")
    xla = XLA()
    handler("activation_topk")(xla.frame(*GOOD))
    assert "install cupy-router[cuda12]" in xla.errors[0][0]


# -- Registration ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("command_buffers", [False, True])
def test_metadata(command_buffers: bool) -> None:
    """The answer is XLA's own version: a failing registration would break JAX's backend."""
    handle = _ffi.handler("x", lambda execution: pytest.fail("executed"), True, command_buffers)
    for version in ((0, 1), (0, 4), (1, 7)):
        xla = XLA(version=version)
        extension, metadata = xla.metadata()
        assert handle(xla.frame([], [], {}, extension=extension)) is None
        assert (metadata.api_version.major, metadata.api_version.minor) == version
        assert metadata.traits == int(command_buffers)
        assert not xla.errors


def test_capturable_calls_use_no_scratch_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each capture would allocate scratch memory that is never freed."""
    asked: dict[str, bool] = {}
    monkeypatch.setattr(_ffi, "handler", lambda op, run, on_cuda, captured: asked.setdefault(op, captured))
    monkeypatch.setattr(jax.ffi, "pycapsule", lambda function: None)
    monkeypatch.setattr(jax.ffi, "register_ffi_target", lambda *arguments, **more: None)
    monkeypatch.setattr(_ffi_targets.atexit, "register", lambda function: None)
    _ffi_targets.register()
    assert asked.keys() == {op.label for op in OPS.values()}
    assert asked.items() >= {
        "topk_select": False, "activation_topk": True, "hash_router": True, "dense_router": False, "Router": False,
        "activation_topk_backward": True,
    }.items()  # fmt: skip


@pytest.mark.slow("compiler")
def test_the_layout_is_that_of_jaxlibs_header(tmp_path: Path) -> None:
    gxx = shutil.which("g++")
    if gxx is None:
        pytest.skip("g++ is not installed")
    structs = {
        "XLA_FFI_CallFrame": (fake_xla.Frame, ("args", "rets", "attrs", "stage", "ctx")),
        "XLA_FFI_Buffer": (fake_xla.Buffer, ("dtype", "data", "rank", "dims")),
        "XLA_FFI_Args": (fake_xla.Args, ("size", "types", "args")),
        "XLA_FFI_Attrs": (fake_xla.Attrs, ("size", "types", "names", "attrs")),
        "XLA_FFI_Error_Create_Args": (fake_xla.ErrorCreate, ("message", "errc")),
        "XLA_FFI_Stream_Get_Args": (fake_xla.StreamGet, ("ctx", "stream")),
        "XLA_FFI_DeviceOrdinal_Get_Args": (fake_xla.Ordinal, ("ctx", "device_ordinal")),
        "XLA_FFI_Metadata": (fake_xla.Metadata, ("api_version", "traits")),
        "XLA_FFI_ByteSpan": (fake_xla.Span, ("ptr", "len")),
    }
    first = fake_xla.Api.functions.offset
    places = {"Error_Create": 0, "Error_Destroy": 2, "Stream_Get": 4, "DeviceOrdinal_Get": 17}
    lines = [
        f"static_assert(offsetof({name}, {field}) == {getattr(kind, field).offset});"
        for name, (kind, fields) in structs.items()
        for field in fields
    ]
    lines += [f"static_assert(offsetof(XLA_FFI_Api, XLA_FFI_{n}) == {first + 8 * at});" for n, at in places.items()]
    lines += [f"static_assert(XLA_FFI_CallFrame_STRUCT_SIZE == {_ffi._FRAME_BYTES});"]
    lines += [f"static_assert(XLA_FFI_Api_STRUCT_SIZE >= {ctypes.sizeof(_ffi._Table)});"]
    lines += ["static_assert(XLA_FFI_ExecutionStage_EXECUTE == 3 && XLA_FFI_AttrType_STRING == 4);"]
    names = {1: "PRED", 2: "S8", 3: "S16", 4: "S32", 5: "S64", 6: "U8", 7: "U16", 8: "U32", 9: "U64", 10: "F16"}
    names |= {11: "F32", 12: "F64", 15: "C64", 16: "BF16", 18: "C128", 19: "F8E5M2", 20: "F8E4M3FN"}
    names |= {23: "F8E4M3B11FNUZ", 24: "F8E5M2FNUZ", 25: "F8E4M3FNUZ", 28: "F8E4M3", 29: "F8E3M4", 33: "F8E8M0FNU"}
    assert sorted(names) == sorted(_ffi.DTYPES)
    lines += [f"static_assert(XLA_FFI_DataType_{name} == {code});" for code, name in names.items()]
    source = tmp_path / "layout.cpp"
    source.write_text('#include "xla/ffi/api/c_api.h"\n' + "\n".join(lines))
    done = subprocess.run(
        [gxx, "-std=c++17", "-fsyntax-only", f"-I{jax.ffi.include_dir()}", source], capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr


# -- Kernels in XLA's own hands ----------------------------------------------------------------------------------------


def test_a_compiled_program_launches_kernels() -> None:
    """On the CPU with a recorder in place of a GPU: everything but the driver."""
    given = inputs.normal((70, 32)), inputs.normal((16, 32)), np.zeros((9, 4), np.int32)
    x, weight, table = jax.device_put(given, jax.devices("cpu")[0])
    routed: dict[str, Any] = {
        "activation_topk": lambda x: activation_topk(x @ weight.T, METHOD),
        "hash_router": lambda x: hash_router(x[:, 0].astype("int32"), table, METHOD, logits=x[:, :16], num_valid=2),
        "dense_router_decode": lambda x: dense_router(x[:8], weight, METHOD),
        "topk_select": lambda x: topk_select(x, 3),
    }
    for kernel, function in routed.items():
        compiled = jax.jit(function)
        with recording("cpu") as recorder:
            for _ in range(2):
                jax.block_until_ready(compiled(x))
        first, second = recorder.launches
        assert (first.kernel, first.stream, first.macros) == (kernel, 0, second.macros)
        assert all(first.arguments[name] for name in ("indices", "scores" if kernel == "topk_select" else "weights"))
        assert first.arguments.get("num_valid_value", -1) == (2 if kernel == "hash_router" else -1)
        again = jax.block_until_ready(compiled(x))  # the reference, although the recorder's plan is still known
        assert again.indices.max() > 0 or kernel == "hash_router"
