# SPDX-License-Identifier: Apache-2.0
"""What a declaration of an op can say, tried on an op that uses all of it (tests/tally.py), in every framework."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest

from cupy_router import RoutingMethod
from cupy_router.ops import registry
from cupy_router.ops._method import MethodOptions
from cupy_router.ops._options import Options
from cupy_router.ops.registry import OPS
from tests.backends import Backend
from tests.tally import OP, Layout, Tally, TallyOptions, add_kernel_file, tally, torch_with_tally

IDS = np.array([[1, 0], [2, 1], [7, 1], [0, 2]], np.int16)
PAYLOAD = np.array([1.5, -2.0, np.nan], np.float32)
COUNTS, ORDER = [2, 3, 2], [1, 6, 0, 3, 5, 2, 7, -1]


@pytest.fixture(autouse=True)
def _kernel_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    add_kernel_file(tmp_path, monkeypatch)


def right(got: Tally, counts: list[int] = COUNTS, order: list[int] | None = ORDER) -> None:
    np.testing.assert_array_equal(np.asarray(got.layout.counts), counts)
    if order is None:
        assert got.layout.order is None
    else:
        np.testing.assert_array_equal(np.asarray(got.layout.order), order)


# -- Eager calls -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [np.uint8, np.int16, np.uint16, np.int32, np.int64])
def test_ids_of_every_dtype(backend: Backend, dtype: Any) -> None:
    """In rows that lie apart."""
    got = tally(backend.array(IDS.astype(dtype), row_pad=3, offset=1), backend.array(PAYLOAD), 3)
    right(Tally(Layout(*map(backend.numpy, got.layout)), None))


def test_any_dtype_is_moved_as_bytes() -> None:
    for payload in (np.array([True, False]), np.arange(3, dtype=ml_dtypes.float8_e4m3fn), np.arange(2) * 1j):
        got = tally(IDS, payload, 3).copy
        assert got.dtype == payload.dtype
        np.testing.assert_array_equal(got.view(np.uint8), payload.view(np.uint8))


def test_results_that_options_decide(backend: Backend) -> None:
    ids, payload = backend.array(IDS), backend.array(PAYLOAD)
    for capacity, order in ((None, ORDER), (5, ORDER[:5]), (10, [*ORDER, -1, -1]), (0, [])):
        got = tally(ids, payload, 3, capacity=capacity)
        np.testing.assert_array_equal(backend.numpy(got.layout.order), order)
    assert tally(ids, payload, 3, with_order=False).layout.order is None


def test_a_call_without_rows_still_runs(backend: Backend) -> None:
    got = tally(backend.array(IDS[:0]), backend.array(PAYLOAD), 3, capacity=2)
    right(Tally(Layout(*map(backend.numpy, got.layout)), None), [0, 0, 0], [-1, -1])


def test_an_input_that_is_written(backend: Backend) -> None:
    load = backend.array(np.array([5, 6, 7], np.int64))
    for num_valid in (2, backend.array(np.array([2], np.int32))):
        tally(backend.array(IDS), backend.array(PAYLOAD), 3, load=load, num_valid=num_valid)
    np.testing.assert_array_equal(backend.numpy(load), [7, 10, 9])


def test_nested_results_are_filled_in_place(backend: Backend) -> None:
    empty = [backend.array(np.full(n, 9, np.int32)) for n in (3, 8)]
    out = Tally(Layout(*empty), backend.array(np.zeros(3, np.float32)))
    assert tally(backend.array(IDS), backend.array(PAYLOAD), 3, out=out) is out
    right(Tally(Layout(*map(backend.numpy, out.layout)), None))


@pytest.mark.parametrize(
    ("out", "error", "message"),
    [
        (Tally(None, PAYLOAD), ValueError, None),
        (Tally(PAYLOAD, PAYLOAD), TypeError, r"tally: out\.layout must be Layout\(counts, order\), got ndarray"),
        (PAYLOAD, TypeError, r"tally: out must be Tally\(layout, copy\), got ndarray"),
        (Tally(Layout(np.zeros(4, np.int32), None), PAYLOAD), ValueError, r"out.layout.counts must .* = \[3\]"),
    ],
)
def test_outs_of_another_form(out: Any, error: type[Exception], message: str | None) -> None:
    if message is None:
        with pytest.raises(TypeError, match=r"tally: out.layout.counts must be an array"):
            tally(IDS, PAYLOAD, 3, with_order=False, out=out)
    else:
        with pytest.raises(error, match=message):
            tally(IDS, PAYLOAD, 3, with_order=False, out=out)


def test_an_out_that_was_not_asked_for() -> None:
    out = Tally(Layout(np.zeros(3, np.int32), np.zeros(8, np.int32)), PAYLOAD.copy())
    with pytest.raises(TypeError, match=r"tally: out.layout.order must be None where it is not returned, got ndarray"):
        tally(IDS, PAYLOAD, 3, with_order=False, out=out)


def test_inputs_are_checked_by_the_declaration() -> None:
    for given, error, message in (
        ((IDS.astype(np.float32), PAYLOAD, 3), TypeError, "ids must be uint8 or int16 .* got float32"),
        ((IDS[0], PAYLOAD, 3), ValueError, r"ids must have shape \[num_tokens, top_k\], got int16 \[2\]"),
        ((IDS, None, 3), TypeError, "payload must be an array, got None"),
    ):
        with pytest.raises(error, match=f"^tally: {message}"):
            tally(*given)
    with pytest.raises(ValueError, match=r"^tally: load must have shape \[num_experts\] = \[3\], got int32 \[4\]"):
        tally(IDS, PAYLOAD, 3, load=np.zeros(4, np.int32))
    load = np.zeros(3, np.int32)
    load.flags.writeable = False
    with pytest.raises(ValueError, match=r"^tally: load must be writable, got a read-only int32"):
        tally(IDS, PAYLOAD, 3, load=load)


# -- Options as text ---------------------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Outer(Options):
    inner: TallyOptions | None
    method: RoutingMethod
    name: str


@pytest.mark.parametrize("inner", [None, TallyOptions(3, None, True)])
def test_options_travel_as_text(inner: TallyOptions | None) -> None:
    options = Outer(inner, RoutingMethod(8, 2, scale=2.5), "any")
    json.loads(options.text)
    op = type("OuterOp", (type(OP),), {"name": "outer", "options": Outer})()
    assert op.options_of(options.text) == options


@pytest.mark.parametrize("name", OPS)
def test_options_of_every_op_are_frozen_dataclasses(name: str) -> None:
    fields = dataclasses.fields(OPS[name].options)
    assert OPS[name].options.__dataclass_params__.frozen
    if {"method"} == {field.name for field in fields}:
        options = OPS[name].options(RoutingMethod(8, 2))
        assert OPS[name].options_of(options.text) == options
    assert OPS["activation_topk"].options is MethodOptions


# -- PyTorch -----------------------------------------------------------------------------------------------------------


@pytest.fixture
def torch() -> Any:
    return torch_with_tally()


def test_the_schema(torch: Any) -> None:
    assert str(torch.ops.cupy_router.tally.default._schema) == (
        "cupy_router::tally(str options, Tensor ids, Tensor payload, Tensor? num_valid, SymInt num_valid_value) -> "
        "(Tensor, Tensor, Tensor)"
    )
    assert str(torch.ops.cupy_router.tally_write.default._schema) == (
        "cupy_router::tally_write(str options, Tensor ids, Tensor payload, Tensor(a!)? load, Tensor? num_valid, "
        "SymInt num_valid_value) -> ()"
    )


def test_writing_is_known_to_autograd(torch: Any) -> None:
    load = torch.zeros(3, dtype=torch.int64)
    before = load._version
    right(tally(torch.from_numpy(IDS), torch.from_numpy(PAYLOAD), 3, load=load))
    assert load._version == before + 1
    assert load.tolist() == COUNTS


@pytest.mark.slow("seconds")
@pytest.mark.parametrize("dynamic", [False, True])
@pytest.mark.parametrize("with_order", [False, True])
def test_compiled(torch: Any, with_order: bool, dynamic: bool) -> None:
    torch.compiler.reset()
    compiled = torch.compile(
        lambda ids, payload, load: tally(ids + 0, payload, 3, with_order=with_order, load=load),
        backend="aot_eager", fullgraph=True, dynamic=dynamic,
    )  # fmt: skip
    for n in (4, 3, 2):
        load = torch.zeros(3, dtype=torch.int32)
        got = compiled(torch.from_numpy(IDS[:n]), torch.from_numpy(PAYLOAD), load)
        want = tally(IDS[:n], PAYLOAD, 3, with_order=with_order)
        right(got, want.layout.counts.tolist(), want.layout.order.tolist() if with_order else None)
        assert load.tolist() == want.layout.counts.tolist()


@pytest.mark.slow("seconds")
def test_opcheck(torch: Any) -> None:
    ids, payload = torch.from_numpy(IDS), torch.ones(3, dtype=torch.bool)
    for options, load in (
        (TallyOptions(3, 5, True), torch.zeros(3, dtype=torch.int32)),
        (TallyOptions(3, None, False), None),
    ):
        ops = torch.ops.cupy_router
        for op, given in ((ops.tally, (ids, payload)), (ops.tally_write, (ids, payload, load))):
            found = torch.library.opcheck(op.default, (options.text, *given, None, 2))
            assert set(found.values()) == {"SUCCESS"}


def test_torch_vmap(torch: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    many = torch.stack([torch.from_numpy(IDS), torch.from_numpy(IDS).flip(0)])
    payload = torch.from_numpy(PAYLOAD)
    got = torch.func.vmap(lambda ids: tally(ids, payload, 3))(many)
    assert got.layout.counts.tolist() == [COUNTS, COUNTS]
    assert got.layout.order[0].tolist() == ORDER
    with pytest.raises(ValueError, match=r"tally: load cannot be written inside torch.func"):
        torch.func.vmap(lambda ids: tally(ids, payload, 3, load=torch.zeros(3, dtype=torch.int32)))(many)
    monkeypatch.setattr(type(OP), "vmap", "refuse")
    with pytest.raises(ValueError, match=r"tally: torch.func.vmap cannot map over it"):
        torch.func.vmap(lambda ids: tally(ids, payload, 3))(many)


# -- JAX ---------------------------------------------------------------------------------------------------------------


_registered: list[Any] = []


@pytest.fixture
def jax(monkeypatch: pytest.MonkeyPatch) -> Any:
    jax = pytest.importorskip("jax")
    from cupy_router.jax import _ffi_targets

    if _ffi_targets.why_not() is not None:
        pytest.skip("calls inside jax.jit need a newer JAX")
    monkeypatch.setitem(registry.OPS, OP.name, OP)
    if not _registered:  # XLA takes each target once
        _ffi_targets.register_op(OP)
        _registered.append(OP)
    return jax


@pytest.mark.parametrize("with_order", [False, True])
def test_inside_jit(jax: Any, with_order: bool) -> None:
    ids, payload = jax.numpy.asarray(IDS), jax.numpy.asarray(PAYLOAD)
    right(jax.jit(lambda ids: tally(ids, payload, 3, with_order=with_order))(ids), order=ORDER if with_order else None)
    with pytest.raises(ValueError, match=r"tally: load cannot be written inside jax.jit, where arrays are immutable"):
        jax.jit(lambda ids: tally(ids, payload, 3, load=jax.numpy.zeros(3, "int32")))(ids)


def test_jax_vmap(jax: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    many, payload = jax.numpy.asarray(np.stack([IDS, IDS[::-1]])), jax.numpy.asarray(PAYLOAD)
    got = jax.jit(jax.vmap(lambda ids: tally(ids, payload, 3)))(many)
    assert got.layout.counts.tolist() == [COUNTS, COUNTS]
    assert got.layout.order[0].tolist() == ORDER
    monkeypatch.setattr(type(OP), "vmap", "refuse")
    jax.clear_caches()
    with pytest.raises(ValueError, match=r"tally: jax.vmap cannot map over it"):
        jax.vmap(lambda ids: tally(ids * 1, payload, 3))(many)
