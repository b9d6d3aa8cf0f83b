# SPDX-License-Identifier: Apache-2.0
"""Arrays of JAX on several devices: sharded over a mesh, or on one that is not the default."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

import cupy_router

jax = pytest.importorskip("jax", reason="JAX is not installed")
if jax.__version_info__ < (0, 8):
    pytest.skip("calls inside jax.jit need JAX 0.8 or later", allow_module_level=True)

pytestmark = pytest.mark.slow("process")


def run(check: str, where: str = "cpu") -> None:
    """Run a function of `tests.jax_mesh` in a process with four devices of a CPU, or with all GPUs."""
    done = subprocess.run(
        [sys.executable, "-m", "tests.jax_mesh", check, where],
        cwd=Path(cupy_router.__file__).parents[1], capture_output=True, text=True, timeout=240, env=os.environ,
    )  # fmt: skip
    assert (done.returncode, done.stdout) == (0, "done\n"), done.stderr[-3000:]


@pytest.mark.parametrize("check", ["forward", "gradients", "vmap", "inside_shard_map", "loops", "layouts"])
def test_explicit_mesh_axes_keep_rows_on_their_devices(check: str, backend: Any) -> None:
    if check == "vmap" and jax.__version_info__ < (0, 9, 1):
        pytest.skip("jax.vmap over an explicit axis needs JAX 0.9.1 or later")
    run(check, "gpu" if backend.name == "gpu" and len(jax.devices()) > 1 else "cpu")


@pytest.mark.parametrize("check", ["devices", "several_devices"])
def test_eager_calls_of_arrays_on_any_device(check: str) -> None:
    run(check)
