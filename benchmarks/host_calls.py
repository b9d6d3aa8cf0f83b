# SPDX-License-Identifier: Apache-2.0
"""Host time of an eager call of every op, beside torch.relu of the same run: `python -m benchmarks.host_calls`.

Calls take turns. Bars are multiples of torch.relu, for calls from PyTorch with `out=` and without. Routers of models of
transformers are compared with those that they are swapped for.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import cupy

from benchmarks.bars import HOST_RATIO, MODEL_ROUTER_HOST_RATIO
from benchmarks.harness import attempt, barred, host_rows, inputs, main
from benchmarks.rows import OURS, Row
from cupy_router import (
    LayoutSpec,
    RoutingMethod,
    activation_topk,
    dense_router,
    expert_layout,
    hash_router,
    permute,
    topk_select,
    unpermute,
)

N, EXPERTS, TOP_K, HIDDEN, VOCAB_SIZE = 64, 256, 6, 4096, 129_280
METHOD = RoutingMethod(EXPERTS, TOP_K)
CELL: Row = {"n": N, "E": EXPERTS, "k": TOP_K, "H": HIDDEN}
RELU = "torch.relu"

Call = Callable[..., Any]


def calls(convert: Callable[[Any], Any]) -> dict[str, Call]:
    """Return a call of each function by name, which takes `out`; `convert` makes an array of one of CuPy."""
    (logits,), (x,), (weight,) = (
        inputs(shape, "float32", cold=False) for shape in ((N, EXPERTS), (N, HIDDEN), (EXPERTS, HIDDEN))
    )
    indices = convert(activation_topk(logits, METHOD).indices)
    token_ids = convert(cupy.random.randint(0, VOCAB_SIZE, N).astype(cupy.int32))
    table = convert(cupy.random.randint(0, EXPERTS, (VOCAB_SIZE, TOP_K)).astype(cupy.int32))
    weights = convert(cupy.random.random((N, TOP_K), dtype=cupy.float32))
    tokens, logits, weight = convert(x.astype("float16")), convert(logits), convert(weight.astype("float16"))
    layout = expert_layout(indices, EXPERTS)
    rows = permute(tokens, layout)
    maps = {"replicas": cupy.arange(EXPERTS, dtype=cupy.int32)[:, None], "replica_counts": cupy.ones(EXPERTS, "int32")}
    replicas = {name: convert(array) for name, array in maps.items()} | {"num_physical": EXPERTS}
    return {
        "activation_topk": partial(activation_topk, logits, METHOD),
        "topk_select": partial(topk_select, logits, TOP_K),
        "hash_router": partial(hash_router, token_ids, table, METHOD, logits=logits),
        "dense_router": partial(dense_router, tokens, weight, METHOD, path="decode"),
        "activation_topk with replicas": partial(activation_topk, logits, METHOD, **replicas),
        "activation_topk with a layout": partial(activation_topk, logits, METHOD, layout=LayoutSpec()),
        "expert_layout": partial(expert_layout, indices, EXPERTS),
        "expert_layout, counts and offsets": partial(expert_layout, indices, EXPERTS, want=("counts", "offsets")),
        "permute": partial(permute, tokens, layout),
        "permute with weights": partial(permute, tokens, layout, weights=weights),
        "unpermute with weights": partial(unpermute, rows, layout, weights),
    }


def of_torch(array: Any) -> Any:
    import torch

    return torch.from_dlpack(array)


def of_jax(array: Any) -> Any:
    import jax

    return jax.dlpack.from_dlpack(array)


def rows_of(framework: str, convert: Callable[[Any], Any], with_out: bool) -> list[Row]:
    """Time the calls of a framework, and torch.relu with them."""
    import torch

    logits = torch.randn(N, EXPERTS, device="cuda")
    actions: dict[tuple[str, str], Call] = {("PyTorch", RELU): lambda: torch.relu(logits)}
    for name, call in calls(convert).items():
        actions[OURS, f"{name} from {framework}"] = call
        if with_out:
            actions[OURS, f"{name} from {framework}, out="] = partial(call, out=call())
    timed = host_rows(actions, CELL)
    (relu,) = (row["us"] for row in timed if row["call"] == RELU)
    return [_barred(row, relu) for row in timed]


def _barred(row: Row, relu: float) -> Row:
    ratio = HOST_RATIO.get(row["call"])
    row = row | {"ratio": round(row["us"] / relu, 2)}
    return barred(row, None if ratio is None else round(ratio * relu, 3))


def router_rows(name: str) -> list[Row]:
    """Time the router of a model for one token, by the model's code and swapped."""
    import torch

    from benchmarks import models
    from cupy_router.torch._swapped import Router

    own = models.build(name, layers=1)
    path, ours = next((path, module) for path, module in models.twin(own).named_modules() if isinstance(module, Router))
    x = torch.randn(1, ours.weight.shape[1], device="cuda", dtype=torch.bfloat16)
    calls = {"transformers": own.get_submodule(path), OURS: ours}
    actions = {(by, type(ours).__name__): torch.no_grad()(partial(module, x)) for by, module in calls.items()}
    theirs, row = host_rows(actions, {"n": 1, "H": x.shape[1]})
    row["ratio"] = round(row["us"] / theirs["us"], 2)
    return [theirs, barred(row, round(MODEL_ROUTER_HOST_RATIO * theirs["us"], 3))]


def measure(quick: bool) -> list[Row]:
    found = rows_of("torch", of_torch, True)
    for name in ("qwen3", "deepseek", "gpt-oss", "mixtral"):
        found += attempt(name, partial(router_rows, name)) or []
    if not quick:
        found += attempt("cupy", lambda: rows_of("cupy", lambda array: array, True)) or []
        found += attempt("jax", lambda: rows_of("jax", of_jax, False)) or []
    return found


if __name__ == "__main__":
    main("host_calls", measure)
