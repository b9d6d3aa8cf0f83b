# SPDX-License-Identifier: Apache-2.0
"""Arguments for every op of torch.library, as graphs pass them."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch

from cupy_router import ExpertLayout, LayoutSpec, Router, RoutingMethod, activation_topk, expert_layout
from cupy_router.ops._method import MethodOptions
from cupy_router.ops._op import Op
from cupy_router.ops._rows import GradientOptions, LayoutInts
from cupy_router.ops.activation_topk_backward import BackwardOptions
from cupy_router.ops.dense_router import DenseOptions
from cupy_router.ops.expert_layout import LayoutOptions
from cupy_router.ops.hash_router import HashOptions
from cupy_router.ops.registry import OPS
from cupy_router.ops.topk_select import TopKOptions
from cupy_router.torch._library import node, texts
from tests import declared, inputs
from tests.methods import METHODS

METHOD = RoutingMethod(16, 4, renormalize_eps=1e-20, scale=1.5)
NODES = {node(op, kind): (op, kind) for op in OPS.values() for kind in (op.returns, *op.variants)}  # by name in graphs
_KEPT: list[Router] = []  # a graph knows a Router by a weak reference


def samples(device: str = "cpu") -> dict[str, list[tuple[Any, ...]]]:
    """Return argument lists for each op by name, on a device."""

    def tensor(*shape: int, seed: int = 0) -> Any:
        return torch.from_numpy(inputs.normal(shape, seed=200 + seed)).to(device)

    def parameter(*shape: int, seed: int = 0) -> Any:
        return tensor(*shape, seed=seed).requires_grad_()

    method, square = MethodOptions(METHOD).text, MethodOptions(METHODS["own score, a body"]).text
    dense, hashed = DenseOptions(METHOD, None).text, HashOptions(METHOD).text
    physical = MethodOptions(METHOD, num_physical=32, replica_offset=1).text
    replicas = torch.arange(32, dtype=torch.int32, device=device).view(16, 2)
    counts, none = torch.full((16,), 2, dtype=torch.int32, device=device), (None, None)
    in_float32, as_logits = BackwardOptions(METHOD, "float32", True).text, BackwardOptions(METHOD, None, False).text
    routed = activation_topk(tensor(5, 16), METHOD)
    count = torch.tensor([3], dtype=torch.int32, device=device)
    rows = np.stack([inputs.rng(203, r).permutation(16)[:4] for r in range(9)])
    ids, table = torch.arange(5, device=device), torch.from_numpy(rows).to(device)
    pages = torch.arange(8, dtype=torch.int32, device=device)[None]
    bias, scale = parameter(16, seed=2), parameter(16, seed=3)
    padded = routed.indices.clone()
    padded[3:] = -1
    replayed, emptied = padded.to(torch.int16), MethodOptions(METHOD, unset="empty").text
    gated, by_table = Router(METHOD, weight=tensor(16, 8, seed=1)), Router(METHOD, table=table)
    biases, which = tensor(2, 16, seed=2), ids.int() % 2
    biased = Router(METHOD, weight=tensor(16, 8, seed=1), bias=biases)
    _KEPT.extend((gated, by_table, biased))

    def hash_layer(token_ids: Any, given: Any, *several: Any) -> tuple[Any, ...]:
        biases, bias_index = several or (None, None)
        layer = table, parameter(16, 8, seed=1), biases, bias_index, bias, scale
        return hashed, parameter(5, 8), token_ids, *layer, given, count, -1

    by_hand: dict[str, list[tuple[Any, ...]]] = {
        "topk_select": [
            (TopKOptions(3).text, tensor(5, 16), ids.int(), None, None),
            (TopKOptions(3, "column", False, 2).text, tensor(5, 16), None, None, pages),
        ],
        "activation_topk": [
            (method, parameter(5, 16), tensor(16, seed=1), None, bias, scale, None, None, None, count, -1),
            (method, parameter(5, 16), tensor(2, 16, seed=1), which, bias, scale, replayed, None, None, count, -1),
            (emptied, parameter(5, 16), None, None, bias, scale, replayed, None, None, count, -1),
            (square, parameter(5, 64).detach().bfloat16().requires_grad_(), *[None] * 8, 3),
            (physical, parameter(5, 16), None, None, bias, scale, None, replicas, counts, count, -1),
        ],
        "hash_router": [
            (hashed, ids, table, parameter(5, 16), None, None, None, None, bias, scale, None, 4),
            (hashed, ids, table, parameter(5, 16), None, None, biases, which, bias, scale, None, 4),
            (hashed, ids, table, None, parameter(5, 8), parameter(16, 8, seed=1), None, None, bias, None, None, -1),
            (HashOptions(None).text, ids, table, None, None, None, None, None, None, None, None, -1),
        ],
        "hash_layer": [hash_layer(ids, replayed), hash_layer(None, replayed), hash_layer(ids, None, biases, which)],
        "dense_router": [
            (dense, parameter(5, 8), parameter(16, 8, seed=1), None, None, bias, scale, ids_given, *none, count, -1)
            for ids_given in (None, replayed)
        ],
        "router": [
            (gated.key, parameter(5, 8), None, None, None, "route", False, count, -1),
            (gated.key, parameter(5, 8), None, None, replayed, "empty", False, count, -1),
            (biased.key, parameter(5, 8), None, which, replayed, "route", False, count, -1),
            (by_table.key, parameter(5, 8), ids, None, None, "route", False, None, -1),
        ],
        "activation_topk_backward": [
            (as_logits, tensor(5, 4), padded, tensor(5, 16), bias.detach(), scale.detach()),
            (in_float32, tensor(5, 4), routed.indices, tensor(5, 16).half(), None, None),
        ],
        "router_logits": [(gated.key, parameter(5, 8), None, None, None, "route", False, None, 3)],
        "router_backward": [
            (gated.key, tensor(5, 8), routed.indices, tensor(5, 4), None, None, -1, False),
            (gated.key, tensor(5, 8), routed.indices, tensor(5, 4), tensor(5, 16), count, -1, True),
        ],
    }
    spec = LayoutSpec(4, None, tuple(ExpertLayout._fields[:7]))
    by_hand |= {
        "activation_topk_layout": [
            (
                MethodOptions(METHOD, LayoutSpec()).text, None, parameter(5, 16), None, None, bias, scale, None, None,
                None, count, -1,
            ),
            (MethodOptions(METHOD, spec).text, 8, tensor(5, 16), None, None, None, None, None, None, None, None, -1),
        ],
        "hash_router_layout": [
            (HashOptions(METHOD, spec).text, None, ids, table, parameter(5, 16), None, None, None, None, bias,
             scale, None, 4)
        ],
        "hash_layer_layout": [
            (HashOptions(METHOD, spec).text, None, parameter(5, 8), ids, table, None, None, None, None, None,
             None, count, -1)
        ],
        "dense_router_layout": [
            (DenseOptions(METHOD, None, spec).text, 8, parameter(5, 8), parameter(16, 8, seed=1), None, None, bias,
             scale, None, None, None, count, -1)
        ],
        "hash_router_logits": [
            (HashOptions(METHOD, None, "float32").text, ids, table, None, parameter(5, 8), parameter(16, 8, seed=1),
             None, None, bias, None, None, 4)
        ],
        "hash_layer_logits": [
            (HashOptions(METHOD, None, "float32").text, parameter(5, 8), ids, table, parameter(16, 8, seed=1), biases,
             which, None, scale, None, count, -1)
        ],
        "hash_router_logits_layout": [
            (HashOptions(METHOD, spec, "float32").text, None, ids, table, None, parameter(5, 8),
             parameter(16, 8, seed=1), None, None, bias, None, None, 4)
        ],
        "hash_layer_logits_layout": [
            (HashOptions(METHOD, spec, "float32").text, 8, parameter(5, 8), ids, table, parameter(16, 8, seed=1), None,
             None, None, None, None, count, -1)
        ],
        "dense_router_logits": [
            (DenseOptions(METHOD, None, None, dtype).text, parameter(5, 8), parameter(16, 8, seed=1), None, None,
             bias, scale, None, None, None, count, -1)
            for dtype in ("float32", "bfloat16")
        ],
        "dense_router_logits_layout": [
            (DenseOptions(METHOD, None, spec, "float16").text, 8, parameter(5, 8), parameter(16, 8, seed=1),
             tensor(2, 16, seed=2), which, None, None, None, None, None, None, 3)
        ],
    }  # fmt: skip
    return {name: [_declared(op, kind, device)] for name, (op, kind) in NODES.items()} | by_hand | _of_rows(device)


def _of_rows(device: str) -> dict[str, list[tuple[Any, ...]]]:
    """Return calls that lay rows out, and move them there and back, with gradients and without."""

    def tensor(*shape: int, seed: int = 0) -> Any:
        return torch.from_numpy(inputs.normal(shape, seed=220 + seed)).to(device)

    def parameter(*shape: int, seed: int = 0) -> Any:
        return tensor(*shape, seed=seed).requires_grad_()

    ids = torch.from_numpy(inputs.rng(221).integers(-1, 6, (5, 3)).astype(np.int32)).to(device)
    count = torch.tensor([4], dtype=torch.int32, device=device)
    sent = torch.tensor([0, -1, 1, 0, 7], dtype=torch.int32, device=device)
    load = torch.arange(5, device=device)
    layout = expert_layout(ids, 5, alignment=2)
    order, positions, rows = layout.order, layout.positions, layout.capacity
    none, everything = LayoutInts().text, GradientOptions(("rows", "dots", "scaled", "residual_dots")).text
    x, y, scale = tensor(5, 7), tensor(rows, 7, seed=2), tensor(5, seed=4)
    weights, residual = tensor(5, 3, seed=1), tensor(5, 7, seed=3)
    return {
        "expert_layout": [
            (LayoutOptions(5).text, None, None, ids, None, count, -1),
            (LayoutOptions(5, 4, None, ("order", "row_experts"), (1, 3)).text, 12, 99, ids.byte(), None, None, 2),
            (LayoutOptions(5, want=("block_experts",), num_local=2).text, None, None, ids, sent, None, -1),
        ],
        "expert_layout_write": [
            (LayoutOptions(5, want=("counts",)).text, ids, None, load, count, -1),
            (LayoutOptions(5, want=("counts",), num_local=2).text, ids, sent, load.int(), None, 3),
        ],
        "permute": [
            (none, parameter(5, 7), order, positions, parameter(5, 3, seed=1)),
            (none, parameter(5, 7), order, positions, None),
            (none, x, order, positions, parameter(5, 3, seed=1).detach().bfloat16().requires_grad_()),
            (none, torch.arange(10, device=device).reshape(5, 2), order, positions, None),
        ],
        "unpermute": [
            (none, parameter(rows, 7, seed=2), positions, order, parameter(5, 3, seed=1), parameter(5, 7, seed=3),
             parameter(5, seed=4)),
            (none, parameter(rows, 7, seed=2), positions, order, None, parameter(5, 7, seed=3), None),
            (none, y, positions, None, parameter(5, 3, seed=1), None, None),
        ],
        "permute_backward": [
            (GradientOptions(("sums", "dots")).text, y, positions, weights, x),
            (GradientOptions(("dots",)).text, y, positions, None, x),
        ],
        "unpermute_backward": [
            (everything, x, order, positions, weights, y, residual, scale),
            (GradientOptions(("rows",)).text, x, order, positions, None, None, None, None),
        ],
    }  # fmt: skip


def into_samples(device: str = "cpu") -> dict[str, list[tuple[Any, ...]]]:
    """Return argument lists for each op that writes into tensors of the caller: those of its twin, then the tensors."""
    found: dict[str, list[tuple[Any, ...]]] = {}
    for name, calls in samples(device).items():
        if name in ("router_backward", "expert_layout_write"):
            continue
        for given in calls:
            given = tuple(array.detach() if isinstance(array, torch.Tensor) else array for array in given)
            results = getattr(torch.ops.cupy_router, name)(*given)
            results = results if isinstance(results, tuple) else (results,)
            if name in NODES:
                op, kind = NODES[name]
                wanted = op.existing(op.options_of(given[0]))
                results = tuple(r if d in wanted else None for r, d in zip(results, op.results_in(kind), strict=True))
            outs = [None if result is None else torch.zeros_like(result) for result in results]
            found.setdefault(f"{name}_out", []).append((*given, *outs))
    return found


def _declared(op: Op, kind: Any, device: str) -> tuple[Any, ...]:
    """Return arguments made from the declaration of an op."""
    tensors = {name: torch.from_numpy(array).to(device) for name, array in declared.arrays(op).items()}
    if kind is not op.returns:
        return ()  # its example has no layout; the calls by hand have
    read = [tensors.get(each.name) for each in op.inputs if not each.written]
    return (*texts(op, kind, op.example()), *read, *([-1] if op.takes_number else []))
