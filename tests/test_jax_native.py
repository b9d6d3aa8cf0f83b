# SPDX-License-Identifier: Apache-2.0
"""Kernels in XLA's programs: lowering for CUDA, as far as it can be tested without a GPU."""

from __future__ import annotations

import re
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from cupy_router import (
    LayoutSpec,
    RoutingMethod,
    ScoreFunction,
    activation_topk,
    compiler,
    expert_layout,
    kernel_log,
    nvrtc,
    topk_select,
    tuning,
)
from cupy_router.compiler import CompileError, Signature
from cupy_router.ops import _cached
from tests import given_calls, inputs, jax_layouts
from tests.gpu import support
from tests.jax_calls import METHOD, NAMES, calls
from tests.recorder import recording

jax = pytest.importorskip("jax", reason="JAX is not installed")
jnp = jax.numpy
if jax.__version_info__ < (0, 8):
    pytest.skip("calls inside jax.jit need JAX 0.8 or later", allow_module_level=True)

from cupy_router.jax import _lower_ptx, _ptx  # noqa: E402

ARCHITECTURE = "compute_90"

# What has memory of its own: products of gates, and lists of many winners.
HANDLED = [
    name
    for name in NAMES
    if name.startswith(("dense_router", "a "))
    or "with logits" in name
    or name == "topk_select with starts"
    or (name.startswith("hash_router") and "biases" in name)
]


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Pretend that XLA can launch kernels on a GPU; NVRTC compiles without one."""
    cupy = pytest.importorskip("cupy", reason="CuPy is not installed")
    monkeypatch.setattr(compiler, "require_cuda", lambda: cupy)
    monkeypatch.setattr(_lower_ptx, "_gpu", lambda: (("cuda", 0), ARCHITECTURE))
    jax.clear_caches()
    with tuning.assume(tuning.DEFAULT):
        yield


def lowered(function: Any, *arrays: Any) -> str:
    """Return the program lowered for a GPU."""
    return str(jax.jit(function).trace(*arrays).lower(lowering_platforms=("cuda",)).as_text())


def launched(program: str) -> int:
    return program.count(f"custom_call @{_lower_ptx.TARGET}(")


def handled(program: str) -> int:
    return program.count("custom_call @cupy_router.")


# -- Programs ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.slow("compiler")
@pytest.mark.usefixtures("gpu")
def test_single_kernel_calls_need_no_handler(name: str) -> None:
    call = calls()[name]
    program = lowered(lambda arrays: call(arrays), call.arrays)
    assert (launched(program), handled(program)) == ((0, 1) if name in HANDLED else (1, 0))


@pytest.mark.slow("compiler")
@pytest.mark.usefixtures("gpu")
@pytest.mark.parametrize("unset", ["route", "empty"])
def test_given_experts_need_no_handler(unset: str) -> None:
    """Nor arrays that this kernel does not read: with "empty" nothing is selected, so there is no bias."""
    call = given_calls.Call("activation_topk", "uint8 indices", unset)
    program = lowered(lambda arrays: call(arrays), call.arrays())
    assert (launched(program), handled(program)) == (1, 0)


@pytest.mark.slow("compiler")
@pytest.mark.usefixtures("gpu")
def test_a_gradient_needs_no_handler() -> None:
    def loss(logits: Any, scale: Any) -> Any:
        return (activation_topk(logits, METHOD, expert_scale=scale).weights ** 2).sum()

    program = lowered(jax.grad(loss, argnums=(0, 1)), jnp.ones((5, 32)), jnp.ones(32))
    assert (launched(program), handled(program)) == (3, 0)  # and the weights without factors


@pytest.mark.slow("compiler")
@pytest.mark.usefixtures("gpu")
def test_calls_that_need_a_handler() -> None:
    rows = jnp.ones((3, 2000))
    assert handled(lowered(lambda a: topk_select(a, 2), rows)) == 1, "long rows may need memory"
    assert handled(lowered(lambda a: topk_select(a, 2), jnp.ones((0, 20)))) == 1, "no rows are no grid"
    assert launched(lowered(lambda a: topk_select(a, 2), rows[:, :20])) == 1
    assert handled(lowered(lambda a: activation_topk(a, RoutingMethod(2000, 2)), rows)) == 0


@pytest.mark.slow("compiler")
@pytest.mark.usefixtures("gpu")
def test_layouts_of_few_pairs_need_no_handler() -> None:
    for case in jax_layouts.cases(9).values():
        counted = case.options.get("experts") != (2, 0)  # no experts, no block for them
        program = lowered(lambda arrays, case=case: case(arrays), case.arrays)
        assert (launched(program), handled(program)) == (counted, not counted)
    for n, here in ((0, 1), (1, 1), (60, 1), (1000, 1), (40_000, 0)):
        program = lowered(lambda a: expert_layout(a, 64), jax_layouts.ids(n))
        assert (launched(program), handled(program)) == (here, 1 - here)


@pytest.mark.slow("compiler")
@pytest.mark.usefixtures("gpu")
def test_rows_and_their_gradients_need_no_handler() -> None:
    layout = expert_layout(jnp.array(jax_layouts.ids(9)), jax_layouts.EXPERTS, alignment=4)
    arrays = {name: jnp.array(array) for name, array in jax_layouts.arrays_of_rows(9).items()}
    arrays["y"] = jnp.ones((layout.capacity, jax_layouts.HIDDEN))
    for call, names in jax_layouts.ROWS.values():
        given = {name: arrays[name] for name in names}
        program = lowered(lambda given, call=call: call(layout, **given), given)
        assert (launched(program), handled(program)) == (1, 0)
        gradient = lowered(jax.grad(lambda given, call=call: (call(layout, **given) ** 2).sum()), given)
        assert (launched(gradient), handled(gradient)) == (2, 0)


@pytest.mark.slow("compiler")
@pytest.mark.usefixtures("gpu")
def test_routers_with_a_layout_are_kernels_of_the_program() -> None:
    """One for few tokens, two for more, and a handler for the layout of many pairs."""
    for n, expected in ((9, (1, 0)), (1000, (2, 0)), (40_000, (1, 1))):
        program = lowered(lambda a: activation_topk(a, METHOD, layout=LayoutSpec()), jnp.ones((n, 32)))
        assert (launched(program), handled(program)) == expected, n


@pytest.mark.slow("compiler")
@pytest.mark.usefixtures("gpu")
def test_other_platforms_have_handlers() -> None:
    traced = jax.jit(lambda a: topk_select(a, 2)).trace(jnp.ones((3, 20)))
    assert handled(traced.lower(lowering_platforms=("cpu",)).as_text()) == 1
    both = traced.lower(lowering_platforms=("cpu", "cuda")).as_text()
    assert (launched(both), handled(both)) == (1, 1)


@pytest.mark.slow("compiler")
@pytest.mark.usefixtures("gpu")
def test_exported_programs_use_the_stable_target() -> None:
    exported = jax.export.export(
        jax.jit(lambda a: activation_topk(a, METHOD)),
        platforms=["cuda"],
        disabled_checks=[jax.export.DisabledSafetyCheck.custom_call("cupy_router.activation_topk")],
    )(jnp.ones((3, 32)))
    program = exported.mlir_module()
    assert (launched(program), handled(program)) == (0, 1)


@pytest.mark.slow("compiler")
@pytest.mark.usefixtures("gpu")
def test_compile_errors_are_reported_by_the_handler(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(nvrtc, "errors", lambda *args: None)  # as where there is none when the score is made
    wrong = ScoreFunction("wrong", cuda="x + undeclared", numpy=lambda x: x)
    program = lowered(lambda a: activation_topk(a, RoutingMethod(32, 4, wrong)), jnp.ones((3, 32)))
    assert (launched(program), handled(program)) == (0, 1)


def test_without_a_gpu_every_call_has_a_handler() -> None:
    if compiler.why_no_cuda() is None:
        pytest.skip("there is one")
    _lower_ptx._gpu.cache_clear()
    jax.clear_caches()
    program = lowered(lambda a: activation_topk(a, METHOD), jnp.ones((3, 32)))
    assert (launched(program), handled(program)) == (0, 1)


@pytest.mark.slow("compiler")
@pytest.mark.usefixtures("gpu")
def test_edited_kernels_are_read_again(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_cached, "calls", {"stale": None})
    monkeypatch.setattr(compiler, "WATCHING", True)
    monkeypatch.setattr(compiler, "changed", lambda: True)
    assert launched(lowered(lambda a: activation_topk(a, METHOD), jnp.ones((3, 32)))) == 1
    assert not _cached.calls


@pytest.mark.slow("compiler")
@pytest.mark.usefixtures("gpu")
def test_kernels_in_programs_are_announced_once(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[kernel_log.KernelReady] = []
    monkeypatch.setattr(kernel_log, "listeners", [seen.append])
    method = RoutingMethod(40, 3, scale=1.75)
    for _ in range(2):
        jax.clear_caches()
        lowered(lambda a: activation_topk(a, method), jnp.ones((3, 40)))
    (ready,) = seen
    assert (ready.function, ready.device, ready.compiled) == ("activation_topk", ("cuda", 0), True)
    assert ready.milliseconds > 0
    assert dict(ready.macros)["NUM_EXPERTS"] == 40


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
def test_gpus_must_share_an_architecture_that_passes_a_trial(
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
    """Loaded before a program runs, in which one GPU may wait for another."""
    monkeypatch.setattr(compiler, "why_no_cuda", lambda: None)
    monkeypatch.setattr(jax, "local_devices", lambda backend: [Gpu("9.0", i) for i in range(number)])
    monkeypatch.setattr(_lower_ptx, "_gpu", lambda: None)
    jax.clear_caches()
    with recording("cuda") as recorder:
        assert handled(lowered(lambda a: activation_topk(a, METHOD), jnp.ones((3, 32)))) == 1
    assert [device for _, device in recorder._built] == loaded


def test_a_trial_that_fails_is_no_error() -> None:
    """Here XLA lacks the call, and there may be no driver."""
    assert not _lower_ptx._adds_one(ARCHITECTURE, jax.devices("cpu")[0])


# -- Entries of addresses alone ----------------------------------------------------------------------------------------

SOURCE = """
struct Numbers {
    float scale;
    float bias;  // of each
};
extern "C" __global__ void __launch_bounds__(128, 2)
    route(const float *__restrict__ logits, float *out,  // a remark
          int count, const __grid_constant__ Numbers numbers, long long stride, float last) {
    if (count > 0) out[stride] = numbers.scale * count + numbers.bias - last + (logits ? *logits : 0.0f);
}
"""
CONSTANTS = {"logits": 0, "count": 7, "scale": 1.5, "bias": float("-inf"), "stride": -(2**33) - 9, "last": -0.0}


def test_parameters_become_constants() -> None:
    assert _ptx.with_entry(SOURCE, "route", ("out",), CONSTANTS).endswith("""
#line 1 "entry of route"
extern "C" __global__ void __launch_bounds__(128, 2) route(float *out) {
    route_body(nullptr, out, static_cast<int>(0x7ll), \
Numbers{__uint_as_float(0x3fc00000u), __uint_as_float(0xff800000u)}, \
static_cast<long long>(-0x200000009ll), __uint_as_float(0x80000000u));
}
""")


def test_arguments_come_in_the_order_of_xla() -> None:
    text = _ptx.with_entry(SOURCE, "route", ("out", "logits"), CONSTANTS)
    assert "route(float *out, const float *__restrict__ logits) {\n    route_body(logits, out, " in text


def test_only_addresses_are_left_in_ptx(monkeypatch: pytest.MonkeyPatch) -> None:
    cupy = pytest.importorskip("cupy", reason="CuPy is not installed")
    monkeypatch.setattr(compiler, "require_cuda", lambda: cupy)
    signature = Signature("route", ("logits", "out", "count", "scale", "bias", "stride", "last"), "PPiffqf")
    ptx = _ptx.kernel(SOURCE, ARCHITECTURE, signature, ("out", "logits"), tuple(CONSTANTS.items()))
    entry = ptx[ptx.index(".entry route(") :]
    assert re.findall(r"\.param \.(\w+)", entry[: entry.index(")")]) == ["u64", "u64"]
    assert "0fFF800000" in entry
    assert ".maxntid 128" in entry


def test_a_kernel_that_is_not_there_is_an_error() -> None:
    with pytest.raises(CompileError, match="no extern"):
        _ptx.with_entry(SOURCE, "rout", (), CONSTANTS)


@pytest.mark.parametrize("dtype", inputs.FLOATS[:1])
@pytest.mark.parametrize("name", [name for name in NAMES if name not in HANDLED])
@pytest.mark.usefixtures("gpu")
def test_every_kernel_becomes_ptx_with_addresses_alone(name: str, dtype: str, monkeypatch: pytest.MonkeyPatch) -> None:
    call, found = calls(dtype)[name], []
    kernel = _ptx.kernel
    _lower_ptx._compiled.cache_clear()
    monkeypatch.setattr(_ptx, "kernel", lambda *given: found.append(kernel(*given)) or found[-1])
    lowered(lambda arrays: call(arrays), call.arrays)
    (ptx,) = found
    assert ptx.count(".param ") == len(call.arrays) + 2


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
