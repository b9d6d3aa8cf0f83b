# SPDX-License-Identifier: Apache-2.0
"""The arrays that the consumers of docs/layout.md document, each built from the ids of the experts by slow loops."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import numpy as np

Rule = Callable[[dict[str, Any]], Mapping[str, Any]]
RULES: dict[str, Rule] = {}  # from ids, E, k, x and w to the arrays by name, for each row of the table


def rule(consumer: str) -> Callable[[Rule], Rule]:
    return lambda function: RULES.setdefault(consumer, function)


def sorted_pairs(given: Mapping[str, Any]) -> np.ndarray:
    return np.argsort(given["ids"], kind="stable")


def inverse(order: np.ndarray) -> np.ndarray:
    positions = np.empty_like(order)
    positions[order] = np.arange(len(order))
    return positions


def histogram(given: Mapping[str, Any]) -> np.ndarray:
    return np.bincount(given["ids"], minlength=given["E"])


def padded(given: Mapping[str, Any], block: int) -> list[tuple[int, list[int]]]:
    """Expert and pairs of each block; -1 for padding."""
    blocks = []
    for expert in range(given["E"]):
        pairs = np.flatnonzero(given["ids"] == expert).tolist()
        while pairs:
            blocks.append((expert, (pairs[:block] + [-1] * block)[:block]))
            pairs = pairs[block:]
    return blocks


def products(given: Mapping[str, Any]) -> np.ndarray:
    """The row of each pair times the matrix of its expert, in order of experts."""
    x, w = np.asarray(given["x"]), np.asarray(given["w"])
    return np.array([x[pair // given["k"]] @ w[given["ids"][pair]] for pair in sorted_pairs(given)])


@rule("`torch.nn.functional.grouped_mm`")
def _(given: dict[str, Any]) -> Mapping[str, Any]:
    return {"y": products(given)}


@rule("the same, for groups of aligned sizes")
def _(given: dict[str, Any]) -> Mapping[str, Any]:
    x, w, k = np.asarray(given["x"]), np.asarray(given["w"]), given["k"]
    zero = np.zeros_like(x[0])
    rows = [(x[p // k] if p >= 0 else zero) @ w[expert] for expert, pairs in padded(given, 8) for p in pairs]
    return {"y": np.array(rows)}


@rule("`jax.lax.ragged_dot`, tokamax, megablox")
def _(given: dict[str, Any]) -> Mapping[str, Any]:
    return {"y": products(given)}


@rule('transformers, experts "grouped_mm"')
def _(given: dict[str, Any]) -> Mapping[str, Any]:
    perm = sorted_pairs(given)
    return {"perm": perm, "inv_perm": inverse(perm), "offsets": np.cumsum(histogram(given))}


@rule('DeepGEMM contiguous; transformers, experts "deepgemm"')
def _(given: dict[str, Any]) -> Mapping[str, Any]:
    rows = [expert if pair >= 0 else -1 for expert, pairs in padded(given, 128) for pair in pairs]
    return {"m_indices": np.array(rows)}  # -1 after these, which are skipped


@rule("DeepGEMM contiguous, `use_psum_layout=True`")
def _(given: dict[str, Any]) -> Mapping[str, Any]:
    ends, start = [], 0
    for count in histogram(given):
        ends.append(start + count)
        start += -(-count // 128) * 128
    return {"grouped_layout": np.array(ends)}


@rule("DeepGEMM masked, rows [E, max_m]")
def _(given: dict[str, Any]) -> Mapping[str, Any]:
    ids = given["ids"]
    row = np.array([(ids[:pair] == expert).sum() for pair, expert in enumerate(ids)])
    return {"masked_m": histogram(given), "row": row.reshape(-1, given["k"])}


@rule("vLLM and SGLang, fused MoE")
def _(given: dict[str, Any]) -> Mapping[str, Any]:
    blocks, m = padded(given, 16), len(given["ids"])
    ids = [pair if pair >= 0 else m for _, pairs in blocks for pair in pairs]
    experts = [expert for expert, _ in blocks]
    return {"sorted_token_ids": ids, "expert_ids": experts, "num_tokens_post_pad": [len(ids)]}


@rule("vLLM `moe_permute`, CUTLASS grouped GEMM")
def _(given: dict[str, Any]) -> Mapping[str, Any]:
    order, first = sorted_pairs(given), np.cumsum([0, *histogram(given)])
    return {
        "expert_first_token_offset": first.astype(np.int64),
        "permuted_idx": order,
        "inv_permuted_idx": inverse(order).reshape(-1, given["k"]),
    }


@rule("FlashInfer `moe_sort`")
def _(given: dict[str, Any]) -> Mapping[str, Any]:
    blocks = padded(given, 16)
    rows = np.array([pair for _, pairs in blocks for pair in pairs])
    positions = np.array([np.flatnonzero(rows == pair)[0] for pair in range(len(given["ids"]))])
    return {
        "tile_idx_to_expert_idx": [expert for expert, _ in blocks],
        "tile_idx_to_mn_limit": [16 * i + sum(pair >= 0 for pair in pairs) for i, (_, pairs) in enumerate(blocks)],
        "expanded_idx_to_permuted_idx": positions.reshape(-1, given["k"]),
        "permuted_idx_to_expanded_idx": rows,
        "total_num_padded_tokens": [len(rows)],
    }


@rule("OpenAI triton_kernels")
def _(given: dict[str, Any]) -> Mapping[str, Any]:
    order, sizes = sorted_pairs(given), histogram(given)
    offsets = np.cumsum([0, *sizes])
    return {
        "slice_sizes": sizes,
        "slice_offs": offsets,
        "col_sorted_indx": order,
        "row_sorted_indx": inverse(order),
    }


@rule("MegaBlocks")
def _(given: dict[str, Any]) -> Mapping[str, Any]:
    order = sorted_pairs(given)
    return {"bin_ids": given["ids"][order], "sorted_indices": order, "bins": np.cumsum(histogram(given))}


@rule("ScatterMoE")
def _(given: dict[str, Any]) -> Mapping[str, Any]:
    order = sorted_pairs(given)
    ends = np.cumsum(histogram(given))
    return {"sorted_expert_idxs": np.sort(given["ids"]), "sorted_scattered_idxs": order, "expert_offsets": ends}


@rule("SonicMoE")
def _(given: dict[str, Any]) -> Mapping[str, Any]:
    order, counts = sorted_pairs(given), histogram(given)
    return {
        "expert_frequency": counts,
        "expert_frequency_offset": np.cumsum([0, *counts]),
        "x_gather_idx": order // given["k"],
        "s_scatter_idx": order,
        "s_reverse_scatter_idx": inverse(order),
    }


@rule("Megatron and TransformerEngine, index map")
def _(given: dict[str, Any]) -> Mapping[str, Any]:
    k, n, order = given["k"], len(given["ids"]) // given["k"], sorted_pairs(given)
    row_id_map = np.empty(n * k, np.int64)
    for row, pair in enumerate(order):
        row_id_map[pair % k * n + pair // k] = row
    return {"row_id_map": row_id_map}


@rule("TorchTitan")
def _(given: dict[str, Any]) -> Mapping[str, Any]:
    return {
        "token_indices_experts_sorted": sorted_pairs(given) // given["k"],
        "num_tokens_per_expert": histogram(given),
    }
