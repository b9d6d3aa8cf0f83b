# SPDX-License-Identifier: Apache-2.0
"""PyTorch's checks of schemas, fakes and gradients for every op of torch.library."""

from __future__ import annotations

import pytest

from cupy_router.ops.registry import OPS

torch = pytest.importorskip("torch", reason="PyTorch is not installed")

from tests.torch_samples import samples  # noqa: E402

BY_HAND = {"router", "router_backward"}  # a Router whose arrays are not tensors


def test_every_op_has_a_sample() -> None:
    assert samples().keys() == OPS.keys() | BY_HAND


@pytest.mark.slow("seconds", every=3)
@pytest.mark.parametrize("name", sorted(OPS.keys() | BY_HAND))
def test_opcheck(name: str) -> None:
    for given in samples()[name]:
        results = torch.library.opcheck(getattr(torch.ops.cupy_router, name).default, given)
        assert set(results.values()) == {"SUCCESS"}
