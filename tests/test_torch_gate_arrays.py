# SPDX-License-Identifier: Apache-2.0
"""The arrays of a Gate: names, dtypes and devices, and that a call uses those that it has now."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from cupy_router import Router
from tests.gates import (
    EXPERTS,
    FLOAT32,
    HIDDEN,
    METHOD,
    arguments,
    assert_same,
    dense_gate,
    expected,
    hash_gate,
    others,
    randomized,
    seeded,  # noqa: F401
    table,
)

torch = pytest.importorskip("torch", reason="PyTorch is not installed")
from torch.nn.utils import parametrizations  # noqa: E402

from cupy_router.torch import Gate  # noqa: E402

# -- Arrays ------------------------------------------------------------------------------------------------------------


def test_names_dtypes_and_initial_values() -> None:
    torch.manual_seed(5)
    gate = Gate(HIDDEN, METHOD, bias=True, logit_bias=True, expert_scale=True, dtype=torch.bfloat16)
    torch.manual_seed(5)
    linear = torch.nn.Linear(HIDDEN, EXPERTS, dtype=torch.bfloat16)
    assert list(dict(gate.named_parameters())) == ["weight", "logit_bias", "per_expert_scale"]
    assert list(dict(gate.named_buffers())) == ["e_score_correction_bias"]
    assert torch.equal(gate.weight, linear.weight)
    for name, value in (("e_score_correction_bias", 0), ("logit_bias", 0), ("per_expert_scale", 1)):
        tensor = gate.state_dict()[name]
        assert (tensor.dtype, tensor.shape) == (torch.float32, (EXPERTS,))
        assert (tensor == value).all()
    assert all(parameter.requires_grad for parameter in gate.parameters())
    given = table(torch.int32)
    hashed = Gate(HIDDEN, METHOD, table=given)
    assert list(dict(hashed.named_buffers())) == ["tid2eid"]
    assert hashed.tid2eid.dtype == torch.int32
    assert hashed.tid2eid.data_ptr() != given.data_ptr()  # loading writes into it
    none = Gate(HIDDEN, METHOD)
    assert [getattr(none, name) for name in (*FLOAT32, "bias", "tid2eid")] == 5 * [None]


def test_the_weight_has_the_default_dtype_and_the_others_float32() -> None:
    before = torch.get_default_dtype()
    try:
        torch.set_default_dtype(torch.bfloat16)
        gate = dense_gate()
        assert gate(torch.randn(2, HIDDEN)).weights.dtype == torch.float32
        torch.set_default_dtype(torch.float64)
        with pytest.raises(
            TypeError, match=r"Gate: dtype must be torch.float32 .* got torch.float64, which is PyTorch's"
        ):
            Gate(HIDDEN, METHOD)
        Gate(None, METHOD, table=table())
    finally:
        torch.set_default_dtype(before)
    assert gate.weight.dtype == torch.bfloat16
    assert {gate.state_dict()[name].dtype for name in FLOAT32} == {torch.float32}


CASTS: dict[str, tuple[Callable[[Any], Any], Any]] = {
    "to(bfloat16)": (lambda gate: gate.to(torch.bfloat16), torch.bfloat16),
    "to(cpu, float16)": (lambda gate: gate.to("cpu", torch.float16), torch.float16),
    "to(tensor)": (lambda gate: gate.to(torch.empty(0, dtype=torch.float16)), torch.float16),
    "half()": (lambda gate: gate.half(), torch.float16),
    "bfloat16()": (lambda gate: gate.bfloat16(), torch.bfloat16),
    "double()": (lambda gate: gate.double(), torch.float64),
    "type()": (lambda gate: gate.type(torch.bfloat16), torch.bfloat16),
    "half().float()": (lambda gate: gate.half().float(), torch.float32),
}


@pytest.mark.parametrize("cast", CASTS)
@pytest.mark.parametrize("inside", [False, True], ids=["alone", "in a model"])
def test_float32_arrays_keep_dtype_and_values(cast: str, inside: bool) -> None:
    gate = dense_gate()
    gate(torch.randn(3, HIDDEN)).weights.square().sum().backward()
    convert, dtype = CASTS[cast]
    before = copy.deepcopy(gate)
    grads = {name: getattr(gate, name).grad.clone() for name in ("logit_bias", "per_expert_scale")}
    convert(torch.nn.Sequential(torch.nn.Linear(2, 2), gate) if inside else gate)
    assert gate.weight.dtype == gate.weight.grad.dtype == dtype
    for name in FLOAT32:
        torch.testing.assert_close(getattr(gate, name), getattr(before, name), rtol=0, atol=0)
    for name, grad in grads.items():
        torch.testing.assert_close(getattr(gate, name).grad, grad, rtol=0, atol=0)


@pytest.mark.parametrize("swap", [False, True])
@pytest.mark.parametrize("overwrite", [False, True])
def test_however_pytorch_converts_modules(swap: bool, overwrite: bool) -> None:
    gate = dense_gate()
    before = copy.deepcopy(gate)
    torch.__future__.set_swap_module_params_on_conversion(swap)
    torch.__future__.set_overwrite_module_params_on_conversion(overwrite)
    try:
        gate.to(torch.bfloat16)
    finally:
        torch.__future__.set_swap_module_params_on_conversion(False)
        torch.__future__.set_overwrite_module_params_on_conversion(False)
    for name in FLOAT32:
        torch.testing.assert_close(getattr(gate, name), getattr(before, name), rtol=0, atol=0)


def test_arrays_assigned_in_another_dtype_become_float32() -> None:
    gate = dense_gate()
    gate.e_score_correction_bias = rounded = gate.e_score_correction_bias.bfloat16()
    gate.to(torch.float16)
    assert gate.e_score_correction_bias.dtype == torch.float32
    assert torch.equal(gate.e_score_correction_bias, rounded.float())


def test_only_the_device_changes() -> None:
    gate = dense_gate().to("meta", torch.bfloat16)
    assert {tensor.device.type for tensor in gate.state_dict().values()} == {"meta"}
    assert gate.weight.dtype == torch.bfloat16
    assert gate.logit_bias.dtype == torch.float32


# -- The arrays of now -------------------------------------------------------------------------------------------------


def assign_to_buffer(gate: Any) -> None:
    if gate.tid2eid is None:
        gate.e_score_correction_bias = torch.randn(EXPERTS)
    else:
        gate.tid2eid = table()


def assign_to_parameters(gate: Any) -> None:
    for name, value in others(gate).items():
        if name in dict(gate.named_parameters()):
            setattr(gate, name, torch.nn.Parameter(value))


CHANGES: dict[str, Callable[[Any], Any]] = {
    "load_state_dict": lambda gate: gate.load_state_dict(others(gate)),
    "load_state_dict(assign=True)": lambda gate: gate.load_state_dict(others(gate), assign=True),
    "an assigned buffer": assign_to_buffer,
    "assigned parameters": assign_to_parameters,
    "to(bfloat16)": lambda gate: gate.to(torch.bfloat16),
    "to(meta), to_empty, reset": lambda gate: (
        gate.to("meta").to_empty(device="cpu").reset_parameters(),
        gate.tid2eid is None or gate.tid2eid.copy_(table()),
    ),
    "a step of an optimizer": lambda gate: (
        gate(*arguments(gate)).weights.square().sum().backward(),
        torch.optim.SGD(gate.parameters(), 1.0).step(),
    ),
    "written in place": lambda gate: [
        tensor.copy_(new) for tensor, new in zip(gate.state_dict().values(), others(gate).values(), strict=True)
    ],
}


@pytest.mark.parametrize("change", CHANGES)
@pytest.mark.parametrize("make", [dense_gate, hash_gate])
def test_a_gate_uses_the_arrays_that_it_has_now(make: Callable[[], Any], change: str) -> None:
    gate = make()
    given = arguments(gate)
    before = gate(*given)
    CHANGES[change](gate)
    got = gate(*given)
    assert_same(got, expected(gate.state_dict(), *given))
    assert not torch.equal(got.weights, before.weights)


@pytest.mark.parametrize("make", [dense_gate, hash_gate])
def test_functional_call(make: Callable[[], Any]) -> None:
    gate = make()
    given, arrays = arguments(gate), others(gate)
    assert_same(torch.func.functional_call(gate, arrays, given), expected(arrays, *given))
    assert_same(gate(*given), expected(gate.state_dict(), *given))


def test_a_bias_of_another_dtype_is_converted() -> None:
    """As under a mixed-precision policy of FSDP."""
    gate, x = dense_gate(), torch.randn(5, HIDDEN)
    arrays = {name: tensor.bfloat16() for name, tensor in gate.state_dict().items()}
    got = torch.func.functional_call(gate, arrays, (x,))
    assert_same(got, expected({name: arrays[name].float() if name in FLOAT32 else arrays[name] for name in arrays}, x))


COPIES: dict[str, Callable[[Any, Path], Any]] = {
    "deepcopy": lambda gate, path: copy.deepcopy(gate),
    "pickle": lambda gate, path: pickle.loads(pickle.dumps(gate)),
    "torch.save": lambda gate, path: (torch.save(gate, path), torch.load(path, weights_only=False))[1],
}


@pytest.mark.parametrize("way", COPIES)
@pytest.mark.parametrize("make", [dense_gate, hash_gate])
def test_copies_are_gates_of_their_own(make: Callable[[], Any], way: str, tmp_path: Path) -> None:
    gate = make()
    given, twin = arguments(gate), COPIES[way](gate, tmp_path / "gate.pt")
    assert repr(twin) == repr(gate)
    assert_same(twin(*given), gate(*given))
    twin.load_state_dict(others(gate))
    assert_same(twin(*given), expected(twin.state_dict(), *given))
    assert not torch.equal(twin(*given).weights, gate(*given).weights)


@pytest.mark.parametrize(
    "make", [partial(Gate, HIDDEN, METHOD, bias=True), partial(Gate, HIDDEN, METHOD, table=table())]
)
def test_meta_device(make: Callable[..., Any]) -> None:
    with torch.device("meta"):
        inside = make()
    source = randomized(make())
    given = arguments(source)
    for gate in (make(device="meta"), make(device=torch.device("meta")), inside):
        assert {tensor.device.type for tensor in gate.state_dict().values()} == {"meta"}
        assert [t.shape for t in gate.state_dict().values()] == [t.shape for t in source.state_dict().values()]
        empty = copy.deepcopy(gate).to_empty(device="cpu")
        empty.load_state_dict(source.state_dict())
        assert_same(empty(*given), source(*given))
        gate.load_state_dict(source.state_dict(), assign=True)
        assert_same(gate(*given), source(*given))
    skipped = torch.nn.utils.skip_init(Gate, HIDDEN, METHOD, bias=True)
    skipped.reset_parameters()
    assert (skipped.e_score_correction_bias == 0).all()


def test_parametrizations() -> None:
    gate, x = dense_gate(), torch.randn(5, HIDDEN)
    want = gate(x)
    parametrizations.weight_norm(gate, "weight")
    parametrizations.weight_norm(gate, "logit_bias", dim=None)
    torch.testing.assert_close(tuple(gate(x)), tuple(want))
    with torch.no_grad():
        gate.parametrizations.weight.original0.mul_(2)
    torch.testing.assert_close(
        gate(x).weights,
        expected({**gate.state_dict(), "weight": gate.weight, "logit_bias": gate.logit_bias}, x).weights,
    )
    gate.to(torch.bfloat16)(x).weights.sum().backward()
    gate.half()
    found = {name: tensor.dtype for name, tensor in gate.named_parameters()}
    assert (
        found.pop("parametrizations.weight.original0")
        == found.pop("parametrizations.weight.original1")
        == torch.float16
    )
    assert set(found.values()) == {torch.float32}


def test_a_router_of_the_arrays_does_not_follow() -> None:
    """Which is why there is a Gate; a Router says what it has now."""
    gate = dense_gate()
    router = Router(METHOD, weight=gate.weight, bias=gate.e_score_correction_bias)
    gate.load_state_dict(others(gate), assign=True)
    assert router.weight is not gate.weight
    router.weight, router.bias = gate.weight.detach().bfloat16(), None
    assert repr(router) == f"Router({METHOD!r}, weight=bfloat16 [16, 8] on cpu)"
