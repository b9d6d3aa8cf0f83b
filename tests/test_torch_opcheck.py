# SPDX-License-Identifier: Apache-2.0
"""Every op of torch.library against PyTorch's own checks of schemas, fakes and gradients."""

from __future__ import annotations

import pytest

torch = pytest.importorskip("torch", reason="PyTorch is not installed")

from tests.torch_samples import NODES, into_samples, samples  # noqa: E402

WRITING = {f"{op.name}_write" for op, _ in NODES.values() if op.written}
BY_HAND = {"router", "router_logits", "router_backward"}  # a Router of arrays that are no tensors


def test_every_op_has_a_sample() -> None:
    assert samples().keys() == NODES.keys() | BY_HAND | WRITING
    assert into_samples().keys() == {f"{name}_out" for name in NODES.keys() | {"router", "router_logits"}}


@pytest.mark.slow("seconds")
@pytest.mark.parametrize("name", sorted(NODES.keys() | BY_HAND | WRITING))
def test_opcheck(name: str) -> None:
    for given in samples()[name]:
        results = torch.library.opcheck(getattr(torch.ops.cupy_router, name).default, given)
        assert set(results.values()) == {"SUCCESS"}


@pytest.mark.slow("seconds")
@pytest.mark.parametrize("name", sorted(NODES.keys() | {"router", "router_logits"}))
def test_opcheck_of_out(name: str) -> None:
    for given in into_samples()[f"{name}_out"]:
        results = torch.library.opcheck(getattr(torch.ops.cupy_router, f"{name}_out").default, given)
        assert set(results.values()) == {"SUCCESS"}
