# SPDX-License-Identifier: Apache-2.0
"""Bars: the required times on an H100 in microseconds, and the cells that they are for."""

from __future__ import annotations

from collections.abc import Iterable

from benchmarks.rows import Row, select

# n -> bar. Warm, except the last, which does not fit into L2.
ACTIVATION_TOPK = {
    256: {1: 2.0, 16: 2.05, 64: 2.15, 1024: 2.4, 8192: 6.2, 65536: 40.0},
    384: {1: 2.25, 16: 2.3, 64: 2.35, 1024: 2.6, 8192: 7.5, 65536: 52.0},
}
ACTIVATION_TOPK_BACKWARD = {256: {64: 2.2, 8192: 5.0}, 384: {64: 2.2, 8192: 6.0}}  # warm
HASH_ROUTER_LOGITS = {1: 1.5, 16: 1.5, 64: 1.6, 1024: 1.8, 8192: 2.2}  # warm, with 256 experts and with 384
TOPK_SELECT = {(256, 8): {64: 2.2, 8192: 7.0, 65536: 42.0}, (384, 6): {64: 2.2, 8192: 7.5}}  # cold
# On an H200: bfloat16 rows, order "any", indices only; cold.
TOPK_SELECT_16_BITS = {(256, 8): {64: 1.5, 8192: 4.6, 65536: 18.0}, (384, 6): {64: 1.5, 8192: 5.0}}
TOPK_SELECT_LONG = {  # num_rows, num_columns, k; cold; up to 64 rows on an H200
    (1, 32_768, 512): 8.4, (8, 32_768, 512): 9.1, (64, 32_768, 512): 10.8, (1, 65_536, 1024): 9.0,
    (8, 65_536, 1024): 10.3, (64, 65_536, 1024): 16.0, (1, 131_072, 2048): 10.5, (8, 131_072, 2048): 12.8,
    (256, 32_768, 2048): 38.0, (64, 262_144, 1024): 45.0, (1024, 131_072, 1024): 230.0, (4096, 32_768, 512): 250.0,
    (1, 1_048_576, 2048): 19.0,
}  # fmt: skip
TOPK_SELECT_FEW = {  # the same in order "any", indices only
    "float32": {
        (1, 32_768, 512): 6.9, (8, 32_768, 512): 7.9, (64, 32_768, 512): 9.8, (1, 65_536, 1024): 6.9,
        (8, 65_536, 1024): 8.1, (64, 65_536, 1024): 15.0, (1, 131_072, 2048): 7.8, (8, 131_072, 2048): 10.0,
        (1, 1_048_576, 2048): 16.5,
    },
    "bfloat16": {
        (1, 65_536, 1024): 5.8, (8, 65_536, 1024): 5.5, (64, 65_536, 1024): 10.0, (8, 131_072, 2048): 9.0,
    },
}  # fmt: skip
# On an H200, cold: num_rows, num_columns, k -> order "any" and indices only; order "value" with values.
TOPK_SELECT_ORDERS = {
    (256, 32_768, 2048): (21.5, 25.0), (64, 262_144, 1024): (29.0, 31.5), (1024, 131_072, 1024): (160.0, 174.0),
    (1024, 131_072, 2048): (180.0, 200.0), (4096, 32_768, 512): (180.0, 199.0),
}  # fmt: skip
TOPK_SELECT_LENGTHS = {(4096, 32_768, 512): (130.0, 145.0)}  # the same with lengths uniform in 1..num_columns
TOPK_SELECT_BFLOAT16 = {  # order "any", indices only
    (64, 262_144, 1024): 18.0, (256, 32_768, 2048): 21.0, (1024, 131_072, 1024): 105.0, (4096, 32_768, 512): 125.0,
}  # fmt: skip
TOPK_SELECT_PAGED = {  # the same through an index_map with pages of 8 columns, as the indexer of DeepSeek-V4.1 does
    (1, 16_384, 512): None, (8, 16_384, 512): None, (64, 16_384, 512): None, (1024, 16_384, 512): 18.0,
}  # fmt: skip
# Rows that a multiprocessor holds several of, without bars.
TOPK_SELECT_HELD = (
    (8192, 16_384, 512, "bfloat16"), (2048, 8192, 512, "bfloat16"), (8192, 4096, 64, "bfloat16"),
    (5000, 3000, 300, "float32"), (8192, 2048, 64, "float32"),
)  # fmt: skip
ANY_ORDER_RATIO, ANY_ORDER_MORE = 1.02, 0.1  # of order "any" to the others: the larger of both is allowed
ANY_ORDER_ADVERSARIAL = ((1, 32_768, 512), (8, 131_072, 2048), (256, 32_768, 2048), (1024, 32_768, 512))
ANY_ORDER_ADVERSARIAL_BFLOAT16 = ((1024, 16_384, 512),)
ANY_ORDER_ADVERSARIAL_RATIO = 1.6
LONG_BFLOAT16 = ((64, 262_144, 1024), (1024, 131_072, 1024), (4096, 32_768, 512))
LONG_BFLOAT16_RATIO, ADVERSARIAL_RATIO = 0.8, 2.0  # of bfloat16 to float32; of adversarial inputs to normal ones

# dense_router in bfloat16 by number of experts: decode warm, additional time if cold, hash layers from x and weight.
DENSE_DECODE = {256: {1: 4.0, 4: 4.2, 16: 4.9, 64: 5.8}, 384: {1: 4.9, 4: 5.2, 16: 6.2, 64: 7.5}}
COLD_MORE = {256: 1.3, 384: 2.0}
HASH_LAYER = {256: {1: 2.5, 16: 3.0, 64: 4.5}, 384: {1: 2.9, 16: 3.4, 64: 5.0}}
BATCH_INVARIANT = {  # whole calls on an H200
    256: {1: 3.9, 16: 4.9, 64: 5.6, 128: 7.5, 256: 8.5, 1024: 11.0, 8192: 32.0},
    384: {1: 4.7, 16: 5.6, 64: 7.5, 128: 9.5, 256: 11.5, 1024: 17.5, 8192: 74.0},
}
PREFILL_RATIO = 1.2  # of the whole call to cuBLAS alone

# Given experts. More than hash_router with the same logits; more than the same call without, if rows may be routed; few
# tokens with 256 experts, hidden 4096 and k 8; ratios of 8192 tokens to the call without, and to two float32 GEMMs.
GIVEN_MORE, GIVEN_OR_ROUTED_MORE = 0.1, 0.2
GIVEN_DECODE = {1: 2.4, 64: 3.0}
GIVEN_PREFILL_RATIO, GIVEN_GRADIENT_RATIO = 0.92, 0.5

# Two biases, to the same call with one: more up to this number of tokens, and as a ratio of more tokens.
SECOND_BIAS_MORE, SECOND_BIAS_FEW, SECOND_BIAS_RATIO = 0.1, 1024, 1.03

# expert_layout with 256 experts, k 6 and 8, on an H200; as ratios: other numbers of experts, alignment 128 with
# block_experts and row_experts (their bytes are added at 3 TB/s), skewed experts to uniform ones of the same run.
EXPERT_LAYOUT = {1: 1.6, 16: 2.0, 64: 2.3, 1024: 4.2, 8192: 6.5, 65536: 11.0}
FUSED_LAYOUT = {1: 1.0, 16: 1.2, 64: 1.8, 1024: 4.2, 8192: 6.5, 65536: 11.0}  # more than activation_topk alone
LAYOUT_WIDTH_RATIO, LAYOUT_PADDED_RATIO, LAYOUT_SKEW_RATIO = 1.15, 1.5, 1.3

# permute, unpermute with weights and their gradients in bfloat16 with k = 6: by hidden for 64 tokens; for more, the
# ratio to a copy that moves the same bytes.
MOVE_64 = {"permute": {4096: 2.1, 7168: 2.6}, "unpermute": {4096: 2.4, 7168: 2.6}}
MOVE_RATIOS = {
    "permute": {1024: 1.08, 8192: 1.1},
    "unpermute": {1024: 1.04, 8192: 1.04},
    "permute_backward": {64: 1.1, 1024: 1.1, 8192: 1.1},
    "unpermute_backward": {64: 1.1, 1024: 1.1, 8192: 1.1},
}

# ExpertParallel in a CUDA graph. By tokens of a rank, a ratio to bare collectives and copies of the same bytes, and
# microseconds more; with one rank, a ratio to the ops alone.
EXPERT_PARALLEL_RATIO, EXPERT_PARALLEL_MORE = {64: 1.4, 1024: 1.1, 8192: 1.1}, 12.0
EXPERT_PARALLEL_ALONE = 1.05

JAX_MORE = 30.0  # until the result of a jitted activation_topk is ready, minus that of an addition of the same size
HOST = {"torch": 20.0, "torch, out=": 12.0, "cupy": 15.0, "cupy, out=": 12.0}  # each call of activation_topk
HOST_RATIO = {  # of an eager call to torch.relu
    "expert_layout from torch": 3.0, "expert_layout from torch, out=": 1.7,
    "permute from torch": 2.0, "permute from torch, out=": 1.5,
    "permute with weights from torch": 2.0, "permute with weights from torch, out=": 1.5,
    "unpermute with weights from torch": 2.0, "unpermute with weights from torch, out=": 1.5,
}  # fmt: skip
IMPORT = 150_000.0
METHOD_RATIO, GROUPED_RATIO = 1.5, 2.0  # of a preset to plain sqrt(softplus) of its size
COMPILE = 300_000.0  # a method's kernel
COMPILE_TOPK_SELECT = 350_000.0  # a kernel of topk_select, with one thread on the host of an H200
FIRST_CALL = 60_000.0  # with kernels in the disk cache, CuPy imported and a CUDA context

# A step of a model of transformers on an H200, as a ratio to its own code with grouped_mm: by model, mode and what was
# swapped, then by tokens of a step.
MODEL_STEPS = {
    ("qwen3", "decode", "routers"): {1: 0.97, 16: 0.97},
    ("qwen3", "decode", "routers and experts"): {1: 0.80, 16: 0.80},
    ("qwen3", "compiled decode", "routers and experts"): {1: 0.75, 16: 0.90},
    ("qwen3", "prefill", "routers and experts"): {4096: 0.80},
    ("qwen3", "training", "routers and experts"): {4096: 0.86},
    ("deepseek", "decode", "routers and experts"): {1: 0.80, 16: 0.80},
    ("deepseek", "prefill", "routers and experts"): {4096: 0.78},
    ("gpt-oss", "decode", "routers and experts"): {1: 0.90, 16: 0.95},
    ("gpt-oss", "prefill", "routers and experts"): {4096: 0.97},
    ("mixtral", "decode", "routers and experts"): {1: 0.90, 16: 0.95},
    ("mixtral", "prefill", "routers and experts"): {4096: 0.90},
    ("glm", "decode", "routers and experts"): {1: 0.90, 16: 0.95},
    ("glm", "prefill", "routers and experts"): {4096: 0.76},
}
BATCHED_RATIO = 1.0  # with routers swapped and experts by batched_mm; the spread is added
# A router of Qwen3 with logits: microseconds on the GPU by tokens, and on the host as a ratio to the model's own.
MODEL_ROUTER, MODEL_ROUTER_HOST_RATIO = {1: 3.6, 64: 5.0, 4096: 10.5}, 0.35


def bar_16_bit(rows: Iterable[Row]) -> None:
    """Set the bar of bfloat16 and float16 rows: the time of the same float32 row plus the larger of their spreads."""
    rows = list(rows)
    for wide in rows:
        if "bar_us" not in wide or wide.get("dtype") != "float32":
            continue
        same = {name: wide[name] for name in ("what", "op", "by", "E", "k", "n", "cache")}
        for dtype in ("bfloat16", "float16"):
            for row in select(rows, **same, dtype=dtype, data=None):
                row["bar_us"] = round(wide["us"] + max(wide["spread_us"], row["spread_us"]), 3)
