# SPDX-License-Identifier: Apache-2.0
"""JAX arrays on a GPU that are unusual, JAX's transfer guard, and programs of jax.export."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import cupy_router
from cupy_router import Router, Routing, activation_topk, topk_select
from tests import inputs
from tests.gpu.support import on_gpu, printed, upload
from tests.jax_calls import METHOD, NAMES, SHARED, batch, calls, same_bits

CALLS = calls()
ROOT = Path(cupy_router.__file__).parents[1]


@pytest.fixture(scope="module")
def gpu() -> Any:
    framework = on_gpu("jax")
    if framework.jax.__version_info__ < (0, 8):
        pytest.skip("calls inside jax.jit need JAX 0.8 or later")
    return framework


class Holder:
    def __init__(self, value: Any) -> None:
        self.value = value

    def __jax_array__(self) -> Any:
        return self.value


@pytest.mark.parametrize("name", NAMES)
def test_holders_and_the_transfer_guard(gpu: Any, name: str) -> None:
    jax, call = gpu.jax, CALLS[name]
    arrays = upload(gpu, call.arrays)
    axes = {key: None if key in SHARED else 0 for key in arrays}
    many = upload(gpu, {key: a if key in SHARED else batch({key: a}, 2)[key] for key, a in call.arrays.items()})
    want = call(arrays)
    with jax.transfer_guard("disallow"):
        got = [call(arrays), call({key: Holder(array) for key, array in arrays.items()})]
        got.append(jax.jit(call.function)(**arrays))
        jax.block_until_ready(jax.vmap(lambda arrays: call(arrays), in_axes=(axes,))(many))
    for result in got:
        assert all(array.devices() == {gpu.device} for array in result)
        same_bits(result, want)


GUARDED = """
import jax, numpy as np
from cupy_router import activation_topk
from cupy_router.jax import _lower_ptx
from tests.jax_calls import METHOD
jax.config.update("jax_transfer_guard", "disallow")
logits = jax.device_put(np.zeros((3, 32), np.float32))
program = jax.jit(lambda a: activation_topk(a, METHOD)).lower(logits)
jax.block_until_ready(program.compile()(logits))
print("done", program.as_text().count(f"custom_call @{_lower_ptx.TARGET}("))
"""


def test_xla_launches_without_a_handler_under_the_guard() -> None:
    """The kernel that tests whether it can is guarded as well."""
    if on_gpu("jax").jax.__version_info__ < (0, 11):
        pytest.skip("not measured with this JAX")
    assert printed(GUARDED, "", "XLA") == 1


@pytest.mark.parametrize("dtype", ["key<fry>", "int4", "float8_e4m3fn", "bool", "complex64", "deleted"])
def test_other_arrays_are_refused_by_name(gpu: Any, dtype: str) -> None:
    jax, jnp = gpu.jax, gpu.jax.numpy
    logits = gpu.array(inputs.normal((6, 32)))
    with jax.default_device(gpu.device):
        if dtype == "key<fry>":
            array = jax.random.split(jax.random.key(0), (6, 32))
        else:
            array = jnp.zeros((6, 32), "float32" if dtype == "deleted" else dtype)
    if dtype == "deleted":
        array.delete()
    for name, route in {
        "logits": lambda: activation_topk(array, METHOD),
        "bias": lambda: activation_topk(logits, METHOD, bias=array),
        "out.weights": lambda: activation_topk(logits, METHOD, out=Routing(array, array)),
        "weight": lambda: Router(METHOD, weight=array),
    }.items():
        with pytest.raises((TypeError, ValueError), match=rf"(activation_topk|Router): {name} must ") as caught:
            route()
        assert dtype in str(caught.value)
    with pytest.raises((TypeError, ValueError), match=rf"topk_select: scores must .*{dtype}"):
        topk_select(array, 2)
    same_bits(activation_topk(logits, METHOD), gpu.jax.jit(lambda a: activation_topk(a, METHOD))(logits))


LOADS = """
import sys
import jax, numpy as np
import cupy_router.jax
from tests.jax_calls import METHOD
route = jax.export.deserialize(bytearray(open(sys.argv[1], "rb").read())).call
gate, x = (jax.device_put(array) for array in np.load(sys.argv[2]).values())
print(*map(np.asarray, route(cupy_router.Router(METHOD, weight=gate), x)), sep="\\n")
"""


def test_an_exported_program_of_a_router_runs_in_another_process(gpu: Any, tmp_path: Path) -> None:
    jax = gpu.jax
    arrays = {name: CALLS["dense_router"].arrays[name] for name in ("weight", "x")}
    router, x = Router(METHOD, weight=gpu.array(arrays["weight"])), gpu.array(arrays["x"])
    safe = [jax.export.DisabledSafetyCheck.custom_call("cupy_router.dense_router")]
    route = jax.jit(lambda router, x: router(x))
    (tmp_path / "program").write_bytes(jax.export.export(route, disabled_checks=safe)(router, x).serialize())
    np.savez(tmp_path / "arrays.npz", **arrays)
    command = [sys.executable, "-c", LOADS, str(tmp_path / "program"), str(tmp_path / "arrays.npz")]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    assert done.stdout == "\n".join(str(np.asarray(array)) for array in router(x)) + "\n"
