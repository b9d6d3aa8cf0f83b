# SPDX-License-Identifier: Apache-2.0
"""Arguments for every op of torch.library, as graphs pass them."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch

from cupy_router import Router, RoutingMethod, activation_topk
from cupy_router.ops._method import MethodOptions
from cupy_router.ops._op import Op
from cupy_router.ops.activation_topk_backward import BackwardOptions
from cupy_router.ops.dense_router import DenseOptions
from cupy_router.ops.hash_router import HashOptions
from cupy_router.ops.registry import OPS
from cupy_router.ops.topk_select import TopKOptions
from tests import declared, inputs
from tests.methods import METHODS

METHOD = RoutingMethod(16, 4, renormalize_eps=1e-20, scale=1.5)
_KEPT: list[Router] = []  # a graph knows a Router by a weak reference


def samples(device: str = "cpu") -> dict[str, list[tuple[Any, ...]]]:
    """Return argument lists for each op by name, on a device."""

    def tensor(*shape: int, seed: int = 0) -> Any:
        return torch.from_numpy(inputs.normal(shape, seed=200 + seed)).to(device)

    def parameter(*shape: int, seed: int = 0) -> Any:
        return tensor(*shape, seed=seed).requires_grad_()

    method, square = MethodOptions(METHOD).text, MethodOptions(METHODS["own score, a body"]).text
    dense = DenseOptions(METHOD, None).text
    in_float32, as_logits = BackwardOptions(METHOD, "float32", True).text, BackwardOptions(METHOD, None, False).text
    routed = activation_topk(tensor(5, 16), METHOD)
    count = torch.tensor([3], dtype=torch.int32, device=device)
    rows = np.stack([inputs.rng(203, r).permutation(16)[:4] for r in range(9)])
    ids, table = torch.arange(5, device=device), torch.from_numpy(rows).to(device)
    pages = torch.arange(8, dtype=torch.int32, device=device)[None]
    bias, scale = parameter(16, seed=2), parameter(16, seed=3)
    padded = routed.indices.clone()
    padded[3:] = -1
    gated, hashed = Router(METHOD, weight=tensor(16, 8, seed=1)), Router(METHOD, table=table)
    _KEPT.extend((gated, hashed))
    by_hand: dict[str, list[tuple[Any, ...]]] = {
        "topk_select": [
            (TopKOptions(3).text, tensor(5, 16), ids.int(), None, None),
            (TopKOptions(3, "column", False, 2).text, tensor(5, 16), None, None, pages),
        ],
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
        "dense_router": [(dense, parameter(5, 8), parameter(16, 8, seed=1), None, bias, scale, count, -1)],
        "router": [(gated.key, parameter(5, 8), None, count, -1), (hashed.key, parameter(5, 8), ids, None, -1)],
        "activation_topk_backward": [
            (as_logits, tensor(5, 4), padded, tensor(5, 16), bias.detach(), scale.detach()),
            (in_float32, tensor(5, 4), routed.indices, tensor(5, 16).half(), None, None),
        ],
        "router_backward": [(gated.key, tensor(5, 8), routed.indices, tensor(5, 4))],
    }
    return {name: [_declared(op, device)] for name, op in OPS.items()} | by_hand


def into_samples(device: str = "cpu") -> dict[str, list[tuple[Any, ...]]]:
    """Return argument lists for each op that writes into tensors of the caller: those of its twin, then the tensors."""
    found: dict[str, list[tuple[Any, ...]]] = {}
    for name, calls in samples(device).items():
        if name == "router_backward":
            continue
        for given in calls:
            given = tuple(array.detach() if isinstance(array, torch.Tensor) else array for array in given)
            results = getattr(torch.ops.cupy_router, name)(*given)
            results = results if isinstance(results, tuple) else (results,)
            if name in OPS:
                wanted = OPS[name].existing(OPS[name].options_of(given[0]))
                results = tuple(r if d in wanted else None for r, d in zip(results, OPS[name].results, strict=True))
            outs = [None if result is None else torch.zeros_like(result) for result in results]
            found.setdefault(f"{name}_out", []).append((*given, *outs))
    return found


def _declared(op: Op, device: str) -> tuple[Any, ...]:
    """Return arguments made from the declaration of an op."""
    tensors = {name: torch.from_numpy(array).to(device) for name, array in declared.arrays(op).items()}
    return (op.example().text, *declared.positional(op, tensors), *([-1] if op.takes_number else []))
