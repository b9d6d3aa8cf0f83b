# SPDX-License-Identifier: Apache-2.0
"""The logits that routers return inside jax.jit on a GPU: exact products, and gradients that add up."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest

from tests import compare
from tests.gpu.support import LAUNCHED_BY, launched_by, on_gpu, upload
from tests.jax_calls import same_bits
from tests.logit_calls import KINDS, LAYER, Call

EVERY = pytest.mark.parametrize("kind", KINDS)


@pytest.fixture(scope="module", params=LAUNCHED_BY)
def gpu(request: pytest.FixtureRequest) -> Iterator[Any]:
    framework = on_gpu("jax")
    with launched_by(request.param, framework.jax):
        yield framework


@pytest.mark.parametrize("num_valid", [None, np.array([4], np.int32)], ids=["all rows", "array"])
@pytest.mark.parametrize("given", [(), LAYER], ids=["plain", "layer"])
@EVERY
def test_traced_logits_are_the_products(gpu: Any, kind: str, given: tuple[str, ...], num_valid: Any) -> None:
    for n in (1, 9, 64, 300):
        if "decode" in kind and n > 64:
            continue
        call = Call(kind, "two shared experts", n, "bfloat16", given)
        arrays = upload(gpu, call.arrays())
        more = {} if num_valid is None else {"num_valid": gpu.array(num_valid)}
        got = gpu.jax.jit(lambda arrays, call=call, more=more: call(arrays, return_logits=True, **more))(arrays)
        same_bits(got, call(arrays, return_logits=True, **more))
        compare.assert_same_bits(np.asarray(got.logits), call.logits(None if num_valid is None else min(4, n)))


@pytest.mark.parametrize("num_valid", [None, 4])
@EVERY
def test_gradients_of_weights_and_logits_add_up(gpu: Any, kind: str, num_valid: int | None) -> None:
    from tests.test_jax_logits import loss, wanted

    call = Call(kind, "logit scale and soft cap", 7, given=LAYER)
    arrays = upload(gpu, call.arrays())
    smooth = {name: array for name, array in arrays.items() if array.dtype == np.float32}
    fixed = {name: array for name, array in arrays.items() if name not in smooth}
    with gpu.jax.default_matmul_precision("highest"):
        found = gpu.jax.jit(gpu.jax.grad(loss(call, num_valid=num_valid)))(smooth, fixed)
    indices = np.asarray(call(arrays, num_valid=num_valid).indices)
    with gpu.jax.default_device(gpu.jax.devices("cpu")[0]):
        want = wanted(call, indices, 1.0, 1.0, num_valid)
    for name, right in want.items():
        most = max(1, abs(right).max())
        np.testing.assert_allclose(found[name], right, rtol=1e-4, atol=2e-5 * most, err_msg=name)
