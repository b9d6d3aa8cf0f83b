# SPDX-License-Identifier: Apache-2.0
"""Launches give kernels as much dynamic shared memory as these divide. On the executor, kernels have a static array."""

from __future__ import annotations

import numpy as np
import pytest

from cupy_router import compiler, topk_select, tuning
from cupy_router.simt import device
from cupy_router.simt.device import SimtBackend, launch
from tests.backends import DTYPES
from tests.recorder import recording

pytestmark = pytest.mark.skipif(device.why_not() is not None, reason=str(device.why_not()))

PROBE = 'extern "C" __global__ void shared_bytes(int* bytes) { *bytes = SHARED_BYTES; }\n'


@pytest.mark.parametrize(
    ("kernel", "columns", "k", "dtype", "order"),
    [
        ("topk_select_held", 16_384, 512, "bfloat16", "any"),
        ("topk_select_held", 2000, 512, "float32", "value"),  # sorting takes more than the row
        ("topk_select_many", 16_384, 1000, "float16", "value"),
        ("topk_select_many", 9000, 512, "float32", "any"),
    ],
)
def test_topk_select(kernel: str, columns: int, k: int, dtype: str, order: str) -> None:
    with recording() as recorder, tuning.assume(tuning.DEFAULT):
        topk_select(np.zeros((1000, columns), DTYPES[dtype]), k, order=order)
    (made,) = recorder.launches
    assert made.kernel == kernel
    divided = np.zeros(1, np.int32)
    text = compiler.expand(kernel, made.macros) + PROBE
    launch(SimtBackend(), text, "shared_bytes", (1,), (1,), (divided,))
    assert 0 < divided[0] <= made.shared_bytes
