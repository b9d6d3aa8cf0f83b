# SPDX-License-Identifier: Apache-2.0
"""Every op of torch.library against PyTorch's own checks of schemas, fakes and gradients."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from cupy_router import Router, RoutingMethod, activation_topk
from cupy_router.ops._method import MethodOptions
from cupy_router.ops.activation_topk_backward import BackwardOptions
from cupy_router.ops.dense_router import DenseOptions
from cupy_router.ops.hash_router import HashOptions
from cupy_router.ops.registry import OPS
from cupy_router.ops.topk_select import TopKOptions
from tests import inputs
from tests.steps import METHODS

torch = pytest.importorskip("torch", reason="PyTorch is not installed")

METHOD = RoutingMethod(16, 4, renormalize_eps=1e-20, scale=1.5)


def tensor(*shape: int, seed: int = 0) -> Any:
    return torch.from_numpy(inputs.normal(shape, seed=200 + seed))


def parameter(*shape: int, seed: int = 0) -> Any:
    return tensor(*shape, seed=seed).requires_grad_()


def samples() -> dict[str, list[tuple[Any, ...]]]:
    method, square = MethodOptions(METHOD).text, MethodOptions(METHODS["own score, a body"]).text
    in_float32, as_logits = BackwardOptions(METHOD, "float32", True).text, BackwardOptions(METHOD, None, False).text
    routed = activation_topk(tensor(5, 16), METHOD)
    count = torch.tensor([3], dtype=torch.int32)
    ids, table = torch.arange(5), torch.from_numpy(np.stack([inputs.rng(203, r).permutation(16)[:4] for r in range(9)]))
    bias, scale = parameter(16, seed=2), parameter(16, seed=3)
    padded = routed.indices.clone()
    padded[3:] = -1
    return {
        "activation_topk": [
            (method, parameter(5, 16), tensor(16, seed=1), bias, scale, count, -1),
            (square, parameter(5, 64).detach().bfloat16().requires_grad_(), None, None, None, None, 3),
        ],
        "hash_router": [
            (method, ids, table, parameter(5, 16), None, None, bias, scale, None, 4),
            (method, ids, table, None, parameter(5, 8), parameter(16, 8, seed=1), bias, None, None, -1),
            (HashOptions(None).text, ids, table, None, None, None, None, None, None, -1),
        ],
        "hash_layer": [(method, parameter(5, 8), ids, table, parameter(16, 8, seed=1), bias, scale, count, -1)],
        "topk_select": [
            (TopKOptions(3).text, tensor(5, 16), ids.int(), None, None),
            (TopKOptions(3, "column", False).text, tensor(5, 16), None, None, table.int()[:1, :1].expand(5, 16)),
        ],
        "dense_router": [
            (DenseOptions(METHOD, None).text, parameter(5, 8), parameter(16, 8, seed=1), None, bias, scale, count, -1)
        ],
        "router": [(ROUTER.key, parameter(5, 8), None, count, -1), (TABLE.key, parameter(5, 8), ids, None, -1)],
        "activation_topk_backward": [
            (as_logits, tensor(5, 4), padded, tensor(5, 16), bias.detach(), scale.detach()),
            (in_float32, tensor(5, 4), routed.indices, tensor(5, 16).half(), None, None),
        ],
        "router_backward": [(ROUTER.key, tensor(5, 8), routed.indices, tensor(5, 4))],
    }


ROUTER = Router(METHOD, weight=tensor(16, 8, seed=1))
TABLE = Router(METHOD, table=torch.from_numpy(np.stack([inputs.rng(204, r).permutation(16)[:4] for r in range(9)])))


def test_every_op_has_a_sample() -> None:
    assert samples().keys() == OPS.keys() | {"router", "router_backward"}


@pytest.mark.parametrize("name", samples())
def test_opcheck(name: str) -> None:
    for given in samples()[name]:
        results = torch.library.opcheck(getattr(torch.ops.cupy_router, name).default, given)
        assert set(results.values()) == {"SUCCESS"}
