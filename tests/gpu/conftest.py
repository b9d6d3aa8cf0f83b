# SPDX-License-Identifier: Apache-2.0
"""Setup of all tests on a GPU: a device, and frameworks that leave memory to each other."""

from __future__ import annotations

import os
from typing import Any

import pytest

os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")  # before JAX starts: it would take 75 % of the memory


@pytest.fixture(scope="session", autouse=True)
def cupy() -> Any:
    cupy = pytest.importorskip("cupy", reason="CuPy is not installed")
    if not cupy.cuda.is_available():
        pytest.skip("no CUDA device")
    return cupy
