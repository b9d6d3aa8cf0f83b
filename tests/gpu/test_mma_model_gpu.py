# SPDX-License-Identifier: Apache-2.0
"""Tensor cores give the bits of tests/mma_model.py; tests/test_mma_model.py compares logits."""

from __future__ import annotations

from typing import Any

import pytest

from tests import compare, mma_model
from tests.gpu import mma_chains
from tests.mma_probes import probes


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_chains(cupy: Any, dtype: str) -> None:
    if cupy.cuda.Device().compute_capability != "90":
        pytest.skip("the model is of compute capability 9.0")
    for _name, tiles in probes(dtype, 32):
        compare.assert_same_bits(mma_chains.multiply(tiles), mma_model.multiply(*tiles))
