# SPDX-License-Identifier: Apache-2.0
"""Kernels in XLA's programs: lowering for CUDA, tested without a GPU."""

from __future__ import annotations

import shutil
import struct
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from cupy_router import RoutingMethod, ScoreFunction, activation_topk, compiler, topk_select, tuning
from cupy_router.compiler import CompileError, Signature
from cupy_router.ops import _cached
from tests import inputs
from tests.gpu import support
from tests.jax_calls import METHOD, NAMES, calls
from tests.recorder import recording

jax = pytest.importorskip("jax", reason="JAX is not installed")
jnp = jax.numpy
if jax.__version_info__ < (0, 8):
    pytest.skip("calls inside jax.jit need JAX 0.8 or later", allow_module_level=True)

from cupy_router.jax import _lower_ptx, _ptx  # noqa: E402

ARCHITECTURE = "compute_90"

# Calls with scratch memory: gate GEMMs, and lists of many winners.
HANDLED = [name for name in NAMES if name.startswith(("dense_router", "a ")) or name == "topk_select with starts"]


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Pretend that XLA can launch kernels on a GPU that does not exist; NVRTC compiles without one."""
    cupy = pytest.importorskip("cupy", reason="CuPy is not installed")
    monkeypatch.setattr(compiler, "require_cuda", lambda: cupy)
    monkeypatch.setattr(_lower_ptx, "_gpu", lambda: (("cuda", 0), ARCHITECTURE))
    jax.clear_caches()
    with tuning.assume(tuning.DEFAULT):
        yield


def lowered(function: Any, *arrays: Any) -> str:
    """Return the program for a GPU."""
    return str(jax.jit(function).trace(*arrays).lower(lowering_platforms=("cuda",)).as_text())


def launched(program: str) -> int:
    return program.count(f"custom_call @{_lower_ptx.TARGET}(")


def handled(program: str) -> int:
    return program.count("custom_call @cupy_router.")


# -- Programs ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.slow("compiler")
@pytest.mark.usefixtures("gpu")
def test_a_single_kernel_needs_no_handler(name: str) -> None:
    call = calls()[name]
    program = lowered(lambda arrays: call(arrays), call.arrays)
    assert (launched(program), handled(program)) == ((0, 1) if name in HANDLED else (1, 0))


@pytest.mark.slow("compiler")
@pytest.mark.usefixtures("gpu")
def test_a_gradient_needs_no_handler() -> None:
    def loss(logits: Any, scale: Any) -> Any:
        return (activation_topk(logits, METHOD, expert_scale=scale).weights ** 2).sum()

    program = lowered(jax.grad(loss, argnums=(0, 1)), jnp.ones((5, 32)), jnp.ones(32))
    assert (launched(program), handled(program)) == (3, 0)  # and the weights without factors


@pytest.mark.slow("compiler")
@pytest.mark.usefixtures("gpu")
def test_calls_that_need_handlers() -> None:
    rows = jnp.ones((3, 2000))
    assert handled(lowered(lambda a: topk_select(a, 2), rows)) == 1, "long rows may need memory"
    assert handled(lowered(lambda a: topk_select(a, 2), jnp.ones((0, 20)))) == 1, "no rows are no grid"
    assert launched(lowered(lambda a: topk_select(a, 2), rows[:, :20])) == 1
    assert handled(lowered(lambda a: activation_topk(a, RoutingMethod(2000, 2)), rows)) == 0


@pytest.mark.slow("compiler")
@pytest.mark.usefixtures("gpu")
def test_other_platforms_have_handlers() -> None:
    traced = jax.jit(lambda a: topk_select(a, 2)).trace(jnp.ones((3, 20)))
    assert handled(traced.lower(lowering_platforms=("cpu",)).as_text()) == 1
    both = traced.lower(lowering_platforms=("cpu", "cuda")).as_text()
    assert (launched(both), handled(both)) == (1, 1)


@pytest.mark.slow("compiler")
@pytest.mark.usefixtures("gpu")
def test_exported_programs_call_handlers() -> None:
    exported = jax.export.export(
        jax.jit(lambda a: activation_topk(a, METHOD)),
        platforms=["cuda"],
        disabled_checks=[jax.export.DisabledSafetyCheck.custom_call("cupy_router.activation_topk")],
    )(jnp.ones((3, 32)))
    program = exported.mlir_module()
    assert (launched(program), handled(program)) == (0, 1)


@pytest.mark.slow("compiler")
@pytest.mark.usefixtures("gpu")
def test_the_handler_reports_a_kernel_that_does_not_compile() -> None:
    wrong = ScoreFunction("wrong", cuda="x + undeclared", numpy=lambda x: x)
    program = lowered(lambda a: activation_topk(a, RoutingMethod(32, 4, wrong)), jnp.ones((3, 32)))
    assert (launched(program), handled(program)) == (0, 1)


def test_without_a_gpu_all_calls_use_handlers() -> None:
    if compiler.why_no_cuda() is None:
        pytest.skip("there is one")
    _lower_ptx._gpu.cache_clear()
    jax.clear_caches()
    program = lowered(lambda a: activation_topk(a, METHOD), jnp.ones((3, 32)))
    assert (launched(program), handled(program)) == (0, 1)


@pytest.mark.slow("compiler")
@pytest.mark.usefixtures("gpu")
def test_edited_kernels_are_read_again(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_cached, "_calls", {"stale": None})
    monkeypatch.setattr(compiler, "WATCHING", True)
    monkeypatch.setattr(compiler, "changed", lambda: True)
    assert launched(lowered(lambda a: activation_topk(a, METHOD), jnp.ones((3, 32)))) == 1
    assert not _cached._calls


# -- Whether it works --------------------------------------------------------------------------------------------------


class Gpu:
    def __init__(self, capability: str, number: int = 3) -> None:
        self.compute_capability, self.local_hardware_id = capability, number


@pytest.mark.parametrize(
    ("capabilities", "works", "environment", "expected"),
    [
        (["9.0", "9.0"], True, "", (("cuda", 3), "compute_90")),
        (["12.0"], True, "", (("cuda", 3), "compute_120")),
        (["9.0", "8.0"], True, "", None),
        (["9.0"], False, "", None),
        (["9.0"], True, "1", None),
    ],
)
def test_one_architecture_on_which_a_trial_works(
    capabilities: list[str], works: bool, environment: str, expected: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(compiler, "why_no_cuda", lambda: None)
    monkeypatch.setattr(jax, "local_devices", lambda backend: [Gpu(capability) for capability in capabilities])
    monkeypatch.setattr(_lower_ptx, "_adds_one", lambda architecture, device: works)
    monkeypatch.setenv(_lower_ptx.HANDLERS, environment)
    assert _lower_ptx._gpu.__wrapped__() == expected


@pytest.mark.parametrize(("number", "loaded"), [(0, []), (1, []), (2, [0, 1])])
def test_kernels_of_handlers_are_loaded_for_all_of_several_gpus(
    number: int, loaded: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    """They are loaded before a program runs in which one GPU may wait for another."""
    monkeypatch.setattr(compiler, "why_no_cuda", lambda: None)
    monkeypatch.setattr(jax, "local_devices", lambda backend: [Gpu("9.0", i) for i in range(number)])
    monkeypatch.setattr(_lower_ptx, "_gpu", lambda: None)
    jax.clear_caches()
    with recording("cuda") as recorder:
        assert handled(lowered(lambda a: activation_topk(a, METHOD), jnp.ones((3, 32)))) == 1
    assert [device for _, device in recorder._built] == loaded


def test_a_trial_that_fails_is_no_error() -> None:
    """Without a GPU, XLA has no such custom call, and NVRTC may have no driver."""
    assert not _lower_ptx._adds_one(ARCHITECTURE, jax.devices("cpu")[0])


# -- PTX ---------------------------------------------------------------------------------------------------------------

PTX = """
.visible .entry other(.param .u64 other_param_0)
.visible .entry route(
	.param .u64 .ptr .align 1 route_param_0,
	.param .u64 route_param_1,
	.param .u32 route_param_2,
	.param .f32 route_param_10,
	.param .u64 route_param_11
)
{
	.reg .pred 	%p<2>;
	.reg .f32 	%f<2>;
	.reg .b32 	%r<3>;
	.reg .b64 	%rd<6>;
	ld.param.b64 	%rd1, [route_param_0];
	ld.param.u64 	%rd2, [route_param_1];
	ld.param.u32 	%r1, [route_param_2];
	ld.param.s32 	%rd3, [route_param_2];
	ld.param.u32 	%rd4, [route_param_2];
	ld.param.f32 	%f1, [route_param_10];
	ld.param.u64 	%rd5, [route_param_11];
	ld.param.u32 	%r2, [route_param_11];
}
"""
SIGNATURE = Signature("route", ("logits", "out", "count", "scale", "stride"), "PPifq")
CONSTANTS = {"logits": 0, "count": 7, "scale": 1.5, "stride": 2**33 + 9}


@pytest.mark.parametrize("count", [7, -2, 2**31 - 1])
@pytest.mark.parametrize("scale", [1.5, float("-inf"), -0.0])
def test_parameters_become_constants(count: int, scale: float) -> None:
    """Loads may read a part of a parameter, and extend it with or without the sign."""
    text = _ptx.specialised(PTX, SIGNATURE, ("out",), CONSTANTS | {"count": count, "scale": scale})
    assert ".entry other(.param .u64 other_param_0)" in text
    assert ".entry route(.param .u64 route_param_1)" in text
    loads = [line.split() for line in text.splitlines() if line.startswith(("\tmov", "\tld"))]
    assert loads.pop(1) == ["ld.param.u64", "%rd2,", "[route_param_1];"]
    (scale_bits,) = struct.unpack("<I", struct.pack("<f", scale))
    assert [(kind, register, int(value[:-1], 16)) for kind, register, value in loads] == [
        ("mov.b64", "%rd1,", 0),
        ("mov.b32", "%r1,", count % 2**32),
        ("mov.b64", "%rd3,", count % 2**64),
        ("mov.b64", "%rd4,", count % 2**32),
        ("mov.b32", "%f1,", scale_bits),
        ("mov.b64", "%rd5,", 2**33 + 9),
        ("mov.b32", "%r2,", 9),
    ]


def test_arguments_come_in_the_order_of_xla() -> None:
    text = _ptx.specialised(PTX, SIGNATURE, ("out", "logits"), CONSTANTS)
    assert ".entry route(.param .u64 route_param_1, .param .u64 .ptr .align 1 route_param_0)" in text


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (PTX.replace("%r1, [", "{%r1, %r2}, ["), "reads count"),
        (PTX.replace("[route_param_10]", "[route_param_10+0]"), "reads scale"),
        (PTX.replace("ld.param.u32 \t%r1", "ld.param.u8 \t%r1"), "reads count"),
        (PTX.replace("ld.param.u64 \t%rd5", "ld.param.u64 \t%r2"), "reads stride"),
        (PTX.replace("\t.param .u32 route_param_2,\n", ""), "has 4 parameters in PTX, not 5"),
        (PTX.replace(".entry route", ".func route"), "has 0 parameters"),
    ],
)
def test_what_is_not_known_is_an_error(text: str, message: str) -> None:
    with pytest.raises(CompileError, match=message):
        _ptx.specialised(text, SIGNATURE, ("logits", "out"), CONSTANTS)


@pytest.mark.parametrize("dtype", inputs.FLOATS)
@pytest.mark.parametrize("name", [*NAMES, *(f"large {name}" for name in support.NAMES)])
@pytest.mark.slow("compiler")
@pytest.mark.usefixtures("gpu")
def test_every_kernel_assembles(name: str, dtype: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    ptxas = shutil.which("ptxas")
    if ptxas is None:
        pytest.skip("ptxas is not installed")
    found: list[dict[str, Any]] = []
    attributes = _lower_ptx.attributes
    monkeypatch.setattr(_lower_ptx, "attributes", lambda *given: found.append(attributes(*given)) or found[-1])
    call: Any = support.call(name.removeprefix("large "), dtype=dtype) if "large" in name else calls(dtype)[name]
    program = lowered(lambda arrays: call(arrays), call.arrays)
    for made in filter(None, found):
        assert made["kernel_data"].count(".param ") == len(call.arrays) + 2
        (tmp_path / "kernel.ptx").write_text(made["kernel_data"])
        subprocess.run([ptxas, "-arch=sm_90", "-o", "/dev/null", tmp_path / "kernel.ptx"], check=True)
    assert launched(program) == len([made for made in found if made])
